import copy
import json
import math

import pytest
import torch
from recipe_parts import load_recipe


@pytest.fixture(scope="module")
def example():
    module = load_recipe("unconditional_gan")
    module.BATCH, module.IMAGES = 2, 6
    return module


@pytest.fixture(scope="module")
def photos(example):
    return [example.load_photo(name) for name in ("china", "flower")]


@pytest.fixture(scope="module")
def built(example):
    return example.make_discriminator()


@pytest.fixture
def discriminator(built):
    return copy.deepcopy(built)


@pytest.mark.filterwarnings("ignore:frechet_distance.*rank deficient:UserWarning")
def test_a_run_leaves_a_picture_and_figures(example, tmp_path):
    example.main(["--out", str(tmp_path), "--steps", "2"])
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "figures.json").read_text())
    for measure in (f"frechet_distance/{example.JUDGE}", "difference"):
        values = figures[measure]
        assert set(values) == {"real", "more real", "start", "middle", "end"}
        assert all(math.isfinite(value) for value in values.values())
    assert figures[f"frechet_distance/{example.JUDGE}"]["real"] < 1e-3


def test_the_seed_decides_what_is_learnt(example, photos, discriminator):
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        generator = example.make_generator((16, 16, 8, 8, 8))
        *_, average = example.train(generator, copy.deepcopy(discriminator), photos, 2)
        ends.append(average(torch.ones(1, example.LATENT)))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_different_noise_gives_different_images(example):
    images = example.make_generator()(torch.randn(4, example.LATENT))
    assert images.shape == (4, 3, 64, 64)
    assert (images[1:] - images[:-1]).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_training_teaches_heads_and_generator_and_leaves_the_backbone(
    example, photos, discriminator
):
    generator, network = example.make_generator(), discriminator.backbone._frozen_network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    # a bias before a batch norm changes nothing, so it learns nothing
    params = [p for model in (generator, discriminator) for p in model.parameters() if p.ndim > 1]
    start = [param.detach().clone() for param in params]
    *_, average = example.train(generator, discriminator, photos, 2)
    assert all(not torch.equal(*pair) for pair in zip(params, start, strict=True))
    assert all(torch.equal(before[name], now) for name, now in network.state_dict().items())
    assert not average.training


def test_the_discriminator_learns_to_tell_noise_from_crops(example, photos, discriminator):
    loss = example.AdversarialLoss("hinge")
    real, fake = example.draw_crops(photos, 4), torch.rand(4, 3, 64, 64) * 2 - 1
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.0, 0.99))
    losses = []
    for _ in range(5):
        losses.append(loss.discriminator(discriminator(real), discriminator(fake)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_from_scratch_nothing_is_frozen(example):
    discriminator = example.make_discriminator(from_scratch=True)
    assert not discriminator.backbone.frozen
    assert len(list(discriminator.backbone.network.parameters())) > 100
