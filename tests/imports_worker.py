"""Import all of dpsims in a fresh process, and write as JSON what that did.

The arguments are packages that it must do without.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import os
import pkgutil
import sys
from collections.abc import Collection
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
NOTED = ("os.mkdir", "os.remove", "os.rename", "socket.", "subprocess.Popen", "urllib.")


class Blocker(importlib.abc.MetaPathFinder):
    """Let some packages look as if they were not installed."""

    def __init__(self, names: Collection[str]):
        self.names = names

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in self.names:
            msg = f"No module named {name!r}"
            raise ModuleNotFoundError(msg, name=name)


def note_side_effects() -> list[str]:
    """A list that grows by every file written, process started and socket used from now on."""
    noted: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if writes or event.startswith(NOTED):
            noted.append(f"{event} {args!r:.120}")

    sys.addaudithook(hook)
    return noted


def main(blocked: list[str]) -> dict[str, Any]:
    sys.dont_write_bytecode = True
    sys.meta_path.insert(0, Blocker(blocked))
    noted = note_side_effects()
    import dpsims

    report: dict[str, Any] = {"loaded first": sorted({n.partition(".")[0] for n in sys.modules})}
    report["side effects"] = list(noted)
    # what torch does at its own import is not dpsims' doing
    import torch

    noted.clear()
    names = [found.name for found in pkgutil.walk_packages(dpsims.__path__, "dpsims.")]
    # kernels are imported where they run
    report["modules"] = [name for name in names if not name.endswith("._triton")]
    for name in report["modules"]:
        # the kernels need triton, and are imported where they run
        if not name.endswith("._triton"):
            importlib.import_module(name)
    report["names"] = [name for name in dpsims.__all__ if getattr(dpsims, name) is not None]
    report["side effects"] += noted
    report["cuda"] = torch.cuda.is_initialized()
    report["blocked but loaded"] = sorted({n.partition(".")[0] for n in sys.modules} & {*blocked})
    return report


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1:])))
