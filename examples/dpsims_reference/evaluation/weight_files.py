"""Files of network weights: read once, hashed, and never run."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from dpsims.errors import BackboneError

_PREFIXES = ("module.", "backbone.")


class WeightFile(NamedTuple):
    """Tensors by name, and the file they are from."""

    tensors: dict[str, Tensor]
    name: str
    sha256: str

    @property
    def origin(self) -> dict[str, str]:
        """What an evaluation card says of the file."""
        return {"file": self.name, "sha256": self.sha256}


def read_weights(owner: str, path: Path, *, advice: str) -> WeightFile:
    """The tensors of a checkpoint ``.pth``, ``.pth.tar`` or ``.safetensors``.

    Args:
        owner: The callable that speaks.
        path: The file.
        advice: Where to get the file, for the error of a missing one.

    Raises:
        BackboneError: The file is missing, damaged, holds code or no tensors, or is not the one
            whose hash stands in its name; the message says where to put the right one.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        msg = f"{owner}: weights must be a file on this disk ({advice}); got none at {path}"
        raise BackboneError(msg) from error
    digest = hashlib.sha256(data).hexdigest()
    hashed = re.search(r"-([0-9a-f]{8})\.pth$", Path(path).name)
    if hashed and not digest.startswith(hashed[1]):
        msg = f"{owner}: weights must have the hash in their name (fetch them again); got {path}"
        raise BackboneError(msg)
    try:
        if Path(path).suffix == ".safetensors":
            content: object = load(data)
        else:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        msg = f"{owner}: weights must be a readable file of tensors; got {path} ({error!s:.80})"
        raise BackboneError(msg) from error
    return WeightFile(_tensors(owner, path, content), Path(path).name, digest)


def _tensors(owner: str, path: Path, content: object) -> dict[str, Tensor]:
    """The state dict, also of one inside a training checkpoint, without the wrappers' prefixes."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        msg = f"{owner}: weights must hold a state dict; got {type(content).__name__} in {path}"
        raise BackboneError(msg)
    tensors = {}
    for name, value in content.items():
        for prefix in _PREFIXES:
            name = str(name).removeprefix(prefix)
        tensors[name] = value
    return tensors


def fill_(owner: str, module: nn.Module, file: WeightFile) -> None:
    """Copy ``file`` into ``module``; what else the file holds, such as a head, is left out.

    Raises:
        BackboneError: A tensor of the module is missing or has another shape; nothing is copied.
    """
    wanted = module.state_dict()
    for name, value in wanted.items():
        # counts the batches of a training that is over
        if name.endswith("num_batches_tracked"):
            continue
        found = file.tensors.get(name)
        if found is None or found.shape != value.shape:
            shape = "none" if found is None else tuple(found.shape)
            msg = (
                f"{owner}: weights must hold {name} of shape {tuple(value.shape)}; "
                f"got {shape} in {file.name}"
            )
            raise BackboneError(msg)
    kept = {name: file.tensors.get(name, value) for name, value in wanted.items()}
    module.load_state_dict(kept)


def tensors_sha256(module: nn.Module) -> str:
    """A hash of a module's tensors and their names, for networks that are not one file."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
