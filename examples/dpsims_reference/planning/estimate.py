"""From counts to memory, time and energy: arithmetic only, every assumption an argument."""

from __future__ import annotations

from dataclasses import dataclass

from dpsims._checks import check_int
from dpsims.errors import InputError
from dpsims_reference.planning.counts import StepCounts
from dpsims_reference.planning.hardware import Cluster

_HOUR = 3600.0


@dataclass(frozen=True)
class Estimate:
    """What a run needs on a cluster."""

    counts: StepCounts
    """One GPU's step."""
    cluster: Cluster
    """The machines."""
    batch: int
    """Images per step over all GPUs."""
    steps: int
    """Steps of the run."""
    memory_bytes: float
    """Per GPU, with the reserve."""
    largest_batch: int
    """Images per GPU that fit, extrapolated along a line."""
    seconds: dict[str, float]
    """Time of a step if only ``compute``, the ``links`` or the ``input`` counted."""
    all_reduce_bytes: float
    """What one GPU sends per step."""
    image_bytes: int
    """What is copied to one GPU per step."""

    @property
    def step_seconds(self) -> float:
        """The longest of the three: they overlap at best."""
        return max(self.seconds.values())

    @property
    def bound(self) -> str:
        """What the step waits for."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def load(self) -> dict[str, float]:
        """Share of each resource that is in use; whatever reaches 1 first is the limit."""
        shares = {name: value / self.step_seconds for name, value in self.seconds.items()}
        return shares | {"memory": self.memory_bytes / self.cluster.gpu.memory_bytes}

    @property
    def fits(self) -> bool:
        """Whether the step fits into memory."""
        return self.memory_bytes <= self.cluster.gpu.memory_bytes

    @property
    def images_per_second(self) -> float:
        """What the input pipelines of all machines must deliver together."""
        return self.batch / self.step_seconds

    @property
    def hours(self) -> float:
        """Wall time."""
        return self.steps * self.step_seconds / _HOUR

    @property
    def gpu_hours(self) -> float:
        """Wall time of all GPUs together."""
        return self.hours * self.cluster.gpus

    @property
    def kilowatt_hours(self) -> float:
        """Energy, every GPU at its design power."""
        return energy(self.gpu_hours, self.cluster.gpu.watts, self.cluster.pue)


def energy(gpu_hours: float, watts: float, pue: float) -> float:
    """Kilowatt hours of a run.

    Example:
        >>> round(energy(1920, 250, 1.1))  # the paper's supplement, COCO-Stuff
        528
    """
    return gpu_hours * watts * pue / 1000


def all_reduce_volume(num_bytes: float, gpus: int) -> float:
    """What each process sends in a ring all-reduce: 2 (n - 1) / n of the buffer."""
    return 2 * (gpus - 1) / gpus * num_bytes


def split_batch(batch: int, gpus: int) -> int:
    """Images per GPU.

    Raises:
        InputError: The batch does not divide.
    """
    check_int("split_batch", "batch", batch)
    check_int("split_batch", "gpus", gpus)
    if batch % gpus:
        msg = f"split_batch: batch must be divisible by {gpus} GPUs; got {batch}"
        raise InputError(msg)
    return batch // gpus


def estimate(
    counts: StepCounts,
    cluster: Cluster,
    *,
    images: int,
    image_size: tuple[int, int],
    precision: str = "bf16",
) -> Estimate:
    """Estimate a run that sees ``images`` images.

    Args:
        counts: One GPU's step.
        cluster: The machines.
        images: Images of the whole run; steps times batch.
        image_size: Height and width.
        precision: ``"bf16"``, or ``"float32"``, which runs in TF32.
    """
    gpu, batch = cluster.gpu, counts.batch * cluster.gpus
    peak = gpu.bf16_flops if precision == "bf16" else gpu.tf32_flops
    sent = all_reduce_volume(counts.gradient_bytes, cluster.gpus)
    seconds = {
        "compute": counts.flops / (peak * cluster.utilisation),
        "links": sent / cluster.link_bytes,
        "input": counts.batch / (cluster.cores_per_gpu * cluster.images_per_core),
    }
    reserve = 1 + cluster.reserve
    constant = counts.memory_bytes - counts.peak_bytes + counts.gradient_bytes
    per_image = (counts.peak_bytes - counts.gradient_bytes) / counts.batch
    room = gpu.memory_bytes / reserve - constant
    pixels = image_size[0] * image_size[1]
    return Estimate(
        counts=counts,
        cluster=cluster,
        batch=batch,
        steps=-(-images // batch),
        memory_bytes=reserve * counts.memory_bytes,
        largest_batch=max(int(room / per_image), 0),
        seconds=seconds,
        all_reduce_bytes=sent,
        # three float32 channels and a uint8 map
        image_bytes=counts.batch * pixels * (3 * 4 + 1),
    )
