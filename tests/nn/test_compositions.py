"""Whole networks from the literature, put together here from the public parts.

OASIS's generator is made of ``SPADEResBlock`` and ``LabelConv2d``, and gives the published code's
numbers. Its discriminator takes ordinary torch layers, because ``UNetDecoder`` has other blocks.
Its outputs show that the network whose size is counted is the right one; of dpsims it uses the
spectral norm, whose buffers are counted.

Of DP_GAN, only the groups that follow from the public parts are counted: the generator's residual
blocks, whose SPADE has no hidden layer, and the encoder and decoder of the discriminator, which
are of OASIS's size. Its label pyramid is not ``LabelMapPyramid`` and its two further heads have no
counterpart in dpsims, so both, and the totals, are left to code that builds them.
"""

from __future__ import annotations

import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from support import Golden, assert_golden64, golden_cases
from torch import nn
from torch.nn import functional as F

from dpsims.nn.labels import LabelConv2d
from dpsims.nn.spade import SPADE, SPADEResBlock
from dpsims.nn.spectral import spectral_normalize_

# inputs of the blocks and output of the last one, in units of the narrowest
GENERATOR_WIDTHS = (16, 16, 16, 8, 4, 2, 1)
# inputs of the blocks and output of the last one
ENCODER_WIDTHS = (3, 128, 128, 256, 256, 512, 512)
# outputs of the blocks, coarse to fine
DECODER_WIDTHS = (512, 256, 256, 128, 128, 64)


class OasisGenerator(nn.Module):
    """Six SPADE blocks, each with the label map and the noise, doubling the size in between."""

    def __init__(self, num_classes, noise_channels, channels, kernel_size):
        super().__init__()
        widths = [channels * factor for factor in GENERATOR_WIDTHS]
        cond_channels = noise_channels + num_classes
        self.num_classes = num_classes
        self.fc = LabelConv2d(num_classes, widths[0], extra_channels=noise_channels)
        self.body = nn.ModuleList(
            SPADEResBlock(wide, narrow, cond_channels, kernel_size=kernel_size)
            for wide, narrow in pairwise(widths)
        )
        self.conv_img = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, labels, noise):
        """All blocks' outputs, the input of the last convolution, and its output before tanh."""
        dtype = self.conv_img.weight.dtype
        onehot = (labels[:, None] == torch.arange(self.num_classes).view(-1, 1, 1)).to(dtype)
        maps = noise.to(dtype)[:, :, None, None].expand(-1, -1, *labels.shape[1:])
        cond = torch.cat([maps, onehot], dim=1)
        step = 2 ** (len(self.body) - 1)
        # the first pixel of every square: what "nearest" picks at whole factors
        coarse = maps[:, :, ::step, ::step] if noise.shape[1] else None
        hidden = self.fc(labels[:, ::step, ::step], coarse)
        blocks = []
        for block in self.body:
            if blocks:
                hidden = F.interpolate(hidden, scale_factor=2, mode="nearest")
            hidden = block(hidden, F.interpolate(cond, size=hidden.shape[2:], mode="nearest"))
            blocks.append(hidden)
        features = F.leaky_relu(hidden, 0.2)
        return blocks, features, self.conv_img(features)


class Half(nn.Module):
    """A residual block that halves or doubles the size; layers are named as in the file."""

    def __init__(self, wide, narrow, resize, *, image=False):
        super().__init__()
        up = isinstance(resize, nn.Upsample)
        before = [] if image else [nn.LeakyReLU(0.2)]
        conv = nn.Conv2d(wide, narrow, 3, padding=1)
        self.conv1 = nn.Sequential(*before, resize, conv) if up else nn.Sequential(*before, conv)
        self.conv2 = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(narrow, narrow, 3, padding=1))
        self.conv_s = nn.Conv2d(wide, narrow, 1) if wide != narrow else nn.Identity()
        self.resize, self.up = resize, up

    def forward(self, x):
        shortcut = self.conv_s(self.resize(x))
        out = self.conv2(self.conv1(x))
        return shortcut + (out if self.up else self.resize(out))


class OasisDiscriminator(nn.Module):
    """A UNet of residual blocks; the fake class comes first."""

    def __init__(self, num_classes):
        super().__init__()
        pairs = pairwise(ENCODER_WIDTHS)
        self.body_down = nn.ModuleList(
            Half(wide, narrow, nn.AvgPool2d(2), image=wide == 3) for wide, narrow in pairs
        )
        # every block but the deepest also reads the encoder's map of its size
        skips = zip(DECODER_WIDTHS[:-1], ENCODER_WIDTHS[-2:0:-1], strict=True)
        wides = [ENCODER_WIDTHS[-1], *(below + skip for below, skip in skips)]
        self.body_up = nn.ModuleList(
            Half(wide, narrow, nn.Upsample(scale_factor=2))
            for wide, narrow in zip(wides, DECODER_WIDTHS, strict=True)
        )
        self.layer_up_last = nn.Conv2d(DECODER_WIDTHS[-1], num_classes + 1, 1)

    def forward(self, images):
        """All encoder blocks' outputs, and the logits."""
        downs = []
        for block in self.body_down:
            downs.append(block(downs[-1] if downs else images))
        hidden = self.body_up[0](downs[-1])
        for block, skip in zip(self.body_up[1:], downs[-2::-1], strict=True):
            hidden = block(torch.cat([skip, hidden], dim=1))
        return downs, self.layer_up_last(hidden)


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
        ours[name.replace("mlp_gamma", "modulation")] = value
    return ours


@pytest.mark.parametrize("case", golden_cases("e_oasis_generator_tiny"))
def test_generator_of_our_parts_gives_oasis_images(case):
    golden = Golden(case)
    options = golden.options
    noise = golden.f64("z") if "z" in golden else torch.empty(1, 0)
    sizes = (options["semantic_nc"], noise.shape[1], options["channels_G"], options["spade_ks"])
    generator = OasisGenerator(*sizes).double().train(options["train"])
    ours = our_parameters(peer_parameters(golden), noise.shape[1])
    assert set(ours) == set(dict(generator.named_parameters()))
    generator.load_state_dict(ours, strict=False)
    blocks, features, pre = generator(golden.tensor("label"), noise)
    stacked = [block.flatten(1) for block in blocks]
    assert_golden64(torch.stack([block.mean(1) for block in stacked]), golden, "block_mean")
    assert_golden64(torch.stack([block.abs().mean(1) for block in stacked]), golden, "block_abs")
    assert_golden64(features[:, :, ::4, ::4], golden, "feat_sub")
    assert_golden64(pre[:, :, ::4, ::4], golden, "pre_sub")
    assert_golden64(pre.mean((2, 3)), golden, "pre_mean")
    assert_golden64(pre.abs().mean((2, 3)), golden, "pre_abs")
    assert_golden64(pre.tanh()[:, :, ::4, ::4], golden, "out_sub")


def recipe(name, shape):
    """The weights of the file are a formula of the parameter's name, rounded to float32."""
    scale = 2 * np.sqrt(3 / np.prod(shape[1:])) if len(shape) > 1 else 0.1
    index = np.arange(np.prod(shape), dtype=np.int64)
    draw = (index * 40503 + zlib.crc32(name.encode())) % 65521 / 65521 - 0.5
    return torch.from_numpy((scale * draw).astype(np.float32)).view(shape)


@pytest.mark.parametrize("case", golden_cases("e_oasis_discriminator_recipe"))
def test_discriminator_of_plain_layers_gives_oasis_logits(case):
    golden = Golden(case)
    discriminator = OasisDiscriminator(golden.options["semantic_nc"])
    shapes = {name: tuple(value.shape) for name, value in discriminator.named_parameters()}
    listed = {f"{name} {shape}" for name, shape in shapes.items()}
    assert listed == set(golden.options["param_names"])
    discriminator.load_state_dict({name: recipe(name, shape) for name, shape in shapes.items()})
    with torch.no_grad():
        downs, logits = discriminator.double()(golden.tensor("x", torch.float64))
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


def paper_size(row, options):
    """OASIS's network of one row of a file of counts, without memory."""
    dataset, part = row.split("/")
    num_classes = next(int(sizes[1]) for sizes in options["datasets"] if sizes[0] == dataset)
    with torch.device("meta"):
        if part == "D":
            return OasisDiscriminator(num_classes)
        noise_channels, kernel_size = options["z_dim"], options["spade_ks"]
        return OasisGenerator(num_classes, noise_channels, options["channels_G"], kernel_size)


def group_counts(golden):
    """The file's counts as {row: {group: count}}."""
    groups = {}
    for name, count in zip(golden.options["groups"], golden.arrays["group_counts"], strict=True):
        row, group = name.split(":")
        groups.setdefault(row, {})[group] = int(count)
    return groups


def our_groups(network, names):
    return {name: num_parameters(network.get_submodule(name)) for name in names}


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
            _, out = network(torch.empty(batch, channels, height, width))
        else:
            labels = torch.empty(batch, height, width, dtype=torch.int64)
            *_, out = network(labels, torch.empty(batch, OASIS.options["z_dim"]))
    assert list(out.shape) == OASIS.arrays["out_shape"][index].tolist()


# the buffers do not depend on the number of classes
@pytest.mark.parametrize(("index", "row"), ROWS[:2])
def test_normalised_oasis_has_the_published_buffers(index, row):
    network = paper_size(row, OASIS.options)
    shared = 0
    if row.endswith("D"):
        # the last layer of the discriminator has no spectral norm in the published code
        skip = [network.layer_up_last]
    else:
        # nor have the generator's first and last layer, and what is inside a SPADE
        skip = [module for module in network.modules() if isinstance(module, SPADE)]
        skip += [network.fc, network.conv_img]
        # OASIS keeps the running mean and variance of a block's input twice, where it has a
        # SPADE on the shortcut; they are equal, and SPADEResBlock keeps them once
        shared = sum(2 * block.in_channels for block in network.body if block.conv_s is not None)
    spectral_normalize_(network, skip=skip)
    assert num_buffers(network) + shared == OASIS.arrays["n_buffers"][index]


@pytest.mark.parametrize("row", DP_GAN.options["rows"])
def test_the_parts_that_dp_gan_shares_have_the_published_size(row):
    groups = group_counts(DP_GAN)[row]
    names = [name for name in groups if name.startswith("body")]
    if row.endswith("D"):
        assert len(names) == len(ENCODER_WIDTHS) - 1 + len(DECODER_WIDTHS)
        ours = our_groups(paper_size(row, DP_GAN.options), names)
    else:
        # 128 maps go straight into the convolution for gamma and beta
        widths = [DP_GAN.options["channels_G"] * factor for factor in GENERATOR_WIDTHS]
        with torch.device("meta"):
            blocks = [
                SPADEResBlock(wide, narrow, 128, hidden_channels=None)
                for wide, narrow in pairwise(widths)
            ]
        ours = {f"body.{i}": num_parameters(block) for i, block in enumerate(blocks)}
    assert ours == {name: groups[name] for name in names}
