import numpy as np
import pytest
from PIL import Image

from dpsims_reference.cli import Train, data_config, main, parse_train
from dpsims_reference.presets import preset
from dpsims_reference.verbs import pick_device


@pytest.mark.parametrize(
    "verb",
    ["train", "sample", "evaluate", "experiments", "pseudo-labels", "check-data", "demo"],
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
    folder = data_config(config, "my/pictures")
    assert (folder.name, folder.root) == ("folder", "my/pictures")


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


def test_device_names():
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda")
