"""From a finished run to images: label maps in, PNGs out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpsims.data import LabelSpec, instance_offsets
from dpsims.errors import DataError, InputError
from dpsims_reference.checkpoints import load_module_
from dpsims_reference.checkpoints.manifest import MANIFEST
from dpsims_reference.config import Config
from dpsims_reference.config_json import from_dict
from dpsims_reference.figures import captioned_grid, label_pictures, save_image, to_uint8
from dpsims_reference.generator import build_generator
from dpsims_reference.networks import ImageGenerator
from dpsims_reference.prepared import PreparedGenerator, prepare_generator
from dpsims_reference.randomness import derive_generator
from dpsims_reference.runs import read_run


class TrainedGenerator(NamedTuple):
    """The averaged generator of a run, with its configuration and its classes."""

    generator: ImageGenerator
    config: Config
    spec: LabelSpec
    step: int | None = None
    """Training step of its checkpoint."""
    manifest_sha256: str | None = None
    """Hash of its checkpoint's manifest, which holds the hashes of all its files."""


def load_generator(run: str | Path, *, device: str = "cpu") -> TrainedGenerator:
    """The averaged generator of a run's newest sound checkpoint, or of another one.

    Args:
        run: Folder of the run; ``RUN@best`` or ``RUN@STEP`` takes another checkpoint.
        device: Where the generator goes.

    Raises:
        CheckpointError: The folder holds no checkpoint, or none that is intact.
        IncompatibleCheckpointError: The tensors do not fit the configuration beside them.
    """
    checkpoint = read_run("load_generator", run)
    manifest = hashlib.sha256((checkpoint.path / MANIFEST).read_bytes()).hexdigest()
    config = from_dict(Config, checkpoint.state["config"])
    spec = LabelSpec.from_dict(checkpoint.state["spec"])
    generator = build_generator(config)
    load_module_(generator, checkpoint.tensors["ema"], name="ema")
    return TrainedGenerator(generator.to(device).eval(), config, spec, checkpoint.step, manifest)


def read_label_map(path: Path, spec: LabelSpec) -> Tensor:
    """A PNG of ids as a class map ``(H, W)``.

    Raises:
        DataError: The file is unreadable, is no map of ids, or holds an id that the model does not
            know; the message names the file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "I", "I;16"):
                msg = f"{path}: a label map must hold one id per pixel; got mode {image.mode}"
                raise DataError(msg)
            ids = np.array(image)
    except (OSError, UnidentifiedImageError) as error:
        msg = f"{path}: cannot read the label map: {error}"
        raise DataError(msg) from error
    try:
        return torch.as_tensor(spec.map_ids(ids))
    except InputError as error:
        msg = f"{path}: {error}"
        raise DataError(msg) from error


def label_files(source: Path) -> list[Path]:
    """``source`` itself, or every PNG in it in the order of their names.

    Raises:
        DataError: There is none.
    """
    files = sorted(source.glob("*.png")) if source.is_dir() else [source]
    if not files or not files[0].is_file():
        msg = f"{source}: must be a PNG label map or a folder of them; got none"
        raise DataError(msg)
    return files


@torch.no_grad()
def generate(
    trained: TrainedGenerator,
    labels: Tensor,
    latents: Tensor,
    *,
    instances: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Images for maps ``(B, H, W)`` and latents ``(B, Z)``; per-pixel noise is from ``seed``."""
    model = trained.generator
    extra, noise = _beside(trained, labels, instances, seed)
    noise = None if noise is None else noise.expand(len(labels), -1, -1, -1)
    return model(labels, latents, extra, noise).images


@torch.no_grad()
def generate_many(
    trained: TrainedGenerator,
    labels: Tensor,
    latents: Tensor,
    *,
    instances: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """:func:`generate` for one map ``(1, H, W)`` and many latents.

    What does not depend on the latents is computed once if ``trained`` holds a
    :class:`~dpsims_reference.prepared.PreparedGenerator` that can tell it apart.
    """
    model = trained.generator
    if isinstance(model, PreparedGenerator) and model.can_condition:
        extra, noise = _beside(trained, labels, instances, seed)
        return model.sample(model.condition(labels, extra, noise), latents).images
    count = len(latents)
    repeated = None if instances is None else instances.expand(count, -1, -1)
    maps = labels.expand(count, -1, -1)
    return generate(trained, maps, latents, instances=repeated, seed=seed)


def _beside(
    trained: TrainedGenerator, labels: Tensor, instances: Tensor | None, seed: int
) -> tuple[Tensor | None, Tensor | None]:
    """The maps beside the labels: instance offsets, and per-pixel noise for one image."""
    extra = None
    if trained.config.data.instances:
        if instances is None:
            msg = "generate: instances must be given, the model was trained with them; got None"
            raise InputError(msg)
        extra = instance_offsets(instances)
    rng = derive_generator(seed, "sample-noise")
    return extra, trained.generator.sample_noise(1, labels.shape[-2:], generator=rng)


def slerp(first: Tensor, second: Tensor, shares: Sequence[float]) -> Tensor:
    """Latents on the great circle from ``first`` to ``second``, one for each share in [0, 1]."""
    a, b = first / first.norm(), second / second.norm()
    angle = torch.arccos((a * b).sum().clamp(-1, 1))
    share = torch.tensor(shares, dtype=first.dtype)[:, None]
    near_parallel = bool(angle < 1e-4)
    if near_parallel:
        return torch.lerp(a, b, share) * first.norm()
    mixed = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return mixed * first.norm()


def sample_to_folder(
    trained: TrainedGenerator,
    source: Path,
    out: Path,
    *,
    num_noises: int = 4,
    interpolate: int = 0,
    seed: int = 0,
    instances: Path | None = None,
) -> list[Path]:
    """Write images of every label map in ``source``: one per noise, and an overview.

    Args:
        trained: What generates.
        source: A PNG label map or a folder of them.
        out: Folder for the PNGs.
        num_noises: Images per map; noise ``i`` is the same latent for every map.
        interpolate: Steps of an interpolation between the first two noises; 0 for none.
        seed: Decides every noise.
        instances: Folder of instance PNGs of the same names, for models that use them.

    Returns:
        The files written.
    """
    trained = trained._replace(generator=prepare_generator(trained.generator))
    rng = derive_generator(seed, "sample-latents")
    latents = trained.generator.sample_latents(max(num_noises, 2), generator=rng)
    device = latents.device
    path_latents = slerp(
        latents[0].cpu(), latents[1].cpu(), torch.linspace(0, 1, max(interpolate, 1)).tolist()
    )
    written: list[Path] = []
    for file in label_files(source):
        labels = read_label_map(file, trained.spec)[None].to(device)
        ids = None if instances is None else read_instances(instances / file.name)[None].to(device)
        made = generate_many(trained, labels, latents[:num_noises], instances=ids, seed=seed)
        images = to_uint8(made)
        for index, pixels in enumerate(images):
            written.append(out / f"{file.stem}-noise{index}.png")
            save_image(written[-1], pixels)
        rows = [("labels", label_pictures(trained.spec, labels)), ("noises", list(images))]
        if interpolate:
            between = path_latents.to(device)
            made = generate_many(trained, labels, between, instances=ids, seed=seed)
            rows.append(("from noise\n0 to 1", list(to_uint8(made))))
        written.append(out / f"{file.stem}-overview.png")
        save_image(written[-1], captioned_grid(rows))
    return written


def read_instances(path: Path) -> Tensor:
    """A PNG of instance ids ``(H, W)``, 0 for the background.

    Raises:
        DataError: The file is missing or unreadable.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image).astype(np.int64))
    except (OSError, UnidentifiedImageError) as error:
        msg = f"{path}: cannot read the instance map: {error}"
        raise DataError(msg) from error
