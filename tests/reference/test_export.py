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
from dpsims_reference.presets import preset
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
    "tiny": lambda: preset("tiny"),
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
@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("format_", ["torch", "onnx"])
def test_the_file_gives_the_same_images_and_the_card_describes_it(name, format_, run, tmp_path):
    trained = run(CONFIGS[name]())
    out = tmp_path / "new" / f"generator{'.onnx' if format_ == 'onnx' else '.pt2'}"
    card = export_generator("run", out, format=format_)
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name, f"{out.name}.json"]
    assert json.loads(out.with_name(f"{out.name}.json").read_text()) == card
    assert card["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert card["check"]["largest_difference"] < 1e-4
    # another batch than those that were traced and checked, through a program opened anew
    inputs = program_inputs(trained, 5)
    assert [each["name"] for each in card["inputs"]] == list(inputs)
    assert [each["shape"][1:] for each in card["inputs"]] == [
        [*x.shape[1:]] for x in inputs.values()
    ]
    assert [each["dtype"] for each in card["inputs"]] == [
        str(x.dtype).removeprefix("torch.") for x in inputs.values()
    ]
    _, opened = exporting._WAYS[format_]
    images = opened(out)(inputs)
    with torch.no_grad():
        wanted = trained.generator(*exporting._positional(inputs)).images
    assert (images - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    # every input counts
    for key, value in inputs.items():
        assert not torch.equal(opened(out)(inputs | {key: value.flip(0)}), images)


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
    run(unit_config())

    def opener(path):
        return lambda inputs: exporting._torch_runner(path)(inputs) * 1.001

    ways = exporting._WAYS | {"torch": (exporting._write_torch, opener)}
    monkeypatch.setattr(exporting, "_WAYS", ways)
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


def test_the_command_writes_both_files(run, tmp_path, capsys):
    run(unit_config())
    out = tmp_path / "generator.pt2"
    main(["export", "runs/any", "--out", str(out)])
    assert {path.name for path in tmp_path.iterdir()} == {out.name, f"{out.name}.json"}
    assert "of the largest pixel" in capsys.readouterr().out


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


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_the_generator_exports_for_any_batch(strict):
    trained = stand_in(unit_config())
    module = ImagesOnly(trained.generator).double()
    labels, latents = program_inputs(trained, 2).values()
    batch = torch.export.Dim("batch", min=1)
    shapes = ({0: batch}, {0: batch}, None, None)
    inputs = (labels, latents.double(), None, None)
    program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)
    for count in (1, 4):
        labels, latents = program_inputs(trained, count).values()
        got = program.module()(labels, latents.double(), None, None)
        assert_close64(got, module(labels, latents.double()))
