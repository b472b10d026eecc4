"""Try timm's architectures as backbones, and write the table of docs/backbones.rst.

``python -m benchmarks.backbones`` tries what ``benchmarks/results/backbones.json`` does not hold
yet, saves after every model, and rewrites the table. Names after the command are tried again.
``--shortlist`` does the same for a few at 256x256, in ``backbones-256.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.backbone_list import SHORTLIST, model_names
from benchmarks.backbone_page import write_table

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
_PACKAGES = ("torch", "timm")


def main() -> None:
    """Try, save, write."""
    options = _parse()
    report = new_report(options)
    if options.json.exists():
        old = json.loads(options.json.read_text(encoding="utf-8"))
        report["results"] = old["results"]
    else:
        old = report
    done = {result["name"] for result in report["results"]}
    listed = SHORTLIST.split() if options.shortlist else model_names()
    names = options.names or [name for name in listed if name not in done]
    if names:
        check_resumable(old, report)
    started = time.monotonic()
    for count, result in enumerate(tried(names, options), 1):
        kept = [other for other in report["results"] if other["name"] != result["name"]]
        report["results"] = sorted([*kept, result], key=lambda r: (r["family"], r["name"]))
        save(report, options.json)
        print(_line(result, count, len(names), time.monotonic() - started), flush=True)
    write_table(options.page, options.json)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backbones",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="architectures to try again; default: the rest")
    parser.add_argument("--shortlist", action="store_true", help="a few at 256x256")
    parser.add_argument("--json", type=Path, help="results; default: in benchmarks/results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "backbones.rst")
    parser.add_argument("--size", type=int, help="height and width of the images; default: 64")
    parser.add_argument("--batch", type=int, default=2, help="images at once")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes; the median counts")
    parser.add_argument("--per-process", type=int, default=12, help="models in one process")
    parser.add_argument("--seconds", type=int, default=120, help="limit for one model")
    parser.add_argument("--gib", type=float, default=4, help="limit for the memory of a process")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    options.size = options.size or (256 if options.shortlist else 64)
    name = "backbones-256.json" if options.shortlist else "backbones.json"
    options.json = options.json or ROOT / "benchmarks" / "results" / name
    return options


def new_report(options: argparse.Namespace) -> dict[str, Any]:
    """An empty report: what was run, on what."""
    return {
        "benchmark": "backbones",
        "schema": SCHEMA,
        "image_size": options.size,
        "batch": options.batch,
        "repeats": options.repeats,
        "torch_threads": options.threads,
        "limit_seconds": options.seconds,
        "limit_gib": options.gib,
        "processor": _processor(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in _PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
        "results": [],
    }


def check_resumable(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to mix results of two settings or machines in one file."""
    free = ("results", "date", "limit_seconds", "limit_gib")
    differ = [
        f"{key} {old.get(key)!r}" for key in new if key not in free and old.get(key) != new[key]
    ]
    if differ:
        sys.exit(f"the file holds results with {', '.join(differ)}; remove it or pass --json")


def tried(names: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results in order, from as many processes as it takes."""
    rest = list(names)
    while rest:
        count = 0
        for result in _run_process(rest[: options.per_process], options):
            count += 1
            yield result
        rest = rest[count:]


def _run_process(names: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of the models that one process got through; a failure is the last."""
    values = {key: getattr(options, key) for key in ("size", "batch", "repeats", "seconds", "gib")}
    flags = [f"--{key}={value}" for key, value in values.items()]
    threads = {f"{kind}_NUM_THREADS": str(options.threads) for kind in ("OMP", "MKL")}
    paths = [str(ROOT), str(ROOT / "examples"), *sys.path[1:]]
    command = [sys.executable, "-m", "benchmarks.backbone_trial", *names, *flags]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        ) as process,
    ):
        assert process.stdout is not None
        described: dict[str, Any] | None = None
        for line in process.stdout:
            if described is None:
                described = json.loads(line)
            else:
                yield {**described, **json.loads(line)}
                described = None
        code = process.wait()
        errors.seek(0)
        text = errors.read()
    if described is not None:
        yield {**described, "works": False, "reason": reason_of(code, text, options)}
    elif code != 0:
        sys.exit(f"a process ended with {code} before it tried a model:\n{text}")


def reason_of(code: int, text: str, options: argparse.Namespace) -> str:
    """Why a process ended: the limit or signal, else the error that it printed last."""
    if code == -signal.SIGALRM:
        return f"more than {options.seconds} s"
    if code < 0:
        return f"the process died of {signal.Signals(-code).name}"
    found = list(re.finditer(r"^(?:\w+\.)*(\w+): ", text, re.MULTILINE))
    message = text[found[-1].start(1) :] if found else text
    return textwrap.shorten(message, 300, placeholder=" ...")


def save(report: dict[str, Any], path: Path) -> None:
    """Write the report, one model a line; a reader never sees half a file."""
    head = {key: value for key, value in report.items() if key != "results"}
    lines = ",\n".join(f"  {json.dumps(result)}" for result in report["results"])
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "results": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _line(result: dict[str, Any], count: int, total: int, taken: float) -> str:
    said = f"{result['both_seconds'] * 1e3:.0f} ms" if result["works"] else result["reason"]
    return f"[{count}/{total}, {taken / 60:.1f} min] {result['name']}: {said}"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
