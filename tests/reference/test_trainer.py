import json
import warnings
from dataclasses import replace

import pytest
import torch
from support import assert_equal, assert_message
from unit_run import unit_config

from dpsims.data import ClassBalancedSampler
from dpsims.errors import IncompatibleCheckpointError, NonFiniteError
from dpsims_reference.batches import Draw, _DrawOrder, train_batches
from dpsims_reference.checkpoints import CheckpointStore
from dpsims_reference.datasets import build_dataset
from dpsims_reference.logs import read_log
from dpsims_reference.resume import differences
from dpsims_reference.sampling import load_generator
from dpsims_reference.trainer import Trainer

_QUIET = {"save_every": 10**6, "picture_every": 10**6}


def train(config, folder, dataset, *, resume=False, **options):
    trainer = Trainer(config, dataset, folder)
    if resume:
        trainer.restore(trainer.store.latest(), allow=("config.optim.steps",))
    trainer.run(**(_QUIET | options))
    trainer.store.close()
    return trainer


def assert_same_run(first, second):
    for name in ("generator", "discriminator", "objective"):
        mine, theirs = getattr(first, name).state_dict(), getattr(second, name).state_dict()
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert_equal(value, theirs[key])
    for one, other in zip(
        first.averaged_generator().state_dict().values(),
        second.averaged_generator().state_dict().values(),
        strict=True,
    ):
        assert_equal(one, other)


@pytest.fixture(scope="module")
def dataset():
    return build_dataset(unit_config().data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset):
    """Four steps in one go, with pictures and checkpoints in between."""
    folder = tmp_path_factory.mktemp("whole")
    return train(unit_config(steps=4), folder, dataset, save_every=3, picture_every=2)


def test_two_steps_and_two_resumed_ones_equal_four(whole, dataset, tmp_path):
    # the first half stops early, keeps no picture and saves at another step: none of it may count
    train(unit_config(steps=2), tmp_path, dataset)
    resumed = train(unit_config(steps=4), tmp_path, dataset, resume=True)
    assert resumed.step == 4
    assert_same_run(whole, resumed)


def test_loader_processes_change_nothing(whole, dataset, tmp_path):
    config = unit_config(steps=4)
    config = replace(config, data=replace(config.data, workers=1))
    assert_same_run(whole, train(config, tmp_path, dataset))


def test_the_log_has_every_step_once_after_a_resume(dataset, tmp_path):
    train(unit_config(steps=2), tmp_path, dataset)
    train(unit_config(steps=3), tmp_path, dataset, resume=True)
    records = read_log(tmp_path / "log.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert all("d_real" in record and record["seconds"] > 0 for record in records)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_pictures_and_checkpoints_are_where_they_should_be(whole):
    assert [path.name for path in sorted((whole.folder / "samples").iterdir())] == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    assert sorted(CheckpointStore.read_latest(whole.folder / "checkpoints").tensors) == [
        "discriminator",
        "ema",
        "generator",
        "objective",
        "optimizer_discriminator",
        "optimizer_generator",
    ]


def test_the_backbone_is_not_in_the_checkpoint(whole):
    tensors = CheckpointStore.read_latest(whole.folder / "checkpoints").tensors["discriminator"]
    own = {name for name, _ in whole.discriminator.decoder.named_parameters(prefix="decoder")}
    assert own <= set(tensors)
    backbone = {name for name in tensors if name.startswith("backbone")}
    # the conditioners' statistics and the hash of the weights
    allowed = ("running_mean", "running_var", "num_batches_tracked", "_extra_state")
    assert backbone
    assert all(name.endswith(allowed) for name in backbone)


def test_time_limit_stops_and_saves(dataset, tmp_path):
    trainer = train(unit_config(steps=50), tmp_path, dataset, max_seconds=0.0)
    assert trainer.step == 1
    assert CheckpointStore.read_latest(tmp_path / "checkpoints").step == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 3}, "config.seed"),
        ({"optim": {"lr": 2e-3}}, "config.optim.lr"),
        ({"data": {"seed": 1}}, "data"),
    ],
)
def test_resume_with_other_settings_is_refused_before_anything_loads(
    whole, dataset, tmp_path, change, named
):
    config = unit_config(steps=4)
    for part, value in change.items():
        new = replace(getattr(config, part), **value) if isinstance(value, dict) else value
        config = replace(config, **{part: new})
    other = Trainer(config, build_dataset(config.data), tmp_path)
    before = {k: v.clone() for k, v in other.generator.state_dict().items()}
    with pytest.raises(IncompatibleCheckpointError) as caught:
        other.restore(CheckpointStore.read_latest(whole.folder / "checkpoints"))
    assert_message(caught.value, named)
    for key, value in other.generator.state_dict().items():
        assert_equal(value, before[key])


def test_non_finite_loss_stops_the_run(dataset, tmp_path):
    trainer = Trainer(unit_config(steps=4), dataset, tmp_path)
    with torch.no_grad():
        next(trainer.generator.parameters()).fill_(torch.nan)
    trainer.objective.diversity_hinge = 0.1
    with pytest.raises(NonFiniteError):
        trainer.run(**_QUIET)


def test_draws_of_a_step_do_not_depend_on_where_the_run_began():
    weights = torch.rand(7).double()
    sampler = ClassBalancedSampler(weights, seed=3, rank=0, world_size=1)
    whole = iter(_DrawOrder(sampler, 3, 0))
    steps = [next(whole) for _ in range(9)]
    for first in range(9):
        other = ClassBalancedSampler(weights, seed=3, rank=0, world_size=1)
        assert next(iter(_DrawOrder(other, 3, first))) == steps[first]
    flat = [draw for step in steps for draw in step]
    assert [draw.position for draw in flat] == list(range(27))
    assert isinstance(flat[0], Draw)


def test_batches_are_the_same_every_time(dataset):
    config = unit_config()
    first, second = (next(train_batches(dataset, config, first_step=2)) for _ in range(2))
    assert_equal(first.images, second.images)
    assert_equal(first.labels, second.labels)


def test_differences_names_nested_keys():
    saved = {"a": 1, "b": {"c": 2, "d": [3]}}
    assert differences(saved, saved) == []
    assert differences(saved, {"a": 2, "b": {"c": 2, "d": [4]}}) == ["a", "b.d"]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(whole, tmp_path):
    import shutil

    copy = tmp_path / "checkpoints"
    shutil.copytree(whole.folder / "checkpoints", copy)
    newest = sorted(copy.glob("step-*"))[-1] / "ema.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = CheckpointStore.read_latest(copy)
    assert checkpoint.step == 3
    assert any("ema.safetensors" in str(w.message) for w in caught)


def test_load_generator_gives_the_averaged_one(whole):
    trained = load_generator(whole.folder)
    assert not trained.generator.training
    for key, value in whole.averaged_generator().state_dict().items():
        assert_equal(trained.generator.state_dict()[key], value)
    assert json.dumps(trained.spec.to_dict())
