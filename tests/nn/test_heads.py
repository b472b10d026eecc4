"""ProjectedDiscriminator: trained heads on a frozen backbone."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import assert_close64, assert_equal, assert_message
from torch import nn

from dpsims.errors import DTypeError, InputError
from dpsims.losses import AdversarialLoss, feature_matching_loss
from dpsims.nn import ConditionedBackbone, ProjectedDiscriminator, effective_weight
from dpsims.nn.pretrained import state_sha256


@cache
def _backbone(**options):
    torch.manual_seed(0)
    return ConditionedBackbone("test_resnet", pretrained=False, **options)


def build(num_levels=3, dtype=torch.float32, **options):
    backbone = copy.deepcopy(_backbone(num_levels=num_levels))
    torch.manual_seed(1)
    return ProjectedDiscriminator(
        backbone, **{"head_channels": 4, "mixing_channels": 3} | options
    ).to(dtype)


def pictures(seed, batch=2, height=64, width=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64) * 2 - 1
    return images.to(dtype)


def test_three_lines_train_a_gan_and_never_touch_the_backbone():
    backbone = copy.deepcopy(_backbone(num_levels=4))
    model = ProjectedDiscriminator(backbone, head_channels=8)
    loss = AdversarialLoss("hinge", r1_weight=0.1, r1_interval=4)

    generator = nn.Sequential(nn.ConvTranspose2d(4, 3, 8, 8), nn.Tanh())
    before = state_sha256(backbone._frozen_network)
    model.requires_grad_(True).train()
    steps = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (model, generator)]
    for step in range(4):
        real, fake = pictures(step).requires_grad_(), generator(torch.randn(2, 4, 8, 8))
        judged = loss.discriminator(
            model(real), model(fake.detach()), real_images=real if step % 4 == 0 else None
        )
        steps[0].zero_grad()
        judged.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        steps[0].step()
        steps[1].zero_grad()
        matched = feature_matching_loss(backbone(fake), backbone(real), paired=False)
        (loss.generator(model(fake)) + matched).backward()
        assert all(p.grad.abs().max() > 0 for p in generator.parameters())
        steps[1].step()
    assert state_sha256(backbone._frozen_network) == before
    assert not any(p.requires_grad for p in backbone._frozen_network.parameters())


class TestShapes:
    @settings(max_examples=10)
    @given(st.integers(1, 3), st.integers(32, 70), st.integers(32, 70))
    def test_one_map_or_one_number_per_level(self, batch, height, width):
        images = pictures(0, batch, height, width)
        maps = build().eval().backbone(images)
        patch = build().eval()(images)
        assert [x.shape for x in patch] == [(batch, 1, *m.shape[2:]) for m in maps]
        assert [x.shape for x in build(heads="global").eval()(images)] == [(batch, 1)] * 3

    @pytest.mark.parametrize("mixing", ["none", "channels", "scales"])
    def test_mixing_changes_what_heads_see(self, mixing):
        model = build(mixing=mixing)
        widths = [head.body[0].in_channels for head in model.heads]
        expected = {
            "none": list(_backbone(num_levels=3).channels),
            "channels": [3, 6, 12],
            "scales": [3, 3, 6],
        }
        assert widths == expected[mixing]
        assert [m.shape[2] for m in model(pictures(0))] == (
            [16, 8, 4] if mixing == "scales" else [8, 4, 2]
        )
        narrow = build(mixing=mixing, mixing_expand=False)
        if mixing != "none":
            assert {head.body[0].in_channels for head in narrow.heads} == {3}

    def test_levels(self):
        whole, some = build(), build(levels=[0, 2])
        assert len(some.heads) == 2
        sizes = [x.shape for x in whole(pictures(0))]
        assert [x.shape for x in some(pictures(0))] == [sizes[0], sizes[2]]


class TestRelations:
    @pytest.mark.parametrize("heads", ["patch", "global"])
    def test_images_are_judged_one_by_one_in_evaluation(self, heads):
        model = build(dtype=torch.float64, num_classes=3, heads=heads).eval()
        images, ids = pictures(0, 3, dtype=torch.float64), torch.tensor([0, 2, 1])
        together = model(images, ids)
        for i in range(3):
            for one, every in zip(model(images[i : i + 1], ids[i : i + 1]), together, strict=True):
                assert_close64(one, every[i : i + 1], scale=100)

    def test_a_global_head_judges_the_mean_of_what_a_patch_head_judges(self):
        patch = build(dtype=torch.float64, num_classes=3, spectral_norm=False).eval()
        pooled = build(
            dtype=torch.float64, num_classes=3, spectral_norm=False, heads="global"
        ).eval()
        state = patch.state_dict()
        for name, value in pooled.state_dict().items():
            if name.endswith("score.weight"):
                state[name] = state[name].reshape(value.shape)
        pooled.load_state_dict(state)
        images, ids = pictures(0, dtype=torch.float64), torch.tensor([2, 0])
        for one, other in zip(patch(images, ids), pooled(images, ids), strict=True):
            assert_close64(one.mean((2, 3)), other, scale=100)

    @pytest.mark.parametrize("heads", ["patch", "global"])
    def test_ids_are_one_hot_weights_and_weights_mix(self, heads):
        model = build(dtype=torch.float64, num_classes=3, heads=heads).eval()
        images = pictures(0, dtype=torch.float64)
        eye = torch.eye(3, dtype=torch.float64)
        ids = torch.tensor([2, 0])
        hot = [model(images, eye[torch.full((2,), k)]) for k in range(3)]
        for dtype in (torch.uint8, torch.int32, torch.int64):
            for one, other in zip(
                model(images, ids.to(dtype)), zip(*hot, strict=True), strict=True
            ):
                assert_close64(one[0], other[2][0])
                assert_close64(one[1], other[0][1])
        # weights that sum to 1: the mean of the logits, since the logits are linear in them
        mixed = model(images, torch.tensor([[0.5, 0.2, 0.3]] * 2, dtype=torch.float64))
        for level, found in enumerate(mixed):
            wanted = 0.5 * hot[0][level] + 0.2 * hot[1][level] + 0.3 * hot[2][level]
            assert_close64(found, wanted, scale=100)

    def test_no_class_leaves_the_unconditional_score(self):
        model = build(dtype=torch.float64, num_classes=3).eval()
        images = pictures(0, dtype=torch.float64)
        nothing = model(images, torch.zeros(2, 3, dtype=torch.float64))
        for head, features, logits in zip(
            model.heads, model.backbone(images), nothing, strict=True
        ):
            assert_close64(logits, head.score(head.body(features)))

    def test_classes_matter_and_each_head_learns_them(self):
        model = build(num_classes=3)
        logits = model(pictures(0), torch.tensor([0, 1]))
        sum(x.square().sum() for x in logits).backward()
        for head in model.heads:
            slope = head.classes.parametrizations.weight.original.grad
            assert slope[:, :2].abs().max() > 0


def test_spectral_norm_is_on_every_layer_or_on_none():
    def layers(model):
        return [m for m in model.heads.modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    normed = build(num_classes=3)
    assert len(layers(normed)) == 3 * 4
    for layer in layers(normed):
        # fifteen steps of the power method find the norm of small matrices up to a few percent
        assert torch.linalg.matrix_norm(effective_weight(layer).flatten(1), 2).item() < 1.2
    plain = build(num_classes=3, spectral_norm=False)
    assert not any(hasattr(layer, "parametrizations") for layer in layers(plain))


def test_the_frozen_network_is_left_out_and_its_hash_is_saved():
    model = build(mixing="scales")
    assert not any("network" in name for name, _ in model.named_parameters())
    assert all(name.startswith("heads.") for name, _ in model.named_parameters())
    saved = model.state_dict()
    assert any(name.startswith("mixing.") for name in saved)
    assert "backbone._extra_state" in saved


def test_a_trainable_backbone_is_trained():
    torch.manual_seed(0)
    backbone = ConditionedBackbone("test_resnet", pretrained=False, num_levels=2, frozen=False)
    model = ProjectedDiscriminator(backbone, head_channels=2)
    sum(x.square().sum() for x in model(pictures(0))).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in backbone.parameters())


def test_channels_last_and_repr():
    model = build().eval()
    images = pictures(0)
    last = images.to(memory_format=torch.channels_last)
    for one, other in zip(model(images), model(last), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert "levels=[0, 1, 2]" in repr(model)


def test_bad_ids_on_other_devices_turn_nan():
    model = build(num_classes=3).eval()
    classes = model._class_weights(torch.tensor([0, 2]), pictures(0))
    assert_equal(classes, torch.eye(3)[[0, 2]])
    # where values cannot be looked at, as on a GPU, nothing is read out of bounds
    images = pictures(0)
    mapped = torch.func.vmap(lambda ids: model._class_weights(ids, images))
    found = mapped(torch.tensor([[0, 3], [-1, 1]]))
    assert found[0, 1].isnan().all()
    assert found[1, 0].isnan().all()
    assert_equal(found[1, 1], torch.eye(3)[1])


@pytest.mark.parametrize(
    ("error", "parts", "options", "ids"),
    [
        pytest.param(
            InputError,
            ["class_ids must be None with num_classes=0", "Tensor"],
            {},
            torch.tensor([0, 1]),
            id="ids-without-classes",
        ),
        pytest.param(
            DTypeError, ["class_ids must", "NoneType"], {"num_classes": 3}, None, id="no-ids"
        ),
        pytest.param(
            InputError,
            ["class_ids must be in [0, 3)", "got 3 at (1,)"],
            {"num_classes": 3},
            torch.tensor([0, 3]),
            id="id-out-of-range",
        ),
        pytest.param(
            InputError,
            ["class_ids must be in [0, 3)", "got -1"],
            {"num_classes": 3},
            torch.tensor([-1, 0]),
            id="negative-id",
        ),
        pytest.param(
            InputError,
            ["class_ids must have shape (B=2, K=3)", "(2, 4)"],
            {"num_classes": 3},
            torch.zeros(2, 4),
            id="weights-of-other-classes",
        ),
        pytest.param(
            DTypeError,
            ["class_ids must hold integer ids", "float32"],
            {"num_classes": 3},
            torch.zeros(2),
            id="float-ids",
        ),
    ],
)
def test_bad_classes(error, parts, options, ids):
    with pytest.raises(error) as caught:
        build(**options)(pictures(0), ids)
    assert_message(caught.value, "ProjectedDiscriminator: ", "; got ", *parts)


class _Pools(nn.Module):
    """Maps of the right widths and sizes."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, images):
        return [
            nn.functional.avg_pool2d(images, 8 * 2**level).repeat(1, width, 1, 1)[:, :width]
            for level, width in enumerate(self.channels)
        ]


@pytest.mark.compile
def test_compiled_equals_eager():
    model = build(num_classes=3, levels=[1]).eval()
    # the backbone has a test of its own, and takes long to compile
    model.backbone = _Pools(model.backbone.channels)
    images, ids = pictures(0), torch.tensor([0, 2])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(images, ids), model(images, ids), strict=True):
        torch.testing.assert_close(one, other)
