import copy
import csv
import datetime as dt
import json
import warnings
from itertools import combinations

import numpy as np
import pytest
import torch
from evaluation_parts import (
    NUM_CLASSES,
    ShadeDataset,
    ShadeGenerator,
    instruments,
    shade_segmenter,
    trained,
)
from PIL import Image
from support import assert_equal, assert_message
from torch import nn
from unit_run import NUM_CLASSES as SCENE_CLASSES, unit_config

import dpsims
from dpsims.data import LabelSpec
from dpsims.errors import DataError, InputError
from dpsims_reference.cli import main
from dpsims_reference.config_json import to_dict
from dpsims_reference.datasets import build_dataset
from dpsims_reference.evaluation import Protocol, build_card, check_card, diversity, measure
from dpsims_reference.evaluation.card import config_sha256, read_card, write_card
from dpsims_reference.evaluation.command import build_instruments, format_card
from dpsims_reference.evaluation.consistency import Scores
from dpsims_reference.evaluation.pictures import plot_class_iou, plot_confusion, write_sheet
from dpsims_reference.evaluation_options import InstrumentOptions
from dpsims_reference.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*rank deficient:UserWarning")
PROTOCOL = Protocol(samples_per_map=2, kernel_subset_size=4)


@pytest.fixture(scope="module")
def card():
    model, dataset, tools = trained(ShadeGenerator(0.1)), ShadeDataset(6), instruments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = measure(model, dataset, tools, PROTOCOL)
    return build_card(model, dataset, tools, PROTOCOL, found, split="heldout", device="cpu")


# --- the card


def test_the_card_says_what_a_figure_needs(card):
    check_card(card)
    (extractor,) = card["extractors"]
    assert extractor["name"] == "colours"
    assert extractor["resize"] == "quarters"
    assert len(extractor["weights"]["tensors_sha256"]) == 64
    assert card["kernel"] == {"subsets": 100, "subset_size": 4}
    assert card["num_images"] == 6
    assert card["protocol"]["seed"] == 0
    assert card["data"] == {
        "split": "heldout",
        "fingerprint": "shades of 6",
        "image_size": [8, 12],
    }
    assert card["versions"]["torch"] == torch.__version__
    assert card["versions"]["dpsims"] == dpsims.__version__
    assert card["device"].startswith("cpu")
    assert dt.datetime.fromisoformat(card["date"]).tzinfo is not None
    assert card["segmenters"][0]["scored_classes"] == NUM_CLASSES
    assert len(card["classes"]["iou"]["shades"]) == NUM_CLASSES


def test_every_figure_names_its_network(card):
    networks = {"colours", "shades", "pixels"}
    assert {name.partition("/")[2] for name in card["figures"]} == networks
    table = format_card(card)
    for name in networks:
        assert name in table
    assert "images per second" in table


def test_a_card_survives_the_disk(card, tmp_path):
    write_card(tmp_path / "out" / "eval_card.json", card)
    assert read_card(tmp_path / "out" / "eval_card.json") == json.loads(json.dumps(card))


def test_a_class_that_occurs_nowhere_has_no_iou(card):
    model, tools = trained(), instruments()._replace(segmenters=(shade_segmenter(ids=[0] * 5),))
    found = measure(model, ShadeDataset(6), tools, PROTOCOL)
    made = build_card(model, ShadeDataset(6), tools, PROTOCOL, found, split="train", device="cpu")
    assert made["classes"]["iou"]["shades"][1:] == [None] * 4
    json.dumps(made, allow_nan=False)


def test_the_configurations_hash_ignores_the_order_of_its_values():
    values = to_dict(unit_config())
    turned = dict(reversed(values.items()))
    assert config_sha256(values) == config_sha256(turned)
    values["seed"] += 1
    assert config_sha256(values) != config_sha256(turned)


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        pytest.param("figures", None, ["figures", "dict"], id="no-figures"),
        pytest.param("run.config_sha256", 7, ["run.config_sha256", "str"], id="number-as-hash"),
        pytest.param("protocol.seed", True, ["protocol.seed", "int"], id="bool-as-number"),
        pytest.param("card_version", 2, ["card_version", "2"], id="newer-version"),
        pytest.param("figures.fid", 1.0, ["figures", "fid"], id="figure-without-network"),
        pytest.param("figures.fid/x", "low", ["figures", "low"], id="text-as-figure"),
    ],
)
def test_wrong_cards_are_refused(card, path, value, parts):
    wrong = copy.deepcopy(card)
    *outer, last = path.split(".")
    inner = wrong
    for key in outer:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(DataError) as caught:
        check_card(wrong)
    assert_message(caught.value, *parts)


@pytest.mark.parametrize("path", ["device", "run.step", "classes.iou"])
def test_missing_entries_are_named(card, path):
    wrong = copy.deepcopy(card)
    *outer, last = path.split(".")
    inner = wrong
    for key in outer:
        inner = inner[key]
    del inner[last]
    with pytest.raises(DataError) as caught:
        check_card(wrong)
    assert_message(caught.value, path)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_other_files_are_no_cards(tmp_path, text):
    path = tmp_path / "eval_card.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_card(path)
    assert_message(caught.value, "eval_card.json")


# --- the pictures


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_the_sheet_shows_maps_images_samples_and_names(tmp_path):
    dataset = ShadeDataset(4)
    write_sheet(tmp_path / "sheet.png", trained(), dataset, seed=0)
    sheet = pixels(tmp_path / "sheet.png")
    # 24 times 8 x 12 pixels: six rows of four cells, captions left, the legend below
    assert sheet.shape[0] > 6 * 192
    assert sheet.shape[1] > 4 * 288
    legend = sheet[6 * 196 + 4 :]
    shown = {tuple(colour) for colour in legend.reshape(-1, 3).tolist()}
    assert set(dataset.spec.palette) <= shown


def test_a_sheet_of_many_classes_wraps_its_legend(tmp_path):
    dataset = ShadeDataset(4)
    few = pixels_of_sheet(tmp_path / "few.png", dataset)
    dataset.spec = LabelSpec(NUM_CLASSES, names=[f"a class with a long name {'x' * 60}"] * 5)
    assert pixels_of_sheet(tmp_path / "many.png", dataset).shape[0] > few.shape[0]


def pixels_of_sheet(path, dataset):
    write_sheet(path, trained(), dataset, seed=0)
    return pixels(path)


def scores(count):
    confusion = torch.randint(1, 50, (count, count), generator=torch.Generator().manual_seed(0))
    iou = torch.linspace(0, 1, count, dtype=torch.float64)
    iou[count // 2] = torch.nan
    return Scores(0.5, 0.6, iou, confusion)


@pytest.mark.parametrize("count", [3, 183])
def test_plots_fit_any_number_of_classes(tmp_path, count):
    spec = LabelSpec(count)
    plot_class_iou(tmp_path / "iou.png", spec, scores(count), scores(count), segmenter="s")
    plot_confusion(tmp_path / "confusion.png", spec, scores(count), segmenter="s")
    for name in ("iou.png", "confusion.png"):
        height, width, _ = pixels(tmp_path / name).shape
        assert 150 < height < 3000
        assert 150 < width < 4000


# --- the command


class ByColour(nn.Module):
    """Logits of the scenes' classes from the colour of a pixel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, SCENE_CLASSES, 1)

    def forward(self, images):
        return self.conv(images)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = unit_config(steps=1)
    trainer = Trainer(config, build_dataset(config.data), folder)
    trainer.run(picture_every=100)
    trainer.store.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(ByColour()), folder / "colour.pt")
    return folder


def test_evaluate_writes_card_pictures_and_table(run, tmp_path, capsys):
    arguments = ["--run", str(run), "--out", str(tmp_path), "--segmenter", str(run / "colour.pt")]
    sizes = ["--num-images", "6", "--diversity-maps", "2", "--samples-per-map", "2"]
    main(["evaluate", *arguments, *sizes, "--segmenter-size", "16", "16", "--device", "cpu"])
    found = read_card(tmp_path / "eval_card.json")
    assert found["run"]["step"] == 1
    assert len(found["run"]["manifest_sha256"]) == 64
    assert found["data"]["split"] == "heldout"
    assert found["segmenters"][0]["size"] == [16, 16]
    names = {
        "frechet/efficientnet_lite1_s16",
        "kernel_distance/efficientnet_lite1_s16",
        "miou/colour",
        "miou_real/colour",
        "pixel_accuracy/colour",
        "pixel_accuracy_real/colour",
        "diversity/l1",
        "diversity/efficientnet_lite1",
    }
    assert set(found["figures"]) == names
    for name in ("sheet.png", "class_iou-colour.png", "confusion-colour.png"):
        assert pixels(tmp_path / name).std() > 0
    with (tmp_path / "confusion-colour.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) == SCENE_CLASSES + 1
    assert sum(int(cell) for row in rows[1:] for cell in row[1:]) == 6 * 32 * 32
    assert "| frechet | efficientnet_lite1_s16 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        pytest.param(["--features", "inception_v3"], "weights-inception", id="inception"),
        pytest.param(["--features", "swav"], "swav_weights", id="swav-unnamed"),
        pytest.param(["--lpips", "alex"], "alexnet", id="lpips"),
        pytest.param(["--segmenter", "none.pt"], "none.pt", id="segmenter"),
    ],
)
def test_missing_weights_stop_before_any_work(run, tmp_path, monkeypatch, capsys, arguments, part):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--run", str(run), "--out", str(out), "--device", "cpu", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_split_that_is_not_there_is_named(run, monkeypatch):
    from dpsims_reference.evaluation import command

    dataset = build_dataset(unit_config().data)
    monkeypatch.setattr(command, "build_splits", lambda config: {"train": dataset})
    with pytest.raises(InputError) as caught:
        command.evaluate_run(run, run, InstrumentOptions(), PROTOCOL, split="heldout")
    assert_message(caught.value, "split", "train", "heldout")


class Labeller:
    """What a data set with pseudo labels brings along."""

    def __init__(self):
        self.backbone = type("Backbone", (), {"weights_sha256": "ab" * 32})()

    def to(self, _):
        return self

    def predict(self, images):
        return ((images.mean(1) + 1) / 2 * (NUM_CLASSES - 1)).round().to(torch.uint8)


def test_the_labeller_of_the_data_is_a_segmenter():
    dataset = ShadeDataset(3)
    dataset.labeller = Labeller()
    tools = build_instruments(InstrumentOptions(features=()), dataset, device="cpu")
    (segmenter,) = tools.segmenters
    assert segmenter.name == "pseudo_labeller"
    sample = dataset.view(0)
    assert_equal(segmenter(sample.image[None])[0], sample.labels.long())
    assert [distance.name for distance in tools.distances] == ["l1"]


# --- distances with networks


def test_feature_distance_is_between_0_and_4_and_0_for_equal_images():
    from dpsims_reference.evaluation import feature_diversity

    distance = diversity.features()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    assert 0 < distance.diversity(images) < 4
    # rounding of sums of some thousand squares, far below any difference of images
    assert distance.diversity(images[:1].expand(3, -1, -1, -1)) < 1e-8
    embedded = diversity.FeatureDistance()(images)
    assert distance.diversity(images) == feature_diversity(embedded)


def test_lpips_uses_the_given_weights(tmp_path):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        network = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    state = {
        f"features.{key.partition('.')[2]}": value
        for key, value in network.net.state_dict().items()
    }
    torch.save(state, tmp_path / "squeeze.pth")
    distance = diversity.lpips("squeeze", weights=tmp_path / "squeeze.pth")
    samples = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        pairs = [network(a[None], b[None]) for a, b in combinations(samples, 2)]
    assert distance.name == "lpips_squeeze"
    assert len(distance.facts["weights"]["tensors_sha256"]) == 64
    expected = float(torch.cat(pairs).double().mean())
    assert distance.diversity(samples) == pytest.approx(expected, rel=1e-5)
