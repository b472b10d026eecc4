import copy

import pytest
import torch
from support import assert_equal, assert_message

from dpsims.errors import DTypeError, InputError
from dpsims.nn import SPADE, effective_weight
from dpsims_reference.oasis import OasisDiscriminator, OasisGenerator

K, Z = 5, 3


def make_generator(**options):
    torch.manual_seed(0)
    defaults = {"channels": (8, 8, 4), "latent_dim": Z, "spade_hidden": 4}
    return OasisGenerator(K, **(defaults | options)).eval()


def draw(batch=2, extra=0):
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, K, (batch, 8, 12), generator=rng)
    labels[:, 0] = 255
    maps = torch.randn(batch, extra, 8, 12, generator=rng) if extra else None
    return labels, torch.randn(batch, Z, generator=rng), maps


def normalised(module):
    return {name for name, m in module.named_modules() if hasattr(m, "parametrizations")}


def test_sizes_of_the_generator():
    output = make_generator(extra_channels=2)(*draw(extra=2))
    assert output.images.shape == (2, 3, 8, 12)
    assert output.features.shape == (2, 4, 8, 12)
    assert output.images.abs().max() <= 1


def test_images_of_a_batch_are_independent_and_latents_count():
    generator = make_generator()
    labels, latents, _ = draw()
    with torch.no_grad():
        whole = generator(labels, latents).images
        torch.testing.assert_close(generator(labels[1:], latents[1:]).images, whole[1:])
        other = generator(labels, -latents).images
    assert (whole - other).abs().max() > 1e-3


def test_every_input_counts_at_every_size():
    generator = make_generator(extra_channels=2)
    labels, latents, extra = draw(extra=2)
    with torch.no_grad():
        before = generator(labels, latents, extra).images
        changed = labels.clone()
        # a pixel that only the last block sees
        changed[:, 3, 5] = (changed[:, 3, 5] + 1) % K
        assert not torch.equal(generator(changed, latents, extra).images, before)
        assert not torch.equal(generator(labels, latents, 2 * extra).images, before)


def test_spectral_norm_is_where_oasis_has_it():
    blocks = {f"blocks.{i}.{conv}" for i in range(2) for conv in ("conv_0", "conv_1")}
    assert normalised(make_generator()) == blocks | {"blocks.1.conv_s"}
    assert normalised(make_generator(spectral_norm=False)) == set()
    spades = [m for m in make_generator().modules() if isinstance(m, SPADE)]
    assert spades
    assert not any(normalised(spade) for spade in spades)
    discriminator = OasisDiscriminator(K, channels=2)
    found = normalised(discriminator)
    assert "head" not in found
    # 12 blocks of two convolutions, and a shortcut wherever the width changes
    assert len(found) == 24 + sum("conv_s" in name for name in found)
    assert normalised(OasisDiscriminator(K, channels=2, spectral_norm=False)) == set()
    conv = discriminator.encoder[3].conv_1
    norm = torch.linalg.matrix_norm(effective_weight(conv).detach().flatten(1), 2)
    # fifteen steps of the power method
    assert norm == pytest.approx(1, abs=0.05)


def test_the_discriminator_has_nothing_frozen():
    discriminator = OasisDiscriminator(K, channels=2)
    images = torch.randn(1, 3, 64, 128, requires_grad=True)
    assert discriminator.encode(images) == []
    assert discriminator.frozen_channels == ()
    assert discriminator.identity["model"] == "oasis"
    logits = discriminator(images)
    assert logits.shape == (1, K + 1, 64, 128)
    logits.square().sum().backward()
    assert images.grad.abs().max() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())


@pytest.mark.parametrize(
    "make",
    [make_generator, lambda: OasisDiscriminator(K, channels=2).eval()],
    ids=["generator", "discriminator"],
)
def test_copies_and_states_give_the_same(make):
    def run(module):
        if isinstance(module, OasisGenerator):
            return module(*draw()).images
        return module(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))

    first, other = make(), make()
    for parameter in other.parameters():
        torch.nn.init.ones_(parameter)
    other.load_state_dict(first.state_dict())
    with torch.no_grad():
        for same in (other, copy.deepcopy(first)):
            assert_equal(run(same), run(first))


LABELS, LATENTS, _ = draw()


@pytest.mark.parametrize(
    ("args", "error", "parts"),
    [
        pytest.param(
            (LABELS[:, :7], LATENTS), InputError, ["labels", "divisible by 2", "7x12"], id="size"
        ),
        pytest.param((LABELS, LATENTS[:1]), InputError, ["latents", "(2, 3)"], id="batch"),
        pytest.param((LABELS, LATENTS[:, :2]), InputError, ["latents", "(2, 2)"], id="width"),
        pytest.param((LABELS.float(), LATENTS), DTypeError, ["labels"], id="float-labels"),
        pytest.param((LABELS, LATENTS, None, LATENTS), InputError, ["noise", "None"], id="noise"),
    ],
)
def test_bad_inputs_of_the_generator(args, error, parts):
    with pytest.raises(error) as caught:
        make_generator()(*args)
    assert_message(caught.value, "OasisGenerator: ", "must", *parts)


@pytest.mark.parametrize(
    ("images", "parts"),
    [
        (torch.zeros(1, 3, 64, 96), ["images", "divisible by 64", "64x96"]),
        (torch.zeros(1, 1, 64, 64), ["images", "C=3"]),
    ],
)
def test_bad_inputs_of_the_discriminator(images, parts):
    with pytest.raises(InputError) as caught:
        OasisDiscriminator(K, channels=2)(images)
    assert_message(caught.value, "OasisDiscriminator: ", "must", *parts)


@pytest.mark.parametrize(("options", "name"), [({"channels": 0}, "channels")])
def test_bad_settings_of_the_discriminator(options, name):
    with pytest.raises(InputError) as caught:
        OasisDiscriminator(K, **options)
    assert_message(caught.value, f"OasisDiscriminator: {name} must")
