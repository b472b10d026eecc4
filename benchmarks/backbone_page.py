"""The tables of docs/backbones.rst, from the JSON that :mod:`benchmarks.backbones` writes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_COLUMNS = (
    ("family", 9),
    ("architecture", 15),
    ("images", 9),
    ("ms forward", 6),
    ("ms both", 6),
    ("MiB", 5),
    ("M parameters", 6),
    ("strides", 9),
    ("channels", 12),
    ("tags", 5),
    ("licences of the tags", 14),
)


def write_table(page: Path, source: Path) -> None:
    """Replace what stands between the two marks of a report, if a page has them."""
    page.write_text(with_table(page.read_text(encoding="utf-8"), source), encoding="utf-8")


def with_table(text: str, source: Path) -> str:
    """A page with the tables that belong to a report, between the marks that name its file."""
    begin, end = marks(source)
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        return text
    report = json.loads(source.read_text(encoding="utf-8"))
    return f"{before}{begin}\n{tables(report)}\n{end}{after}"


def marks(source: Path) -> tuple[str, str]:
    """The comments around the tables of a report."""
    where = f"tables from benchmarks/results/{source.name}\n"
    return f".. begin: {where}", f".. end: {where}"


def tables(report: dict[str, Any]) -> str:
    """What was run, the table of what works and the table of what does not."""
    results = report["results"]
    good = [result for result in results if result["works"]]
    bad = [result for result in results if not result["works"]]
    families = {result["family"] for result in results}
    size = f"{report['image_size']}x{report['image_size']}"
    threads = "1 thread" if report["torch_threads"] == 1 else f"{report['torch_threads']} threads"
    lines = [
        f"{len(results)} architectures of {len(families)} families; {len(good)} work. timm "
        f"{report['timm']}, torch {report['torch']}, Python {report['python']}, {report['date']}; "
        f"{report['batch']} images of {size}, float32, {threads} ({report['processor']}).",
        "",
        *_table("sortable", _COLUMNS, map(_row, good)),
    ]
    if bad:
        rows = ((r["family"], f"``{r['name']}``", _literal(r["reason"])) for r in bad)
        columns = (("family", 20), ("architecture", 25), ("why not", 55))
        lines += ["", "These do not work:", "", *_table("failures", columns, rows)]
    return "\n".join(lines) + "\n"


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    licences = [f"{name} ({count})" for name, count in result["licences"].items()]
    return (
        result["family"],
        f"``{result['name']}``",
        _images(result),
        f"{result['forward_seconds'] * 1e3:.0f}",
        f"{result['both_seconds'] * 1e3:.0f}",
        f"{result['peak_bytes'] / 2**20:.0f}",
        f"{result['parameters'] / 1e6:.2f}",
        " ".join(map(str, result["reductions"])),
        " ".join(map(str, result["channels"])),
        str(result["pretrained_tags"]),
        ", ".join(licences) or "no weights",
    )


def _images(result: dict[str, Any]) -> str:
    """What happens to images."""
    if result["resized_to"]:
        height, width = result["resized_to"]
        why = " (``input_size``)" if "input_size" in result["options"] else ""
        return f"resized {height}x{width}{why}"
    kind = f"padded {result['padded_to']}" if result["padded_to"] > 1 else "any"
    return f"{kind} from {result['minimum_size']}"


def _table(
    name: str, columns: Iterable[tuple[str, int]], rows: Iterable[tuple[str, ...]]
) -> list[str]:
    heads, widths = zip(*columns, strict=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    return [
        ".. csv-table::",
        f"   :class: {name}",
        "   :header-rows: 1",
        f"   :widths: {' '.join(map(str, widths))}",
        "",
        *(f"   {line}" for line in text.getvalue().splitlines()),
    ]


def _literal(text: str) -> str:
    """A message as it is: no character of it is markup."""
    return f"``{text.replace('`', chr(39)).strip()}``"
