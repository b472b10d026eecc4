"""How the image sizes that a network takes are found out."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dpsims.errors import BackboneError
from dpsims.nn._image_sizes import SizeRule, check_takes, find_size_rule, size_options


class Picky(nn.Module):
    """Takes what a rule allows, and complains as timm does otherwise."""

    def __init__(self, allows, error=RuntimeError):
        super().__init__()
        self.allows, self.error, self.asked = allows, error, []

    def forward(self, images):
        height, width = images.shape[-2:]
        assert images.is_meta
        assert not self.training
        self.asked.append((height, width))
        if not self.allows(height, width):
            raise self.error("size")


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, ValueError])
@pytest.mark.parametrize(
    ("kind", "allows", "expected"),
    [
        ("anything", lambda h, w: True, SizeRule(minimum=32)),
        ("large", lambda h, w: min(h, w) >= 75, SizeRule(minimum=80)),
        ("patches", lambda h, w: h % 4 == w % 4 == 0, SizeRule(multiple=4, minimum=32)),
        ("strides", lambda h, w: h % 32 == w % 32 == 0, SizeRule(multiple=32, minimum=32)),
        (
            "windows",
            lambda h, w: h % 64 == w % 64 == 0,
            SizeRule(multiple=64, minimum=64),
        ),
        ("native-only", lambda h, w: (h, w) == (224, 224), SizeRule(resize=(224, 224))),
        ("squares", lambda h, w: h == w, SizeRule(resize=(224, 224))),
        ("nothing", lambda h, w: False, SizeRule(resize=(224, 224))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_mildest_rule_that_the_network_takes(kind, allows, expected, error):
    network = Picky(allows, error)
    rule = find_size_rule(network, (224, 224), finest=4, coarsest=32, minimum=32)
    assert rule == expected
    assert all(min(size) >= 32 for size in network.asked)


def test_other_errors_are_not_hidden():
    with pytest.raises(KeyError):
        find_size_rule(
            Picky(lambda h, w: False, KeyError), (64, 64), finest=4, coarsest=32, minimum=32
        )


@pytest.mark.parametrize("side", [32, 80, 224])
def test_the_odd_probe_is_neither_square_nor_whole(side):
    network = Picky(lambda h, w: min(h, w) >= side)
    find_size_rule(network, (224, 224), finest=4, coarsest=32, minimum=side)
    height, width = network.asked[-1]
    assert height != width
    assert height % 2 or width % 2
    assert torch.Size((height, width)).numel() > side * side


class Counting(nn.Module):
    """Looks at values, of which the meta device has none."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def forward(self, images):
        self.asked += 1
        return images[: int(images.sum())]


def test_a_network_that_needs_values_is_asked_once_and_gets_its_native_size():
    network = Counting()
    rule = find_size_rule(network, (768, 768), finest=16, coarsest=16, minimum=96)
    assert rule == SizeRule(resize=(768, 768))
    assert network.asked == 1
    # nobody can tell
    check_takes(network, "counting", (96, 96))


def test_a_size_that_the_network_refuses_is_named():
    network = Picky(lambda h, w: h == w)
    check_takes(network, "squares", (32, 32))
    with pytest.raises(BackboneError) as caught:
        check_takes(network, "squares", (32, 64))
    assert str(caught.value).endswith("a size that squares takes; got (32, 64) (size)")


def test_a_network_of_one_size_that_cannot_be_built_for_another():
    config = SimpleNamespace(input_size=(3, 224, 224), fixed_input_size=True)
    assert size_options(Counting(), config, (224, 224)) == ({}, (224, 224))
    with pytest.raises(BackboneError) as caught:
        size_options(Counting(), config, (64, 64))
    assert str(caught.value).endswith("input_size must be (224, 224) for this model; got (64, 64)")
