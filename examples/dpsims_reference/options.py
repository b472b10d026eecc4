"""The options of every verb of the command line: one dataclass each, whose texts are the help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dpsims_reference.config import Config
from dpsims_reference.evaluation_options import InstrumentOptions, Protocol

PresetName = Literal["ade20k", "coco_stuff", "cityscapes", "tiny"]


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
    given: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Settings that the command line names; a resumed run keeps its own for all others."""
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
