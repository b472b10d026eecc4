"""Runs on disk: which checkpoint of which run is meant, and where a run may go."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from dpsims.errors import CheckpointError, InputError
from dpsims_reference.checkpoints import Checkpoint, CheckpointStore
from dpsims_reference.checkpoints.reader import candidates

CHECKPOINTS = "checkpoints"
_WHICH = re.compile(r"(.+)@(best|[0-9]{1,18})")


class RunName(NamedTuple):
    """A run's folder, and which of its checkpoints is meant: a step, the best or the newest."""

    folder: Path
    which: int | str

    def __str__(self) -> str:
        return str(self.folder) if self.which == "latest" else f"{self.folder}@{self.which}"


def parse_run(run: str | Path) -> RunName:
    """Read ``RUN``, ``RUN@best`` or ``RUN@STEP``; a folder of the whole name comes first.

    Example:
        >>> parse_run("runs/city@best").which, parse_run("runs/city@4000").which
        ('best', 4000)
        >>> parse_run("runs/me@home").folder.name
        'me@home'
    """
    match = _WHICH.fullmatch(str(run))
    if match is None or Path(run).is_dir():
        return RunName(Path(run), "latest")
    return RunName(Path(match[1]), "best" if match[2] == "best" else int(match[2]))


def read_run(owner: str, run: str | Path) -> Checkpoint:
    """The checkpoint that ``run`` names, as :func:`parse_run` reads it.

    Args:
        owner: The callable that speaks.
        run: A run's folder, ``RUN@best`` or ``RUN@STEP``.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    name = parse_run(run)
    folder = name.folder / CHECKPOINTS
    if isinstance(name.which, int) and folder.is_dir():
        return CheckpointStore.read_step(folder, name.which)
    read = CheckpointStore.read_best if name.which == "best" else CheckpointStore.read_latest
    checkpoint = read(folder) if folder.is_dir() else None
    if checkpoint is None:
        kind = "a best checkpoint" if name.which == "best" else "a checkpoint"
        msg = f"{owner}: run must hold {kind}; got none in {folder}"
        raise CheckpointError(msg)
    return checkpoint


def steps_of(folder: Path) -> list[int]:
    """Steps of the checkpoints of the run in ``folder``, oldest first; needs no lock."""
    if not (folder / CHECKPOINTS).is_dir():
        return []
    return [step for step, _ in reversed(candidates("steps_of", folder / CHECKPOINTS))]


def choose_folder(
    out: Path | None, resume: Path | None, *, discard_later: bool = False
) -> tuple[Path, Checkpoint | None]:
    """Where a run goes, and the checkpoint that it continues from.

    Args:
        out: The wanted folder; ``None`` is ``runs/train``, or that of the resumed run.
        resume: The run to continue, as :func:`parse_run` reads it, or ``None``. In another folder
            than its own it branches off, and its log goes along.
        discard_later: Whether checkpoints above the resumed one may be removed.

    Raises:
        InputError: ``discard_later`` without ``resume``, or with another folder.
        CheckpointError: The folder holds checkpoints that the run would mix with its own.
    """
    if resume is None:
        folder = Path("runs/train") if out is None else out
        _check_empty(folder, "to go on with it, give it to --resume")
        if discard_later:
            msg = "train: discard_later must go with resume; got no run to resume"
            raise InputError(msg)
        return folder, None
    checkpoint, (source, which) = read_run("train", resume), parse_run(resume)
    if out is None or out.resolve() == source.resolve():
        later = [step for step in steps_of(source) if step > checkpoint.step]
        if later and which != "latest" and not discard_later:
            msg = (
                f"train: resume must be the newest checkpoint of {source}; got step "
                f"{checkpoint.step}, below {later[-10:]}: name another folder by --out, or remove "
                "the later ones by --discard-later"
            )
            raise CheckpointError(msg)
        return source, checkpoint
    if discard_later:
        msg = f"train: discard_later must go with the resumed run's own folder; got out {out}"
        raise InputError(msg)
    _check_empty(out, "a run that branches off needs a folder of its own")
    if (source / "log.jsonl").is_file():
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / "log.jsonl", out / "log.jsonl")
    return out, checkpoint


def _check_empty(folder: Path, advice: str) -> None:
    if steps := steps_of(folder):
        msg = (
            f"train: out must be a folder without checkpoints ({advice}); "
            f"got {folder} with steps {steps[-10:]}"
        )
        raise CheckpointError(msg)
