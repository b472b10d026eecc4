"""The generator whose weights are a moving average of the trained one's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpsims._checks import check_number
from dpsims.errors import DTypeError, IncompatibleCheckpointError, NonFiniteError
from dpsims.nn.spectral import refresh_spectral_norm_
from dpsims_reference.checkpoints.module import bare_names, load_module_, module_tensors
from dpsims_reference.recalibration import recalibrate_batch_norm_ as recalibrate_batch_norm_

M = TypeVar("M", bound=nn.Module)

_HALF = (torch.float16, torch.bfloat16)


class GeneratorEMA(Generic[M]):
    r"""Exponential moving average of a generator's parameters.

    Each update moves every averaged parameter by :math:`1 - d` of its distance to the trained one.
    Buffers are copied, never averaged. Half-precision parameters are averaged in float32.

    Args:
        model: The trained generator; the average starts as a copy of it.
        decay: The :math:`d` above: 0 copies the model, 1 keeps the start.
        warmup: Whether update ``t`` (from 0) uses ``min(decay, (1 + t) / (10 + t))``, so that a
            short run forgets its random start.

    Raises:
        InputError: ``decay`` outside [0, 1].
        DTypeError: ``model`` is no module.

    Note:
        The average is a network of its own: evaluating it leaves the trained one alone. Processes
        that hold equal models hold equal averages. Cost of an update: one pass over the
        parameters for the check and one for the average; on CUDA one wait for the device.

    Source:
        Berrada et al., CVPR 2024, Table S2 (0.9999). Not in the paper: the warm-up, the buffers.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> ema = GeneratorEMA(model, decay=0.75)
        >>> start = model.weight.item()
        >>> _ = nn.init.constant_(model.weight, start + 4)
        >>> ema.update(model)
        >>> round(ema.model.weight.item() - start, 5)
        1.0
    """

    def __init__(self, model: M, *, decay: float = 0.9999, warmup: bool = False) -> None:
        if not isinstance(model, nn.Module):
            msg = f"GeneratorEMA: model must be a torch.nn.Module; got {type(model).__name__}"
            raise DTypeError(msg)
        check_number("GeneratorEMA", "decay", decay, minimum=0, maximum=1)
        if not isinstance(warmup, bool):
            msg = f"GeneratorEMA: warmup must be a bool; got {type(warmup).__name__}"
            raise DTypeError(msg)
        self.decay, self.warmup = float(decay), warmup
        self._averages = AveragedModel(_unwrapped(model)).requires_grad_(False).eval()
        _widen(self._averages)
        self._stale = True

    @property
    def model(self) -> M:
        """The averaged generator, in evaluation mode and without gradients.

        Its spectral-norm vectors fit its weights: after an update, the first look lets them catch
        up. Its batch-norm statistics are those of the trained generator until
        :func:`recalibrate_batch_norm_` has seen data; call that before evaluating or saving.
        """
        model = cast("M", self._averages.module)
        if self._stale:
            refresh_spectral_norm_(model)
            self._stale = False
        return model

    @property
    def num_updates(self) -> int:
        """How many times :meth:`update` was called."""
        return int(self._averages.n_averaged)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the trained generator's present weights into the average.

        Args:
            model: The generator given at construction, or one of the same structure; wrapped or
                not. Tensors are matched by name.

        Raises:
            IncompatibleCheckpointError: Other names or shapes; lists the first ten.
            NonFiniteError: A parameter is NaN or infinite; the average is as it was.
        """
        own = self._averages.module
        own_params, own_buffers = _tensors(own)
        live_params, live_buffers = _tensors(model)
        averages, params = _matched(own_params, live_params)
        copies, buffers = _matched(own_buffers, live_buffers)
        _check_finite(live_params)
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        if decay == 0:
            copies, buffers = copies + averages, buffers + params
        elif averages:
            # AveragedModel.update_parameters pairs by order, wants one dtype and copies at first
            get_ema_multi_avg_fn(decay)(averages, params, self.num_updates)
        for copy, buffer in zip(copies, buffers, strict=True):
            copy.copy_(buffer)
        self._averages.n_averaged.add_(1)
        self._stale = True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON for ``CheckpointStore.save``; the tensors are the live ones."""
        state = {"num_updates": self.num_updates, "decay": self.decay, "warmup": self.warmup}
        return module_tensors(self.model), state

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state` gave.

        Another decay or warm-up than now is warned of; the present one counts.

        Raises:
            IncompatibleCheckpointError: The tensors do not fit, or the number of updates is
                missing; nothing has been loaded.
            NonFiniteError: A tensor holds NaN or infinity; nothing has been loaded.
        """
        count = state.get("num_updates")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            msg = f"GeneratorEMA.load: state must give num_updates, at least 0; got {count!r}"
            raise IncompatibleCheckpointError(msg)
        load_module_(self._averages.module, tensors, name="ema")
        self._averages.n_averaged.fill_(count)
        self._stale = False
        for name, present in (("decay", self.decay), ("warmup", self.warmup)):
            if state.get(name) != present:
                text = f"GeneratorEMA.load: goes on with {name} {present}; got {state.get(name)}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel`` and ``torch.compile``."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        is_ddp = isinstance(model, DistributedDataParallel)
        model = cast("nn.Module", model.module if is_ddp else model._orig_mod)
    return model


def _widen(model: nn.Module) -> None:
    """Make half-precision tensors float32: in bfloat16 a small step would round to none."""
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if param.dtype in _HALF:
                param.data = param.data.float()
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.dtype in _HALF:
                setattr(module, name, buffer.float())


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers by bare name, each tensor once."""
    params: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen = set()
    # one walk instead of named_parameters() and named_buffers(), which took most of an update
    for prefix, module in model.named_modules():
        for found, members in ((params, module._parameters), (buffers, module._buffers)):
            for name, tensor in members.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}.{name}" if prefix else name] = tensor
    names = iter(bare_names([*params, *buffers]))
    return {next(names): t for t in params.values()}, {next(names): t for t in buffers.values()}


def _matched(own: dict[str, Tensor], live: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of both in one order, the live ones with the own device and dtype."""
    pairs = [(old, live.get(name)) for name, old in own.items()]
    if len(own) != len(live) or any(new is None or old.shape != new.shape for old, new in pairs):
        wrong = [
            name for name, old in own.items() if name not in live or live[name].shape != old.shape
        ]
        wrong += [name for name in live if name not in own]
        msg = (
            "GeneratorEMA.update: model must have the tensors of the averaged one; got other "
            f"names or shapes: {', '.join(wrong[:10])}"
        )
        raise IncompatibleCheckpointError(msg)
    olds = [old for old, _ in pairs]
    news = [new.to(old.device, old.dtype) for old, new in pairs if new is not None]
    return olds, news


def _check_finite(params: dict[str, Tensor]) -> None:
    values = [param.detach() for param in params.values() if param.is_floating_point()]
    if not values:
        return
    # one number per tensor, and one wait; a norm may overflow, so only the values convict
    norms = [norm.to(values[0].device, torch.float32) for norm in torch._foreach_norm(values)]
    if bool(torch.stack(norms).isfinite().all()):
        return
    bad = [name for name, param in params.items() if not param.isfinite().all()]
    if bad:
        msg = f"GeneratorEMA.update: model must have finite parameters; got others in {bad[:10]}"
        raise NonFiniteError(msg)
