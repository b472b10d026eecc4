import itertools
from dataclasses import replace

import pytest
import torch
from support import assert_equal
from unit_run import NUM_CLASSES, unit_config

from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.generator import build_generator
from dpsims_reference.presets import preset


def conv(inputs, outputs, kernel, *, bias=True):
    return inputs * outputs * kernel**2 + outputs * bias


def attention_block(width, token_dim):
    """Table S2's pyramid block: cross-attention, self-attention, two more batch norms."""
    inner = width // 2
    # keys, values and the self-attention's projections have no bias; each gate is one number
    cross = conv(width, inner, 1) + 2 * token_dim * inner + conv(inner, width, 1) + 1
    own = 3 * conv(width, inner, 1, bias=False) + conv(inner, width, 1) + 1
    return cross + own + 2 * 2 * width


def generator_parameters(num_classes, extra, *, width=64, token_dim=256, tokens=8, attended=4):
    mapper = 64 * 256 + 256 + 256 * 256 + 256 + 256 * tokens * token_dim + tokens * token_dim
    # every level: a 3x3 whose bias is its batch norm's, and a 1x1 at the end
    pyramid = conv(num_classes + extra, width, 3, bias=False)
    pyramid += 5 * conv(width, width, 3, bias=False) + 6 * (2 * width + conv(width, width, 1))
    pyramid += attended * attention_block(width, token_dim)
    channels = (1024, 1024, 1024, 512, 256, 128, 64)
    stem = conv(num_classes + extra, channels[0], 3)

    def spade(inputs):
        return conv(2 * width, 128, 3) + conv(128, 2 * inputs, 3)

    blocks = 0
    for wide, narrow in itertools.pairwise(channels):
        middle = min(wide, narrow)
        blocks += spade(wide) + conv(wide, middle, 3) + spade(middle) + conv(middle, narrow, 3)
        if wide != narrow:
            blocks += spade(wide) + conv(wide, narrow, 1, bias=False)
    return mapper + pyramid + stem + blocks + conv(channels[-1], 3, 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ade20k", 73_143_435), ("coco_stuff", 73_476_363), ("cityscapes", 72_027_147)],
)
def test_generator_of_the_papers_size(name, expected):
    config = preset(name)
    height, width = config.data.image_size
    extra = 2 if config.data.instances else 0
    with torch.device("meta"):
        generator = build_generator(config)
        maps = torch.zeros(2, extra, height, width) if extra else None
        output = generator(
            torch.zeros(2, height, width, dtype=torch.uint8), torch.zeros(2, 64), maps
        )
    assert output.images.shape == (2, 3, height, width)
    assert output.features.shape == (2, 64, height, width)
    counted = sum(parameter.numel() for parameter in generator.parameters())
    assert counted == generator_parameters(config.data.num_classes, extra) == expected


def decoder_parameters(widths, num_outputs, *, full_res=128, head=256):
    def block(inputs, outputs):
        skip = conv(inputs, outputs, 1, bias=False) if inputs != outputs else 0
        return conv(inputs, outputs, 3) + conv(outputs, outputs, 1) + skip

    total, coarser = 0, 0
    for width in reversed(widths):
        total += block(width + coarser, width)
        coarser = width
    total += block(3, full_res) + block(full_res, full_res)
    return total + block(coarser + full_res, head) + conv(head, num_outputs, 1)


@pytest.mark.parametrize(
    ("name", "expected"), [("ade20k", 48_706_072), ("cityscapes", 48_676_260)]
)
def test_discriminator_of_the_papers_size(name, expected):
    config = preset(name)
    config = replace(config, discriminator=replace(config.discriminator, pretrained=False))
    height, width = config.data.image_size
    with torch.device("meta"):
        discriminator = build_discriminator(config)
        logits = discriminator(torch.zeros(1, 3, height, width))
    outputs = config.data.num_classes + 1
    assert logits.shape == (1, outputs, height, width)
    trained = sum(parameter.numel() for parameter in discriminator.parameters())
    assert trained == decoder_parameters((192, 384, 768, 1536), outputs) == expected


@pytest.fixture(scope="module")
def unit_generator():
    return build_generator(unit_config()).eval()


def test_images_of_a_batch_are_independent_in_evaluation(unit_generator):
    labels = torch.randint(0, NUM_CLASSES, (3, 32, 32))
    latents = torch.randn(3, 64)
    with torch.no_grad():
        whole = unit_generator(labels, latents).images
        alone = unit_generator(labels[1:2], latents[1:2]).images
    # float32 convolutions of another batch size may sum in another order
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-5)


def test_closed_gates_ignore_the_latents(unit_generator):
    labels = torch.randint(0, NUM_CLASSES, (1, 32, 32))
    with torch.no_grad():
        images = [unit_generator(labels, torch.randn(1, 64)).images for _ in range(2)]
    assert_equal(*images)


def test_open_gates_do_not():
    generator = build_generator(unit_config()).eval()
    gates = [p for name, p in generator.named_parameters() if name.endswith("gate")]
    assert gates
    for gate in gates:
        torch.nn.init.constant_(gate, 1.0)
    labels = torch.randint(0, NUM_CLASSES, (1, 32, 32))
    with torch.no_grad():
        first, second = (generator(labels, torch.randn(1, 64)).images for _ in range(2))
    assert (first - second).abs().max() > 1e-4


def test_spatial_noise_reaches_the_image():
    config = unit_config()
    config = replace(config, generator=replace(config.generator, spatial_noise=4))
    generator = build_generator(config).eval()
    labels, latents = torch.zeros(1, 32, 32, dtype=torch.uint8), torch.randn(1, 64)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        first, second = (
            generator(
                labels, latents, None, generator.sample_noise(1, (32, 32), generator=rng)
            ).images
            for _ in range(2)
        )
    assert (first - second).abs().max() > 1e-4


def test_spectral_norm_covers_every_weight_of_both_networks():
    config = unit_config()
    config = replace(config, generator=replace(config.generator, spectral_norm=True))
    for module in (build_generator(config), build_discriminator(config)):
        for name, layer in module.named_modules():
            weight = getattr(layer, "weight", None)
            if (
                isinstance(weight, torch.Tensor)
                and weight.dim() > 1
                and "parametrizations" not in name
            ):
                assert torch.nn.utils.parametrize.is_parametrized(layer, "weight"), name
