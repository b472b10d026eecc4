"""What the names of vision-aided GAN's models mean in timm."""

from __future__ import annotations

from typing import NamedTuple

from dpsims.errors import DTypeError, InputError
from dpsims.nn._timm import load_timm


class Vision(NamedTuple):
    """One model of the ensemble.

    Attributes:
        name: timm's name.
        input_size: What images are resized to, or ``None``.
        multi_level: Whether four levels are judged, or the last one.
    """

    name: str
    input_size: tuple[int, int] | None
    multi_level: bool


_SIZE = (224, 224)
#: The models behind each short name; any other name is one of timm.
MODELS = {
    "clip": Vision("vit_base_patch32_clip_224.openai", _SIZE, multi_level=True),
    "dino": Vision("vit_base_patch16_224.dino", _SIZE, multi_level=True),
    "swin": Vision("swin_tiny_patch4_window7_224.ms_in1k", _SIZE, multi_level=False),
    "vgg": Vision("vgg16.tv_in1k", _SIZE, multi_level=False),
    "dinov2": Vision("vit_base_patch14_reg4_dinov2.lvd142m", _SIZE, multi_level=True),
    "convnext": Vision("convnext_tiny.in12k_ft_in1k", _SIZE, multi_level=False),
    "efficientnet": Vision("tf_efficientnet_lite0.in1k", _SIZE, multi_level=False),
}
# models of the original whose weights timm does not have, and the closest that it has
_MISSING = {
    "det_coco": "swin",
    "seg_ade": "swin",
    "face_seg": "dino",
    "face_normals": "dino",
}
_OUTPUTS = {"conv": False, "conv_multi_level": True}


def choose_models(owner: str, cv_type: object, output_type: object) -> list[Vision]:
    """The models of a ``"+"``-joined ``cv_type``, each with its kind of output."""
    names = _split(owner, "cv_type", cv_type)
    models = [_find(owner, name) for name in names]
    if output_type is None:
        return models
    outputs = _split(owner, "output_type", output_type)
    if len(outputs) != len(models):
        msg = f"{owner}: output_type must name {len(models)} outputs, one per model, joined by '+'"
        raise InputError(f"{msg}; got {output_type!r:.80}")
    for output in outputs:
        if output not in _OUTPUTS:
            msg = f"{owner}: output_type must be made of {', '.join(_OUTPUTS)}; got {output!r:.80}"
            raise InputError(msg)
    pairs = zip(models, outputs, strict=True)
    return [model._replace(multi_level=_OUTPUTS[output]) for model, output in pairs]


def _split(owner: str, name: str, value: object) -> list[str]:
    if not isinstance(value, str):
        msg = f"{owner}: {name} must be names joined by '+'; got {type(value).__name__}"
        raise DTypeError(msg)
    return value.split("+")


def _find(owner: str, name: str) -> Vision:
    if name in MODELS:
        return MODELS[name]
    if name in _MISSING:
        msg = f"{owner}: cv_type must be a model of timm; nearest to {name}: {_MISSING[name]!r}"
        raise InputError(f"{msg}; got {name!r}")
    architecture = name.partition(".")[0]
    if not architecture or not load_timm().is_model(architecture):
        msg = f"{owner}: cv_type must be made of {', '.join(MODELS)} or names of timm"
        raise InputError(f"{msg}; got {name!r:.80}")
    transformer = architecture.startswith(("vit_", "deit", "test_vit", "eva", "beit"))
    return Vision(name, None, multi_level=transformer)
