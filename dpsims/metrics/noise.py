"""Whether a generator listens to its noise: gates, feature maps and images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpsims._checks import check_int, check_tensor
from dpsims.errors import DTypeError, InputError
from dpsims.metrics._tables import text_table
from dpsims.metrics.diversity import l1_distance, pairwise_diversity

_OWNER = "noise_sensitivity"


class NoiseGate(NamedTuple):
    """The gate of one module: the factor on what it adds to its input.

    Attributes:
        name: Name of the module inside the generator.
        kind: Its class.
        value: The gate; 0 adds nothing.

    Source:
        Berrada et al., CVPR 2024, Eq. (2). Theirs -> ours: eta -> value.

    Example:
        >>> NoiseGate("blocks.2.inject", "CrossAttentionNoiseInjector", 0.0).value
        0.0
    """

    name: str
    kind: str
    value: float


class NoiseScale(NamedTuple):
    """How much one feature map changes with the noise.

    Attributes:
        name: Name of the module that made the map.
        channels: Width of the map.
        size: Height and width of the map.
        distance: Mean absolute difference of the maps of two noises.
        share: Share of the map's variance that comes from the noise, in [0, 1]: 0 if the noise is
            ignored, 1 if nothing else counts.

    Source:
        Not from the paper: the law of total variance, over noises given image and position.

    Example:
        >>> NoiseScale("blocks.2", 64, (16, 16), distance=0.1, share=0.5).share
        0.5
    """

    name: str
    channels: int
    size: tuple[int, int]
    distance: float
    share: float


class NoiseSensitivity(NamedTuple):
    """What :func:`noise_sensitivity` found.

    Attributes:
        gates: One entry per gated module.
        scales: One entry per feature map, in the order of the forward pass.
        diversity: Mean distance of the images of one label map over pairs of noises.

    Source:
        Not from the paper.

    Example:
        >>> found = NoiseSensitivity(gates=(), scales=(), diversity=0.25)
        >>> found.numbers()
        {'noise_diversity': 0.25}
    """

    gates: tuple[NoiseGate, ...]
    scales: tuple[NoiseScale, ...]
    diversity: float

    def numbers(self) -> dict[str, float]:
        """Every figure by a name that suits a log."""
        found = {f"gate/{gate.name}": gate.value for gate in self.gates}
        for scale in self.scales:
            found[f"noise_share/{scale.name}"] = scale.share
            found[f"noise_distance/{scale.name}"] = scale.distance
        return found | {"noise_diversity": self.diversity}

    def table(self) -> str:
        """Everything as aligned text."""
        gates = [(gate.name, gate.kind, f"{gate.value:+.4f}") for gate in self.gates]
        scales = [
            (
                scale.name,
                f"{scale.channels}x{scale.size[0]}x{scale.size[1]}",
                f"{scale.distance:.4f}",
                f"{scale.share:.2%}",
            )
            for scale in self.scales
        ]
        return "\n\n".join(
            [
                text_table(("gate", "module", "value"), gates),
                text_table(("feature map", "size", "distance", "noise share"), scales),
                f"distance of images between noises: {self.diversity:.4f}",
            ]
        )


@torch.no_grad()
def noise_sensitivity(
    generator: nn.Module,
    render: Callable[[int], Tensor],
    *,
    num_noises: int = 4,
    layers: Sequence[str] | None = None,
    distance: Callable[[Tensor, Tensor], Tensor] = l1_distance,
) -> NoiseSensitivity:
    r"""Compare a generator's gates, feature maps and images between noises.

    A generator may reach a low loss while it ignores its noise. The gates say whether the noise is
    let in, the shares say at which scale it is lost, and the diversity says what is left of it.

    Args:
        generator: What is looked at. A gate is any parameter called ``gate`` with one entry.
        render: Runs ``generator`` once and returns its images for noise ``0 ... num_noises - 1``;
            everything but the noise must be the same at each call.
        num_noises: Number of calls.
        layers: Names of the modules whose output maps are compared. ``None`` takes every entry of
            every ``nn.ModuleList``. Outputs that are no floating-point maps are left out.
        distance: Of two batches of images, one value per image, as in
            :func:`dpsims.metrics.pairwise_diversity`.

    Shape:
        - images ``(B, 3, H, W)`` at every call of ``render``; maps ``(B, C, h, w)``

    Returns:
        A :class:`NoiseSensitivity` with a ``table()`` to print and ``numbers()`` to log.

    Raises:
        InputError: ``num_noises`` below 2, an unknown layer, or images of another shape.
        DTypeError: ``generator`` is no module, ``render`` or ``distance`` no callable.

    Note:
        Units: those of the maps and of ``distance``. The generator runs in the mode it is in; in
        training mode batch norms record statistics, so call ``eval()`` first.
        Cost: ``num_noises`` forward passes, whose maps are all kept; take a few label maps.

    Source:
        Not from the paper. Gates: Berrada et al., CVPR 2024, Eq. (2).

    Example:
        >>> from dpsims.nn import CrossAttentionNoiseInjector
        >>> inject = CrossAttentionNoiseInjector(channels=3, token_dim=4)
        >>> features, tokens = torch.randn(2, 3, 8, 8), torch.randn(5, 2, 1, 4)
        >>> found = noise_sensitivity(inject, lambda i: inject(features, tokens[i]), num_noises=5)
        >>> found.gates[0].value, found.diversity  # the gate is closed
        (0.0, 0.0)
    """
    _check(generator, render, num_noises, distance)
    images, maps = [], []
    for index in range(num_noises):
        with _outputs(generator, layers) as found:
            images.append(render(index))
        check_tensor(_OWNER, "render's result", images[-1], "B C H W", C=3)
        maps.append(found)
    samples = torch.stack(images)
    return NoiseSensitivity(
        gates=tuple(_gates(generator)),
        scales=tuple(_scale(name, torch.stack([one[name] for one in maps])) for name in maps[0]),
        diversity=float(pairwise_diversity(samples, distance).mean()),
    )


def _check(generator: object, render: object, num_noises: object, distance: object) -> None:
    if not isinstance(generator, nn.Module):
        msg = f"{_OWNER}: generator must be a torch.nn.Module; got {type(generator).__name__}"
        raise DTypeError(msg)
    for name, value in (("render", render), ("distance", distance)):
        if not callable(value):
            msg = f"{_OWNER}: {name} must be callable; got {type(value).__name__}"
            raise DTypeError(msg)
    check_int(_OWNER, "num_noises", num_noises, minimum=2)


def _gates(generator: nn.Module) -> Iterator[NoiseGate]:
    for name, module in generator.named_modules():
        gate = getattr(module, "gate", None)
        if isinstance(gate, nn.Parameter) and gate.numel() == 1:
            yield NoiseGate(name, type(module).__name__, float(gate))


def _chosen(generator: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    known = dict(generator.named_modules())
    if layers is None:
        # not its subclasses: torch's list of parametrizations holds no layers
        lists = {name for name, module in known.items() if type(module) is nn.ModuleList}
        return {n: m for n, m in known.items() if n and n.rpartition(".")[0] in lists}
    unknown = [name for name in layers if name not in known]
    if unknown:
        msg = f"{_OWNER}: layers must be names of modules of generator; got {unknown}"
        raise InputError(msg)
    return {name: known[name] for name in layers}


@contextmanager
def _outputs(generator: nn.Module, layers: Sequence[str] | None) -> Iterator[dict[str, Tensor]]:
    """The output maps of the chosen modules, by name; a module's first call counts."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: object, output: object) -> None:  # noqa: ARG001
        if isinstance(output, Tensor) and output.dim() == 4 and output.is_floating_point():
            # a later layer may write into its input
            found.setdefault(name, output.detach().clone())

    handles = [
        module.register_forward_hook(partial(keep, name))
        for name, module in _chosen(generator, layers).items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _scale(name: str, maps: Tensor) -> NoiseScale:
    """``maps`` is ``(S, B, C, H, W)``."""
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    pairs = [(wide[i] - wide[j]).abs().mean() for j in range(1, len(wide)) for i in range(j)]
    # from the first sample on, so that equal ones have no variance at all
    from_noise = (wide - wide[0]).var(0, correction=0).mean((0, 2, 3))
    total = wide.var((0, 1, 3, 4), correction=0)
    # the two variances are measured apart: rounding must not leave [0, 1]
    share = (from_noise.sum() / total.sum()).clamp(0, 1) if bool(total.sum() != 0) else total.sum()
    size = (maps.shape[-2], maps.shape[-1])
    return NoiseScale(name, maps.shape[2], size, float(torch.stack(pairs).mean()), float(share))
