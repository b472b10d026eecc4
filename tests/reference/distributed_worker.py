"""One of two processes that train together; run by test_distributed.py, raises on a difference.

usage: RANK=r WORLD_SIZE=2 ... distributed_worker.py FOLDER
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from unit_run import unit_config

from dpsims.errors import IncompatibleCheckpointError, NonFiniteError
from dpsims_reference.batches import train_batches
from dpsims_reference.checkpoints import CheckpointStore, read_checkpoint
from dpsims_reference.datasets import build_dataset
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.generator import build_generator
from dpsims_reference.logs import read_log
from dpsims_reference.objective import Objective
from dpsims_reference.parallel import FabricParallel, Parallel
from dpsims_reference.sharding import shard_backbones_, shard_generator_, whole_tensors
from dpsims_reference.steps import TrainingStep
from dpsims_reference.trainer import Trainer

_QUIET = {"save_every": 10**6, "picture_every": 10**6}


class DoubleDataset:
    """A data set whose images are float64, in which rounding does not hide a difference."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def draw(self, index, generator):
        sample = self.dataset.draw(index, generator)
        return sample._replace(image=sample.image.double())

    def view(self, index):
        sample = self.dataset.view(index)
        return sample._replace(image=sample.image.double())


def configs():
    """Both ways to pair fakes, with every part that looks at more than one image."""
    base = unit_config(steps=4, batch_size=8)
    normed = replace(
        base,
        generator=replace(base.generator, spectral_norm=True, spatial_noise=2),
        objective=replace(base.objective, contrastive_features="discriminator"),
    )
    apart = replace(
        normed, optim=replace(normed.optim, reuse_fake=False, pairs="second_pass", clip_grad=0.1)
    )
    # without batch and spectral norms, parts of a batch are independent
    split = replace(
        apart,
        generator=replace(apart.generator, norm="instance", spectral_norm=False),
        discriminator=replace(apart.discriminator, norm="none", spectral_norm=False),
    )
    return {"reuse": normed, "apart": apart, "accumulated": split}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def record_gradients(update, half, seen):
    optimizer, parameters = (
        getattr(update, f"{half}_optimizer"),
        getattr(update, f"{half}_parameters"),
    )
    names = [name for name, p in getattr(update, half).named_parameters() if p.requires_grad]
    # the projector trains with the generator
    names += [f"projector {i}" for i in range(len(parameters) - len(names))]
    original = optimizer.step

    def step():
        assert all(p.grad is not None for p in parameters)
        seen.extend(
            (f"{half} {n}", whole(p.grad).clone()) for n, p in zip(names, parameters, strict=True)
        )
        return original()

    optimizer.step = step


def trained(config, dataset, parallel, steps=2, *, sharded=False):
    """Gradients of every half of some steps, buffers, terms."""
    torch.manual_seed(0)
    generator, discriminator = build_generator(config), build_discriminator(config)
    objective = Objective(config, discriminator)
    objective.diversity_hinge = 0.1
    if sharded:
        shard_backbones_(discriminator, objective, parallel)
        shard_generator_(generator, objective, parallel)
    update = TrainingStep(generator, discriminator, objective, config, parallel=parallel)
    seen = []
    for half in ("discriminator", "generator"):
        record_gradients(update, half, seen)
    batches = train_batches(dataset, config, shard=parallel.shard)
    for number in range(steps):
        terms = parallel.mean(update(next(batches), number))
        seen.extend((f"term {name}", value) for name, value in terms.items())
    for module in (generator, discriminator):
        seen.extend(
            (name, value) for name, value in module.state_dict().items() if "running" in name
        )
    return seen


def assert_same(actual, expected):
    assert [name for name, _ in actual] == [name for name, _ in expected]
    largest = {}
    for name, value in expected:
        kind = name.split()[0]
        largest[kind] = max(largest.get(kind, 0.0), value.double().abs().max().item())
    for (name, one), (_, other) in zip(actual, expected, strict=True):
        error = (one.double() - other.double()).abs().max().item()
        # terms are averaged in float32; the rest differs by float64 rounding in sums of 1e5
        # numbers and by what the first step's Adam makes of it
        bound = 1e-6 if name.startswith("term") else 1e-8 * max(largest[name.split()[0]], 1e-3)
        assert error <= bound, f"{name}: {error:.3e} > {bound:.3e}"


def references(rank, folder, dataset):
    """What one process alone finds, before there is a group."""
    cases = configs()
    found = {name: trained(config, dataset, Parallel()) for name, config in cases.items()}
    if rank == 0:
        trainer = Trainer(cases["reuse"], dataset, folder / "one")
        trainer.run(save_every=2, picture_every=10**6)
        trainer.close()
    return found


def assert_steps_equal(parallel, dataset, expected):
    """Two processes with half the batch each have the gradients of one with all of it."""
    cases = configs()
    for name, config in cases.items():
        assert_same(trained(config, dataset, parallel), expected[name])
    parts = replace(cases["accumulated"], optim=replace(cases["accumulated"].optim, accumulate=2))
    assert_same(trained(parts, dataset, parallel), expected["accumulated"])
    local = cases["reuse"]
    local = replace(local, discriminator=replace(local.discriminator, norm="batch"))
    # norms of one process: two forward passes of D, one backward, no shared buffer; other numbers
    with pytest.raises(AssertionError, match="discriminator decoder"):
        assert_same(trained(local, dataset, parallel), expected["reuse"])


def assert_sharded_steps_equal(parallel, dataset, expected):
    """The same gradients where every process holds half of each weight."""
    config = configs()["apart"]
    assert_same(trained(config, dataset, parallel, sharded=True), expected["apart"])
    torch.manual_seed(0)
    generator, plain = build_generator(config), build_generator(config)
    plain.load_state_dict(generator.state_dict())
    objective = Objective(config, build_discriminator(config))
    shard_generator_(generator, objective, parallel)
    shares = [p.to_local().numel() for p in generator.parameters()]
    assert sum(shares) < 0.6 * sum(p.numel() for p in plain.parameters())
    for name, value in whole_tensors(generator).items():
        assert torch.equal(value, plain.state_dict()[name])


def assert_runs_equal(parallel, dataset, folder):
    """A checkpoint of one process goes on in two, and the other way round."""
    config = configs()["reuse"]
    parallel.barrier()
    earlier = read_checkpoint(folder / "one" / "checkpoints" / "step-00000002")
    trainer = Trainer(config, dataset, folder / "two", parallel=parallel, shard_backbones=True)
    trainer.restore(earlier)
    assert trainer.run(save_every=10**6, picture_every=1)
    trainer.close()
    short = replace(config, optim=replace(config.optim, steps=2))
    begun = Trainer(short, dataset, folder / "begun", parallel=parallel)
    begun.run(**_QUIET)
    begun.close()
    if parallel.rank:
        with pytest.raises(AssertionError, match="first process"):
            trainer.store  # noqa: B018
        return
    written = CheckpointStore.read_latest(folder / "two" / "checkpoints")
    whole = CheckpointStore.read_latest(folder / "one" / "checkpoints")
    assert_same_checkpoint(written, whole)
    assert [r["step"] for r in read_log(folder / "two" / "log.jsonl")] == [2, 3]
    assert len(list((folder / "two" / "samples").iterdir())) == 2


def assert_same_checkpoint(actual, expected):
    assert actual.step == expected.step
    hinges = [c.state["diversity_hinge"] for c in (actual, expected)]
    assert hinges[0] == pytest.approx(hinges[1], rel=1e-9)
    for group in ("generator", "discriminator", "objective", "ema"):
        mine, theirs = actual.tensors[group], expected.tensors[group]
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-6, atol=1e-8, msg=name)


def assert_continues_alone(dataset, folder):
    """After the group is gone, one process ends what two began."""
    config = configs()["reuse"]
    trainer = Trainer(config, dataset, folder / "begun")
    trainer.restore(trainer.store.latest(), allow=("config.optim.steps",))
    trainer.run(**_QUIET)
    trainer.close()
    assert_same_checkpoint(
        CheckpointStore.read_latest(folder / "begun" / "checkpoints"),
        CheckpointStore.read_latest(folder / "one" / "checkpoints"),
    )


def assert_other_norms_are_refused(parallel, dataset, folder):
    """Local batch norms tie a run to its number of processes."""
    config = configs()["reuse"]
    config = replace(config, generator=replace(config.generator, norm="batch"))
    trainer = Trainer(config, dataset, folder / "refused", parallel=parallel)
    checkpoint = CheckpointStore.read_latest(folder / "one" / "checkpoints")
    with pytest.raises(IncompatibleCheckpointError, match="sees 4 images instead of 8"):
        trainer.restore(checkpoint, allow=("config.generator.norm",))
    trainer.close()


def assert_all_stop_together(parallel, dataset):
    """A NaN in one process raises in both."""
    config = configs()["apart"]
    generator, discriminator = build_generator(config), build_discriminator(config)
    objective = Objective(config, discriminator)
    objective.diversity_hinge = 0.1
    update = TrainingStep(generator, discriminator, objective, config, parallel=parallel)
    batch = next(train_batches(dataset, config, shard=parallel.shard))
    broken = update.objective.discriminator_loss

    def loss(*args, **kwargs):
        found = broken(*args, **kwargs)
        return found._replace(total=found.total * torch.nan) if parallel.rank else found

    update.objective.discriminator_loss = loss
    with pytest.raises(NonFiniteError, match="nan" if parallel.rank else "on another process"):
        update(batch, 0)


def assert_collectives(parallel):
    rows = torch.arange(2) * 2 + parallel.rank
    assert parallel.gather(rows).tolist() == [0, 1, 2, 3]
    assert parallel.any(parallel.rank == 1)
    assert not parallel.any(False)
    assert parallel.mean({"a": torch.tensor(float(parallel.rank))})["a"] == 0.5
    value = torch.ones(2)
    assert parallel.sum(value).tolist() == [2.0, 2.0]
    assert value.tolist() == [1.0, 1.0]


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    config = configs()["reuse"]
    torch.set_default_dtype(torch.float64)
    dataset = DoubleDataset(build_dataset(config.data))
    expected = references(rank, folder, dataset)
    parallel = FabricParallel("cpu", timeout=120)
    assert_collectives(parallel)
    assert_steps_equal(parallel, dataset, expected)
    assert_sharded_steps_equal(parallel, dataset, expected)
    assert_runs_equal(parallel, dataset, folder)
    assert_other_norms_are_refused(parallel, dataset, folder)
    assert_all_stop_together(parallel, dataset)
    parallel.close()
    if rank == 0:
        assert_continues_alone(dataset, folder)
    sys.stderr.write("all equal\n")


if __name__ == "__main__":
    main()
