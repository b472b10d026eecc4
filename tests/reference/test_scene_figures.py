import copy
import json

import pytest
import torch
from torch import nn

from dpsims.errors import InputError
from dpsims_reference.data.scenes import StreetScenes
from dpsims_reference.scene_figures import SceneReport, stack_scenes


@pytest.fixture(scope="module")
def scenes():
    return stack_scenes(4, ["noon", "night"], size=32)


@pytest.fixture(scope="module")
def empty(scenes):
    torch.manual_seed(0)
    return SceneReport(scenes, scenes.labels, segmenter_steps=1)


@pytest.fixture
def report(empty):
    fresh = copy.copy(empty)
    fresh.rows, fresh.figures = list(empty.rows), {}
    return fresh


def test_the_looks_take_turns(scenes):
    streets = StreetScenes(4, image_size=(32, 32))
    for index, look in enumerate(("noon", "night", "noon", "night")):
        sample = streets.render(index, 0, look=look)
        assert torch.equal(scenes.images[index], sample.image)
        assert torch.equal(scenes.labels[index], sample.labels.long())


def test_another_seed_gives_other_streets(scenes):
    assert not torch.equal(stack_scenes(4, ["noon"], size=32, seed=1).labels, scenes.labels)


def test_an_unknown_look_is_refused():
    with pytest.raises(InputError, match=r"StreetScenes\.render: look must be"):
        stack_scenes(1, ["nowhere"], size=32)


def test_real_images_are_at_distance_0_and_alike_images_do_not_differ(report, scenes):
    report.add("same", [scenes.images, scenes.images])
    report.add("darker", [scenes.images - 1, scenes.images], show=False)
    # 112 features of 4 images: rounding of a singular covariance
    assert report.figures["same"]["Frechet"] < 1e-3
    assert report.figures["darker"]["Frechet"] > 1
    assert report.figures["same"]["between noises"] == 0
    assert report.figures["darker"]["between noises"] == pytest.approx(1)
    assert [caption for caption, _ in report.rows] == ["label map", "same\n1", "same\n2"]


def test_one_image_has_no_difference_between_noises(report, scenes):
    report.add("one", [scenes.images])
    assert set(report.figures["one"]) == {"mIoU", "Frechet"}
    assert report.rows[-1][0] == "one"


def test_consistency_counts_what_the_segmenter_sees(report, scenes):
    class Painted(nn.Module):
        """Sees the true map in every image, but takes class 2 for class 3."""

        def forward(self, images):
            assert images is not None
            labels = scenes.labels.where(scenes.labels != 2, 3)
            return nn.functional.one_hot(labels, 12).permute(0, 3, 1, 2).float()

    report.segmenter = Painted()
    report.add("painted", [scenes.images])
    ids = scenes.labels.unique().tolist()
    assert {2, 3} <= set(ids)
    threes, twos = ((scenes.labels == label).sum().item() for label in (3, 2))
    expected = (len(ids) - 2 + threes / (threes + twos)) / len(ids)
    assert report.figures["painted"]["mIoU"] == pytest.approx(expected)


class Tinted(nn.Module):
    """A generator whose noise is the colour of the image."""

    def forward(self, labels, noise):
        assert not self.training
        return noise[:, :3, None, None].expand(-1, -1, *labels.shape[1:]).tanh()


def test_noises_are_the_same_every_time_and_the_mode_is_left_alone(report):
    generator = Tinted().train()
    for name in ("first", "second"):
        report.add_noises(name, generator, 5, num_noises=3)
        torch.rand(7)
    assert generator.training
    assert report.figures["first"] == report.figures["second"]
    assert report.figures["first"]["between noises"] > 0.1
    assert len(report.rows) == 1 + 3 + 3


def test_the_results_are_written_and_printed(report, scenes, tmp_path, capsys):
    report.add("real", [scenes.images])
    report.add_noises("tinted", Tinted(), 5, num_noises=2)
    report.write(tmp_path / "new")
    assert (tmp_path / "new" / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == report.figures
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["mIoU", "Frechet", "between", "noises"]
    assert [row.split()[0] for row in rows] == ["real", "tinted"]
    assert len(rows[0].split()) == 3
    assert len(rows[1].split()) == 4
