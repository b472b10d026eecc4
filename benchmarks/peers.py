"""Other projects' own generators and losses, from a checkout that the user names.

Nothing of theirs is copied here: their modules are imported from the given folder, built with
the sizes of the case and timed beside ours. A peer keeps its own random weights, so it is compared
with itself in float64.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Inputs, Outputs, Run, UnavailableError, plain, wide, with_gradients
from benchmarks.models import Model
from benchmarks.naive import one_hot
from dpsims.errors import InputError

# what importing or building strange code of another torch version may raise
_BROKEN = (
    ImportError,
    AttributeError,
    TypeError,
    ValueError,
    KeyError,
    RuntimeError,
    SyntaxError,
    OSError,
    AssertionError,
)


class Peer:
    """A project in a folder.

    Args:
        name: ``"oasis"`` or ``"spade"``.
        path: The checkout, the folder that holds ``models``.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path

    def generator(self, model: Model, device: torch.device, dtype: torch.dtype) -> Run:
        """Its generator of the same sizes, from integer labels to images.

        Raises:
            UnavailableError: It cannot be imported or built.
        """
        return self._images(model, device, dtype)

    def true_images(self, model: Model, device: torch.device, inputs: Inputs) -> Outputs:
        """What its generator gives in float64."""
        with self._explained():
            return self._images(model, device, torch.float64)(wide(inputs))

    def loss(self) -> Run:
        """Its loss of the real images, with its own class balancing, and the logits' gradient.

        Raises:
            UnavailableError: It has none, or it cannot be imported.
        """
        if self.name != "oasis":
            msg = "not run: its loss knows real and fake, and no classes"
            raise UnavailableError(msg)
        with self._explained():
            losses = self._module("models.losses")
        return _loss_run(losses)

    def true_loss(self, inputs: Inputs) -> Outputs:
        """What its loss gives in float64."""
        return self.loss()(wide(inputs))

    def _images(self, model: Model, device: torch.device, dtype: torch.dtype) -> Run:
        with self._explained(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            network = self._build(model, device).eval().to(device, dtype)

        def function(inputs: Inputs) -> Tensor:
            # its noise comes from the global source: the same in every call, so that it compares
            torch.manual_seed(0)
            maps = one_hot(inputs["labels"], model.num_classes, dtype)
            images: Tensor = network(maps)
            return images

        return plain(function)

    def _build(self, model: Model, device: torch.device) -> nn.Module:
        module = "models.generator" if self.name == "oasis" else "models.networks.generator"
        found = self._module(module)
        make = found.OASIS_Generator if self.name == "oasis" else found.SPADEGenerator
        network: nn.Module = make(_options(model, device))
        return network

    def _module(self, name: str) -> ModuleType:
        """Import one of its modules; no other project's ``models`` is seen, before or after."""
        before = list(sys.path)
        _forget(name)
        sys.path.insert(0, str(self.path))
        try:
            return importlib.import_module(name)
        finally:
            sys.path[:] = before
            _forget(name)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except _BROKEN as error:
            text = f"not run: {type(error).__name__}: {error}".splitlines()[0]
            # a message may hold the path of the checkout, which is nobody's business
            raise UnavailableError(text.replace(str(self.path), "PATH")[:300]) from error


def parse_peers(arguments: list[str]) -> dict[str, Peer]:
    """Peers from ``NAME=PATH`` arguments.

    Raises:
        InputError: Another form, an unknown name, or a name given twice.
    """
    peers: dict[str, Peer] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not path or name not in ("oasis", "spade") or name in peers:
            msg = f"peer: each must be oasis=PATH or spade=PATH, and given once; got {argument!r}"
            raise InputError(msg)
        peers[name] = Peer(name, Path(path))
    return peers


def _forget(name: str) -> None:
    top = name.partition(".")[0]
    for loaded in [m for m in sys.modules if m == top or m.startswith(f"{top}.")]:
        del sys.modules[loaded]


def _options(model: Model, device: torch.device) -> SimpleNamespace:
    """The command-line options that either project's generator reads."""
    return SimpleNamespace(
        # both
        semantic_nc=model.num_classes,
        crop_size=model.width,
        aspect_ratio=model.width / model.height,
        z_dim=model.latent_dim,
        gpu_ids="-1" if device.type == "cpu" else "0",
        # OASIS
        channels_G=model.channels[-1],
        num_res_blocks=len(model.channels) - 1,
        no_3dnoise=False,
        no_spectral_norm=False,
        param_free_norm="batch",
        spade_ks=3,
        # SPADE
        ngf=model.channels[-1],
        norm_G="spectralspadebatch3x3",
        num_upsampling_layers="normal",
        use_vae=False,
    )


def _loss_run(losses: Any) -> Run:
    def function(inputs: Inputs) -> Tensor:
        logits, labels = inputs["logits"], inputs["labels"]
        options = SimpleNamespace(
            no_labelmix=True,
            no_balancing_inloss=False,
            contain_dontcare_label=False,
            gpu_ids="-1" if logits.device.type == "cpu" else "0",
        )
        maps = one_hot(labels, logits.shape[1] - 1, logits.dtype)
        value: Tensor = losses.losses_computer(options).loss(logits, maps, True)
        return value

    run: Callable[[Inputs], Outputs] = with_gradients(function, ["logits"])
    return run
