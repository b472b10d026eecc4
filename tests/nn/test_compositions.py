"""Whole networks from the literature, put together from the public parts.

OASIS's networks are those of ``dpsims_reference.oasis``, made of ``SPADEResBlock``,
``LabelConv2d`` and ordinary torch layers. They give the published code's numbers.

Of DP_GAN, only the groups that follow from the public parts are counted: the generator's residual
blocks, whose SPADE has no hidden layer, and the encoder and decoder of the discriminator, which
are of OASIS's size. Its label pyramid is not ``LabelMapPyramid`` and its two further heads have no
counterpart in dpsims, so both, and the totals, are left to code that builds them.
"""

from __future__ import annotations

import re
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from support import Golden, assert_golden64, golden_cases
from torch import nn

from dpsims.nn.labels import LabelConv2d
from dpsims.nn.spade_block import SPADEResBlock
from dpsims_reference.oasis import OasisDiscriminator, OasisGenerator

# inputs of the blocks and output of the last one, in units of the narrowest
GENERATOR_WIDTHS = (16, 16, 16, 8, 4, 2, 1)


def widths(channels):
    return tuple(channels * factor for factor in GENERATOR_WIDTHS)


def kept(module, found):
    """Put every output of ``module`` into the list ``found``."""
    module.register_forward_hook(lambda module, args, output: found.append(output))


# the numbers of the published code


def peer_parameters(golden):
    """The file's one vector, cut into the peer's named parameters."""
    names, shapes = zip(*golden.options["params"], strict=True)
    pieces = golden.tensor("params").split([int(np.prod(shape)) for shape in shapes])
    return {
        name: piece.view(shape) for name, shape, piece in zip(names, shapes, pieces, strict=True)
    }


def our_parameters(peer, noise_channels):
    """The same under our names: gamma and beta in one convolution, noise after the labels."""
    ours = {}
    for name, value in peer.items():
        if name == "fc.weight":
            value = torch.cat([value[:, noise_channels:], value[:, :noise_channels]], dim=1)
        if "mlp_beta" in name:
            continue
        if "mlp_gamma" in name:
            value = torch.cat([value, peer[name.replace("mlp_gamma", "mlp_beta")]])
        name = name.replace("norm_", "spade_").replace("mlp_shared.0", "hidden")
        name = name.replace("mlp_gamma", "modulation").replace("body", "blocks")
        ours[re.sub("^fc", "stem", name).replace("conv_img", "to_rgb")] = value
    return ours


@pytest.mark.parametrize("case", golden_cases("e_oasis_generator_tiny"))
def test_generator_of_our_parts_gives_oasis_images(case):
    golden = Golden(case)
    options = golden.options
    noise = golden.f64("z") if "z" in golden else torch.empty(1, 0, dtype=torch.float64)
    generator = OasisGenerator(
        options["semantic_nc"],
        channels=widths(options["channels_G"]),
        latent_dim=noise.shape[1],
        spade_kernel=options["spade_ks"],
        spectral_norm=False,
    )
    generator = generator.double().train(options["train"])
    ours = our_parameters(peer_parameters(golden), noise.shape[1])
    assert set(ours) == set(dict(generator.named_parameters()))
    generator.load_state_dict(ours, strict=False)
    blocks, before_tanh = [], []
    for block in generator.blocks:
        kept(block, blocks)
    kept(generator.to_rgb, before_tanh)
    images, features = generator(golden.tensor("label"), noise)
    (pre,) = before_tanh
    stacked = [block.flatten(1) for block in blocks]
    assert_golden64(torch.stack([block.mean(1) for block in stacked]), golden, "block_mean")
    assert_golden64(torch.stack([block.abs().mean(1) for block in stacked]), golden, "block_abs")
    assert_golden64(features[:, :, ::4, ::4], golden, "feat_sub")
    assert_golden64(pre[:, :, ::4, ::4], golden, "pre_sub")
    assert_golden64(pre.mean((2, 3)), golden, "pre_mean")
    assert_golden64(pre.abs().mean((2, 3)), golden, "pre_abs")
    assert_golden64(images[:, :, ::4, ::4], golden, "out_sub")


def recipe(name, shape):
    """The weights of the file are a formula of the parameter's name, rounded to float32."""
    scale = 2 * np.sqrt(3 / np.prod(shape[1:])) if len(shape) > 1 else 0.1
    index = np.arange(np.prod(shape), dtype=np.int64)
    draw = (index * 40503 + zlib.crc32(name.encode())) % 65521 / 65521 - 0.5
    return torch.from_numpy((scale * draw).astype(np.float32)).view(shape)


def peer_name(name):
    """The file's name of a parameter of the discriminator; there, layers stand in sequences."""
    # an activation comes before every convolution but the one on the image, and upsampling second
    first = "0" if name.startswith("encoder.0.") else "1" if name.startswith("encoder") else "2"
    name = name.replace("conv_0", f"conv1.{first}").replace("conv_1", "conv2.1")
    name = name.replace("encoder", "body_down").replace("decoder", "body_up")
    return name.replace("head", "layer_up_last")


@pytest.mark.parametrize("case", golden_cases("e_oasis_discriminator_recipe"))
def test_discriminator_gives_oasis_logits(case):
    golden = Golden(case)
    discriminator = OasisDiscriminator(golden.options["semantic_nc"], spectral_norm=False)
    shapes = {name: tuple(value.shape) for name, value in discriminator.named_parameters()}
    listed = {f"{peer_name(name)} {shape}" for name, shape in shapes.items()}
    assert listed == set(golden.options["param_names"])
    discriminator.load_state_dict(
        {name: recipe(peer_name(name), shape) for name, shape in shapes.items()}
    )
    downs = []
    for block in discriminator.encoder:
        kept(block, downs)
    with torch.no_grad():
        logits = discriminator.double()(golden.tensor("x", torch.float64))
    for level, down in enumerate(downs):
        assert_golden64(down.mean((2, 3)), golden, f"down{level}_mean")
    assert_golden64(logits[:, :, ::4, ::4], golden, "logits_sub")
    assert_golden64(logits.mean((2, 3)), golden, "logits_mean")
    assert_golden64(logits.abs().mean((2, 3)), golden, "logits_abs")


# sizes of the published models


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def num_buffers(module):
    return sum(value.numel() for value in module.buffers() if value.is_floating_point())


def paper_size(row, options, *, spectral_norm=False):
    """OASIS's network of one row of a file of counts, without memory."""
    dataset, part = row.split("/")
    num_classes = next(int(sizes[1]) for sizes in options["datasets"] if sizes[0] == dataset)
    with torch.device("meta"):
        if part == "D":
            return OasisDiscriminator(num_classes, spectral_norm=spectral_norm)
        return OasisGenerator(
            num_classes,
            channels=widths(options["channels_G"]),
            latent_dim=options["z_dim"],
            spade_kernel=options["spade_ks"],
            spectral_norm=spectral_norm,
        )


def group_counts(golden):
    """The file's counts as {row: {group: count}}."""
    groups = {}
    for name, count in zip(golden.options["groups"], golden.arrays["group_counts"], strict=True):
        row, group = name.split(":")
        groups.setdefault(row, {})[group] = int(count)
    return groups


def our_groups(network, names):
    """The counts of our modules under the file's names of them."""
    ours = {"body_down": "encoder", "body_up": "decoder", "body": "blocks"}
    ours |= {"fc": "stem", "conv_img": "to_rgb", "layer_up_last": "head"}
    found = {}
    for name in names:
        first, _, rest = name.partition(".")
        part = f"{ours[first]}.{rest}" if rest else ours[first]
        found[name] = num_parameters(network.get_submodule(part))
    return found


OASIS, DP_GAN = Golden("e_counts_oasis/paper_size"), Golden("e_counts_dp_gan/paper_size")


ROWS = list(enumerate(OASIS.options["rows"]))


@pytest.mark.parametrize(("index", "row"), ROWS)
def test_oasis_of_our_parts_has_the_published_size(index, row):
    network = paper_size(row, OASIS.options)
    total, in_layers = OASIS.arrays["counts"][index]
    assert num_parameters(network) == total
    kinds = (nn.Conv2d, LabelConv2d)
    layers = [layer for layer in network.modules() if isinstance(layer, kinds)]
    assert sum(num_parameters(layer) for layer in layers) == in_layers
    groups = group_counts(OASIS)[row]
    assert our_groups(network, groups) == groups


# the rows with maps that are not square
@pytest.mark.parametrize(("index", "row"), ROWS[2:])
def test_oasis_of_our_parts_has_the_published_shapes(index, row):
    network = paper_size(row, OASIS.options)
    batch, channels, height, width = OASIS.arrays["in_shape"][index].tolist()
    with torch.device("meta"):
        if row.endswith("D"):
            out = network(torch.empty(batch, channels, height, width))
        else:
            labels = torch.empty(batch, height, width, dtype=torch.int64)
            out = network(labels, torch.empty(batch, OASIS.options["z_dim"])).images
    assert list(out.shape) == OASIS.arrays["out_shape"][index].tolist()


# the buffers do not depend on the number of classes
@pytest.mark.parametrize(("index", "row"), ROWS[:2])
def test_normalised_oasis_has_the_published_buffers(index, row):
    network = paper_size(row, OASIS.options, spectral_norm=True)
    shared = 0
    if row.endswith("G"):
        # OASIS keeps the running mean and variance of a block's input twice, where it has a
        # SPADE on the shortcut; they are equal, and SPADEResBlock keeps them once
        shared = sum(2 * block.in_channels for block in network.blocks if block.conv_s is not None)
    assert num_buffers(network) + shared == OASIS.arrays["n_buffers"][index]


@pytest.mark.parametrize("row", DP_GAN.options["rows"])
def test_the_parts_that_dp_gan_shares_have_the_published_size(row):
    groups = group_counts(DP_GAN)[row]
    names = [name for name in groups if name.startswith("body")]
    if row.endswith("D"):
        network = paper_size(row, DP_GAN.options)
        assert len(names) == len(network.encoder) + len(network.decoder)
        ours = our_groups(network, names)
    else:
        # 128 maps go straight into the convolution for gamma and beta
        with torch.device("meta"):
            blocks = [
                SPADEResBlock(wide, narrow, 128, hidden_channels=None)
                for wide, narrow in pairwise(widths(DP_GAN.options["channels_G"]))
            ]
        ours = {f"body.{i}": num_parameters(block) for i, block in enumerate(blocks)}
    assert ours == {name: groups[name] for name in names}
