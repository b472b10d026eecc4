"""The command line. Each verb is one function; tyro turns its signature into options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dpsims.errors import (
    BackboneError,
    CheckpointError,
    DataError,
    DTypeError,
    InputError,
    NonFiniteError,
)
from dpsims_reference.config import OFFICIAL, Config, DataConfig
from dpsims_reference.evaluation_options import InstrumentOptions, Protocol
from dpsims_reference.experiments import experiment
from dpsims_reference.presets import PRESETS, preset

PresetName = Literal["ade20k", "coco_stuff", "cityscapes", "tiny"]
_EXPECTED = (
    BackboneError,
    CheckpointError,
    DataError,
    DTypeError,
    InputError,
    ModuleNotFoundError,
    NonFiniteError,
)


@dataclass
class Train:
    """Train a model.

    Start from a preset and change any of its numbers: ``--preset tiny --data photos
    --optim.steps 500``. Ctrl-C and SIGTERM save; ``--resume RUN`` goes on.
    """

    preset: PresetName = "tiny"
    """Where the numbers come from."""
    experiment: str | None = None
    """A row of the paper's tables, such as table5/ccm_csm, instead of a preset; the verb
    experiments lists them."""
    size: Literal["tiny", "paper"] = "tiny"
    """Networks of an experiment: those that a CPU trains, on scenes, or the paper's."""
    steps: int | None = None
    """Training steps; short for --optim.steps."""
    data: str | None = None
    """"photos", "scenes", with --data.root "ade20k", "coco_stuff", "cityscapes", or a folder with
    images/ and labels/. None keeps the preset's."""
    out: Path | None = None
    """Folder of the run: log, samples, checkpoints. None is runs/train, or the resumed run's."""
    resume: Path | None = None
    """Run to continue, with its configuration: RUN, RUN@best or RUN@STEP."""
    discard_later: bool = False
    """Remove the checkpoints above the one that is resumed, to go on in the same folder."""
    allow_change: tuple[str, ...] = ()
    """Settings that may differ from the resumed run's, such as config.optim.steps."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when there is a device."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that stay, newest first; the best one stays beside them."""
    keep_best: str | None = None
    """Figure that decides which checkpoint is the best: a loss such as g_pixel, or min:NAME,
    max:NAME, where NAME may be a figure of the evaluation such as heldout.frechet."""
    picture_every: int = 500
    """Steps between sample grids."""
    shard_backbones: bool = False
    """Let many processes share the weights of the frozen networks: less memory, more traffic."""
    timeout: float = 1800.0
    """Seconds that one of many processes waits for the others before all fail."""
    diagnose_every: int = 0
    """Steps between diagnoses (gates, noise per scale, features before and after conditioning);
    0 for none."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass
class Sample:
    """Generate images from label maps with a trained run."""

    run: Path
    """Folder of the run; RUN@best or RUN@STEP takes another checkpoint than the newest."""
    labels: Path
    """A PNG label map, or a folder of them."""
    out: Path = Path("samples")
    """Folder for the PNGs."""
    num_noises: int = 4
    """Images per map."""
    interpolate: int = 0
    """Steps from the first noise to the second; 0 for none."""
    seed: int = 0
    """Decides every noise."""
    instances: Path | None = None
    """Folder of instance PNGs, for models trained with them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to generate."""


@dataclass
class Export:
    """Write a trained generator as one file for other programs: torch.export or ONNX."""

    run: tyro.conf.Positional[Path]
    """Folder of the run; RUN@best or RUN@STEP takes another checkpoint than the newest."""
    out: Path
    """The file, .pt2 or .onnx; a card of its inputs goes beside it."""
    format: Literal["torch", "onnx"] = "torch"
    """torch is read by torch.export.load; onnx runs without torch."""


@dataclass
class Evaluate:
    """Measure a trained run: FID, KID, mIoU, diversity, speed, with a card and pictures.

    Works under torchrun, where every process measures its share of the images.
    """

    run: Path
    """Folder of the run; RUN@best or RUN@STEP takes another checkpoint than the newest."""
    out: Path | None = None
    """Folder for eval_card.json and the pictures; None is RUN/evaluation."""
    split: Literal["auto", "train", "heldout"] = "auto"
    """Which images; auto takes heldout ones where there are."""
    instruments: Annotated[InstrumentOptions, tyro.conf.arg(name="")] = field(
        default_factory=InstrumentOptions
    )
    protocol: Annotated[Protocol, tyro.conf.arg(name="")] = field(default_factory=Protocol)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


@dataclass
class Experiments:
    """List the rows of the paper's tables that train can run, with the paper's numbers."""

    table: str | None = None
    """Only this table, such as table5."""


@dataclass
class Diagnose:
    """Look inside a trained run: gates, noise per scale, conditioning of the features."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path | None = None
    """Where to write diagnosis.txt and the pictures; None is the run's folder."""
    num_maps: int = 4
    """Label maps to look at."""
    num_noises: int = 4
    """Noises per map."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


@dataclass
class Replay:
    """Run the step of a crash-step-N folder again and tell where values stop being finite."""

    folder: tyro.conf.Positional[Path]
    """The folder that the crashed run left."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


@dataclass
class Plan:
    """Predict memory, time and energy of a training run, without a GPU and without data."""

    preset: PresetName = "ade20k"
    """Where the numbers come from."""
    gpu: Literal["a100", "h100", "h200"] = "h100"
    """The GPU."""
    gpus: tuple[int, ...] = (8,)
    """Number of GPUs; several numbers make one column each."""
    batch: tuple[int, ...] | None = None
    """Images per step over all GPUs, one number for each of --gpus or one for all; None takes the
    configuration's."""
    utilisation: float = 0.4
    """Share of the GPU's peak arithmetic rate that a step reaches."""
    rst: bool = False
    """Print the comparison as a reStructuredText table."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass
class PseudoLabels:
    """Label a folder of photographs by clustering pretrained features."""

    folder: tyro.conf.Positional[Path]
    """Folder of PNG or JPEG files."""
    classes: int = 8
    """Number of classes to find."""
    out: Path | None = None
    """Where labels/ goes; None is the folder itself."""
    seed: int = 0
    """Seed of the clustering."""


@dataclass
class CheckData:
    """Check a folder with images/ and labels/, or an official data set, before training on it."""

    folder: tyro.conf.Positional[Path]
    """The folder."""
    name: Literal["folder", "ade20k", "coco_stuff", "cityscapes"] = "folder"
    """What the folder holds."""
    workers: int = 0
    """Processes that read the label maps of an official data set."""
    partial: bool = False
    """Accept an official data set of which some images are missing."""
    num_classes: int | None = None
    """Number of classes you mean to train; None suggests one."""
    ignore_index: int = 255
    """Id of unlabelled pixels."""


@dataclass
class Demo:
    """Train the tiny model on two photographs and write the pictures and figures."""

    out: Path = Path("runs/demo")
    """Folder of the run."""
    seed: int = 0
    """Seed of the run."""
    minutes: float = 8.0
    """Longest training time."""
    steps: int | None = None
    """Training steps; None takes as many as fit into the minutes on this machine."""


def parse_train(arguments: Sequence[str]) -> Train:
    """The options of ``train``, with the named preset's or experiment's numbers as defaults.

    Raises:
        InputError: Both are named, or there is no such experiment.
    """
    name, row = _value_of("--preset", arguments), _value_of("--experiment", arguments)
    config = preset(name) if name in PRESETS else preset("tiny")
    if row is not None:
        if name is not None:
            msg = f"train: preset must not be given beside an experiment; got {name!r} and {row!r}"
            raise InputError(msg)
        size = _value_of("--size", arguments)
        config = experiment(row).config("paper" if size == "paper" else "tiny")
    return tyro.cli(Train, args=list(arguments), default=Train(config=config), prog=_prog("train"))


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


def parse_plan(arguments: Sequence[str]) -> Plan:
    """The options of ``plan``, with the named preset's numbers as defaults."""
    name = _value_of("--preset", arguments)
    default = Plan(config=preset(name if name in PRESETS else "ade20k"))
    return tyro.cli(Plan, args=list(arguments), default=default, prog=_prog("plan"))


_VERBS = {
    "train": Train,
    "sample": Sample,
    "export": Export,
    "evaluate": Evaluate,
    "experiments": Experiments,
    "diagnose": Diagnose,
    "replay": Replay,
    "plan": Plan,
    "pseudo-labels": PseudoLabels,
    "check-data": CheckData,
    "demo": Demo,
}
# verbs whose defaults depend on a preset
_PARSERS: dict[str, Callable[[Sequence[str]], Any]] = {"train": parse_train, "plan": parse_plan}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb. Expected faults end with one line on standard error and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] not in _VERBS:
        print(_overview())
        wants_help = not arguments or arguments[0] in ("-h", "--help")
        sys.exit(0 if wants_help else 2)
    verb, rest = arguments[0], arguments[1:]
    from dpsims_reference import verbs

    try:
        parse = _PARSERS.get(verb)
        options = parse(rest) if parse else tyro.cli(_VERBS[verb], args=rest, prog=_prog(verb))
        verbs.RUNNERS[type(options)](options)
    except _EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("left at once; a checkpoint that was saved before is whole", file=sys.stderr)
        sys.exit(130)


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


def _prog(verb: str) -> str:
    return f"python -m dpsims_reference {verb}"


def _overview() -> str:
    lines = ["usage: python -m dpsims_reference VERB [options]", ""]
    for name, options in _VERBS.items():
        summary = (options.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:<14} {summary}")
    return "\n".join([*lines, "", "VERB --help lists the options."])
