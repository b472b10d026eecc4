"""A run that stops anywhere and goes on is, in every bit, the run that never stopped."""

import random
import signal
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoint_trials import files
from support import assert_equal, assert_message
from unit_run import small_config

from dpsims.errors import CheckpointError, IncompatibleCheckpointError, InputError
from dpsims_reference import probes
from dpsims_reference.best import BestFigure
from dpsims_reference.checkpoints import CheckpointStore
from dpsims_reference.checkpoints.disk import Disk
from dpsims_reference.checkpoints.strict_json import encode_json
from dpsims_reference.cli import main
from dpsims_reference.datasets import build_dataset
from dpsims_reference.logs import read_log
from dpsims_reference.resume import machine, warn_of_other_machine
from dpsims_reference.runs import read_run, steps_of
from dpsims_reference.sampling import load_generator
from dpsims_reference.trainer import Trainer

STEPS = 9
_QUIET = {"save_every": 10**6, "picture_every": 10**6}
# what must decide nothing, or differs on purpose: times, and loader processes
_OTHER = ("seconds", "machine", "best")


def config_of(workers=0):
    # 10 scenes and 4 draws a step: an epoch ends in the middle of a step
    config = small_config(
        steps=STEPS,
        batch_size=4,
        final_lr=0.1,
        ema_warmup=True,
        clip_grad=1.0,
        pairs="second_pass",
        reuse_fake=False,
    )
    return replace(
        config,
        generator=replace(config.generator, spatial_noise=2),
        data=replace(config.data, workers=workers),
    )


@pytest.fixture(scope="module")
def dataset():
    return build_dataset(config_of().data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset):
    """One run with a checkpoint of every step, step 0 included."""
    folder = tmp_path_factory.mktemp("whole")
    best = BestFigure("g_pixel")
    trainer = Trainer(config_of(), dataset, folder, keep=2 * STEPS, best=best)
    calibrated = (trainer.objective, trainer.generator, dataset, trainer.config)
    probes.calibrate_(*calibrated, trainer.parallel)
    trainer.save()
    before = global_states()
    trainer.run(save_every=1, picture_every=4)
    assert_same_states(before, global_states())
    trainer.store.close()
    assert steps_of(folder) == list(range(STEPS + 1))
    return folder


def global_states():
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002 - what nothing may change
    return torch.get_rng_state(), random.getstate(), numpy_state


def assert_same_states(before, after):
    assert_equal(before[0], after[0])
    assert before[1] == after[1]
    assert (before[2] == after[2]).all()


def seed_globally(number):
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - the global state that nothing may read


def go_on(folder, start, end, dataset, out, *, workers=0):
    """Resume at ``start``, in a folder of its own, and stop by a signal after step ``end``."""
    trainer = Trainer(config_of(workers), dataset, out)
    trainer.restore(read_run("test", f"{folder}@{start}"))
    update = trainer.ema.update

    def stopping(generator):
        update(generator)
        if trainer.step == end - 1:
            signal.raise_signal(signal.SIGTERM)

    trainer.ema.update = stopping
    trainer.run(**_QUIET)
    trainer.store.close()
    return CheckpointStore.read_latest(out / "checkpoints")


def assert_same_checkpoint(found, wanted):
    assert found.step == wanted.step
    mine, theirs = files(found.path), files(wanted.path)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if mine[name] != theirs[name]]
    assert set(different) <= {"state.json", "MANIFEST.json"}
    states = []
    for state in (found.state, wanted.state):
        kept = {key: value for key, value in state.items() if key not in _OTHER}
        kept["config"]["data"]["workers"] = 0
        states.append(encode_json("test", "state", kept))
    assert states[0] == states[1]


def points(count=20):
    """Where a run stops, how far it then goes, and with how many loader processes."""
    draw = random.Random(7)
    # the very start, a step that ends with the epoch, and the last step are among them
    found = [(0, 2, 0), (4, 5, 2), (5, 6, 0), (STEPS - 1, STEPS, 2)]
    while len(found) < count:
        start = draw.randrange(STEPS)
        point = (start, draw.randint(start + 1, min(start + 3, STEPS)), draw.choice((0, 2)))
        if point not in found:
            found.append(point)
    return found


@pytest.mark.parametrize(("start", "end", "workers"), points())
def test_resumed_at_any_point_it_is_the_same_run(whole, dataset, tmp_path, start, end, workers):
    # were any global generator read, these seeds would show; were one written, the states would
    seed_globally(1000 * start + end)
    before = global_states()
    found = go_on(whole, start, end, dataset, tmp_path, workers=workers)
    assert_same_states(before, global_states())
    assert_same_checkpoint(found, CheckpointStore.read_step(whole / "checkpoints", end))


def test_a_run_that_is_stopped_again_and_again_is_the_same_run(whole, dataset, tmp_path):
    folder = whole
    for start, end in ((0, 1), (1, 3), (3, 4), (4, STEPS)):
        found = go_on(folder, start, end, dataset, tmp_path / str(end))
        folder = tmp_path / str(end)
    assert_same_checkpoint(found, CheckpointStore.read_latest(whole / "checkpoints"))


def test_a_finished_run_that_is_resumed_changes_nothing(whole, dataset, tmp_path):
    found = go_on(whole, STEPS, STEPS, dataset, tmp_path)
    assert_same_checkpoint(found, CheckpointStore.read_latest(whole / "checkpoints"))


def test_the_checkpoint_holds_every_optimiser_state_and_average(whole):
    found = CheckpointStore.read_latest(whole / "checkpoints")
    for network in ("generator", "discriminator"):
        names = found.tensors[f"optimizer_{network}"]
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            assert any(kind in name for name in names)
    assert found.tensors["ema"].keys() >= set(found.tensors["generator"])
    assert found.state["ema"]
    # every spectral norm's vectors go along, so that the power iteration goes on too
    assert any(name.endswith(".u") for name in found.tensors["discriminator"])


def test_the_best_checkpoint_is_the_one_with_the_lowest_mean(whole):
    values = [record["g_pixel"] for record in read_log(whole / "log.jsonl")]
    lowest = int(np.argmin(values)) + 1
    assert read_run("test", f"{whole}@best").step == lowest
    state = CheckpointStore.read_latest(whole / "checkpoints").state["best"]
    assert (state["step"], state["value"]) == (lowest, values[lowest - 1])


def test_an_interrupted_run_keeps_the_best_one_of_the_whole_run(whole, dataset, tmp_path):
    ways = {}
    for name, stops in (("straight", ()), ("broken", (2, 3, 7))):
        folder = tmp_path / name
        for stop in (*stops, STEPS):
            best = BestFigure("max:d_real")
            trainer = Trainer(config_of(), dataset, folder, best=best)
            checkpoint = trainer.store.latest() or read_run("test", f"{whole}@0")
            trainer.restore(checkpoint)
            update = trainer.ema.update

            def stopping(generator, trainer=trainer, update=update, stop=stop):
                update(generator)
                if trainer.step == stop - 1:
                    signal.raise_signal(signal.SIGINT)

            trainer.ema.update = stopping
            trainer.run(save_every=4, picture_every=10**6)
            trainer.store.close()
        ways[name] = (best.state(), read_run("test", f"{folder}@best"))
    (straight, one), (broken, other) = ways.values()
    assert straight == broken
    assert_same_checkpoint(one, other)
    records = [record["d_real"] for record in read_log(folder / "log.jsonl")]
    means = {4: np.mean(records[:4]), 8: np.mean(records[4:8]), 9: records[8]}
    assert straight["step"] == max(means, key=means.get) == one.step


def test_a_figure_of_the_averaged_generator_decides_and_disturbs_nothing(whole, dataset, tmp_path):
    asked = []

    def evaluate(generator):
        asked.append(generator.training)
        torch.rand(3)
        return {"heldout.frechet": [9.0, 5.0, 7.0, 5.0][len(asked) - 1]}

    best = BestFigure("min:heldout.frechet", evaluate)
    trainer = Trainer(config_of(), dataset, tmp_path, best=best)
    trainer.run(save_every=4, picture_every=10**6)
    trainer.store.close()
    assert asked == [False] * 4
    assert read_run("test", f"{tmp_path}@best").step == 4, "the first of two equal ones"
    assert_same_checkpoint(
        CheckpointStore.read_latest(tmp_path / "checkpoints"),
        CheckpointStore.read_latest(whole / "checkpoints"),
    )


def test_a_name_that_nothing_measures_is_refused_at_once(dataset, tmp_path):
    def evaluate(generator):
        return {"heldout.frechet": 1.0}

    for number, best in enumerate(
        (BestFigure("min:heldout.miou", evaluate), BestFigure("min:g_pixels"))
    ):
        trainer = Trainer(config_of(), dataset, tmp_path / str(number), best=best)
        with pytest.raises(InputError) as caught:
            trainer.run(**_QUIET)
        trainer.store.close()
        assert trainer.step <= 1
        assert_message(caught.value, "BestFigure: rule must name one of", best.rule)


class TestBestFigure:
    @pytest.mark.parametrize("rule", ["miou", "min:", "best:g_pixel", "", ":x", "g_:x"])
    def test_bad_rule(self, rule):
        with pytest.raises(InputError, match=r"rule must be min:NAME, max:NAME or"):
            BestFigure(rule)

    def test_no_number_is_never_the_best(self):
        best = BestFigure("g_pixel")
        for step, value in enumerate((float("nan"), 2.0, float("inf"), 1.0), start=1):
            best.observe({"g_pixel": value})
            encode_json("test", "state", best.state())
            assert best.judge(step, None) is (step in (2, 4))

    def test_a_window_goes_through_the_state(self):
        one, other = BestFigure("g_pixel"), BestFigure("g_pixel")
        for number, value in enumerate((1.0, 2.0, float("nan"), 4.0)):
            one.observe({"g_pixel": value})
            other.observe({"g_pixel": value})
            restored = BestFigure("g_pixel")
            restored.load(other.state())
            other = restored
            if number == 1:
                assert one.judge(2, None) is other.judge(2, None) is True
        assert one.judge(4, None) is other.judge(4, None) is False
        assert one.state() == other.state()

    def test_without_a_rule_it_hands_on_what_was_found(self, capsys):
        best = BestFigure("g_pixel")
        best.observe({"g_pixel": 1.0})
        best.judge(1, None)
        nothing = BestFigure(None)
        nothing.load(best.state())
        nothing.observe({"g_pixel": 0.0})
        assert nothing.judge(2, None) is False
        assert nothing.state() == best.state()
        assert capsys.readouterr().out == ""
        another = BestFigure("d_real")
        another.load(nothing.state())
        assert "now judged by d_real; so far by g_pixel" in capsys.readouterr().out
        assert another.state()["value"] is None


def test_a_generator_of_any_checkpoint(whole):
    for which, step in (("", STEPS), ("@4", 4)):
        weights = read_run("test", f"{whole}@{step}").tensors["ema"]
        for name, value in load_generator(f"{whole}{which}").generator.state_dict().items():
            assert_equal(value, weights[name])


def test_another_machine_is_named(recwarn):
    present = machine(torch.device("cpu"))
    assert present["threads"] == 1
    warn_of_other_machine(None, present)
    warn_of_other_machine(present, present)
    assert not recwarn.list
    with pytest.warns(RuntimeWarning, match=r"not be equal in every bit: threads 8 -> 1"):
        warn_of_other_machine({**present, "threads": 8}, present)


def test_a_changed_setting_is_refused_whatever_else_fits(whole, dataset, tmp_path):
    config = replace(config_of(), seed=5)
    trainer = Trainer(config, dataset, tmp_path)
    with pytest.raises(IncompatibleCheckpointError, match=r"config\.seed"):
        trainer.restore(read_run("test", whole))
    trainer.store.close()


class RefusingDisk(Disk):
    def make_folder(self, path):
        raise OSError(28, "No space left on device", str(path))


def refusing(trainer, calls):
    """Let the disk refuse the saves of these numbers."""
    save, numbers = trainer.store.save, []

    def saving(*args, **options):
        numbers.append(len(numbers))
        trainer.store._writer._disk = RefusingDisk() if numbers[-1] in calls else Disk()
        return save(*args, **options)

    trainer.store.save = saving


def test_the_command_line_says_which_setting_it_will_not_change(whole, tmp_path, capsys):
    branch = tmp_path / "branch"
    command = ["train", "--resume", f"{whole}@{STEPS}", "--out", str(branch), "--device", "cpu"]
    longer = ["--steps", str(STEPS + 1)]
    with pytest.raises(SystemExit):
        main([*command, *longer])
    assert "config.optim.steps" in capsys.readouterr().err
    assert steps_of(branch) == []
    main([*command, *longer, "--allow-change", "config.optim.steps"])
    assert steps_of(branch)[-1] == STEPS + 1


def test_a_full_disk_ends_the_run_only_if_it_stays_full(whole, dataset, tmp_path):
    def trainer_at(folder, calls):
        trainer = Trainer(config_of(), dataset, folder, keep=20, best=BestFigure("g_pixel"))
        refusing(trainer, calls)
        return trainer

    trainer = trainer_at(tmp_path / "a", {1, 2})
    with pytest.warns(RuntimeWarning, match="No space left") as caught:
        assert trainer.run(save_every=2, picture_every=100) is True
    trainer.store.close()
    told = [str(entry.message) for entry in caught]
    assert len(told) == 2
    assert_message(ValueError(told[0]), "no checkpoint of step 4, the training goes on")
    assert steps_of(tmp_path / "a") == [2, 8, 9]
    assert_same_checkpoint(
        CheckpointStore.read_latest(tmp_path / "a" / "checkpoints"),
        CheckpointStore.read_latest(whole / "checkpoints"),
    )
    # what could not be saved is not the best one: that of what was saved is
    assert read_run("test", f"{tmp_path / 'a'}@best").step == trainer.best.state()["step"]

    trainer = trainer_at(tmp_path / "b", {1, 2, 3})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(CheckpointError, match="No space left"):
            trainer.run(save_every=1, picture_every=100)
    trainer.store.close()
    assert (trainer.step, steps_of(tmp_path / "b")) == (4, [1])


def test_a_run_whose_last_checkpoint_fails_has_failed(whole, dataset, tmp_path):
    trainer = Trainer(config_of(), dataset, tmp_path)
    trainer.restore(read_run("test", f"{whole}@{STEPS - 1}"))
    refusing(trainer, {0})
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.run(**_QUIET)
    trainer.store.close()


@pytest.mark.parametrize("name", ["save_every", "picture_every"])
def test_bad_interval(dataset, tmp_path, name):
    trainer = Trainer(config_of(), dataset, tmp_path)
    with pytest.raises(InputError, match=f"Trainer.run: {name} must be at least 1"):
        trainer.run(**(_QUIET | {name: 0}))
    trainer.store.close()
