from dataclasses import replace

import numpy as np
import pytest
from official_folders import write_ade20k, write_cityscapes
from PIL import Image
from support import assert_message

from dpsims.errors import DataError, InputError
from dpsims_reference.cli import main
from dpsims_reference.options import Train
from dpsims_reference.parsing import data_config, parse_train, resumed_config
from dpsims_reference.presets import preset
from dpsims_reference.verbs import pick_device


@pytest.mark.parametrize(
    "verb",
    [
        "train",
        "sample",
        "export",
        "evaluate",
        "experiments",
        "pseudo-labels",
        "check-data",
        "demo",
    ],
)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m dpsims_reference {verb}" in text


def test_overview_lists_the_verbs(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "pseudo-labels" in capsys.readouterr().out


def test_unknown_verb_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fly"])
    assert caught.value.code == 2


@pytest.mark.parametrize("form", [["--preset", "cityscapes"], ["--preset=cityscapes"]])
def test_a_preset_gives_the_defaults_and_options_change_them(form):
    options = parse_train([*form, "--optim.steps", "7", "--generator.num-tokens", "4"])
    assert isinstance(options, Train)
    config = preset("cityscapes")
    assert options.config.data == config.data
    assert options.config.optim.steps == 7
    assert options.config.generator.num_tokens == 4
    assert options.config.generator.channels == config.generator.channels


def test_data_names_a_set_or_a_folder():
    config = preset("tiny")
    assert data_config(config, None) == config.data
    assert data_config(config, "scenes").name == "scenes"
    official = data_config(config, "cityscapes")
    assert (official.name, official.num_classes, official.ignore_index) == ("cityscapes", 35, 0)
    assert official.image_size == config.data.image_size
    folder = data_config(config, "my/pictures")
    assert (folder.name, folder.root) == ("folder", "my/pictures")
    # a folder marks unlabelled pixels with 255, whatever the preset's data set does
    folder = data_config(preset("ade20k"), "my/pictures")
    assert (folder.name, folder.num_classes, folder.ignore_index) == ("folder", 151, 255)


def test_a_resumed_run_takes_what_was_given_and_nothing_else():
    saved = replace(preset("ade20k"), seed=5)
    arguments = ["--resume", "runs/a", "--steps", "9", "--data.workers=3", "--data", "maps"]
    arguments += ["--generator.no-spectral-norm", "--allow-change", "config.seed"]
    found = resumed_config(saved, parse_train(arguments))
    assert found == replace(
        saved,
        optim=replace(saved.optim, steps=9),
        data=replace(saved.data, name="folder", root="maps", workers=3),
        generator=replace(saved.generator, spectral_norm=False),
    )
    assert resumed_config(saved, parse_train(["--resume", "runs/a"])) == saved
    assert resumed_config(saved, parse_train(["--resume", "a", "--seed", "6"])).seed == 6


@pytest.mark.parametrize("name", [["--preset", "tiny"], ["--experiment=table5/ccm_csm"]])
def test_a_resumed_run_has_no_other_preset(name):
    with pytest.raises(InputError) as caught:
        parse_train(["--resume", "runs/a", *name])
    assert_message(caught.value, "train: resume must be", name[0].split("=")[0])


def test_expected_faults_end_with_one_line_and_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["sample", "--run", str(tmp_path), "--labels", str(tmp_path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_check_data_prints_a_report(tmp_path, capsys):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "labels" / "a.png")
    main(["check-data", str(tmp_path)])
    assert "num_classes" in capsys.readouterr().out


def test_check_data_looks_through_an_official_data_set(tmp_path, capsys):
    write_cityscapes(tmp_path)
    main(["check-data", str(tmp_path), "--name", "cityscapes", "--partial"])
    text = capsys.readouterr().out
    assert "no problems found" in text
    assert "% of images with a class, of train (3) and heldout (2)" in text
    assert "    7  100.00  100.00  road" in text
    assert "   34    0.00    0.00  license plate" in text
    assert "unlabeled" not in text
    next((tmp_path / "gtFine/train").rglob("*_instanceIds.png")).unlink()
    next((tmp_path / "gtFine/val").rglob("*_labelIds.png")).unlink()
    main(["check-data", str(tmp_path), "--name", "cityscapes", "--partial"])
    text = capsys.readouterr().out
    assert text.count("problem: Cityscapes") == 2
    assert "--data.no-instances" in text
    assert "of train (3)\n" in text


def test_training_reads_an_official_data_set_and_keeps_the_scan(tmp_path, monkeypatch):
    seen = []

    class FakeTrainer:
        def __init__(self, config, dataset, folder, **_):
            dataset.presence()
            seen.append((config.data, dataset, folder))
            raise DataError("enough")

    monkeypatch.setattr("dpsims_reference.verbs.Trainer", FakeTrainer)
    root, out = write_ade20k(tmp_path / "ade"), tmp_path / "run"
    options = ["train", "--preset", "ade20k", "--data.root", str(root), "--data.partial"]
    with pytest.raises(SystemExit):
        main([*options, "--out", str(out), "--data.workers", "1"])
    config, dataset, folder = seen[0]
    assert (config.name, config.ignore_index, len(dataset)) == ("ade20k", 0, 3)
    assert dataset.scan.workers == 1
    assert folder == out
    assert [path.name for path in out.iterdir()] == ["presence.safetensors"]


def test_device_names():
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda")
