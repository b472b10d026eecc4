"""A generator's inference on CUDA, recorded once and replayed."""

from __future__ import annotations

import torch
from torch import Tensor

from dpsims.errors import InputError
from dpsims_reference.networks import ImageGenerator

OWNER = "CapturedGenerator"
# libraries set themselves up in the first calls, which must not be recorded
_WARM_UP = 3


class CapturedGenerator:
    """Images from a CUDA graph: all kernels of a forward pass in one launch.

    A small batch spends most of its time launching kernels one by one. The arguments fix the sizes
    that every later call must have; its values are copied into the graph's own inputs.

    Args:
        generator: A generator on CUDA in evaluation mode. It is kept: weights that change in place
            count from the next call on.
        labels: As in the generator's ``forward``.
        latents: As in the generator's ``forward``.
        extra: As in the generator's ``forward``.
        noise: As in the generator's ``forward``.
        autocast: Precision of convolutions and matrix products, such as ``torch.bfloat16``.
            ``None`` is that of the weights.

    Raises:
        InputError: The generator is not on CUDA or in training mode; an input of another shape,
            dtype or presence.

    Note:
        The result belongs to the graph: the next call overwrites it, so clone what you keep. No
        call waits for the device. Ids out of range make the pixels they touch NaN.

    Example:
        >>> captured = CapturedGenerator(generator, labels, latents)  # doctest: +SKIP
        >>> images = captured(labels, latents).clone()  # doctest: +SKIP
    """

    def __init__(
        self,
        generator: ImageGenerator,
        labels: Tensor,
        latents: Tensor,
        extra: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        if generator.device.type != "cuda":
            msg = f"{OWNER}: generator must be on a CUDA device; got {generator.device}"
            raise InputError(msg)
        if generator.training:
            msg = f"{OWNER}: generator must be in evaluation mode; got training mode"
            raise InputError(msg)
        self.generator, self.autocast = generator, autocast
        given = (labels, latents, extra, noise)
        self._inputs = [
            None if value is None else value.detach().to(generator.device, copy=True)
            for value in given
        ]
        self._graph = torch.cuda.CUDAGraph()
        self._images = self._record()

    def __call__(
        self,
        labels: Tensor,
        latents: Tensor,
        extra: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The images ``(B, 3, H, W)``, valid until the next call."""
        names = ("labels", "latents", "extra", "noise")
        for name, own, value in zip(
            names, self._inputs, (labels, latents, extra, noise), strict=True
        ):
            _check_alike(name, own, value)
            if own is not None and value is not None:
                own.copy_(value, non_blocking=True)
        self._graph.replay()
        return self._images

    @torch.no_grad()
    def _record(self) -> Tensor:
        device = self.generator.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._run()
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(self._graph):
            return self._run()

    def _run(self) -> Tensor:
        enabled = self.autocast is not None
        # a cast weight that autocast keeps would be freed while the graph still reads it
        with torch.autocast("cuda", self.autocast, enabled=enabled, cache_enabled=False):
            images: Tensor = self.generator(*self._inputs).images
        return images


def _check_alike(name: str, own: Tensor | None, value: Tensor | None) -> None:
    wanted, got = (
        None if x is None else (tuple(x.shape), str(x.dtype).removeprefix("torch."))
        for x in (own, value)
    )
    if wanted != got:
        msg = f"{OWNER}: {name} must be as recorded, {wanted}; got {got}"
        raise InputError(msg)
