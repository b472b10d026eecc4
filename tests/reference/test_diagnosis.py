import pytest
import torch
from PIL import Image
from support import assert_equal, assert_message
from unit_run import unit_config

from dpsims.errors import CheckpointError
from dpsims_reference.cli import main
from dpsims_reference.datasets import build_dataset
from dpsims_reference.diagnosis import diagnose_networks, diagnose_run
from dpsims_reference.diagnosis_figures import write_diagnosis
from dpsims_reference.logs import read_log
from dpsims_reference.trainer import Trainer

_QUIET = {"save_every": 10**6, "picture_every": 10**6}


@pytest.fixture(scope="module")
def dataset():
    return build_dataset(unit_config().data)


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset):
    trainer = Trainer(unit_config(steps=3), dataset, tmp_path_factory.mktemp("run"))
    trainer.run(**_QUIET, diagnose_every=1)
    trainer.store.close()
    return trainer


def test_diagnosing_changes_nothing_of_the_training(run, dataset, tmp_path):
    plain = Trainer(unit_config(steps=3), dataset, tmp_path)
    plain.run(**_QUIET)
    plain.store.close()
    for name in ("generator", "discriminator", "objective"):
        mine, theirs = getattr(run, name).state_dict(), getattr(plain, name).state_dict()
        for key, value in mine.items():
            assert_equal(value, theirs[key])
    assert not (tmp_path / "diagnosis.jsonl").exists()


def test_every_step_is_logged_once(run):
    records = read_log(run.folder / "diagnosis.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    names = set(records[0])
    assert {"noise_diversity", "features_after/level0_kurtosis"} <= names
    assert any(name.startswith("gate/pyramid.blocks.") for name in names)
    assert {"noise_share/blocks.0", "noise_share/pyramid.blocks.2"} <= names


def test_a_resumed_run_drops_the_records_it_writes_again(run, dataset, tmp_path):
    short = Trainer(unit_config(steps=2), dataset, tmp_path)
    short.run(**_QUIET, diagnose_every=1)
    short.store.close()
    text = (tmp_path / "diagnosis.jsonl").read_text()
    (tmp_path / "diagnosis.jsonl").write_text(text + '{"step": 3.0, "old": 1.0}\n')
    resumed = Trainer(unit_config(steps=3), dataset, tmp_path)
    resumed.restore(resumed.store.latest(), allow=("config.optim.steps",))
    resumed.run(**_QUIET, diagnose_every=1)
    resumed.store.close()
    assert read_log(tmp_path / "diagnosis.jsonl") == read_log(run.folder / "diagnosis.jsonl")


def test_modes_are_put_back(run, dataset):
    run.generator.train()
    run.generator.pyramid.eval()
    diagnose_networks(run.generator, run.discriminator, dataset, run.config, num_maps=2)
    assert run.generator.training
    assert run.generator.blocks[0].training
    assert not run.generator.pyramid.training
    run.generator.train()


def test_a_closed_gate_and_an_open_one_look_different(run, dataset):
    generator = run.generator
    gates = {name: p for name, p in generator.named_parameters() if name.endswith("gate")}
    saved = {name: p.detach().clone() for name, p in gates.items()}

    def found(value):
        with torch.no_grad():
            for parameter in gates.values():
                parameter.fill_(value)
        return diagnose_networks(generator, run.discriminator, dataset, run.config).noise

    closed, opened = found(0.0), found(1.0)
    with torch.no_grad():
        for name, parameter in gates.items():
            parameter.copy_(saved[name])
    assert closed.diversity == 0
    assert {scale.share for scale in closed.scales} == {0.0}
    assert opened.diversity > 0
    assert {scale.name for scale in opened.scales if scale.share == 0} == {"pyramid.blocks.0"}
    assert len(closed.gates) == len(gates)


def test_the_verb_prints_and_writes(run, tmp_path, capsys):
    main(["diagnose", str(run.folder), "--out", str(tmp_path), "--device", "cpu"])
    printed = capsys.readouterr().out
    text = (tmp_path / "diagnosis.txt").read_text()
    assert text.strip() in printed
    assert text.startswith("step 3")
    assert "pyramid.blocks.2.inject" in text
    assert "effective rank" in text
    for name in ("diagnosis.png", "diagnosis-history.png"):
        with Image.open(tmp_path / name) as picture:
            colours = len(picture.convert("RGB").resize((64, 64)).getcolors(4096))
            assert picture.width > 1000
        assert colours > 20


def test_without_a_history_there_is_one_picture(run, tmp_path):
    found = diagnose_run(run.folder, num_maps=2, num_noises=2)
    assert found.step == 3
    written = write_diagnosis(tmp_path / "new", found)
    assert [path.name for path in written] == ["diagnosis.txt", "diagnosis.png"]
    assert all(path.stat().st_size for path in written)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError) as caught:
        diagnose_run(tmp_path)
    assert_message(caught.value, "run must hold a checkpoint", str(tmp_path))


def test_a_log_that_cannot_be_written_warns_and_the_training_goes_on(dataset, tmp_path):
    (tmp_path / "diagnosis.jsonl").mkdir(parents=True)
    trainer = Trainer(unit_config(steps=1), dataset, tmp_path)
    with pytest.warns(UserWarning, match="logging stops"):
        assert trainer.run(**_QUIET, diagnose_every=1)
    trainer.store.close()
