"""Which checkpoint a name means, and where a run may go."""

import pytest
from support import assert_message

from dpsims.errors import CheckpointError, InputError
from dpsims_reference.checkpoints import CheckpointStore
from dpsims_reference.runs import choose_folder, parse_run, read_run, steps_of


class TestRunNames:
    def test_a_folder_of_the_whole_name_comes_first(self, tmp_path):
        (tmp_path / "a@3").mkdir()
        assert parse_run(tmp_path / "a@3") == (tmp_path / "a@3", "latest")
        assert parse_run(f"{tmp_path}/a@3@7") == (tmp_path / "a@3", 7)
        assert str(parse_run("a@best")) == "a@best"
        assert str(parse_run("a")) == "a"

    @pytest.mark.parametrize("which", ["", "@best", "@3"])
    def test_a_run_without_checkpoints(self, tmp_path, which):
        with pytest.raises(CheckpointError) as caught:
            read_run("train", f"{tmp_path}{which}")
        assert_message(caught.value, "train: run must hold", str(tmp_path / "checkpoints"))

    def test_a_run_without_a_best_one(self, tmp_path):
        with CheckpointStore(tmp_path / "checkpoints") as store:
            store.save(3, {}, {})
        assert read_run("train", tmp_path).step == read_run("train", f"{tmp_path}@3").step == 3
        with pytest.raises(CheckpointError, match="a best checkpoint; got none"):
            read_run("train", f"{tmp_path}@best")
        with pytest.raises(CheckpointError, match=r"one of \[3\]; got 4"):
            read_run("train", f"{tmp_path}@4")


class TestChoosingTheFolder:
    @pytest.fixture
    def run(self, tmp_path):
        folder = tmp_path / "run"
        with CheckpointStore(folder / "checkpoints", keep=5) as store:
            for step in (1, 2, 3):
                store.save(step, {}, {"value": step}, best=step == 2)
        (folder / "log.jsonl").write_text("{}\n")
        return folder

    def test_a_new_run_needs_a_folder_without_checkpoints(self, run, tmp_path):
        assert choose_folder(tmp_path / "new", None) == (tmp_path / "new", None)
        with pytest.raises(CheckpointError) as caught:
            choose_folder(run, None)
        assert_message(caught.value, "train: out must be a folder without", "[1, 2, 3]", "resume")

    def test_the_newest_goes_on_in_its_folder(self, run):
        folder, checkpoint = choose_folder(None, run)
        assert (folder, checkpoint.step) == (run, 3)
        assert choose_folder(run, run)[0] == run

    @pytest.mark.parametrize("which", ["best", "2"])
    def test_an_earlier_one_must_not_lose_the_later_ones_unasked(self, run, tmp_path, which):
        resume = f"{run}@{which}"
        with pytest.raises(CheckpointError) as caught:
            choose_folder(None, resume)
        assert_message(caught.value, "step 2, below [3]", "--out", "--discard-later")
        folder, checkpoint = choose_folder(None, resume, discard_later=True)
        assert (folder, checkpoint.state) == (run, {"value": 2})
        assert steps_of(run) == [1, 2, 3], "nothing is removed before the run could be restored"
        folder, checkpoint = choose_folder(tmp_path / "branch", resume)
        assert (folder, checkpoint.step) == (tmp_path / "branch", 2)
        assert (tmp_path / "branch" / "log.jsonl").read_text() == "{}\n"

    def test_nonsense_is_refused(self, run, tmp_path):
        with pytest.raises(InputError, match="no run to resume"):
            choose_folder(tmp_path / "new", None, discard_later=True)
        with pytest.raises(InputError, match="own folder"):
            choose_folder(tmp_path / "new", run, discard_later=True)
        other = tmp_path / "other"
        with CheckpointStore(other / "checkpoints") as store:
            store.save(9, {}, {})
        with pytest.raises(CheckpointError, match="branches off"):
            choose_folder(other, run)
