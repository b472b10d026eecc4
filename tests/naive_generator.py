"""The reference generator as it would be written first: the oracle of every rewrite.

One-hot labels, the resized coarse map joined to every level, three convolutions in every SPADE
with a norm of its own, features enlarged before they are normalised, and all weights normalised in
the forward pass. It reads the weights of a :class:`Generator` or an :class:`OasisGenerator`.
"""

import torch
from torch.nn import functional as F

from dpsims.nn import effective_weight, sphere_normalize
from dpsims.nn.labels import resize_labels

SLOPE = 0.2


def onehot(labels, num_classes, like):
    ids = torch.arange(num_classes, device=labels.device).view(-1, 1, 1)
    return (labels[:, None] == ids).to(like.dtype)


def conv(layer, x, rows=None):
    weight, bias = effective_weight(layer), layer.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    stride = layer.stride if isinstance(layer.stride, int) else layer.stride[0]
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)


def norm(layer, x):
    if not hasattr(layer, "running_mean"):
        return layer(x)
    args = layer.running_mean, layer.running_var, layer.weight, layer.bias
    return F.batch_norm(x, *(None if a is None else a.to(x.dtype) for a in args), eps=layer.eps)


def attend(q, k, v):
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v


def rows_of(x):
    return x.flatten(2).mT


def residual(layer, x, read):
    return x + layer.gate * conv(layer.output, read.mT.unflatten(2, x.shape[2:]))


def inject(layer, x, tokens):
    q = rows_of(conv(layer.query, x))
    k, v = (tokens @ effective_weight(linear).mT for linear in (layer.key, layer.value))
    return residual(layer, x, attend(q, k, v))


def self_attend(layer, x):
    return residual(layer, x, attend(*rows_of(conv(layer.qkv, x)).chunk(3, -1)))


def pyramid(part, maps, tokens):
    levels = []
    for first, block in zip(part.convs, part.blocks, strict=True):
        maps = F.gelu(norm(block.norm, conv(first, maps)))
        if hasattr(block, "inject"):
            if block.inject is not None:
                maps = F.gelu(norm(block.inject_norm, inject(block.inject, maps, tokens)))
            if block.attend is not None:
                maps = F.gelu(self_attend(block.attend, maps))
            maps = norm(block.attend_norm, maps)
        maps = conv(block.project, maps)
        levels.append(maps)
    return levels


def spade(part, first_norm, x, cond):
    if part.hidden is not None:
        cond = F.relu(conv(part.hidden, cond))
    gamma = conv(part.modulation, cond, slice(None, part.channels))
    beta = conv(part.modulation, cond, slice(part.channels, None))
    return norm(first_norm, x) * (1 + gamma) + beta


def block(part, x, cond):
    hidden = conv(part.conv_0, F.leaky_relu(spade(part.spade_0, part.norm_0, x, cond), SLOPE))
    hidden = F.leaky_relu(spade(part.spade_1, part.norm_1, hidden, cond), SLOPE)
    shortcut = x
    if part.conv_s is not None:
        shortcut = conv(part.conv_s, spade(part.spade_s, part.norm_0, x, cond))
    return shortcut + conv(part.conv_1, hidden)


def mapped(mapper, latents):
    hidden = sphere_normalize(latents, radius=mapper.radius)
    for index, linear in enumerate(mapper.layers[::2]):
        hidden = F.gelu(hidden) if index else hidden
        hidden = F.linear(hidden, effective_weight(linear), linear.bias)
    return hidden.unflatten(1, (mapper.num_tokens, mapper.token_dim))


def generate(generator, labels, latents, extra=None, noise=None):
    like = latents
    num_classes = generator.stem.num_classes
    beside = [maps for maps in (extra, noise) if maps is not None]
    tokens = None
    if generator.mapper is not None:
        tokens = mapped(generator.mapper, latents)
    else:
        spread = sphere_normalize(latents, radius=generator.latent_radius)
        beside.append(spread[:, :, None, None].expand(-1, -1, *labels.shape[1:]))
    maps = torch.cat([onehot(labels, num_classes, like), *beside], 1)
    levels = pyramid(generator.pyramid, maps, tokens)
    size = levels[-1].shape[2:]
    small = [onehot(resize_labels(labels, size), num_classes, like)]
    if extra is not None:
        small.append(F.adaptive_avg_pool2d(extra, size))
    x = conv(generator.stem, torch.cat(small, 1))
    for part, level in zip(generator.blocks, reversed(levels), strict=True):
        x = F.interpolate(x, size=level.shape[2:], mode="nearest")
        whole = F.interpolate(levels[-1], size=level.shape[2:], mode="bilinear")
        x = block(part, x, torch.cat((level, whole), 1))
    return conv(generator.to_rgb, F.leaky_relu(x, SLOPE))


def generate_oasis(generator, labels, latents, extra=None):
    step = 2 ** (len(generator.blocks) - 1)
    beside = latents[:, :, None, None].expand(-1, -1, *labels.shape[1:])
    if extra is not None:
        beside = torch.cat((beside, extra), 1)
    whole = onehot(labels, generator.num_classes, latents)
    x = conv(generator.stem, torch.cat((whole, beside), 1)[:, :, ::step, ::step])
    cond = torch.cat((beside, whole), 1)
    for part in generator.blocks:
        small = cond[:, :, ::step, ::step]
        x = block(part, F.interpolate(x, size=small.shape[2:], mode="nearest"), small)
        step //= 2
    return torch.tanh(conv(generator.to_rgb, F.leaky_relu(x, SLOPE)))


def randomise(generator, seed=0):
    """Give every number that starts at a special value another one: nothing folds by chance."""
    rng = torch.Generator().manual_seed(seed)

    def draw(like):
        return torch.rand(like.shape, generator=rng, dtype=torch.float64).to(like)

    with torch.no_grad():
        for name, value in [*generator.named_parameters(), *generator.named_buffers()]:
            last = name.rpartition(".")[2]
            if last == "gate":
                value.copy_(0.5 + draw(value))
            elif last == "running_mean":
                value.copy_(draw(value) - 0.5)
            elif last == "running_var":
                value.copy_(0.25 + draw(value))
            elif last == "u" or last == "v":
                value.copy_(F.normalize(draw(value) - 0.5, dim=0))
            elif "norm" in name and last in ("weight", "bias"):
                value.copy_(draw(value) + (0.5 if last == "weight" else -0.5))
    return generator.eval()
