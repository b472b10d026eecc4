"""Draw images in proportion to weights, the same on one process or many, resumable anywhere."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Sampler

from dpsims._checks import check_bool, check_int
from dpsims.data._sampler_checks import check_agreement, checked_rank, summed
from dpsims.errors import IncompatibleCheckpointError, InputError

# indices become Python numbers in pieces, not all at once
_PIECE = 1 << 16
_STATE = ("epoch", "position", "seed", "num_samples", "world_size", "fingerprint")


class ClassBalancedSampler(Sampler[int]):
    """Draw images with replacement, in proportion to their weights, on one process or many.

    Every epoch is one sequence for all processes, a function of ``(seed, epoch)`` alone; rank
    ``r`` of ``R`` takes its entries ``r``, ``r + R``, ``r + 2 R``, ... So nothing has to be
    communicated, and an interrupted epoch can be continued exactly.

    Args:
        weights: Weight of every image, as from :func:`image_sampling_weights`. Equal weights draw
            uniformly; weight 0 is never drawn.
        num_samples: Draws of one epoch, over all processes; ``None`` means one per image. It is
            raised to the next multiple of ``world_size`` by further draws.
        seed: Seed of the sequence, the same on all processes.
        rank: Number of this process. ``None`` asks ``torch.distributed``, and means 0 without it.
        world_size: Number of processes; goes with ``rank``.
        auto_epoch: Step to the next epoch when the sampler is iterated again, for loops that do
            not call :meth:`set_epoch`.

    Shape:
        - weights ``(I,)`` for ``I`` images; the indices drawn are ints in ``[0, I)``

    Raises:
        InputError: A size or rank is out of range, there are fewer draws than processes, or the
            weights are negative, not finite or all 0.
        DTypeError: ``weights`` is not a floating-point tensor, a number has another type.
        DistributedError: The processes of ``torch.distributed`` pass different arguments.

    Note:
        Units: weights count relative to one another. Cost of an epoch: ``num_samples`` bisections
        in a table of ``I`` float64 sums. There is no limit on ``I``, unlike in
        ``WeightedRandomSampler`` (2**24). Global random state is neither read nor written. When
        ``rank`` is taken from ``torch.distributed``, building the sampler is a collective call.

        A ``DataLoader`` asks for indices ahead of what it returns. Whoever saves in the middle of
        an epoch passes ``consumed=``, the draws that really were used on this process:
        ``sampler.state_dict(consumed=batches_done * batch_size)``.

    Source:
        Berrada et al., CVPR 2024, Sec. 4.1 ("each image is sampled with a probability proportional
        to"). The split over processes and the resumable order are not in the paper.

    Example:
        >>> sampler = ClassBalancedSampler(torch.tensor([0.0, 1.0]), num_samples=3)
        >>> list(sampler)
        [1, 1, 1]
    """

    def __init__(
        self,
        weights: Float[Tensor, " I"],
        *,
        num_samples: int | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        auto_epoch: bool = False,
    ) -> None:
        self._sums, self._last, self._fingerprint = summed(weights)
        check_int("ClassBalancedSampler", "seed", seed, minimum=None)
        check_bool("ClassBalancedSampler", "auto_epoch", auto_epoch)
        if num_samples is not None:
            check_int("ClassBalancedSampler", "num_samples", num_samples)
        self.num_samples = len(weights) if num_samples is None else num_samples
        self.seed = seed
        self.auto_epoch = auto_epoch
        if rank is None and world_size is None and dist.is_available() and dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
            check_agreement((seed, self.num_samples, self._fingerprint), world_size)
        self.rank, self.world_size = checked_rank(rank, world_size, self.num_samples)
        self.epoch = 0
        self._start = 0
        self._position = 0
        self._begun: int | None = None
        self._passes = 0
        self._warned = False

    def __len__(self) -> int:
        """Draws of one epoch on this process, however many of them are left."""
        return (self.num_samples + self.world_size - 1) // self.world_size

    def __iter__(self) -> Iterator[int]:
        """Yield all draws of the epoch, or its rest after :meth:`start_at` or a restored state."""
        if self._begun == self.epoch:
            if self.auto_epoch:
                self.set_epoch(self.epoch + 1)
            elif not self._warned:
                self._warned = True
                msg = (
                    f"ClassBalancedSampler: epoch {self.epoch} is drawn again, in the same order; "
                    "call set_epoch before every epoch, or pass auto_epoch=True"
                )
                warnings.warn(msg, UserWarning, stacklevel=2)
        self._begun = self.epoch
        self._position, self._start = self._start, 0
        self._passes += 1
        # drawn now: the iterator keeps its epoch, whatever set_epoch says before the first step
        return self._walk(self._passes, self._position, self._drawn())

    def set_epoch(self, epoch: int) -> None:
        """Choose the sequence to draw; a new epoch starts at its first draw.

        Args:
            epoch: Number of the epoch, from 0. Setting the current one again keeps the position
                that :meth:`start_at` or :meth:`load_state_dict` chose.
        """
        check_int("ClassBalancedSampler.set_epoch", "epoch", epoch, minimum=0)
        if epoch != self.epoch:
            self.epoch = epoch
            self._start = self._position = 0
            self._passes += 1

    def start_at(self, position: int) -> None:
        """Let the next iteration of this epoch leave out its first draws.

        Args:
            position: Number of draws of this process to leave out, at most ``len(self)``.

        Raises:
            InputError: ``position`` is out of range.
        """
        self._start = self._position = self._checked_position("start_at", "position", position)
        self._begun = None
        self._passes += 1

    def state_dict(self, *, consumed: int | None = None) -> dict[str, Any]:
        """Return where this epoch stands, in plain values that JSON can hold.

        Args:
            consumed: Draws of this epoch that were used on this process, counted from the start of
                the epoch. ``None`` takes the draws handed out, which is more when something
                fetched ahead.

        Raises:
            InputError: ``consumed`` is out of range.
        """
        position = self._position
        if consumed is not None:
            position = self._checked_position("state_dict", "consumed", consumed)
        return {"epoch": self.epoch, "position": position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` stood.

        Args:
            state: Its result, from any rank.

        Raises:
            IncompatibleCheckpointError: The state is of other weights (another data set), another
                seed, ``num_samples`` or ``world_size``, or it is no such state.
        """
        owner = "ClassBalancedSampler.load_state_dict"
        if not isinstance(state, Mapping) or set(state) != set(_STATE):
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            msg = f"{owner}: state must have the keys {', '.join(_STATE)}; got {got!s:.200}"
            raise IncompatibleCheckpointError(msg)
        for key, value in self._identity().items():
            if state[key] != value:
                name = "fingerprint of the weights" if key == "fingerprint" else key
                msg = f"{owner}: {name} must be this sampler's {value!r}; got {state[key]!r:.80}"
                raise IncompatibleCheckpointError(msg)
        try:
            check_int(owner, "epoch", state["epoch"], minimum=0)
            position = self._checked_position("load_state_dict", "position", state["position"])
        except (TypeError, ValueError) as error:
            raise IncompatibleCheckpointError(str(error)) from error
        self.epoch = state["epoch"]
        self.start_at(position)

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "num_samples": self.num_samples,
            "world_size": self.world_size,
            "fingerprint": self._fingerprint,
        }

    def _checked_position(self, method: str, name: str, value: int) -> int:
        owner = f"ClassBalancedSampler.{method}"
        check_int(owner, name, value, minimum=0)
        if value > len(self):
            msg = (
                f"{owner}: {name} must be at most {len(self)}, the draws of an epoch; got {value}"
            )
            raise InputError(msg)
        return value

    def _walk(self, number: int, position: int, indices: Tensor) -> Iterator[int]:
        for piece in indices[position:].split(_PIECE):
            for index in piece.tolist():
                position += 1
                # an iterator from before another iter, set_epoch or start_at moves nothing
                if number == self._passes:
                    self._position = position
                yield index

    def _drawn(self) -> Tensor:
        """All indices of this process in this epoch."""
        name = f"dpsims.ClassBalancedSampler {self.seed} {self.epoch}"
        entropy = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        generator = torch.Generator().manual_seed(entropy)
        total = len(self) * self.world_size
        draws = torch.rand(total, generator=generator, dtype=torch.float64)
        draws = draws[self.rank :: self.world_size] * self._sums[-1]
        # right=True: an image of weight 0 owns an empty interval and is never found
        found = torch.searchsorted(self._sums, draws, right=True)
        # a draw just below 1 may be rounded up to the last sum
        return found.clamp_(max=self._last)
