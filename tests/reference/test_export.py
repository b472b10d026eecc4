"""Exported generators and discriminators give the same numbers, for any batch."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from support import assert_close64, assert_message
from torch import nn
from unit_run import unit_config

import dpsims_reference.export as exporting
from dpsims.data import LabelSpec
from dpsims.errors import CheckpointError, InputError
from dpsims.nn import ConditionedBackbone, UNetDecoder
from dpsims_reference.cli import main
from dpsims_reference.export import ImagesOnly, export_generator, program_inputs, traced
from dpsims_reference.generator import build_generator
from dpsims_reference.sampling import TrainedGenerator

# what torch.export, onnx and onnxscript say of their own and each other's functions
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def stand_in(config, seed=0):
    """A run whose weights are random, with open gates and statistics that are not 0 and 1."""
    torch.manual_seed(seed)
    generator = build_generator(config).eval()
    for name, value in generator.state_dict().items():
        if name.endswith("gate"):
            value.fill_(0.7)
        if "running" in name:
            value.uniform_(0.5, 2.0)
    return TrainedGenerator(generator, config, LabelSpec(config.data.num_classes), 7, "abc")


def with_everything(config):
    part = replace(config.generator, spatial_noise=3, spectral_norm=True, spade_hidden=8)
    return replace(config, generator=part, data=replace(config.data, instances=True))


def with_oasis(config):
    part = replace(config.generator, architecture="oasis", spectral_norm=True)
    return replace(config, generator=part)


CONFIGS = {
    "everything": lambda: with_everything(unit_config()),
    "oasis": lambda: with_oasis(unit_config()),
}


@pytest.fixture
def run(monkeypatch):
    def use(config):
        trained = stand_in(config)
        monkeypatch.setattr(exporting, "load_generator", lambda run: trained)
        return trained

    return use


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "suffix"),
    [("everything", ".pt2"), ("everything", ".onnx"), ("oasis", ".onnx")],
)
def test_the_file_gives_the_same_images_and_the_card_describes_it(
    name, suffix, run, tmp_path, capsys
):
    trained = run(CONFIGS[name]())
    out = tmp_path / "new" / f"generator{suffix}"
    kind = "torch" if suffix == ".pt2" else "onnx"
    main(["export", "runs/any", "--out", str(out), "--format", kind])
    assert "of the largest pixel" in capsys.readouterr().out
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name, f"{out.name}.json"]
    card = json.loads(out.with_name(f"{out.name}.json").read_text())
    assert (card["format"], card["file"], card["run"]["step"]) == (kind, out.name, 7)
    assert card["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert card["check"]["largest_difference"] < 1e-4
    # another batch than those that were traced and checked, through a program opened anew
    inputs = program_inputs(trained, 5)
    said = [(each["name"], each["dtype"], each["shape"][1:]) for each in card["inputs"]]
    assert said == [
        (key, str(value.dtype).removeprefix("torch."), [*value.shape[1:]])
        for key, value in inputs.items()
    ]
    _, opener = exporting._WAYS[kind]
    program = opener(out)
    images = program(inputs)
    with torch.no_grad():
        wanted = trained.generator(*exporting._positional(inputs)).images
    assert (images - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    # every input counts
    for key, value in inputs.items():
        assert not torch.equal(program(inputs | {key: value.flip(0)}), images)


def test_exporting_changes_nothing_of_the_generator(run):
    trained = run(with_everything(unit_config()))
    before = {name: value.clone() for name, value in trained.generator.state_dict().items()}
    module = ImagesOnly(trained.generator)
    assert not any("parametrizations" in name for name in module.state_dict())
    after = trained.generator.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_bad_labels_are_an_error_or_nan(run):
    trained = run(unit_config())
    program = traced(ImagesOnly(trained.generator), trained).module()
    inputs = program_inputs(trained, 2)
    inputs["labels"][1, 3, 3] = 200
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, 12\)"):
        program(**inputs)


def test_a_program_that_differs_is_refused_and_leaves_no_file(run, tmp_path, monkeypatch):
    trained = run(unit_config())

    def writer(path, program):
        path.write_bytes(b"a program")

    def opener(path):
        return lambda inputs: ImagesOnly(trained.generator)(**inputs) * 1.001

    monkeypatch.setattr(exporting, "traced", lambda *_: None)
    monkeypatch.setattr(exporting, "_WAYS", {"torch": (writer, opener)})
    with pytest.raises(InputError) as caught:
        export_generator("run", tmp_path / "a.pt2")
    assert_message(caught.value, "export_generator: the program must", "0.0001", "batch of 1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "format_", "parts"),
    [
        ("a.onnx", "torch", ["out must end in .pt2", "a.onnx"]),
        ("a.pt2", "onnx", ["out must end in .onnx", "a.pt2"]),
        ("a.pt2", "tflite", ["format must be one of 'torch', 'onnx'", "'tflite'"]),
    ],
)
def test_bad_arguments(name, format_, parts, tmp_path):
    with pytest.raises(InputError) as caught:
        export_generator("run", tmp_path / name, format=format_)
    assert_message(caught.value, "export_generator: ", *parts)


def test_a_generator_too_large_for_one_onnx_file_is_refused(run, tmp_path, monkeypatch):
    run(unit_config())
    monkeypatch.setattr(exporting, "_LARGEST_ONNX", 1000)
    with pytest.raises(InputError) as caught:
        export_generator("run", tmp_path / "a.onnx", format="onnx")
    assert_message(caught.value, "format must be 'torch'", "GiB")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(run, tmp_path, monkeypatch):
    run(unit_config())
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"dpsims\[export\]"):
        export_generator("run", tmp_path / "a.onnx", format="onnx")


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(CheckpointError):
        export_generator(tmp_path, tmp_path / "a.pt2")


# --- the discriminator's two parts


class BothParts(nn.Module):
    """Backbone and decoder as one network."""

    def __init__(self):
        super().__init__()
        self.backbone = ConditionedBackbone("test_resnet", pretrained=False, num_levels=3)
        self.decoder = UNetDecoder(
            self.backbone.channels,
            self.backbone.reductions,
            5,
            full_res_channels=4,
            head_channels=4,
        )

    def forward(self, images):
        return self.decoder(images, self.backbone(images))


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_the_discriminators_parts_export_for_any_batch(strict):
    torch.manual_seed(0)
    network = BothParts().double().eval()
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    images = torch.rand(2, 3, 64, 48, dtype=torch.float64) * 2 - 1
    program = torch.export.export(network, (images,), dynamic_shapes=shapes, strict=strict)
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, 64, 48, dtype=torch.float64) * 2 - 1
        assert_close64(program.module()(images), network(images))


def test_the_generator_exports_for_any_batch_without_being_run():
    trained = stand_in(unit_config())
    module = ImagesOnly(trained.generator).double()
    labels, latents = program_inputs(trained, 2).values()
    batch = torch.export.Dim("batch", min=1)
    shapes = ({0: batch}, {0: batch}, None, None)
    inputs = (labels, latents.double(), None, None)
    program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=True).module()
    for count in (1, 4):
        labels, latents = program_inputs(trained, count).values()
        got = program(labels, latents.double(), None, None)
        assert_close64(got, module(labels, latents.double()))
