"""ConditionedBackbone: any timm network as a frozen source of conditioned maps."""

import copy
import io
import json
from functools import cache

import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safetensors.torch import load as load_safetensors, save as save_safetensors
from support import assert_equal, assert_message
from torch import nn
from torch.nn import functional as F

from dpsims.errors import BackboneError, DTypeError, IncompatibleCheckpointError, InputError
from dpsims.nn._timm import plan_model
from dpsims.nn.backbone import ConditionedBackbone
from dpsims.nn.pretrained import state_sha256

TINY = ["test_resnet", "test_convnext", "test_efficientnet", "test_vit"]
RAW = {"nonlinearity": "identity", "norm": "none"}
# one small member of each family, with what happens to its images and the strides of its maps
FAMILIES = {
    "test_resnet": (4, 8, 16, 32),
    "test_convnext": (4, 8, 16, 32),
    "tf_efficientnet_lite0": (4, 8, 16, 32),
    "test_vit": (4, 8, 16, 32),
    "vit_small_patch14_dinov2": (4, 7, 14, 28),
    "swin_tiny_patch4_window7_224": (4, 8, 16, 32),
    "test_maxvit": (4, 8, 16, 32),
    "test_mambaout": (4, 8, 16, 32),
    "test_nfnet": (4, 8, 16, 32),
    "regnetx_002": (4, 8, 16, 32),
    "mobilenetv3_small_050": (4, 8, 16, 32),
    "hrnet_w18_small": (4, 8, 16, 32),
    "dla46x_c": (4, 8, 16, 32),
}
seeds = st.integers(0, 2**20)


@cache
def shared(name, **options):
    """One network for all tests that do not change it."""
    return ConditionedBackbone(name, pretrained=False, **options)


def build(name="test_resnet", **options):
    """A fresh copy; the originals are built once."""
    return copy.deepcopy(shared(name, **options))


def pictures(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)


def sizes(maps):
    return [tuple(features.shape[-2:]) for features in maps]


# every family, every size


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_at_every_size(name):
    backbone = ConditionedBackbone(name, pretrained=False)
    assert backbone.reductions == FAMILIES[name]
    for height, width in [(64, 64), (250, 330), (256, 512)]:
        images = pictures(0, 1, 3, height, width).requires_grad_()
        maps = backbone.train()(images)
        assert tuple(features.shape[1] for features in maps) == backbone.channels
        areas = [h * w for h, w in sizes(maps)]
        assert areas == sorted(areas, reverse=True)
        if name != "test_maxvit":
            for (h, w), stride in zip(sizes(maps), backbone.reductions, strict=True):
                # up to the padding to whole strides, and 14 / 4 rounded to 4
                assert height // stride <= h <= 1.2 * (height + 32) / stride
                assert width // stride <= w <= 1.2 * (width + 32) / stride
        sum(features.pow(3).sum() for features in maps).backward()
        assert float(images.grad.abs().sum()) > 0
        assert bool(images.grad.isfinite().all())
        with torch.no_grad():
            assert sizes(backbone.eval()(images)) == sizes(maps)


def test_a_network_of_one_fixed_size_gets_resized_images():
    backbone = shared("test_maxvit", **RAW)
    images = pictures(1, 1, 3, 64, 100)
    resized = F.interpolate(images, size=(160, 160), mode="bilinear")
    for features, wanted in zip(backbone(images), backbone(resized), strict=True):
        torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)
    assert sizes(backbone(images)) == [(40, 40), (20, 20), (10, 10), (5, 5)]


def test_a_network_of_whole_strides_gets_padded_images():
    backbone = shared("test_resnet", **RAW)
    assert sizes(backbone(pictures(2, 1, 3, 65, 97))) == [(17, 25), (9, 13), (5, 7), (3, 4)]
    padded = shared("dla46x_c", **RAW)
    images = pictures(2, 1, 3, 65, 90)
    # padded with zeros after normalisation, which are the mean colour before
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 2 - 1
    whole = mean.expand(1, 3, 96, 96).clone()
    whole[..., :65, :90] = images
    for features, wanted in zip(padded(images), padded(whole), strict=True):
        torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit2", "test_vit"])
def test_input_size_resizes_every_image(name):
    backbone = ConditionedBackbone(name, pretrained=False, input_size=(64, 96))
    for height, width in [(64, 96), (20, 33), (100, 70)]:
        assert sizes(backbone(pictures(3, 1, 3, height, width))) == [
            (16, 24),
            (8, 12),
            (4, 6),
            (2, 3),
        ]


def test_a_network_of_one_size_is_built_for_another():
    backbone = ConditionedBackbone("test_maxvit", pretrained=False, input_size=(64, 128))
    assert sizes(backbone(pictures(3, 1, 3, 100, 70))) == [(16, 32), (8, 16), (4, 8), (2, 4)]


def test_a_network_that_reads_numbers_while_it_is_built(monkeypatch):
    import timm

    wanted = ConditionedBackbone("test_resnet", pretrained=False)
    create = timm.create_model

    def reads_numbers(name, **options):
        if torch.get_default_device().type == "meta":
            raise NotImplementedError("aten::_unique2: attempted to run with Meta tensors")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", reads_numbers)
    before = torch.get_rng_state()
    found = plan_model("test_resnet", None, num_levels=4, input_size=None)
    assert_equal(torch.get_rng_state(), before)
    assert found.channels == wanted.channels


def test_arguments_are_found_behind_those_that_a_constructor_hands_on():
    with torch.device("meta"):
        # its own constructor takes nothing by name
        backbone = ConditionedBackbone("deit_tiny_distilled_patch16_224", pretrained=False)
        maps = backbone(torch.empty(2, 3, 64, 96))
    assert sizes(maps) == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_a_network_without_feature_maps_is_named(monkeypatch):
    import timm

    create = timm.create_model

    def refuse(name, *, features_only=False, **options):
        if features_only:
            raise RuntimeError("features_only not implemented")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(BackboneError) as caught:
        ConditionedBackbone("test_resnet", pretrained=False)
    assert_message(caught.value, "model must offer feature maps", "'test_resnet' (features_only")


@given(st.sampled_from(TINY), st.integers(32, 90), st.integers(32, 90))
@settings(max_examples=20)
def test_sizes_follow_the_strides(name, height, width):
    backbone = shared(name, **RAW)
    for (h, w), stride in zip(
        sizes(backbone(torch.zeros(1, 3, height, width))), backbone.reductions, strict=True
    ):
        # a pyramid starts from whole patches of 16 pixels
        coarse = 4 if name == "test_vit" else 1
        assert height // stride <= h <= -(-height // stride) + coarse - 1
        assert width // stride <= w <= -(-width // stride) + coarse - 1


@pytest.mark.parametrize("name", TINY)
def test_too_small_images_are_refused_and_the_minimum_works(name):
    backbone = shared(name, **RAW)
    assert len(backbone(torch.zeros(1, 3, 32, 32))) == 4
    for shape in [(31, 64), (64, 31)]:
        with pytest.raises(InputError) as caught:
            backbone(torch.zeros(1, 3, *shape))
        assert_message(caught.value, "images must be at least 32 pixels", str(shape))


# what the network sees, and what comes out


@pytest.mark.parametrize(
    "name", ["test_resnet", "regnetx_002", "tf_efficientnet_lite0", "test_vit", "test_mambaout"]
)
def test_pixels_arrive_normalised_for_the_network(name):
    import timm

    with torch.device("meta"):
        network = timm.create_model(name, features_only=True)
    config, unit = network.pretrained_cfg, torch.rand(2, 3, 4, 5)
    mean = torch.tensor(config["mean"]).view(3, 1, 1)
    std = torch.tensor(config["std"]).view(3, 1, 1)
    for low, high in [(-1, 1), (0, 1), (0.0, 255.0), (-3, 5)]:
        backbone = ConditionedBackbone(network, value_range=(low, high))
        pixels = unit * (high - low) + low
        seen = pixels * backbone.pixel_scale + backbone.pixel_shift
        torch.testing.assert_close(seen, (unit - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_the_value_range_does_not_matter(name):
    backbone = shared(name, **RAW)
    unit = ConditionedBackbone(backbone._extractor, value_range=(0, 1), **RAW)
    images = pictures(4, 1, 3, 64, 64)
    for features, wanted in zip(unit((images + 1) / 2), backbone(images), strict=True):
        torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)


def test_images_in_minus_one_to_one_reach_the_lite_networks_unchanged():
    backbone = shared("tf_efficientnet_lite0")
    assert_equal(backbone.pixel_scale, torch.ones(3, 1, 1))
    assert_equal(backbone.pixel_shift, torch.zeros(3, 1, 1))


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_raw_maps_are_timms_maps_as_nchw(name):
    import timm

    network = timm.create_model(name, features_only=True)
    backbone = ConditionedBackbone(network, **RAW)
    mean = torch.tensor(network.pretrained_cfg["mean"]).view(3, 1, 1)
    std = torch.tensor(network.pretrained_cfg["std"]).view(3, 1, 1)
    images = pictures(5, 2, 3, 64, 96)
    expected = network(((images + 1) / 2 - mean) / std)
    maps = backbone(images)
    if name == "test_mambaout":
        assert expected[0].shape[-1] == backbone.channels[0]
        expected = [features.permute(0, 3, 1, 2) for features in expected]
    assert len(maps) == len(backbone.channels) == len(expected)
    for features, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)


def test_a_single_scale_network_becomes_a_pyramid():
    backbone = shared("test_vit", **RAW)
    network = backbone._extractor
    # six blocks: after block 1, 3, 4 and 6, counted from one
    assert list(network.out_indices) == [0, 2, 3, 5]
    images = pictures(6, 1, 3, 80, 112)
    grids = network(images * backbone.pixel_scale + backbone.pixel_shift)
    assert sizes(grids) == [(5, 7)] * 4
    maps = backbone(images)
    assert sizes(maps) == [(20, 28), (10, 14), (5, 7), (3, 4)]
    for features, grid, factor in zip(maps[:2], grids[:2], (4, 2), strict=True):
        torch.testing.assert_close(
            features, F.interpolate(grid, scale_factor=factor, mode="bilinear")
        )
    assert_equal(maps[2], grids[2])
    torch.testing.assert_close(maps[3][..., :2, :3], F.avg_pool2d(grids[3], 2))
    # the last row stands alone
    torch.testing.assert_close(maps[3][..., 2, 0], grids[3][..., 4, :2].mean(-1))


def test_dino_blocks_are_spread_evenly():
    with torch.device("meta"):
        backbone = ConditionedBackbone("deit_tiny_patch16_224", pretrained=False)
    assert list(backbone._extractor.out_indices) == [2, 5, 8, 11]


@pytest.mark.parametrize("num_levels", [1, 2, 3, 5])
def test_any_number_of_levels(num_levels):
    for name, expected in [
        ("test_resnet", (2, 4, 8, 16, 32)),
        ("test_vit", {1: (16,), 2: (16, 32), 3: (8, 16, 32), 5: (2, 4, 8, 16, 32)}),
    ]:
        backbone = ConditionedBackbone(name, pretrained=False, num_levels=num_levels)
        wanted = expected[num_levels] if isinstance(expected, dict) else expected[-num_levels:]
        assert backbone.reductions == wanted
        maps = backbone.eval()(torch.zeros(1, 3, 64, 64))
        assert sizes(maps) == [(64 // stride, 64 // stride) for stride in wanted]


def test_out_indices_choose_timms_maps():
    with torch.device("meta"):
        backbone = ConditionedBackbone("vgg19", pretrained=False, out_indices=[2, 3, 4])
    assert (backbone.channels, backbone.reductions) == ((256, 512, 512), (4, 8, 16))
    backbone = ConditionedBackbone("test_vit", pretrained=False, out_indices=(4,))
    assert backbone.reductions == (16,)
    backbone = ConditionedBackbone("test_vit", pretrained=False, out_indices=(0, 4))
    assert backbone.reductions == (16, 32)


@given(seeds, st.sampled_from(TINY))
@settings(max_examples=12)
def test_training_maps_are_normalised_and_evaluation_keeps_images_apart(seed, name):
    backbone = build(name)
    images = pictures(seed, 2, 3, 64, 64)
    for features in backbone(images):
        # float32 sums of about a thousand values of order 1
        torch.testing.assert_close(
            features.mean((0, 2, 3)), torch.zeros(features.shape[1]), rtol=0, atol=1e-4
        )
        assert bool((features.var((0, 2, 3), correction=0) <= 1 + 1e-4).all())
    backbone.eval()
    together = backbone(images)
    alone = backbone(images[1:])
    for features, single in zip(together, alone, strict=True):
        # another batch size may take another convolution algorithm
        torch.testing.assert_close(features[1:], single, rtol=1e-3, atol=1e-4)


# frozen


def test_only_images_get_gradients():
    backbone = build()
    images = pictures(7, 2, 3, 64, 64).requires_grad_()
    sum(features.pow(3).sum() for features in backbone(images)).backward()
    assert float(images.grad.abs().sum()) > 0
    for parameter in backbone._extractor.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_image_gradients_are_right():
    backbone = build("test_resnet", num_levels=1, nonlinearity="tanh").double().eval()
    images = pictures(8, 1, 3, 32, 32, dtype=torch.float64)
    direction = pictures(9, 1, 3, 32, 32, dtype=torch.float64)

    def along(step):
        return backbone(images + step * direction)[0].sum()

    assert torch.autograd.gradcheck(
        along, (torch.zeros((), dtype=torch.float64, requires_grad=True),), fast_mode=False
    )


class FrozenMachine(RuleBasedStateMachine):
    """Whatever is called on it or its parent, the network's bytes stay."""

    @initialize(name=st.sampled_from(TINY), norm=st.sampled_from(["batch", "instance"]))
    def start(self, name, norm):
        self.backbone = build(name, norm=norm)
        self.parent = nn.Sequential(self.backbone, nn.ModuleList([nn.Conv2d(3, 1, 1)]))
        self.head = nn.Conv2d(self.backbone.channels[-1], 1, 1)
        self.parent.append(self.head)
        self.images = pictures(1, 2, 3, 64, 64).requires_grad_()
        self.optimizer = torch.optim.AdamW([*self.parent.parameters(), self.images], lr=0.1)
        self.before = state_sha256(self.backbone._extractor)
        self.output = None

    @rule(mode=st.booleans(), whole=st.booleans())
    def train(self, mode, whole):
        (self.parent if whole else self.backbone).train(mode)

    @rule(wanted=st.booleans(), whole=st.booleans())
    def require_gradients(self, wanted, whole):
        (self.parent if whole else self.backbone).requires_grad_(wanted)

    @rule(last=st.booleans())
    def change_memory_format(self, last):
        self.parent.to(memory_format=torch.channels_last if last else torch.contiguous_format)

    @rule()
    def apply_and_move(self):
        def reset(module):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

        self.parent.apply(reset)
        self.parent.to("cpu").float()
        # its graph holds the head's old values
        self.output = None

    @rule()
    def forward(self):
        self.output = self.head(self.backbone(self.images)[-1]).pow(2).mean()

    @rule()
    def backward_and_step(self):
        if self.output is None or not self.output.requires_grad:
            return
        self.output.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.output = None

    @rule()
    def save_and_load(self):
        self.parent.load_state_dict(copy.deepcopy(self.parent.state_dict()))
        self.output = None

    @invariant()
    def nothing_changed(self):
        if not hasattr(self, "before"):
            return
        network = self.backbone._extractor
        assert state_sha256(network) == self.before
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert all(parameter.grad is None for parameter in network.parameters())


FrozenMachine.TestCase.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)
test_frozen_means_frozen = FrozenMachine.TestCase


def test_drop_path_and_dropout_stay_off_in_training():
    import timm

    network = timm.create_model("test_convnext", features_only=True, drop_path_rate=0.9)
    backbone = ConditionedBackbone(network, **RAW).train()
    images = pictures(10, 2, 3, 64, 64)
    for features, again in zip(backbone(images), backbone(images), strict=True):
        assert_equal(features, again)


@pytest.mark.parametrize("name", TINY)
def test_the_state_holds_records_and_a_hash_alone(name):
    backbone = build(name)
    assert not list(backbone.parameters())
    state = backbone.state_dict()
    assert len(state.pop("_extra_state")) == 32
    assert all(key.startswith("conditioners.") for key in state)
    assert len(state) == 3 * 4


def test_a_state_round_trip_through_safetensors():
    backbone = build()
    backbone(pictures(11, 2, 3, 64, 64))
    content = save_safetensors(nn.Sequential(backbone).state_dict())
    other = build()
    nn.Sequential(other).load_state_dict(load_safetensors(content))
    images = pictures(12, 2, 3, 64, 64)
    for features, wanted in zip(other.eval()(images), backbone.eval()(images), strict=True):
        assert_equal(features, wanted)
    file = io.BytesIO()
    torch.save(backbone.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))


def test_a_state_from_other_weights_is_refused():
    torch.manual_seed(1)
    ours, theirs = build(), ConditionedBackbone("test_resnet", pretrained=False)
    assert ours.weights_sha256 != theirs.weights_sha256
    with pytest.raises(IncompatibleCheckpointError) as caught:
        nn.Sequential(ours).load_state_dict(nn.Sequential(theirs).state_dict())
    assert_message(
        caught.value, "test_resnet.r160_in1k", ours.weights_sha256, theirs.weights_sha256
    )


def test_identity_is_json_and_is_checked():
    backbone = build()
    identity = json.loads(json.dumps(backbone.identity))
    assert identity == {
        "model": "test_resnet.r160_in1k",
        "weights_source": "random",
        "weights_sha256": state_sha256(backbone._extractor),
    }
    backbone.check_identity(identity)
    # where the same weights were found does not matter
    backbone.check_identity({**identity, "weights_source": "file:/elsewhere"})
    for other in ({**identity, "weights_sha256": "0" * 64, "model": "other_net"}, {}):
        with pytest.raises(IncompatibleCheckpointError) as caught:
            backbone.check_identity(other)
        assert_message(caught.value, "test_resnet.r160_in1k", other.get("model", "a backbone"))


def test_deepcopy_copies_the_network():
    backbone = build()
    other = copy.deepcopy(backbone)
    images = pictures(13, 2, 3, 64, 64)
    for features, wanted in zip(other(images), backbone(images), strict=True):
        assert_equal(features, wanted)
    ours = next(backbone._extractor.parameters())
    theirs = next(other._extractor.parameters())
    assert ours.data_ptr() != theirs.data_ptr()


def test_two_backbones_can_share_one_network():
    import timm

    network = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3))
    first, second = ConditionedBackbone(network), ConditionedBackbone(network, norm="none")
    assert first._extractor is second._extractor is network
    assert first.weights_source == "module"
    assert first.identity == second.identity
    assert first.reductions == (8, 16)


def test_the_network_moves_with_the_module():
    backbone = build()
    parent = nn.Sequential(backbone)
    assert next(parent.double()[0]._extractor.parameters()).dtype == torch.float64
    maps = backbone(pictures(14, 2, 3, 64, 64, dtype=torch.float64))
    assert all(features.dtype == torch.float64 for features in maps)
    parent.to(torch.bfloat16)
    maps = backbone(pictures(14, 2, 3, 64, 64, dtype=torch.bfloat16))
    assert all(features.dtype == torch.bfloat16 for features in maps)
    assert all(bool(features.isfinite().all()) for features in maps)
    # what must not be rounded is not
    assert backbone.pixel_shift.dtype == torch.float64
    assert backbone.conditioners[0].norm.running_mean.dtype == torch.float64
    parent.to("meta")
    maps = backbone(torch.empty(2, 3, 64, 96, device="meta", dtype=torch.bfloat16))
    assert all(features.is_meta for features in maps)


def test_building_and_running_on_the_meta_device():
    with torch.device("meta"):
        backbone = ConditionedBackbone("test_convnext", pretrained=False)
        maps = backbone(torch.empty(2, 3, 64, 96))
    assert sizes(maps) == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert backbone.weights_sha256 is None
    backbone.load_state_dict(backbone.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_network_follows_autocast_and_conditioning_stays_in_float32(dtype):
    backbone = build(norm="none")
    images = pictures(15, 2, 3, 64, 64).requires_grad_()
    seen = []
    backbone.conditioners[0].norm.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].dtype)
    )
    with torch.autocast("cpu", dtype=dtype):
        maps = backbone(images)
    assert seen == [torch.float32]
    assert all(bool(features.isfinite().all()) for features in maps)
    sum(features.float().sum() for features in maps).backward()
    assert bool(images.grad.isfinite().all())
    # 8 bits of mantissa through some ten layers; sigmoid's slope is at most 1/4
    for features, wanted in zip(maps, backbone(images), strict=True):
        assert float((features.float() - wanted).detach().abs().max()) < 0.1


def test_channels_last_and_strided_images_give_the_same_maps():
    backbone = shared("test_resnet", **RAW)
    images = pictures(16, 2, 3, 64, 96)
    expected, version = backbone(images), images._version
    last = backbone(images.contiguous(memory_format=torch.channels_last))
    strided = backbone(images.mT.contiguous().mT)
    for features, one, other in zip(expected, last, strided, strict=True):
        torch.testing.assert_close(one, features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other, features, rtol=1e-4, atol=1e-4)
        assert one.is_contiguous(memory_format=torch.channels_last)
    assert images._version == version


def test_an_empty_batch_passes_in_evaluation():
    maps = build().eval()(torch.zeros(0, 3, 64, 64))
    assert [features.shape[0] for features in maps] == [0] * 4


def test_no_global_state_changes():
    before = torch.get_rng_state(), torch.get_default_dtype()
    shared("test_vit", **RAW)(pictures(17, 1, 3, 64, 64))
    assert_equal(torch.get_rng_state(), before[0])
    assert torch.get_default_dtype() == before[1]


def test_deterministic_algorithms_suffice():
    torch.use_deterministic_algorithms(True)
    try:
        images = pictures(18, 1, 3, 64, 64).requires_grad_()
        sum(features.sum() for features in shared("test_vit", **RAW)(images)).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert float(images.grad.abs().sum()) > 0


# fine-tuning


@pytest.mark.parametrize("name", TINY)
def test_an_unfrozen_network_is_an_ordinary_part(name):
    backbone = ConditionedBackbone(name, pretrained=False, frozen=False)
    before = state_sha256(backbone.network)
    assert before == backbone.weights_sha256
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert len(list(backbone.parameters())) == len(list(backbone.network.parameters())) > 0
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    assert backbone.network.training
    sum(features.pow(3).mean() for features in backbone(pictures(20, 2, 3, 64, 64))).backward()
    optimizer.step()
    assert state_sha256(backbone.network) != before
    assert not backbone.eval().network.training
    other = ConditionedBackbone(name, pretrained=False, frozen=False)
    other.load_state_dict(backbone.state_dict())
    assert state_sha256(other.network) == state_sha256(backbone.network)
    assert next(backbone.double().network.parameters()).dtype == torch.float64


# modules that are not timm's


class Stub(nn.Module):
    """Two maps from average pooling, as a feature extractor of timm would declare them."""

    class Info:
        def channels(self):
            return [3, 3]

        def reduction(self):
            return [4, 8]

    pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # noqa: RUF012

    def __init__(self, change=lambda maps: maps):
        super().__init__()
        self.feature_info = self.Info()
        self.change = change

    def forward(self, images):
        return self.change([F.avg_pool2d(images, 4), F.avg_pool2d(images, 8)])


def test_a_module_of_ones_own():
    images = pictures(21, 2, 3, 32, 40)
    backbone = ConditionedBackbone(Stub(), **RAW)
    torch.testing.assert_close(backbone(images)[1], F.avg_pool2d(images, 8))
    assert backbone.model_name == "Stub"
    # channels last without saying so
    silent = ConditionedBackbone(Stub(lambda maps: [m.permute(0, 2, 3, 1) for m in maps]), **RAW)
    assert_equal(silent(images)[0], backbone(images)[0])
    resized = ConditionedBackbone(Stub(), input_size=(16, 16), **RAW)
    assert sizes(resized(images)) == [(4, 4), (2, 2)]


@pytest.mark.parametrize(
    ("kind", "change", "parts"),
    [
        ("tokens", lambda maps: [m.flatten(2) for m in maps], ("(B, 3, h, w)", "(2, 3, 80)")),
        ("other-width", lambda maps: [m[:, :2] for m in maps], ("(2, 2, 8, 10)",)),
        ("too-few", lambda maps: maps[:1], ("2 maps", "1")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_module_that_breaks_its_word(kind, change, parts):
    with pytest.raises(BackboneError) as caught:
        ConditionedBackbone(Stub(change), **RAW)(torch.zeros(2, 3, 32, 40))
    assert_message(caught.value, "ConditionedBackbone: model must return", *parts)


# bad arguments


@pytest.mark.parametrize(
    ("kind", "model", "options", "error", "parts"),
    [
        ("unknown-name", "resnt18", {}, BackboneError, ("resnet18", "'resnt18'")),
        ("nonsense-name", "qqqqqq", {}, BackboneError, ("timm", "'qqqqqq'")),
        ("unknown-tag", "resnet18.nope", {}, BackboneError, ("resnet18.a1_in1k", "nope")),
        ("hub-scheme", "hf-hub:timm/resnet18", {}, BackboneError, ("scheme", "hf-hub:")),
        ("local-scheme", "local-dir:/tmp", {}, BackboneError, ("scheme", "local-dir:")),
        ("path", "../resnet18", {}, BackboneError, ("path", "'../resnet18'")),
        ("no-name", None, {}, DTypeError, ("model", "NoneType")),
        ("plain-module", nn.Conv2d(3, 3, 1), {}, BackboneError, ("features_only", "Conv2d")),
        (
            "indices-of-a-module",
            Stub(),
            {"out_indices": (0,)},
            InputError,
            ("out_indices must be None", "(0,)"),
        ),
        (
            "weights-of-a-module",
            Stub(),
            {"weights": "pypi"},
            InputError,
            ("weights must be None for a module", "pypi"),
        ),
        (
            "index-out-of-range",
            "test_resnet",
            {"out_indices": (1, 5)},
            BackboneError,
            ("maps 0 to 4", "2, 4, 8, 16, 32", "(1, 5)"),
        ),
        ("index-negative", "test_resnet", {"out_indices": (-1,)}, BackboneError, ("(-1,)",)),
        ("index-twice", "test_resnet", {"out_indices": (1, 1)}, BackboneError, ("(1, 1)",)),
        ("index-unsorted", "test_resnet", {"out_indices": (2, 1)}, BackboneError, ("(2, 1)",)),
        ("index-none", "test_resnet", {"out_indices": ()}, InputError, ("out_indices", "empty")),
        ("index-text", "test_resnet", {"out_indices": "1"}, DTypeError, ("out_indices", "str")),
        ("levels-zero", "test_resnet", {"num_levels": 0}, InputError, ("num_levels", "0")),
        (
            "levels-too-many",
            "test_resnet",
            {"num_levels": 6},
            BackboneError,
            ("at most 5", "reductions 2, 4, 8, 16, 32", "6"),
        ),
        (
            "levels-beyond-depth",
            "test_vit",
            {"num_levels": 7},
            BackboneError,
            ("at most 6", "16 each", "7"),
        ),
        (
            "three-scales",
            "shvit_s1",
            {},
            BackboneError,
            ("num_levels must be at most 3", "16, 32, 64", "4"),
        ),
        ("range-reversed", "test_resnet", {"value_range": (1, -1)}, InputError, ("value_range",)),
        ("range-empty", "test_resnet", {"value_range": (0, 0)}, InputError, ("value_range", "0")),
        (
            "range-nan",
            "test_resnet",
            {"value_range": (float("nan"), 1)},
            InputError,
            ("value_range", "nan"),
        ),
        ("range-one", "test_resnet", {"value_range": (1,)}, InputError, ("value_range", "(1,)")),
        ("size-one", "test_resnet", {"input_size": (64,)}, InputError, ("input_size", "(64,)")),
        ("size-zero", "test_resnet", {"input_size": (64, 0)}, InputError, ("input_size", "0")),
        (
            "size-fixed",
            "efficientformer_l1",
            {"input_size": (256, 256)},
            BackboneError,
            ("input_size must be a size that efficientformer_l1 takes", "(256, 256)"),
        ),
        (
            "size-not-square",
            "nest_tiny",
            {"input_size": (64, 96), "num_levels": 3},
            BackboneError,
            ("input_size must be a size that nest_tiny takes", "(64, 96) (Model only", "square"),
        ),
        ("norm", "test_resnet", {"norm": "layer"}, InputError, ("norm", "'layer'")),
        (
            "nonlinearity",
            "test_resnet",
            {"nonlinearity": "relu"},
            InputError,
            ("nonlinearity", "'relu'"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(kind, model, options, error, parts):
    with pytest.raises(error) as caught:
        ConditionedBackbone(model, **{"pretrained": "weights" in options, **options})
    assert_message(caught.value, *parts)


@pytest.mark.parametrize(
    ("kind", "images", "error", "parts"),
    [
        ("not-a-tensor", None, DTypeError, ("torch.Tensor", "NoneType")),
        ("bytes", torch.zeros(2, 3, 64, 64, dtype=torch.uint8), DTypeError, ("uint8",)),
        ("three-axes", torch.zeros(3, 64, 64), InputError, ("C=3", "(3, 64, 64)")),
        ("grey", torch.zeros(2, 1, 64, 64), InputError, ("C=3", "(2, 1, 64, 64)")),
        ("empty-width", torch.zeros(2, 3, 64, 0), InputError, ("empty", "(2, 3, 64, 0)")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_images(kind, images, error, parts):
    with pytest.raises(error) as caught:
        shared("test_resnet")(images)
    assert_message(caught.value, "ConditionedBackbone: images must", *parts)


def test_one_value_per_channel_cannot_be_normalised():
    with pytest.raises(InputError) as caught:
        build().train()(torch.zeros(1, 3, 32, 32))
    assert_message(caught.value, "FeatureConditioner", "two values", "(1, 96, 1, 1)")


def test_repr_names_the_model():
    assert "'test_resnet.r160_in1k', weights='random', frozen=True" in repr(shared("test_resnet"))
