"""The numbers of the machines that a plan assumes: data sheets, not measurements."""

from __future__ import annotations

from dataclasses import dataclass

from dpsims._checks import check_int, check_number

_OWNER = "Cluster"


@dataclass(frozen=True)
class Gpu:
    """One GPU by its data sheet."""

    name: str
    """What it is."""
    bf16_flops: float
    """Dense bf16 matrix rate, FLOP/s."""
    tf32_flops: float
    """Dense TF32 matrix rate, FLOP/s."""
    memory_bytes: float
    """Memory."""
    watts: float
    """Thermal design power."""
    node_bytes: float
    """What one GPU sends per second to the others of its node."""
    network_bytes: float
    """What one GPU sends per second to another node."""


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 312e12, 156e12, 80e9, 400, 300e9, 25e9),
    "h100": Gpu("H100 SXM 80 GB", 989e12, 494.5e12, 80e9, 700, 450e9, 50e9),
    "h200": Gpu("H200 SXM 141 GB", 989e12, 494.5e12, 141e9, 700, 450e9, 50e9),
}


@dataclass(frozen=True)
class Cluster:
    """Machines, and what is assumed of them.

    Raises:
        InputError: A number out of range.
        DTypeError: A number of the wrong type.
    """

    gpu: Gpu
    """Every GPU."""
    gpus: int = 8
    """How many."""
    gpus_per_node: int = 8
    """How many share a machine."""
    utilisation: float = 0.4
    """Share of the peak arithmetic rate that a step reaches."""
    cores_per_gpu: int = 12
    """Processor cores that read images for each GPU."""
    images_per_core: float = 60.0
    """Images that one core reads, decodes and resizes per second."""
    reserve: float = 0.1
    """Share of memory on top of what was counted: the allocator's gaps, workspaces, the driver."""
    pue: float = 1.1
    """Power usage effectiveness: the energy of the building over that of the GPUs (paper: 1.1)."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "cores_per_gpu"):
            check_int(_OWNER, name, getattr(self, name))
        check_number(_OWNER, "utilisation", self.utilisation, above=0, maximum=1)
        check_number(_OWNER, "images_per_core", self.images_per_core, above=0)
        check_number(_OWNER, "reserve", self.reserve, minimum=0)
        check_number(_OWNER, "pue", self.pue, minimum=1)

    @property
    def link_bytes(self) -> float:
        """What one GPU sends per second in an all-reduce: the slowest link of the ring."""
        inside = self.gpus <= self.gpus_per_node
        return self.gpu.node_bytes if inside else self.gpu.network_bytes
