"""A trained generator as one file that runs without this package: torch.export or ONNX."""

from __future__ import annotations

import copy
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from dpsims._checks import check_choice
from dpsims._optional import require
from dpsims.errors import InputError
from dpsims.nn import fold_spectral_norm_
from dpsims_reference.export_card import ExportCheck, build_card, card_path, write_card
from dpsims_reference.networks import ImageGenerator
from dpsims_reference.randomness import derive_generator
from dpsims_reference.sampling import TrainedGenerator, load_generator

Format = Literal["torch", "onnx"]
Runner = Callable[[dict[str, Tensor]], Tensor]
Writer = Callable[[Path, torch.export.ExportedProgram], None]

OWNER = "export_generator"
# of the largest pixel: float32 sums in another order
TOLERANCE = 1e-4
# the file is traced with a batch of two; these must work as well
_CHECKED_BATCHES = (1, 3)
_OPSET = 18
# a protobuf message is smaller than this
_LARGEST_ONNX = 2**31
_SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}


class ImagesOnly(nn.Module):
    """A generator in evaluation mode that returns its images alone.

    Args:
        generator: The generator; a copy of it is kept, with its spectral norms baked in.

    Shape:
        - as the generator's; output ``(B, 3, H, W)``
    """

    def __init__(self, generator: ImageGenerator) -> None:
        super().__init__()
        self.generator = fold_spectral_norm_(copy.deepcopy(generator)).eval().requires_grad_(False)

    def forward(
        self,
        labels: Integer[Tensor, "B H W"],
        latents: Float[Tensor, "B Z"],
        extra: Float[Tensor, "B E H W"] | None = None,
        noise: Float[Tensor, "B S H W"] | None = None,
    ) -> Float[Tensor, "B 3 H W"]:
        """The images."""
        images: Tensor = self.generator(labels, latents, extra, noise).images
        return images


def export_generator(run: str | Path, out: Path, *, format: Format = "torch") -> dict[str, Any]:  # noqa: A002
    """Write the averaged generator of a run as a program, with a card of what it takes.

    The batch is free, height and width are those of training. The file is run before it gets its
    name: images that differ from the run's own are an error, and leave no file.

    Args:
        run: Folder of the run; ``RUN@best`` or ``RUN@STEP`` takes another checkpoint.
        out: The file, ``.pt2`` or ``.onnx``. The card goes beside it, with ``.json`` added.
        format: ``"torch"`` is :func:`torch.export.save`'s, ``"onnx"`` runs under onnxruntime.

    Returns:
        The card.

    Raises:
        InputError: The name of the file does not fit the format; the generator is too large for
            ONNX; the program's images differ.
        CheckpointError: The run has no sound checkpoint.
        ModuleNotFoundError: ONNX is wanted and the extra ``export`` is not installed.
    """
    check_choice(OWNER, "format", format, tuple(_SUFFIXES))
    if out.suffix != _SUFFIXES[format]:
        msg = f"{OWNER}: out must end in {_SUFFIXES[format]} for format {format!r}; got {out.name}"
        raise InputError(msg)
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, extra="export", purpose="an ONNX file")
    trained = load_generator(run)
    module = ImagesOnly(trained.generator)
    if format == "onnx":
        _check_size(module)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        path = Path(folder) / out.name
        write, runner = _WAYS[format]
        write(path, traced(module, trained))
        check = _checked(trained, runner(path))
        card = build_card(trained, path, format, program_inputs(trained, 1), check)
        os.replace(path, out)
    write_card(card_path(out), card)
    return card


def program_inputs(trained: TrainedGenerator, batch: int) -> dict[str, Tensor]:
    """Inputs of the program by name: random ids with some unlabelled pixels, random numbers."""
    config, generator = trained.config, trained.generator
    height, width = config.data.image_size
    rng = derive_generator(0, "export", batch)
    labels = torch.randint(config.data.num_classes, (batch, height, width), generator=rng)
    # the one id that is no class, which contributes nothing
    labels[:, 0, 0] = 255
    found = {"labels": labels, "latents": generator.sample_latents(batch, generator=rng)}
    if config.data.instances:
        found["extra"] = torch.rand(batch, 2, height, width, generator=rng) * 2 - 1
    noise = generator.sample_noise(batch, (height, width), generator=rng)
    return found if noise is None else found | {"noise": noise}


def traced(module: ImagesOnly, trained: TrainedGenerator) -> torch.export.ExportedProgram:
    """The program of ``module`` for any batch."""
    inputs = program_inputs(trained, 2)
    batch = torch.export.Dim("batch", min=1)
    shapes = {name: {0: batch} for name in inputs}
    with torch.no_grad():
        return torch.export.export(module, (), inputs, dynamic_shapes=shapes)


def _check_size(module: nn.Module) -> None:
    size = sum(value.nbytes for value in module.state_dict().values())
    if size >= _LARGEST_ONNX:
        msg = (
            f"{OWNER}: format must be 'torch' for weights of {_LARGEST_ONNX >> 30} GiB or more, "
            f"which no single ONNX file holds; got {size / 2**30:.1f} GiB"
        )
        raise InputError(msg)


def _write_torch(path: Path, program: torch.export.ExportedProgram) -> None:
    torch.export.save(program, path)


def _write_onnx(path: Path, program: torch.export.ExportedProgram) -> None:
    with warnings.catch_warnings():
        # onnxscript's and onnx's own use of what they deprecate
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        torch.onnx.export(
            program,
            f=str(path),
            input_names=list(program.graph_signature.user_inputs),
            output_names=["images"],
            opset_version=_OPSET,
            external_data=False,
            verbose=False,
        )


def _torch_runner(path: Path) -> Runner:
    module = torch.export.load(path).module()
    return lambda inputs: module(**inputs)


def _onnx_runner(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        (images,) = session.run(["images"], {name: x.numpy() for name, x in inputs.items()})
        return torch.from_numpy(images)

    return run


_WAYS: dict[str, tuple[Writer, Callable[[Path], Runner]]] = {
    "torch": (_write_torch, _torch_runner),
    "onnx": (_write_onnx, _onnx_runner),
}


@torch.no_grad()
def _checked(trained: TrainedGenerator, run: Runner) -> ExportCheck:
    """The largest difference to the run's own images, relative to the largest pixel.

    Raises:
        InputError: It is above the tolerance.
    """
    worst = 0.0
    for batch in _CHECKED_BATCHES:
        inputs = program_inputs(trained, batch)
        wanted, got = trained.generator(*_positional(inputs)).images, run(inputs)
        gap = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
        if not (got.shape == wanted.shape and math.isfinite(gap) and gap <= TOLERANCE):
            msg = (
                f"{OWNER}: the program must give the run's images up to {TOLERANCE:g} of the "
                f"largest pixel; got a difference of {gap:g} for a batch of {batch}"
            )
            raise InputError(msg)
        worst = max(worst, gap)
    return ExportCheck(_CHECKED_BATCHES, worst, TOLERANCE)


def _positional(inputs: dict[str, Tensor]) -> list[Tensor | None]:
    return [inputs.get(name) for name in ("labels", "latents", "extra", "noise")]
