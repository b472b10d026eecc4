"""Plans as text: one in full, several beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dpsims.errors import InputError
from dpsims_reference.config import Config
from dpsims_reference.planning.counts import StepCounts, count_steps
from dpsims_reference.planning.estimate import Estimate, estimate, split_batch
from dpsims_reference.planning.hardware import Cluster, Gpu

_ROWS: tuple[tuple[str, Callable[[Estimate], str]], ...] = (
    ("GPUs", lambda e: f"{e.cluster.gpus}"),
    ("images per step", lambda e: f"{e.batch:,}"),
    ("images per step and GPU", lambda e: f"{e.counts.batch}"),
    ("memory per GPU, GB", lambda e: f"{_giga(e.memory_bytes)}{'' if e.fits else ' (too much)'}"),
    ("images per GPU that fit", lambda e: f"{e.largest_batch}"),
    ("TFLOP per step and GPU", lambda e: f"{e.counts.flops / 1e12:.1f}"),
    ("step, s", lambda e: f"{e.step_seconds:.3f}"),
    ("steps", lambda e: f"{e.steps:,}"),
    ("days", lambda e: f"{e.hours / 24:.2f}"),
    ("GPU hours", lambda e: f"{e.gpu_hours:,.0f}"),
    ("energy, kWh", lambda e: f"{e.kilowatt_hours:,.0f}"),
    ("all-reduce per step and GPU, GB", lambda e: f"{_giga(e.all_reduce_bytes)}"),
    ("input, images/s over all", lambda e: f"{e.images_per_second:,.0f}"),
    ("copies to each GPU, MB/s", lambda e: f"{e.image_bytes / e.step_seconds / 1e6:,.0f}"),
    ("waits for", lambda e: e.bound),
    ("load", lambda e: ", ".join(f"{name} {share:.0%}" for name, share in e.load.items())),
)


def plan_runs(
    config: Config,
    gpu: Gpu,
    gpus: Sequence[int],
    batches: Sequence[int],
    *,
    utilisation: float = 0.4,
) -> list[Estimate]:
    """One estimate for each number of GPUs; every run sees as many images as ``config`` says.

    Args:
        config: The run.
        gpu: The GPU.
        gpus: Numbers of GPUs.
        batches: Images per step: one for each entry of ``gpus``, or one for all.
        utilisation: Share of the peak arithmetic rate that a step reaches.

    Raises:
        InputError: Sequences of other lengths, or a batch that does not divide.
    """
    if len(batches) not in (1, len(gpus)):
        msg = f"plan_runs: batches must have 1 or {len(gpus)} entries; got {len(batches)}"
        raise InputError(msg)
    batches = list(batches) * len(gpus) if len(batches) == 1 else batches
    shares = [split_batch(*pair) for pair in zip(batches, gpus, strict=True)]
    distinct = sorted(set(shares))
    counts = dict(zip(distinct, count_steps(config, distinct), strict=True))
    return [
        estimate(
            counts[share],
            Cluster(gpu, gpus=number, utilisation=utilisation),
            images=config.optim.steps * config.optim.batch_size,
            image_size=config.data.image_size,
            precision=config.optim.precision,
        )
        for share, number in zip(shares, gpus, strict=True)
    ]


def format_plans(name: str, plans: Sequence[Estimate]) -> str:
    """Counts and memory of the first plan in full, then all plans beside each other."""
    first = plans[0]
    cluster = first.cluster
    lines = [
        f"{name} on {cluster.gpu.name}: a prediction; nothing was run",
        "",
        *_networks(first.counts),
        "",
        *_work(first.counts),
        "",
        *_memory(first),
        "",
        *_columns(plans),
        "",
        f"assumed: {cluster.utilisation:.0%} of {cluster.gpu.name}'s peak rate; "
        f"{cluster.gpus_per_node} GPUs a node, {cluster.gpu.node_bytes / 1e9:.0f} GB/s inside and "
        f"{cluster.gpu.network_bytes / 1e9:.0f} GB/s outside it for each GPU; "
        f"{cluster.cores_per_gpu} cores a GPU at {cluster.images_per_core:.0f} images/s; "
        f"{cluster.reserve:.0%} memory in reserve; {cluster.gpu.watts:.0f} W a GPU, PUE "
        f"{cluster.pue:g}; arithmetic, links and input overlap",
    ]
    return "\n".join(lines)


def comparison_rst(plans: Sequence[Estimate]) -> str:
    """The plans beside each other as a reStructuredText list table."""
    lines = [".. list-table::", "   :stub-columns: 1", ""]
    for title, cell in _ROWS:
        cells = [title, *(cell(plan) for plan in plans)]
        lines += [f"   {'*' if i == 0 else ' '} - {text}" for i, text in enumerate(cells)]
    return "\n".join(lines)


def _networks(counts: StepCounts) -> list[str]:
    return ["parameters, millions"] + [
        f"  {name:<34}{number / 1e6:>10.2f}" for name, number in counts.parameters.items()
    ]


def _work(counts: StepCounts) -> list[str]:
    lines = [f"GFLOP per image, and MB per image kept for the backward ({counts.batch} images)"]
    for phase in counts.phases:
        work, kept = phase.flops / 1e9 / counts.batch, phase.saved_bytes / 1e6 / counts.batch
        lines.append(f"  {phase.half}: {phase.name:<31}{work:>10.1f}{kept:>10.1f}")
    frozen, total = counts.flops_of(frozen=True), counts.flops
    for half in ("D", "G"):
        own = counts.flops_of(half=half, frozen=False) / 1e9 / counts.batch
        lines.append(f"  {f'trained networks, {half} half':<34}{own:>10.1f}")
    lines.append(f"  {'frozen networks':<34}{frozen / 1e9 / counts.batch:>10.1f}")
    lines.append(f"  {'all':<34}{total / 1e9 / counts.batch:>10.1f}")
    return lines


def _memory(plan: Estimate) -> list[str]:
    counts = plan.counts
    rows = {
        "weights and buffers": counts.weight_bytes,
        "averaged generator": counts.ema_bytes,
        "Adam's moments": counts.optimizer_bytes,
        "activations and gradients, at most": counts.peak_bytes,
        "reserve": plan.memory_bytes - counts.memory_bytes,
        "all": plan.memory_bytes,
    }
    lines = [f"GB per GPU with {counts.batch} images"]
    return lines + [f"  {name:<34}{_giga(number):>10}" for name, number in rows.items()]


def _columns(plans: Sequence[Estimate]) -> list[str]:
    lines = []
    for title, cell in _ROWS[:-1]:
        lines.append(f"  {title:<34}" + "".join(f"{cell(plan):>16}" for plan in plans))
    loads = [f"  load with {plan.cluster.gpus} GPUs: {_ROWS[-1][1](plan)}" for plan in plans]
    return [*lines, *loads]


def _giga(number: float) -> str:
    return f"{number / 1e9:.2f}"
