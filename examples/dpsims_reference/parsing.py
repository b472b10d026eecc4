"""From arguments to a configuration: the preset or experiment named, then every option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import tyro

from dpsims.errors import InputError
from dpsims_reference.config import OFFICIAL, Config, DataConfig
from dpsims_reference.experiments import experiment
from dpsims_reference.options import Plan, Train
from dpsims_reference.presets import PRESETS, preset


def parse_train(arguments: Sequence[str]) -> Train:
    """The options of ``train``, with the named preset's or experiment's numbers as defaults.

    Raises:
        InputError: Both are named, or one beside a run to resume, or there is no such experiment.
    """
    name, row = _value_of("--preset", arguments), _value_of("--experiment", arguments)
    config = preset(name) if name in PRESETS else preset("tiny")
    if row is not None:
        if name is not None:
            msg = f"train: preset must not be given beside an experiment; got {name!r} and {row!r}"
            raise InputError(msg)
        size = _value_of("--size", arguments)
        config = experiment(row).config("paper" if size == "paper" else "tiny")
    options = tyro.cli(
        Train, args=list(arguments), default=Train(config=config), prog=program("train")
    )
    named = [flag for flag in ("--preset", "--experiment", "--size") if _value_of(flag, arguments)]
    if options.resume is not None and named:
        msg = (
            f"train: resume must be given without {named[0]}: a resumed run has its own settings; "
            f"got {' '.join(arguments)}"
        )
        raise InputError(msg)
    return replace(options, given=_given(arguments, options.data))


def _given(arguments: Sequence[str], data: str | None) -> tuple[str, ...]:
    """Names of the settings that the arguments name, such as ``config.optim.steps``."""
    groups = {field.name for field in fields(Config)}
    names = {"config.optim.steps"} if _value_of("--steps", arguments) else set()
    if data is not None:
        names.add("config.data.name")
        names |= set() if data in ("photos", "scenes", *OFFICIAL) else {"config.data.root"}
    for argument in arguments:
        name = argument.removeprefix("--").split("=")[0].replace("-", "_").replace(".no_", ".")
        if argument.startswith("--") and name.split(".")[0] in groups:
            names.add(f"config.{name}")
    return tuple(sorted(names - {"config.data"}))


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value that follows ``flag``, the last one if it is repeated; ``None`` without it."""
    found = None
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option == flag:
            found = value
        elif option.startswith(f"{flag}="):
            found = option.removeprefix(f"{flag}=")
    return found


def train_config(options: Train) -> Config:
    """The configuration that the options of ``train`` describe."""
    config = replace(options.config, data=data_config(options.config, options.data))
    if options.steps is None:
        return config
    return replace(config, optim=replace(config.optim, steps=options.steps))


def resumed_config(saved: Config, options: Train) -> Config:
    """A saved run's configuration with the settings that were given."""
    given = train_config(options)
    for name in options.given:
        _, *path, last = name.split(".")
        source: Any = getattr(given, path[0]) if path else given
        value: Any = getattr(source, last)
        if path:
            last, value = path[0], replace(getattr(saved, path[0]), **{last: value})
        saved = replace(saved, **{last: value})
    return saved


def parse_plan(arguments: Sequence[str]) -> Plan:
    """The options of ``plan``, with the named preset's numbers as defaults."""
    name = _value_of("--preset", arguments)
    default = Plan(config=preset(name if name in PRESETS else "ade20k"))
    return tyro.cli(Plan, args=list(arguments), default=default, prog=program("plan"))


def data_config(config: Config, data: str | None) -> DataConfig:
    """The configuration's data, or what ``--data`` names instead."""
    if data is None:
        return config.data
    if data == "photos":
        return replace(config.data, name="photos")
    if data == "scenes":
        return replace(config.data, name="scenes")
    if data in OFFICIAL:
        known = preset(data).data
        return replace(
            config.data,
            name=known.name,
            num_classes=known.num_classes,
            ignore_index=known.ignore_index,
        )
    if config.data.name in OFFICIAL:
        # a folder's unlabelled pixels have the id that its labels.json says, which is 255 if none
        return replace(config.data, name="folder", root=data, ignore_index=255)
    return replace(config.data, name="folder", root=data)


def program(verb: str) -> str:
    """What a user types to run ``verb``."""
    return f"python -m dpsims_reference {verb}"
