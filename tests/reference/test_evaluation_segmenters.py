import json
import warnings

import numpy as np
import pytest
import torch
from evaluation_parts import NUM_CLASSES, SIZE, ShadeDataset, read_shade, shade, shade_segmenter
from hypothesis import given, settings, strategies as st
from support import assert_equal, assert_message
from torch import nn

from dpsims.data import LabelSpec
from dpsims.errors import DataError, DTypeError, InputError
from dpsims_reference.evaluation import Segmenter, load_segmenter
from dpsims_reference.evaluation.consistency import ConsistencyPair
from dpsims_reference.evaluation.segmenter_files import read_ids

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def labels_of(count, seed=0, classes=NUM_CLASSES):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (count, *SIZE), generator=generator)


def one_hot_network(images):
    """Logits whose largest is at the shade."""
    return nn.functional.one_hot(read_shade(images), NUM_CLASSES).permute(0, 3, 1, 2).float()


# --- from the network's result to class ids


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(read_shade, id="ids"),
        pytest.param(lambda images: read_shade(images).to(torch.uint8), id="uint8-ids"),
        pytest.param(one_hot_network, id="logits"),
        pytest.param(lambda images: {"out": one_hot_network(images)}, id="dictionary"),
        pytest.param(lambda images: one_hot_network(images).half(), id="half-logits"),
    ],
)
def test_every_kind_of_result_gives_the_classes(network):
    labels = labels_of(2)
    segmenter = Segmenter(network, name="s", num_classes=NUM_CLASSES, **RAW)
    assert_equal(segmenter(shade(labels)), labels)


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=15)
def test_ids_map_the_network_to_the_data(seed):
    order = torch.randperm(NUM_CLASSES, generator=torch.Generator().manual_seed(seed))
    labels = labels_of(1, seed)
    for network in (read_shade, one_hot_network):
        segmenter = Segmenter(
            network, name="s", num_classes=NUM_CLASSES, ids=order.tolist(), **RAW
        )
        assert_equal(segmenter(shade(labels)), order[labels])
        assert bool(segmenter.known.all())


def test_a_class_that_the_data_lacks_is_never_predicted():
    segmenter = Segmenter(
        one_hot_network, name="s", num_classes=4, ids=[None, 0, 1, 2, None], **RAW
    )
    found = segmenter(shade(labels_of(4)))
    assert set(found.unique().tolist()) <= {0, 1, 2}
    assert segmenter.known.tolist() == [True, True, True, False]


def test_the_network_sees_resized_normalised_images():
    seen = []

    def network(images):
        seen.append(images)
        return torch.zeros(len(images), 2, 3, 3)

    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    segmenter = Segmenter(network, name="s", num_classes=2, size=(4, 6), mean=mean, std=std)
    found = segmenter(torch.full((1, 3, 8, 12), 0.2))
    assert found.shape == (1, 8, 12)
    expected = [(0.6 - m) / s for m, s in zip(mean, std, strict=True)]
    assert seen[0].shape == (1, 3, 4, 6)
    # averages of equal numbers, a few roundings of float32
    torch.testing.assert_close(
        seen[0], torch.tensor(expected).view(1, 3, 1, 1).expand(1, 3, 4, 6), rtol=1e-5, atol=1e-6
    )


def test_small_ids_are_enlarged_to_the_pixel_under_the_centre():
    ids = torch.tensor([[[0, 1], [2, 3]]])
    segmenter = Segmenter(lambda images: ids, name="s", num_classes=4)
    expected = ids.repeat_interleave(4, 1).repeat_interleave(3, 2)
    assert_equal(segmenter(torch.zeros(1, 3, 8, 6)), expected)


def test_images_out_of_range_are_clamped_and_left_as_they_are():
    images = 3 * shade(labels_of(1))
    before = images.clone()
    shade_segmenter()(images)
    assert_equal(images, before)


# --- TorchScript and ONNX


class Linear(nn.Module):
    """One logit per class from the colour of a pixel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, NUM_CLASSES, 1)

    def forward(self, images):
        return self.conv(images)


def save_torchscript(path, network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network), path)


def save_onnx(path, network, batch="batch", size=("height", "width")):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = [
        helper.make_tensor(name, kind, value.shape, value.detach().numpy().flatten())
        for name, value in (("weight", network.conv.weight), ("bias", network.conv.bias))
    ]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "weight", "bias"], ["logits"])],
        "linear",
        [helper.make_tensor_value_info("images", kind, [batch, 3, *size])],
        [helper.make_tensor_value_info("logits", kind, [batch, NUM_CLASSES, *size])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))


@pytest.mark.parametrize("batch", ["batch", 1])
def test_files_label_as_the_network_does(tmp_path, batch):
    network = Linear().eval()
    script, exported = tmp_path / "net one.pt", tmp_path / "net.onnx"
    save_torchscript(script, network)
    save_onnx(exported, network, batch=batch)
    images = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = Segmenter(network, name="x", num_classes=NUM_CLASSES)(images)
    assert len(expected.unique()) > 1
    for path, name in ((script, "net_one"), (exported, "net")):
        found = load_segmenter(path, num_classes=NUM_CLASSES)
        assert found.name == name
        # two products of three numbers may differ in the last bit; ties are not hit by this seed
        assert_equal(found(images), expected)
        assert found.facts["weights"]["file"] == path.name
        assert len(found.facts["weights"]["sha256"]) == 64
    json.dumps(found.facts)


def test_an_onnx_file_for_another_size_says_so(tmp_path):
    path = tmp_path / "fixed.onnx"
    save_onnx(path, Linear(), size=(16, 16))
    images = torch.zeros(1, 3, *SIZE)
    with pytest.raises(InputError) as caught:
        load_segmenter(path, num_classes=NUM_CLASSES)(images)
    assert_message(caught.value, "fixed.onnx", "size")
    sized = load_segmenter(path, num_classes=NUM_CLASSES, size=(16, 16))
    assert sized(images).shape == (1, *SIZE)


@pytest.mark.parametrize("name", ["broken.pt", "broken.onnx"])
def test_a_damaged_file_is_named(tmp_path, name):
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
    path = tmp_path / name
    path.write_bytes(b"this is no program")
    with pytest.raises(DataError) as caught:
        load_segmenter(path, num_classes=3)
    assert_message(caught.value, name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        load_segmenter(tmp_path / "none.pt", num_classes=3)
    assert_message(caught.value, "none.pt", "TorchScript")


def test_ids_come_from_a_json_list(tmp_path):
    path = tmp_path / "ids.json"
    path.write_text("[7, null, 0]")
    assert read_ids(path) == [7, None, 0]


@pytest.mark.parametrize("text", ["{", '{"0": 1}', "[1.5]", '["road"]', "[true]"])
def test_other_json_is_no_id_map(tmp_path, text):
    path = tmp_path / "ids.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_ids(path)
    assert_message(caught.value, "ids.json", "JSON list")


# --- bad inputs


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        pytest.param({"network": 3}, DTypeError, ["network", "int"], id="no-callable"),
        pytest.param({"name": "a/b"}, InputError, ["name", "a/b"], id="slash-in-name"),
        pytest.param({"num_classes": 1}, InputError, ["num_classes"], id="one-class"),
        pytest.param({"size": (4,)}, InputError, ["size"], id="one-side"),
        pytest.param({"size": (0, 4)}, InputError, ["size[0]"], id="no-height"),
        pytest.param({"mean": (0.0,)}, InputError, ["mean"], id="one-mean"),
        pytest.param({"std": (1.0, 0.0, 1.0)}, InputError, ["std"], id="zero-deviation"),
        pytest.param({"ids": [0, 5]}, InputError, ["ids[1]", "5"], id="id-out-of-range"),
        pytest.param({"ids": [-1]}, InputError, ["ids[0]", "-1"], id="negative-id"),
        pytest.param({"ids": [None]}, InputError, ["ids", "at least one"], id="maps-nothing"),
        pytest.param({"ids": [1.0]}, DTypeError, ["ids[0]"], id="float-id"),
    ],
)
def test_arguments_are_checked(change, error, parts):
    options = {"network": read_shade, "name": "s", "num_classes": NUM_CLASSES, **change}
    with pytest.raises(error) as caught:
        Segmenter(options.pop("network"), **options)
    assert_message(caught.value, "Segmenter", *parts)


@pytest.mark.parametrize(
    ("result", "error", "parts"),
    [
        pytest.param(torch.zeros(1, 4, 8, 12), InputError, ["C=5", "4, 8"], id="too-few-classes"),
        pytest.param(torch.zeros(1, 6, 8, 12), InputError, ["C=5", "6, 8"], id="too-many-classes"),
        pytest.param(torch.zeros(2, 5, 8, 12), InputError, ["B=1"], id="another-batch"),
        pytest.param(torch.full((1, 8, 12), 5), InputError, ["[5]", "mapped"], id="unknown-id"),
        pytest.param(torch.zeros(1, 8, 12), DTypeError, ["integer"], id="float-ids"),
        pytest.param(None, DTypeError, ["NoneType"], id="nothing"),
        pytest.param({"logits": 1}, DTypeError, ["dict"], id="other-dictionary"),
        pytest.param(
            torch.full((1, 5, 8, 12), torch.nan), InputError, ["finite"], id="nan-logits"
        ),
    ],
)
def test_wrong_results_are_errors(result, error, parts):
    segmenter = Segmenter(lambda images: result, name="wrong", num_classes=NUM_CLASSES)
    with pytest.raises(error) as caught:
        segmenter(torch.zeros(1, 3, *SIZE))
    assert_message(caught.value, "Segmenter wrong", *parts)


# --- scores


def scores_of(segmenter, images, labels, spec=None):
    pair = ConsistencyPair(segmenter, spec or LabelSpec(NUM_CLASSES))
    pair.add(images, labels, real=False)
    return pair.scores(real=False)


def test_scores_equal_counts_in_numpy():
    labels, wrong = labels_of(3), labels_of(3, seed=1)
    seen = torch.where(torch.rand(labels.shape) < 0.5, labels, wrong)
    labels[0, :2] = 255
    found = scores_of(shade_segmenter(), shade(seen), labels)
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for truth, guess in zip(labels.flatten().tolist(), seen.flatten().tolist(), strict=True):
        if truth != 255:
            confusion[truth, guess] += 1
    hits = np.diag(confusion)
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    assert found.confusion.dtype == torch.int64
    assert np.array_equal(found.confusion.numpy(), confusion)
    assert found.miou == pytest.approx(iou.mean(), rel=1e-12)
    assert found.pixel_accuracy == pytest.approx(hits.sum() / confusion.sum(), rel=1e-12)


def test_classes_that_the_segmenter_does_not_know_do_not_count():
    labels = labels_of(2)
    segmenter = Segmenter(
        one_hot_network, name="s", num_classes=NUM_CLASSES, ids=[None, 1, 2, 3, None], **RAW
    )
    found = scores_of(segmenter, shade(labels), labels)
    assert found.miou == 1
    assert found.per_class_iou.isnan().tolist() == [True, False, False, False, True]
    known = ((labels > 0) & (labels < 4)).sum()
    assert int(found.confusion.sum()) == int(known)


def test_an_ignored_class_does_not_count():
    labels = labels_of(2)
    spec = LabelSpec(NUM_CLASSES, ignore_index=0)
    found = scores_of(shade_segmenter(), shade(labels), labels, spec)
    assert found.per_class_iou.isnan().tolist() == [True] + [False] * 4
    assert found.miou == 1


def test_a_segmenter_for_another_number_of_classes_is_refused():
    with pytest.raises(InputError) as caught:
        ConsistencyPair(shade_segmenter(num_classes=9), ShadeDataset().spec)
    assert_message(caught.value, "shades", "5", "9")
