"""How many bytes of tensors are alive."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that are made while the mode is on, until they are freed.

    Attributes:
        now: Bytes alive.
        peak: Most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, then look at what it made."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tree_map_only(Tensor, self._see, result)
        return result

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)
        return tensor

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
