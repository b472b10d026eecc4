"""What a generator of the paper's size may cost, counted on tensors without values.

A convolution or matrix product counts two operations a multiply-add. Picking rows of a table,
which replaces the convolution of a label map, only adds: it counts as nothing, like all
elementwise work. A kernel is a call of an ATen operator that computes or copies numbers: no view,
and no allocation.
"""

from collections import Counter

import naive_generator as naive
import pytest
import torch
from folded_parts import take_fused
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dpsims_reference.generator import build_generator
from dpsims_reference.oasis import OasisGenerator
from dpsims_reference.prepared import PreparedGenerator, prepare_generator
from dpsims_reference.presets import preset

# what neither computes nor copies
WITHOUT_WORK = ("empty", "detach", "lift_fresh", "_unsafe_view", "promote_types", "scalar_tensor")


class Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name().removeprefix("aten::")
        if not function.is_view and not name.startswith(WITHOUT_WORK):
            self.calls.append(name)
        return result


def gigaflops(run):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def kernels(run):
    with torch.no_grad(), Kernels() as counter:
        run()
    return counter.calls


SIZES = {"ade20k": (256, 256), "coco_stuff": (256, 256), "cityscapes": (256, 512)}


def inputs(name="ade20k"):
    size, extra = SIZES[name], None
    if name != "ade20k":
        extra = torch.zeros(1, 2, *size)
    return torch.zeros(1, *size, dtype=torch.uint8), torch.zeros(1, 64), extra


@pytest.fixture(scope="module")
def generators():
    with torch.device("meta"):
        return {name: build_generator(preset(name)).eval() for name in SIZES}


def conv(outputs, channels, kernel, pixels):
    return 2 * outputs * channels * kernel**2 * pixels / 1e9


def level_sizes(name):
    height, width = SIZES[name]
    return [(height >> level, width >> level) for level in range(6)]


def hidden_width(level):
    """Of all SPADEs of the block that works at this level."""
    # the widths change behind the blocks of the four finest levels: these have a shortcut
    return 128 * (3 if level < 4 else 2)


def low_rank_saving(name):
    """The half of SPADE's hidden convolutions that reads the enlarged coarsest map."""
    saved = 0
    *larger, (h, w) = level_sizes(name)
    for level, (height, width) in enumerate(larger):
        outputs = hidden_width(level)
        saved += conv(outputs, 64, 3, height * width)
        # the taps on the small map, its columns, its rows
        saved -= conv(9 * outputs, 64, 1, h * w)
        saved -= conv(outputs * h * 3, w * 3, 1, width)
        saved -= conv(outputs, h * 3, 1, height * width)
    return saved


def lookup_saving(name):
    sizes = level_sizes(name)
    num_classes = {"ade20k": 151, "coco_stuff": 183, "cityscapes": 35}[name]
    finest, coarsest = (height * width for height, width in (sizes[0], sizes[-1]))
    return conv(64, num_classes, 3, finest) + conv(1024, num_classes, 3, coarsest)


def shortcut_saving(name):
    """The shift of the shortcut's SPADE has the output's width, and passes no 1x1 convolution."""
    widths = [(1024, 512), (512, 256), (256, 128), (128, 64)]
    sizes = level_sizes(name)[3::-1]
    return sum(
        conv(wide - narrow, 128, 3, height * width)
        for (wide, narrow), (height, width) in zip(widths, sizes, strict=True)
    )


def attention_saving(name):
    """Queries and what joins the map again meet 8 tokens instead of every pixel."""
    sizes = [size for size in level_sizes(name) if size[0] <= 64]
    pixels = sum(height * width for height, width in sizes)
    # two projections of 64 to 32 channels go; scores and reading take 64 channels instead of 32
    gone = 2 * pixels * 64 * 32 * 2 - 2 * pixels * 8 * (64 - 32) * 2
    folding = len(sizes) * 2 * 8 * 32 * 64 * 2
    return (gone - folding) / 1e9


@pytest.mark.parametrize("name", SIZES)
def test_operations_of_an_image(generators, name):
    generator = generators[name]
    with torch.device("meta"):
        given = inputs(name)
        prepared = PreparedGenerator(generator)
        first = gigaflops(lambda: naive.generate(generator, *given))
        built = gigaflops(lambda: generator(*given))
        folded = gigaflops(lambda: prepared(*given))
    # every gigaflop that went is one that a rewrite says it removes
    saved = lookup_saving(name) + low_rank_saving(name) + attention_saving(name)
    assert first - built == pytest.approx(saved, rel=1e-6)
    attention = 2 * 4 * 2e-3
    assert built - folded == pytest.approx(shortcut_saving(name), abs=0.1 + attention)
    budget = {
        "ade20k": (352.4, 304.2, 286.0),
        "coco_stuff": (355.0, 304.4, 286.2),
        "cityscapes": (691.8, 613.7, 577.3),
    }
    for found, most in zip((first, built, folded), budget[name], strict=True):
        assert found <= most


def test_operations_of_another_noise(generators):
    with torch.device("meta"):
        labels, latents, _ = inputs()
        prepared = PreparedGenerator(generators["ade20k"])
        condition = prepared.condition(labels)
        again = gigaflops(lambda: prepared.sample(condition, latents))
        whole = gigaflops(lambda: prepared(labels, latents))
        once = gigaflops(lambda: prepared.condition(labels))
    assert again <= 248.0
    assert again + once == pytest.approx(whole, rel=1e-9)


def test_operations_of_oasis():
    with torch.device("meta"):
        labels, latents, _ = inputs()
        generator = OasisGenerator(151).eval()
        prepared = prepare_generator(generator)
        assert gigaflops(lambda: naive.generate_oasis(generator, labels, latents)) <= 388.8
        assert gigaflops(lambda: generator(labels, latents)) <= 259.1
        assert gigaflops(lambda: prepared(labels, latents)) <= 241.0


def test_kernels_of_an_image(generators):
    generator = generators["ade20k"]
    with torch.device("meta"):
        given = inputs()
        prepared = PreparedGenerator(generator)
        condition = prepared.condition(given[0])
        folded = kernels(lambda: prepared(*given))
        once = kernels(lambda: prepared.condition(given[0]))
        again = kernels(lambda: prepared.sample(condition, given[1]))
    assert len(folded) <= 222
    assert len(once) <= 30
    assert len(again) <= 192


KINDS = {
    "convolution": "convolutions",
    "dpsims::spade_modulate": "modulate",
    "dpsims::inject_folded": "inject",
    "scaled_dot_product_attention": "attend",
    "gelu": "activate",
    "relu_": "activate",
    "leaky_relu": "activate",
    "add_.Tensor": "sums of a block",
    "bmm": "products",
    "mm": "products",
    "addmm": "products",
    "baddbmm": "products",
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_of_an_image_where_the_fused_operators_run(generators, layout, monkeypatch):
    take_fused(monkeypatch)
    attend, counters = F.scaled_dot_product_attention, []

    def as_one(*args):
        # a tensor without values goes the way of plain products
        calls = counters[-1].calls
        before = len(calls)
        result = attend(*args)
        calls[before:] = ["scaled_dot_product_attention"]
        return result

    def count(run):
        counters.append(Kernels())
        with torch.no_grad(), counters[-1]:
            run()
        return Counter(KINDS.get(name, "others") for name in counters[-1].calls)

    monkeypatch.setattr(F, "scaled_dot_product_attention", as_one)
    with torch.device("meta"):
        given = inputs()
        prepared = PreparedGenerator(generators["ade20k"]).to(memory_format=layout)
        condition = prepared.condition(given[0])
        folded = count(lambda: prepared(*given))
        again = count(lambda: prepared.sample(condition, given[1]))
    # labels are looked up pixel by pixel: in the other format they need a copy
    others = 41 if layout is torch.channels_last else 43
    assert folded == {
        "convolutions": 50,
        "products": 27,
        "activate": 19,
        "modulate": 16,
        "sums of a block": 10,
        "inject": 4,
        "attend": 4,
        "others": others,
    }
    assert folded.total() == 130 + others
    assert again.total() == 143
