import json

import pytest
import torch
from support import assert_message
from torch import nn
from unit_run import unit_config

from dpsims.errors import CheckpointError, NonFiniteError
from dpsims_reference import loop as loop_module
from dpsims_reference.batches import train_batches
from dpsims_reference.checkpoints import CheckpointStore
from dpsims_reference.cli import main
from dpsims_reference.crash import Networks, dump_crash, examine_step, replay_crash
from dpsims_reference.datasets import build_dataset
from dpsims_reference.finite import (
    StepNonFiniteError,
    check_finite_gradients,
    check_finite_loss,
    scan,
    watch,
)
from dpsims_reference.objective import Loss
from dpsims_reference.trainer import Trainer

NAN, INF = torch.nan, torch.inf


def loss(total, **terms):
    return Loss(torch.tensor(total), {name: torch.tensor(value) for name, value in terms.items()})


# --- the checks inside a step


def test_a_finite_loss_passes():
    check_finite_loss(loss(3.0, d_real=1.0, d_fake=2.0))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_the_term_is_named(bad):
    with pytest.raises(StepNonFiniteError) as caught:
        check_finite_loss(loss(bad, g_pixel=1.5, g_contrastive=bad))
    assert_message(caught.value, "loss must be finite", "not finite: g_contrastive", "g_pixel 1.5")
    assert caught.value.terms["g_pixel"] == 1.5


def test_a_sum_that_overflows_is_told_from_a_bad_term():
    with pytest.raises(StepNonFiniteError) as caught:
        check_finite_loss(loss(INF, d_real=3e38, d_fake=3e38))
    assert_message(caught.value, "every term is finite, their sum is not")


def test_a_fault_of_another_process_stops_this_one_too():
    with pytest.raises(StepNonFiniteError) as caught:
        check_finite_loss(loss(1.0, d_real=1.0), anywhere=lambda flag: True)
    assert_message(caught.value, "not on another process", "d_real 1")
    with pytest.raises(StepNonFiniteError):
        check_finite_gradients([nn.Parameter(torch.ones(1))], anywhere=lambda flag: True)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_gradient_that_is_not_finite_is_refused(bad):
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    for parameter in parameters[:2]:
        parameter.grad = torch.zeros(3)
    check_finite_gradients(parameters)
    parameters[1].grad[2] = bad
    with pytest.raises(StepNonFiniteError) as caught:
        check_finite_gradients(parameters)
    assert_message(caught.value, "gradients must be finite", "1 of 2")


def test_large_gradients_whose_squares_overflow_pass():
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 1e30)
    check_finite_gradients([parameter])


# --- where it starts


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, x):
        return self.second(self.first(x).log().exp())


def test_scan_looks_at_the_batch_then_parameters_buffers_and_gradients():
    model = Chain()
    (model.first.weight.sum() * NAN).backward()
    with torch.no_grad():
        model.second.bias[1] = INF
        model.shift[0] = NAN
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0] = NAN
    found = scan({"g": model}, {"images": images, "labels": torch.zeros(2, dtype=torch.uint8)})
    assert [(f.kind, f.name, f.bad, f.total) for f in found] == [
        ("batch", "images", 2, 12),
        ("parameter", "g.second.bias", 1, 2),
        ("buffer", "g.shift", 1, 2),
        ("gradient", "g.first.weight", 4, 4),
    ]
    assert "in samples [1]" in str(found[0])
    assert scan({"g": model}, {}, gradients=False) == found[1:3]


def test_watch_names_the_first_module_and_says_whether_its_input_was_sound():
    model = Chain()
    with torch.no_grad():
        model.second.weight.fill_(3e38)
    with watch({"g": model}) as found:
        model(torch.full((1, 2), 3.0).abs() @ torch.eye(2) * 1e3)
    assert found == [] or found[0].name == "g.second"
    with torch.no_grad():
        model.first.weight.fill_(-1.0)
        model.first.bias.zero_()
    with watch({"g": model}) as found:
        model(torch.ones(1, 2))
    # the logarithm of a negative number stands between the two layers
    assert [f.name for f in found] == ["g.second", "g"]
    assert "Linear; its input is not finite either" in found[0].note
    assert "Chain; its input is finite" in found[1].note


def test_watch_names_the_module_whose_gradient_breaks_first():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with watch({"g": model}) as found:
        out = model(torch.rand(1, 2))
        assert found == []
        # the gradient of a root at 0 is infinite
        (out * 0).abs().sqrt().sum().backward()
    assert found[0].kind == "gradient"
    assert "g" in found[0].name
    assert not any(part._forward_hooks for part in model.modules())


# --- a run that crashes, and its folder

_QUIET = {"save_every": 10**6, "picture_every": 10**6}


@pytest.fixture(scope="module")
def dataset():
    return build_dataset(unit_config().data)


def crashed(trainer):
    with pytest.raises(NonFiniteError) as caught:
        trainer.run(**_QUIET)
    trainer.store.close()
    return caught.value, trainer.folder / f"crash-step-{trainer.step}"


def build(dataset, folder):
    trainer = Trainer(unit_config(steps=3), dataset, folder)
    trainer.objective.diversity_hinge = 0.1
    return trainer


def test_a_bad_weight_is_named(dataset, tmp_path, capsys):
    trainer = build(dataset, tmp_path)
    with torch.no_grad():
        trainer.generator.blocks[1].get_parameter(weight_name(trainer))[0] = NAN
    error, folder = crashed(trainer)
    name = f"generator.blocks.1.{weight_name(trainer)}"
    assert_message(error, "step 0", "d_fake nan", f"first: parameter {name}", str(folder))
    assert f"first: parameter {name}" in (folder / "report.txt").read_text()
    report = replay_crash(folder)
    assert report.findings[0].name == name
    assert report.findings[0].kind == "parameter"
    assert report.error is not None
    # and the first module that computes with it comes first of all activations
    activations = [f for f in report.findings if f.kind == "activation"]
    assert activations[0].name.startswith("generator.blocks.1")
    assert "its input is finite" in activations[0].note
    main(["replay", str(folder), "--device", "cpu"])
    assert name in capsys.readouterr().out


def weight_name(trainer):
    # a convolution that runs by itself: those that read the condition run as one
    names = (
        name
        for name, _ in trainer.generator.blocks[1].named_parameters()
        if name.startswith("conv_0")
    )
    return next(name for name in names if "weight" in name)


def test_a_bad_image_is_named_with_its_place_in_the_batch(dataset, tmp_path, monkeypatch):
    def poisoned(*arguments, **options):
        for index, batch in enumerate(train_batches(*arguments, **options)):
            if index == 1:
                batch.images[2, :, 3, 4] = NAN
            yield batch

    monkeypatch.setattr(loop_module, "train_batches", poisoned)
    error, folder = crashed(build(dataset, tmp_path))
    assert folder.name == "crash-step-1"
    assert_message(error, "first: batch images: 3 of 12288", "in samples [2]", "d_real nan")
    first = replay_crash(folder).findings[0]
    assert (first.kind, first.name, first.bad) == ("batch", "images", 3)


def test_a_loss_that_overflows_is_traced_to_its_module(dataset, tmp_path):
    trainer = build(dataset, tmp_path)
    with torch.no_grad():
        trainer.objective.contrastive.mlps[1][2].weight.fill_(3e38)
    error, folder = crashed(trainer)
    assert_message(error, "not finite: g_contrastive", "activation objective.contrastive.mlps.1.2")
    report = replay_crash(folder)
    assert report.step == 0
    assert report.findings[0].name == "objective.contrastive.mlps.1.2"
    assert "its input is finite" in report.findings[0].note


def test_a_fault_that_does_not_come_back_is_said_so(dataset, tmp_path, monkeypatch):
    trainer = build(dataset, tmp_path)
    discriminator_loss = trainer.objective.discriminator_loss

    def broken(*arguments, **options):
        found = discriminator_loss(*arguments, **options)
        return Loss(found.total * NAN, found.terms | {"d_fake": torch.tensor(NAN)})

    monkeypatch.setattr(trainer.objective, "discriminator_loss", broken)
    error, folder = crashed(trainer)
    assert_message(error, "not finite: d_fake")
    report = replay_crash(folder)
    assert report.error is None
    assert report.findings == []
    assert "ran through with finite losses" in str(report)


def test_the_folder_holds_what_a_replay_needs(dataset, tmp_path):
    trainer = build(dataset, tmp_path)
    with torch.no_grad():
        trainer.generator.to_rgb.bias[0] = INF
    _, folder = crashed(trainer)
    saved = CheckpointStore.read_latest(folder)
    assert sorted(saved.tensors) == ["batch", "discriminator", "generator", "objective"]
    assert sorted(saved.tensors["batch"]) == ["images", "labels"]
    assert saved.state["random"] == {"seed": trainer.config.seed, "step": 0}
    assert saved.state["terms"]["d_fake"] == "nan"
    assert json.loads(saved.state["terms"]["d_real"]) > 0
    batch = next(train_batches(dataset, trainer.config))
    assert torch.equal(saved.tensors["batch"]["images"], batch.images)


def test_examining_a_step_changes_no_weight(dataset, tmp_path):
    trainer = build(dataset, tmp_path)
    trainer.store.close()
    networks = Networks(
        trainer.generator, trainer.discriminator, trainer.objective, trainer.config
    )
    before = [p.clone() for module in networks.modules.values() for p in module.parameters()]
    report = examine_step(networks, next(train_batches(dataset, trainer.config)), 0)
    assert report.error is None
    assert report.findings == []
    after = [p for module in networks.modules.values() for p in module.parameters()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_the_fault_is_told_even_if_nothing_can_be_written(dataset, tmp_path):
    trainer = build(dataset, tmp_path)
    trainer.store.close()
    networks = Networks(
        trainer.generator, trainer.discriminator, trainer.objective, trainer.config
    )
    batch = next(train_batches(dataset, trainer.config))
    (tmp_path / "crash-step-7").write_text("in the way")
    error = dump_crash(tmp_path, networks, batch, 7, NonFiniteError("the loss is nan"))
    assert_message(error, "step 7: the loss is nan", "could not be saved")


def test_a_folder_without_a_dump_is_refused(dataset, tmp_path):
    trainer = Trainer(unit_config(steps=1), dataset, tmp_path / "run")
    trainer.run(**_QUIET)
    trainer.store.close()
    for folder in (tmp_path, tmp_path / "run" / "checkpoints"):
        with pytest.raises(CheckpointError) as caught:
            replay_crash(folder)
        assert_message(caught.value, "crash-step-N", str(folder))
