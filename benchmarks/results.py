"""Runs as JSON: written after every case, read back with every key checked."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dpsims.errors import InputError

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
STATUSES = ("ok", "wrong", "failed", "not available")
_NAMED = ("dpsims", "torch", "triton", "numpy")


@dataclass
class VariantResult:
    """What came of one variant.

    Attributes:
        name: The variant.
        status: ``"ok"``, ``"wrong"`` (never timed), ``"failed"`` or ``"not available"``.
        reason: Why it is not ``"ok"``.
        error: The relative error of a right one.
        seconds: One sample a round.
        wall_seconds: Wall times with launches, where they were asked for.
        peak_bytes: Most memory beyond inputs and weights.
        flops: Operations that were seen.
    """

    name: str
    status: str
    reason: str = ""
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    flops: int | None = None


@dataclass
class CaseResult:
    """One case of one run; ``process`` is the index of the process that measured it."""

    component: str
    name: str
    axes: dict[str, int | str]
    baseline: str
    tolerance: float
    unit: str
    flops: int
    bytes: int
    process: int
    variants: list[VariantResult]

    @property
    def key(self) -> str:
        """Unique name of the case."""
        return f"{self.component}/{self.name}"

    def timed(self) -> list[VariantResult]:
        """The variants that are right and have samples."""
        return [variant for variant in self.variants if variant.status == "ok"]

    def variant(self, name: str) -> VariantResult | None:
        """The variant of that name, if it is there."""
        return next((v for v in self.variants if v.name == name), None)


@dataclass
class RunResult:
    """One run; a resumed one has several processes, each with its own ceilings."""

    profile: str
    date: str
    commit: str
    dirty: bool
    device: dict[str, Any]
    threads: int
    versions: dict[str, str]
    clock: str
    processes: list[dict[str, Any]] = field(default_factory=list)
    cases: list[CaseResult] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA
    benchmark: str = "dpsims"

    def case(self, key: str) -> CaseResult | None:
        """The case of that key, if it was measured."""
        return next((case for case in self.cases if case.key == key), None)

    def ceilings(self, case: CaseResult) -> dict[str, float]:
        """The ceilings of the process that measured a case."""
        found: dict[str, float] = self.processes[case.process]["ceilings"]
        return found


def new_run(profile: str, device: torch.device, clock: str) -> RunResult:
    """An empty run of this code on this machine."""
    return RunResult(
        profile=profile,
        date=time.strftime("%Y-%m-%d"),
        commit=_git("rev-parse", "HEAD") or "unknown",
        # results and pages that a run writes do not change what it measures
        dirty=bool(_git("status", "--porcelain", "--", "dpsims", "examples", "benchmarks/*.py")),
        device=describe(device),
        threads=torch.get_num_threads(),
        versions=_versions(),
        clock=clock,
    )


def describe(device: torch.device) -> dict[str, Any]:
    """Type and name of a device, never of the machine that it is in."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return {"type": "cuda", "name": found.name, "memory_bytes": found.total_memory}
    return {"type": "cpu", "name": _processor()}


def save(run: RunResult, path: Path) -> None:
    """Write the run; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(run), indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def load(path: Path) -> RunResult:
    """Read a run.

    Raises:
        InputError: Not a file of this schema; the message names the file and the key.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"load: path must name a JSON file; got {path.name}: {error}"
        raise InputError(msg) from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        msg = f"load: path must name a run of schema {SCHEMA}; got {path.name} with {schema!r}"
        raise InputError(msg)
    try:
        cases = [
            CaseResult(**{**c, "variants": [VariantResult(**v) for v in c["variants"]]})
            for c in values.pop("cases")
        ]
        run = RunResult(**values, cases=cases)
    except (TypeError, KeyError) as error:
        msg = f"load: path must name a run with all keys of schema {SCHEMA}; got {path.name}: "
        raise InputError(f"{msg}{error}") from error
    _check(run, path)
    return run


def _check(run: RunResult, path: Path) -> None:
    for case in run.cases:
        if not 0 <= case.process < len(run.processes):
            msg = f"load: {path.name}: process of {case.key} must be known; got {case.process}"
            raise InputError(msg)
        for variant in case.variants:
            timed = variant.status == "ok"
            if variant.status not in STATUSES or timed != bool(variant.seconds):
                msg = (
                    f"load: {path.name}: {variant.name} of {case.key} must have samples exactly "
                    f'when its status is "ok"; got {variant.status!r}'
                )
                raise InputError(msg)


def check_resumable(old: RunResult, new: RunResult) -> None:
    """One file holds one commit on one device.

    Raises:
        InputError: What differs, by name.
    """
    for name in ("profile", "commit", "dirty", "device", "threads", "versions", "clock"):
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            msg = f"resume: {name} must be that of the file, {before!r}; got {now!r}"
            raise InputError(msg)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        # no git here: a copy of the tree
        return ""
    return found.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _NAMED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    # with the build that was installed
    versions["torch"] = torch.__version__
    versions["cuda"] = torch.version.cuda or "none"
    versions["cudnn"] = str(torch.backends.cudnn.version() or "none")
    return versions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
