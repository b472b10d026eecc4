"""Segmentation networks from files: TorchScript, ONNX, and the map of their ids."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpsims._optional import require
from dpsims.errors import DataError, InputError
from dpsims_reference.evaluation.segmenters import Network, Segmenter

_ONNX_FAULTS = (
    "EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile",
    "NotImplemented", "RuntimeException",
)  # fmt: skip


def read_ids(path: Path) -> list[int | None]:
    """The ``ids`` of a :class:`Segmenter` from a JSON list such as ``[7, 8, null, 11]``.

    Raises:
        DataError: The file is missing or holds something else; the message names it.
    """
    try:
        ids = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{path}: must be a JSON list of class ids; got {error!r:.100}"
        raise DataError(msg) from error
    if not isinstance(ids, list) or not all(i is None or type(i) is int for i in ids):
        msg = f"{path}: must be a JSON list of class ids and nulls; got {ids!r:.60}"
        raise DataError(msg)
    return ids


def load_segmenter(
    path: Path, *, num_classes: int, device: str = "cpu", **options: Any
) -> Segmenter:
    """A :class:`Segmenter` around a TorchScript (``.pt``, ``.pth``, ``.ts``) or ``.onnx`` file.

    The file is a program: take it from people you trust.

    Args:
        path: The file.
        num_classes: Number of classes of the data set.
        device: Where the network runs.
        **options: ``ids``, ``size``, ``mean`` and ``std`` of :class:`Segmenter`.

    Raises:
        DataError: The file is missing or no such program.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"{path}: must be a TorchScript or ONNX file; got no file"
        raise DataError(msg)
    read = _read_onnx if path.suffix == ".onnx" else _read_torchscript
    weights = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    name = re.sub(r"[^A-Za-z0-9_.@-]", "_", path.stem)
    return Segmenter(
        read(path, device), name=name, num_classes=num_classes, weights=weights, **options
    )


def _read_torchscript(path: Path, device: str) -> Network:
    with warnings.catch_warnings():
        # torch advises to export instead, under one name or the other; people have these files
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        try:
            network = torch.jit.load(path, map_location=device)
        except RuntimeError as error:
            msg = f"{path}: must be a TorchScript program; got {error!s:.100}"
            raise DataError(msg) from error
    return network.eval()


def _read_onnx(path: Path, device: str) -> Network:
    runtime = require("onnxruntime", extra="export", purpose="an ONNX segmenter")
    state = runtime.capi.onnxruntime_pybind11_state
    # its errors have no base of their own
    faults = tuple(getattr(state, name) for name in _ONNX_FAULTS)
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    available = runtime.get_available_providers()
    providers = [name for name in [*wanted, "CPUExecutionProvider"] if name in available]
    try:
        session = runtime.InferenceSession(str(path), providers=providers)
    except faults as error:
        msg = f"{path}: must be an ONNX program; got {error!s:.100}"
        raise DataError(msg) from error
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = [each.name for each in inputs]
        msg = f"{path}: must take one input, the images; got {names}"
        raise DataError(msg)
    name, one_by_one = inputs[0].name, inputs[0].shape[0] == 1

    def run(images: Tensor) -> Tensor:
        found = []
        for part in images.split(1) if one_by_one else [images]:
            try:
                result = session.run(None, {name: part.cpu().numpy()})[0]
            except faults as error:
                shape = tuple(part.shape)
                msg = f"{path}: must take images of shape {shape} (set size); got {error!s:.150}"
                raise InputError(msg) from error
            found.append(torch.from_numpy(result))
        return torch.cat(found).to(images.device)

    return run
