"""Draw the diagrams of the architecture page: ``python docs/diagrams.py`` writes _static/*.svg.

Widths and sizes are those of the preset ``ade20k``.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples")]

# found through the path above
from drawing import Drawing, times  # noqa: E402

from dpsims_reference import preset  # noqa: E402

G, D = preset("ade20k").generator, preset("ade20k").discriminator
NUM_CLASSES = preset("ade20k").data.num_classes
SIZE = preset("ade20k").data.image_size[0]
# of ConvNeXt-L, the preset's backbone
BACKBONE_CHANNELS = (192, 384, 768, 1536)
BACKBONE_STRIDES = (4, 8, 16, 32)

LEVELS = len(G.channels) - 1
COARSE = SIZE >> (LEVELS - 1)
# boxes of one row of the generator and of the discriminator: the first one's top, and the step
TOP, STEP, HALF = 82, 57, 22


def generator() -> Drawing:
    """Fig. 3: the label pyramid downwards, the image branch upwards."""
    draw = Drawing(
        "generator",
        592,
        "The generator",
        f"Left, downwards: a label map becomes {LEVELS} maps of {G.pyramid_channels} channels, "
        f"from {SIZE} to {COARSE} pixels; those of {G.attention_size} pixels and less blend in "
        "noise tokens and attend over themselves. Right, upwards: features made of the small "
        f"label map pass {LEVELS} SPADE residual blocks, each conditioned on the map of its size "
        "joined with the coarsest map, and become the image.",
    )
    _pyramid(draw)
    _image_branch(draw)
    draw.dot(19, 578)
    draw.words(28, 582, "joins the coarsest map", side="left")
    draw.key(212, 572, "noise", "noise enters here")
    return draw


def _pyramid(draw: Drawing) -> None:
    left, width = 24, 128
    middle = left + width / 2
    draw.frame((16, 68), (160, 68), (160, 434), (16, 434))
    draw.words(88, 427, "LabelMapPyramid", link="dpsims.nn.LabelMapPyramid")
    draw.box(left, 4, width, ["label map", f"{SIZE} × {SIZE} ids"], "data")
    for level in range(LEVELS):
        size, y = SIZE >> level, TOP + STEP * level
        attends = size <= G.attention_size
        name = "inject, attend" if attends else "Conv2d, stride 2" if level else "LabelConv2d"
        shape = times(G.pyramid_channels, size, size)
        link = None if level else "dpsims.nn.LabelConv2d"
        draw.wire((middle, y - 13 if level else 48), (middle, y))
        draw.box(left, y, width, [name, shape], "noise" if attends else "trained", link=link)
        if attends:
            draw.wire((8, y + HALF), (left, y + HALF), kind="noise")
    words = ["NoiseMapper", f"{times(G.num_tokens, G.token_dim)} tokens"]
    draw.box(left, 452, width, words, "noise", link="dpsims.nn.NoiseMapper")
    finest = (SIZE // G.attention_size).bit_length() - 1
    top = TOP + STEP * finest + HALF
    draw.wire((left, 474), (8, 474), (8, top), kind="noise", arrow=False)
    draw.box(left, 514, width, ["latent z", f"{G.latent_dim} numbers"], "data")
    draw.wire((middle, 514), (middle, 496))


def _image_branch(draw: Drawing) -> None:
    left, width, middle = 212, 140, 282
    draw.box(left, 4, width, ["image", times(3, SIZE, SIZE)], "data")
    draw.words(276, 69, "LeakyReLU, Conv2d", side="right")
    for level in range(LEVELS):
        size, y = SIZE >> level, TOP + STEP * level
        # the blocks run from coarse to fine
        words = ["SPADEResBlock", times(G.channels[LEVELS - level], size, size)]
        draw.box(left, y, width, words, link="dpsims.nn.SPADEResBlock")
        draw.wire((middle, y), (middle, y - 13 if level else 48))
        draw.wire((152, y + HALF), (left, y + HALF))
        draw.dot(186, y + HALF)
    last = TOP + STEP * (LEVELS - 1)
    draw.wire((186, last + HALF), (186, TOP + HALF), arrow=False)
    words = ["LabelConv2d", times(G.channels[0], COARSE, COARSE)]
    draw.box(left, 452, width, words, link="dpsims.nn.LabelConv2d")
    draw.wire((middle, 452), (middle, last + 2 * HALF))
    draw.box(left, 514, width, ["label map", f"resized, {COARSE} × {COARSE} ids"], "data")
    draw.wire((middle, 514), (middle, 496))


def discriminator() -> Drawing:
    """Fig. 2: the frozen backbone downwards, the trained decoder upwards."""
    draw = Drawing(
        "discriminator",
        450,
        "The discriminator",
        "Left, downwards: a frozen ConvNeXt-L makes maps of every 4, 8, 16 and 32 pixels. Middle: "
        "each is squashed by a sigmoid and normalised. Right, upwards: trained residual blocks "
        "join the maps from coarse to fine; at the top they meet two residual blocks that look at "
        f"the image itself, and give {NUM_CLASSES + 1} logits per pixel, the fake class last.",
    )
    _full_resolution(draw)
    draw.frame((12, 150), (222, 150), (222, 402), (12, 402))
    backbone, conditioner = "dpsims.nn.ConditionedBackbone", "dpsims.nn.FeatureConditioner"
    draw.words(20, 166, "ConditionedBackbone", side="left", link=backbone)
    draw.wire((8, 26), (3, 26), (3, 194), (18, 194))
    for level, stride in enumerate(BACKBONE_STRIDES):
        y = 172 + STEP * level
        shape = times(BACKBONE_CHANNELS[level], SIZE // stride, SIZE // stride)
        draw.box(18, y, 94, [f"stage {level + 1}", shape], "frozen")
        draw.box(132, y, 80, ["Feature-", "Conditioner"], "frozen", link=conditioner)
        draw.box(236, y, 112, ["residual block", shape])
        draw.wire((112, y + HALF), (132, y + HALF))
        draw.wire((212, y + HALF), (236, y + HALF))
        draw.wire((292, y), (292, y - 13 if level else 136))
        if level:
            draw.wire((65, y - 13), (65, y))
    draw.key(12, 414, "frozen", "nothing learns")
    draw.key(130, 414, "trained", "trained, with spectral norm")
    draw.words(12, 442, "FeatureConditioner: sigmoid, norm without parameters", side="left")
    return draw


def _full_resolution(draw: Drawing) -> None:
    block, shape = "residual block", times(D.full_res_channels, SIZE, SIZE)
    draw.box(8, 4, 116, ["image", times(3, SIZE, SIZE)], "data")
    draw.box(232, 4, 120, ["logits", times(NUM_CLASSES + 1, SIZE, SIZE)], "data")
    draw.frame((12, 66), (356, 66), (356, 402), (228, 402), (228, 144), (12, 144))
    draw.words(40, 83, "UNetDecoder", side="left", link="dpsims.nn.UNetDecoder")
    draw.box(18, 92, 94, [block, shape])
    draw.box(124, 92, 94, [block, shape])
    draw.box(236, 92, 112, [block, times(D.head_channels, SIZE, SIZE)])
    draw.wire((30, 48), (30, 92))
    draw.wire((112, 114), (124, 114))
    draw.wire((218, 114), (236, 114))
    draw.wire((292, 92), (292, 48))
    draw.words(286, 83, "Conv2d 1×1", side="right")


def injector() -> Drawing:
    """Eqs. 1 and 2, Fig. S1: at one level, with the paper's sizes."""
    draw = Drawing(
        "injector",
        600,
        "The cross-attention noise injector",
        "Right: a latent becomes a few tokens, and these become keys and values. Left: every "
        "pixel of the features becomes a query, attends over the tokens and reads their values. "
        "What it reads is projected back to the features' width, multiplied by a gate that starts "
        "at 0, and added to the features.",
    )
    mapper, owner = "dpsims.nn.NoiseMapper", "dpsims.nn.CrossAttentionNoiseInjector"
    draw.box(208, 4, 144, ["latents", f"B × Z, Z = {G.latent_dim}"], "data")
    draw.box(208, 68, 144, ["NoiseMapper", "on a sphere, then an MLP"], "noise", link=mapper)
    draw.box(208, 132, 144, ["tokens", f"B × T × D, {times(G.num_tokens, G.token_dim)}"], "data")
    whole = times(G.pyramid_channels, G.attention_size, G.attention_size)
    draw.box(24, 117, 144, ["features", "B × C × H × W", whole], "data")
    draw.wire((280, 48), (280, 68))
    draw.wire((280, 112), (280, 132))
    draw.frame((4, 196), (356, 196), (356, 530), (4, 530))
    draw.words(348, 522, "CrossAttentionNoiseInjector", side="right", link=owner)
    _attention(draw)
    draw.box(40, 424, 190, ["output: Conv2d 1×1", f"C × H × W, {whole}"])
    draw.ring(259, 446, "×")
    draw.wire((230, 446), (250, 446))
    draw.words(298, 442, "gate, one", side="left")
    draw.words(298, 457, "number: 0", side="left")
    draw.wire((294, 446), (268, 446))
    draw.wire((259, 455), (259, 496), (105, 496))
    draw.ring(96, 496, "+")
    draw.wire((24, 146), (14, 146), (14, 496), (87, 496))
    draw.wire((96, 505), (96, 548))
    draw.box(24, 548, 144, ["output", "B × C × H × W"], "data")
    return draw


def _attention(draw: Drawing) -> None:
    """Eq. 1, between the inputs and the output projection."""
    width, pixels = G.pyramid_channels // 2, G.attention_size**2
    read, token = times(pixels, width), times(G.num_tokens, width)
    draw.box(40, 216, 112, ["query", "Conv2d 1×1", f"N × d, {read}"])
    draw.box(192, 216, 78, ["key", "Linear", token])
    draw.box(276, 216, 76, ["value", "Linear", token])
    for x in (96, 232, 314):
        draw.wire((x, 176), (x, 216))
    weights = f"N × T, {times(pixels, G.num_tokens)}"
    draw.box(40, 296, 230, ["softmax of query · key / √d", weights], "step")
    draw.wire((96, 275), (96, 296))
    draw.wire((232, 275), (232, 296))
    draw.box(40, 360, 312, ["weights · value", f"N × d, {read}"], "step")
    draw.wire((155, 340), (155, 360))
    draw.wire((314, 275), (314, 360))
    draw.wire((135, 404), (135, 424))


def level() -> Drawing:
    """Table S2's "pyramid block": what one level with attention computes."""
    draw = Drawing(
        "level",
        330,
        "One level of the pyramid with attention",
        "In order: strided convolution, norm, GELU; noise injection, norm, GELU; self-attention, "
        "GELU, norm; pointwise convolution.",
    )
    rows = [
        ("Conv2d 3×3, stride 2", None),
        ("BatchNorm2d, GELU", "BatchNorm2d"),
        ("CrossAttentionNoiseInjector", "CrossAttentionNoiseInjector"),
        ("BatchNorm2d, GELU", "BatchNorm2d"),
        ("SelfAttention2d, GELU", "SelfAttention2d"),
        ("BatchNorm2d", "BatchNorm2d"),
        ("Conv2d 1×1", None),
    ]
    for row, (name, link) in enumerate(rows):
        y, kind = 30 + 38 * row, "noise" if "Noise" in name else "trained"
        draw.box(75, y, 210, [name], kind, link=link and f"dpsims.nn.{link}", height=26)
        draw.wire((180, y - 12), (180, y))
    draw.words(180, 12, "map of the level before")
    draw.wire((180, 284), (180, 302))
    draw.words(180, 318, f"{G.pyramid_channels} channels, to its SPADE block and the next level")
    draw.wire((345, 119), (285, 119), kind="noise")
    draw.words(318, 113, "tokens")
    return draw


DIAGRAMS = (generator, discriminator, injector, level)

if __name__ == "__main__":
    for diagram in DIAGRAMS:
        drawing = diagram()
        path = HERE / "_static" / f"diagram-{drawing.name}.svg"
        path.write_text(drawing.svg(), encoding="utf-8")
