import numpy as np
import pytest
import torch
from PIL import Image
from support import assert_equal, assert_message
from unit_run import unit_config

from dpsims.data import LabelSpec
from dpsims.errors import CheckpointError, DataError
from dpsims_reference.datasets import build_dataset
from dpsims_reference.sampling import (
    generate,
    label_files,
    load_generator,
    read_label_map,
    sample_to_folder,
    slerp,
)
from dpsims_reference.trainer import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = unit_config(steps=2)
    trainer = Trainer(config, build_dataset(config.data), folder)
    trainer.run(picture_every=100)
    trainer.store.close()
    return load_generator(folder)


@pytest.fixture
def maps(tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    for index in range(2):
        ids = np.full((32, 64), index, np.uint8)
        ids[8:20, 8:20] = 3
        Image.fromarray(ids).save(folder / f"map{index}.png")
    return folder


def pixels(path):
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture))


def test_one_picture_per_map_and_noise(trained, maps, tmp_path):
    written = sample_to_folder(trained, maps, tmp_path / "out", num_noises=3, interpolate=4)
    names = [path.name for path in written]
    assert names == [
        f"map{m}-{kind}.png" for m in (0, 1) for kind in ("noise0", "noise1", "noise2", "overview")
    ]
    assert pixels(written[0]).shape == (32, 64, 3)


def test_the_seed_decides_the_pictures(trained, maps, tmp_path):
    runs = {}
    for gate in (p for n, p in trained.generator.named_parameters() if n.endswith("gate")):
        torch.nn.init.constant_(gate, 1.0)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        runs[name] = sample_to_folder(trained, maps, tmp_path / name, num_noises=1, seed=seed)
    for first, second in zip(runs["a"], runs["b"], strict=True):
        assert_equal(pixels(first), pixels(second))
    assert any(
        not torch.equal(pixels(a), pixels(c)) for a, c in zip(runs["a"], runs["c"], strict=True)
    )


def test_interpolation_starts_and_ends_at_the_two_noises():
    first, second = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).double()
    second = second / second.norm() * first.norm()
    path = slerp(first, second, [0.0, 0.25, 0.5, 1.0])
    # sines and arc cosines in float64
    torch.testing.assert_close(path[0], first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path[-1], second, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.norm(dim=1), first.norm().expand(4), rtol=1e-12, atol=0)


def test_interpolation_of_parallel_latents_is_finite():
    latent = torch.randn(8)
    assert slerp(latent, latent, [0.0, 0.5]).isfinite().all()


def test_a_run_without_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_generator(tmp_path)
    assert_message(caught.value, "run", str(tmp_path))


def test_unknown_ids_name_the_file(tmp_path):
    path = tmp_path / "street.png"
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(path)
    with pytest.raises(DataError) as caught:
        read_label_map(path, LabelSpec(5))
    assert_message(caught.value, "street.png", "200")


def test_colour_pictures_are_refused_as_label_maps(tmp_path):
    path = tmp_path / "colour.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    with pytest.raises(DataError) as caught:
        read_label_map(path, LabelSpec(5))
    assert_message(caught.value, "colour.png", "RGB")


def test_unreadable_label_map_names_the_file(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        read_label_map(path, LabelSpec(5))
    assert_message(caught.value, "broken.png")


def test_no_label_maps_is_an_error(tmp_path):
    for source in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(DataError) as caught:
            label_files(source)
        assert_message(caught.value, str(source))


def test_generate_gives_finite_images(trained):
    images = generate(trained, torch.zeros(2, 32, 32, dtype=torch.uint8), torch.randn(2, 64))
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all()
