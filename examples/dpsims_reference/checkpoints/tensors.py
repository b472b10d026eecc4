"""Groups of tensors as safetensors bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dpsims.errors import CorruptCheckpointError, DTypeError, InputError
from dpsims_reference.checkpoints.strict_json import decode_json

_GROUP = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    | {torch.float8_e4m3fn, torch.float8_e5m2}
)


def encode_tensors(owner: str, group: str, tensors: Mapping[str, Tensor]) -> bytes:
    """One group of tensors as a safetensors file, from any device and memory layout.

    Raises:
        DTypeError: An entry is no dense tensor, has a dtype that the format lacks, or a name that
            is no text.
        InputError: The group's or a tensor's name cannot be used.
    """
    if not isinstance(group, str) or not _GROUP.fullmatch(group):
        msg = f"{owner}: tensors must have groups named by a-z, 0-9, _ and -; got {group!r:.80}"
        raise InputError(msg)
    if not isinstance(tensors, Mapping):
        kind = type(tensors).__name__
        msg = f"{owner}: tensors[{group!r}] must be a dict of tensors; got {kind}"
        raise DTypeError(msg)
    packed: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        _check_entry(owner, f"tensors[{group!r}]", name, tensor)
        dense = tensor.detach().to("cpu").contiguous()
        storage = dense.untyped_storage()
        # safetensors refuses tensors that share memory: tied ones are written twice
        if storage.data_ptr() in seen or storage.nbytes() != dense.nbytes:
            dense = dense.clone(memory_format=torch.contiguous_format)
        seen.add(dense.untyped_storage().data_ptr())
        packed[name] = dense
    return safetensors.torch.save(packed)


def _check_entry(owner: str, group: str, name: object, tensor: object) -> None:
    if not isinstance(name, str):
        msg = f"{owner}: {group} must have text as keys; got {name!r:.80}"
        raise DTypeError(msg)
    if name == "__metadata__" or any("\ud800" <= letter <= "\udfff" for letter in name):
        msg = f"{owner}: {group} must have names that safetensors can hold; got {name!r:.80}"
        raise InputError(msg)
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        msg = f"{owner}: {group}[{name!r:.80}] must be a torch.Tensor; got {kind}"
        raise DTypeError(msg)
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
        found = f"{tensor.dtype}, {tensor.layout} on {tensor.device}"
        msg = f"{owner}: {group}[{name!r:.80}] must be a dense real tensor with data; got {found}"
        raise DTypeError(msg)


def decode_tensors(owner: str, file: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each in memory of its own.

    Raises:
        CorruptCheckpointError: The bytes are no sound safetensors file.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        msg = f"{owner}: {file} must start with the length of its header; got {data[:8].hex()!r}"
        raise CorruptCheckpointError(msg)
    # safetensors itself takes the last of duplicate names
    decode_json(owner, file, data[8 : 8 + length])
    try:
        return safetensors.torch.load(data)
    except (
        safetensors.SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        RuntimeError,
        AssertionError,
    ) as error:
        msg = f"{owner}: {file} must be a safetensors file; got {str(error)[:100]}"
        raise CorruptCheckpointError(msg) from None
