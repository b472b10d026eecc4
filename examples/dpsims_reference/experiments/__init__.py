"""Every row of the paper's ablation tables as a named experiment."""

from __future__ import annotations

import difflib

from dpsims.errors import InputError
from dpsims_reference.experiments.ablations import TABLE6, TABLE7, TABLE8, TABLE_S9, TABLE_S10
from dpsims_reference.experiments.backbones import TABLE2, TABLE3, TABLE_S6, TABLE_S13
from dpsims_reference.experiments.conditioning import TABLE5
from dpsims_reference.experiments.experiment import Experiment, Size
from dpsims_reference.experiments.inputs import TABLE_S11, TABLE_S12

EXPERIMENTS: dict[str, Experiment] = {
    row.name: row
    for table in (
        *(TABLE2, TABLE3, TABLE5, TABLE6, TABLE7, TABLE8),
        *(TABLE_S6, TABLE_S9, TABLE_S10, TABLE_S11, TABLE_S12, TABLE_S13),
    )
    for row in table
}


def experiment(name: str) -> Experiment:
    """The experiment called ``name``.

    Raises:
        InputError: There is no such experiment; the message lists those with a similar name.
    """
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    msg = (
        f"experiment: name must be one of the {len(EXPERIMENTS)} that the verb 'experiments' "
        f"lists ({_similar(name)}); got {name!r}"
    )
    raise InputError(msg)


def tables() -> dict[str, list[Experiment]]:
    """The experiments by table, in the order of the paper."""
    found: dict[str, list[Experiment]] = {}
    for row in EXPERIMENTS.values():
        found.setdefault(row.table, []).append(row)
    return found


def format_experiments(table: str | None = None) -> str:
    """What the verb ``experiments`` prints: one block for each experiment.

    Args:
        table: Only this table, such as ``"table5"``; ``None`` means all.

    Raises:
        InputError: There is no such table; the message lists them.
    """
    known = tables()
    if table is not None and table not in known:
        msg = f"experiments: table must be one of {', '.join(known)}; got {table!r}"
        raise InputError(msg)
    lines = ["The numbers are the paper's. They have not been reproduced."]
    for name in known if table is None else [table]:
        for row in known[name]:
            lines += ["", row.name, f"  {row.change} ({row.dataset})", f"  {row.numbers()}"]
    return "\n".join(lines)


def describe(row: Experiment, size: Size) -> str:
    """What ``train`` prints before it runs an experiment."""
    lines = [f"{row.name} at {size} size: {row.change}"]
    if size == "tiny" and row.stand_in:
        lines.append(f"backbone at tiny size: {row.stand_in}")
    return "\n".join([*lines, f"the paper, on {row.dataset}: {row.numbers()} (not reproduced)"])


def _similar(name: str) -> str:
    lower = {known.lower(): known for known in EXPERIMENTS}
    found = difflib.get_close_matches(name.lower(), lower, n=5, cutoff=0.5)
    names = [lower[match] for match in found] or list(EXPERIMENTS)[:1]
    return f"for example {', '.join(names)}"
