"""Other projects' code, as a folder that this test writes."""

from __future__ import annotations

import sys

import pytest
import torch
from benchmark_runs import PLACE

from benchmarks.cases import Place, UnavailableError
from benchmarks.components import list_cases
from benchmarks.measure import ProcessClock, relative_error
from benchmarks.models import SMOKE
from benchmarks.peers import parse_peers
from benchmarks.runner import Plan, run_case
from dpsims.errors import InputError

# a stand-in with the constructor, the call and the options of the real ones
GENERATOR = """
import torch
from models.parts import first
class OASIS_Generator(torch.nn.Module):
    def __init__(self, opt):
        super().__init__()
        assert (opt.num_res_blocks, opt.crop_size, opt.channels_G) == (3, 16, 4)
        self.conv = first(opt.semantic_nc, opt.z_dim)
    def forward(self, input, z=None):
        z = torch.randn(input.size(0), 1, 1, 1, dtype=torch.float32)
        return torch.tanh(self.conv(input) + z)
SPADEGenerator = OASIS_Generator
"""
PARTS = """
import torch
def first(classes, z_dim):
    return torch.nn.Conv2d(classes, 3, 3, padding=1)
"""
LOSSES = """
import torch
class losses_computer:
    def __init__(self, opt):
        assert opt.no_labelmix and not opt.no_balancing_inloss
    def loss(self, input, label, for_real):
        return torch.nn.functional.cross_entropy(input, label.argmax(1) + 1)
"""


@pytest.fixture
def checkout(tmp_path):
    models = tmp_path / "models"
    (models / "networks").mkdir(parents=True)
    for name in ("__init__", "networks/__init__"):
        (models / f"{name}.py").write_text("")
    (models / "parts.py").write_text(PARTS)
    (models / "generator.py").write_text(GENERATOR)
    (models / "losses.py").write_text(LOSSES)
    (models / "networks" / "generator.py").write_text(GENERATOR)
    return tmp_path


def place_with(*arguments):
    return Place(PLACE.device, "smoke", compiled=False, peers=parse_peers(list(arguments)))


def peer_of(name, place, component, number=0, tmp_path=None):
    case = list_cases([component], place)[number]
    found = run_case(case, place, ProcessClock(), Plan(tmp_path / "x.json", rounds=2))
    return found.variant(f"peer {name}")


@pytest.mark.parametrize("name", ["oasis", "spade"])
def test_a_peers_generator_is_timed_in_the_same_rounds(name, checkout, tmp_path):
    before = list(sys.path)
    found = peer_of(name, place_with(f"{name}={checkout}"), "generator", tmp_path=tmp_path)
    assert (found.status, len(found.seconds)) == ("ok", 2)
    assert sys.path == before
    assert not [module for module in sys.modules if module.partition(".")[0] == "models"]


def test_a_peers_loss_is_timed_too(checkout, tmp_path):
    found = peer_of("oasis", place_with(f"oasis={checkout}"), "focal", tmp_path=tmp_path)
    assert (found.status, len(found.seconds)) == ("ok", 2)


def test_two_peers_with_modules_of_one_name_do_not_mix(checkout, tmp_path):
    other = tmp_path / "other"
    (other / "models" / "networks").mkdir(parents=True)
    for name in ("__init__", "networks/__init__"):
        (other / "models" / f"{name}.py").write_text("")
    text = GENERATOR.replace("from models.parts import first", PARTS).replace("tanh", "sigmoid")
    (other / "models" / "networks" / "generator.py").write_text(text)
    peers = parse_peers([f"oasis={checkout}", f"spade={other}"])
    inputs = {
        "labels": torch.zeros(1, 16, 16, dtype=torch.uint8),
        "latents": torch.zeros(1, SMOKE[0].latent_dim),
    }
    oasis, spade, again = (
        peers[name].generator(SMOKE[0], PLACE.device, torch.float32)(inputs)[0]
        for name in ("oasis", "spade", "oasis")
    )
    assert torch.equal(oasis, again)
    assert bool((spade > 0).all())
    assert not torch.equal(oasis, spade)


def test_a_peers_noise_is_the_same_in_every_call(checkout):
    peer = parse_peers([f"oasis={checkout}"])["oasis"]
    run = peer.generator(SMOKE[0], PLACE.device, torch.float32)
    inputs = {
        "labels": torch.zeros(2, 16, 16, dtype=torch.uint8),
        "latents": torch.zeros(2, SMOKE[0].latent_dim),
    }
    true = peer.true_images(SMOKE[0], PLACE.device, inputs)
    assert relative_error(run(inputs), true) < 1e-5
    assert relative_error(run(inputs), run(inputs)) == 0.0


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        (None, None, "ModuleNotFoundError: No module named 'models'"),
        ("generator.py", "import no_such_package", "No module named 'no_such_package'"),
        ("generator.py", "def broken(:", "SyntaxError"),
        ("generator.py", "x = 1", "has no attribute 'OASIS_Generator'"),
        ("generator.py", "def OASIS_Generator(opt): return opt.colour", "colour"),
        ("generator.py", "import torch\ndef OASIS_Generator(opt): torch.ones(-1)", "negative"),
    ],
    ids=["no-folder", "no-package", "no-python", "no-class", "no-option", "no-build"],
)
def test_a_peer_that_cannot_run_says_why(file, text, reason, checkout, tmp_path):
    path = checkout / "nowhere" if file is None else checkout
    if file is not None:
        (checkout / "models" / file).write_text(text)
    found = peer_of("oasis", place_with(f"oasis={path}"), "generator", tmp_path=tmp_path)
    assert found.status == "not available"
    assert found.reason.startswith("not run: ")
    assert reason in found.reason
    assert str(tmp_path) not in found.reason


def test_a_loss_without_classes_is_not_compared(checkout):
    peer = parse_peers([f"spade={checkout}"])["spade"]
    with pytest.raises(UnavailableError, match="not run: its loss knows real and fake"):
        peer.loss()


@pytest.mark.parametrize(
    "arguments",
    [["oasis"], ["oasis="], ["pix2pix=/x"], ["oasis=/x", "oasis=/y"], ["=/x"]],
    ids=["no-path", "empty-path", "unknown", "twice", "no-name"],
)
def test_peers_are_named_as_the_help_says(arguments):
    with pytest.raises(InputError, match="peer: each must be oasis=PATH or spade=PATH"):
        parse_peers(arguments)
