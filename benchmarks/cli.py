"""``python -m benchmarks``: run components, check gates, make the page."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cases import Place
from benchmarks.components import COMPONENTS, list_cases
from benchmarks.gates import Verdict, check_gates, compare
from benchmarks.measure import clock_for
from benchmarks.peers import parse_peers
from benchmarks.results import ROOT, RunResult, check_resumable, load, new_run, save
from benchmarks.runner import Plan, run_cases, skip_cases
from dpsims.errors import InputError

_RESULTS = ROOT / "benchmarks" / "results"
_DESCRIPTION = """\
Measure the parts of dpsims beside other ways to write them. Every variant is first compared with
a float64 result; a wrong one is never timed. Without a GPU the ratios of a CPU are measured, and
what waits for a GPU is named.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0; 1 if a variant was wrong or failed, or a gate was missed; 2 for bad arguments.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.verb == "report":
            return _report(options)
        if options.verb == "check":
            return _check(options)
        return _run(options)
    except InputError as error:
        print(f"error: {error}")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks", description=_DESCRIPTION)
    verbs = parser.add_subparsers(dest="verb")
    run = verbs.add_parser("run", help="measure (the default)")
    for target in (parser, run):
        _add_run_options(target)
    check = verbs.add_parser("check", help="gates and regressions of a saved run")
    check.add_argument("path", type=Path)
    _add_gate_options(check)
    report = verbs.add_parser("report", help="write the tables and pictures of the docs")
    report.add_argument("--results", type=Path, default=_RESULTS)
    report.add_argument("--docs", type=Path, default=ROOT / "docs")
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = ", ".join(COMPONENTS)
    add("--components", nargs="+", metavar="NAME", help=f"which of {names} (default: all)")
    add("--cases", metavar="TEXT", default="", help="only cases whose name holds this")
    add("--profile", choices=("auto", "smoke", "cpu", "gpu"), default="auto")
    add("--out", type=Path, help="the JSON file (default: results/DATE-DEVICE.json)")
    add("--resume", action="store_true", help="go on with the file: skip the cases it holds")
    add("--rounds", type=int, default=20, help="most rounds of a case")
    add("--budget", type=float, default=1.0, help="factor on the measuring time of every case")
    add("--minutes", type=float, default=24.0, help="no case starts later than this")
    add("--threads", type=int, default=1, help="threads of a CPU run")
    add("--no-compile", action="store_true", help="leave out what torch.compile has to build")
    add("--peer", action="append", default=[], metavar="NAME=PATH", help="oasis=PATH, spade=PATH")
    _add_gate_options(parser)


def _add_gate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gate", action="store_true", help="fail below the ratios that must hold")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="fail where slower")


def _run(options: argparse.Namespace) -> int:
    profile = options.profile
    if profile == "auto":
        profile = "gpu" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda" if profile == "gpu" else "cpu")
    if profile == "gpu" and not torch.cuda.is_available():
        msg = "run: --profile gpu must run on a machine with a CUDA device; got none"
        raise InputError(msg)
    torch.set_num_threads(options.threads)
    # every variant alike gets the convolution that is fastest for its shape
    torch.backends.cudnn.benchmark = True
    components = options.components or list(COMPONENTS)
    place = Place(device, profile, not options.no_compile, parse_peers(options.peer))
    path = options.out or _RESULTS / f"{time.strftime('%Y-%m-%d')}-{profile}.json"
    old = None if options.compare is None else load(options.compare)
    run = _open(path, new_run(profile, device, clock_for(device).name), resume=options.resume)
    plan = Plan(path, options.rounds, 60 * options.minutes, options.budget)
    found = [c for c in list_cases(components, place) if options.cases in c.key]
    run_cases(found, place, run, plan)
    if profile == "cpu":
        waiting = list_cases(components, Place(torch.device("cuda"), "gpu", place.compiled))
        skip_cases([c for c in waiting if options.cases in c.key], run, plan)
        save(run, path)
    print(f"written: {path}")
    return _judge(run, components, gate=options.gate, old=old)


def _open(path: Path, fresh: RunResult, *, resume: bool) -> RunResult:
    if not path.exists():
        return fresh
    if not resume:
        msg = f"run: --out must name a new file, or come with --resume; got {path.name}"
        raise InputError(msg)
    found = load(path)
    check_resumable(found, fresh)
    return found


def _check(options: argparse.Namespace) -> int:
    run = load(options.path)
    old = None if options.compare is None else load(options.compare)
    measured = [name for name in COMPONENTS if any(c.component == name for c in run.cases)]
    return _judge(run, measured, gate=options.gate, old=old)


def _judge(run: RunResult, components: Sequence[str], *, gate: bool, old: RunResult | None) -> int:
    verdicts = check_gates(run, components) if gate else []
    verdicts += compare(run, old) if old is not None else []
    for case in run.cases:
        verdicts += [
            Verdict(False, f"{case.key}: {variant.name}: {variant.status}: {variant.reason}")
            for variant in case.variants
            if variant.status in ("wrong", "failed")
        ]
    for verdict in verdicts:
        print(verdict.text)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def _report(options: argparse.Namespace) -> int:
    from benchmarks.report import write_report

    for path in write_report(options.results, options.docs):
        print(f"written: {path}")
    return 0
