"""The generators for inference compute what the naive formulation computes."""

import copy
import pickle
from dataclasses import replace

import naive_generator as naive
import pytest
import torch
from folded_parts import take_fused
from support import assert_equal, assert_message
from unit_run import NUM_CLASSES, unit_config

from dpsims.errors import InputError
from dpsims.nn import SPADEResBlock, _prepared_spade, prepare_for_inference
from dpsims_reference.generator import Generator, build_generator
from dpsims_reference.oasis import OasisGenerator
from dpsims_reference.prepared import PreparedGenerator, prepare_generator
from dpsims_reference.presets import preset

SIZES = {"image_size": (32, 32), "channels": (12, 12, 8, 4), "pyramid_channels": 6}
NARROW = SIZES | {"token_dim": 8, "num_tokens": 3, "attention_size": 16, "latent_dim": 5}
CASES = {
    "tiny-like": NARROW | {"spade_hidden": None, "spade_kernel": 1, "spectral_norm": False},
    "paper-like": NARROW | {"spade_hidden": 7},
    "three-classes": NARROW | {"num_classes": 3, "spade_hidden": 4},
    "five-taps": NARROW | {"spade_hidden": 4, "spade_kernel": 5},
    "offsets": NARROW | {"spade_hidden": 4, "extra_channels": 2},
    "pixel-noise": NARROW | {"spade_hidden": 4, "spatial_noise": 2},
    "instance-norm": NARROW | {"spade_hidden": 4, "norm": "instance"},
    "no-self-attention": NARROW | {"spade_hidden": 4, "self_attention": False},
    "no-attention": NARROW | {"spade_hidden": 4, "attention_size": 0},
    "all-attention": NARROW | {"spade_hidden": 4, "attention_size": 32},
    "wide-pyramid": NARROW | {"spade_hidden": 4, "pyramid_channels": 12},
    "joined-latent": NARROW | {"spade_hidden": 4, "injection": "concatenation"},
}


def make(case, dtype=torch.float64):
    torch.manual_seed(0)
    options = dict(CASES[case])
    generator = Generator(options.pop("num_classes", 5), **options)
    return naive.randomise(generator.to(dtype))


def draw(generator, batch=2, size=(32, 48), extra=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    num_classes = generator.stem.num_classes
    labels = torch.randint(0, num_classes, (batch, *size), generator=rng, dtype=torch.uint8)
    labels[:, :3] = 255

    def maps(channels):
        return torch.randn(batch, channels, *size, generator=rng).to(dtype) if channels else None

    latents = torch.randn(batch, generator.latent_dim, generator=rng).to(dtype)
    return labels, latents, maps(extra), maps(generator.spatial_noise)


def assert_near(actual, expected, bound):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < bound, f"{error:.2e}"


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equal_to_the_naive_formulation_in_float64(case):
    generator = make(case)
    inputs = draw(generator, extra=CASES[case].get("extra_channels", 0))
    expected = naive.generate(generator, *inputs)
    assert expected.std() > 0.01
    assert_near(generator(*inputs).images, expected, 1e-12)
    before = copy.deepcopy(generator.state_dict())
    prepared = PreparedGenerator(generator)
    assert_near(prepared(*inputs).images, expected, 1e-12)
    # the original is as it was
    assert before.keys() == generator.state_dict().keys()
    for name, value in generator.state_dict().items():
        assert_equal(value, before[name])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_fused_form_is_equal_too(case, layout, monkeypatch):
    generator = make(case)
    inputs = draw(generator, extra=CASES[case].get("extra_channels", 0))
    expected = naive.generate(generator, *inputs)
    calls = take_fused(monkeypatch)
    prepared = PreparedGenerator(generator.to(memory_format=layout))
    assert_near(prepared(*inputs).images, expected, 1e-12)
    # three blocks: two have a shortcut; without a norm in reach it is the library's own path
    assert calls.count("modulate") == 8
    levels = {"no-attention": 0, "all-attention": 3, "joined-latent": 0}
    assert calls.count("inject_folded") == levels.get(case, 2)
    if case != "joined-latent":
        condition = prepared.condition(inputs[0], *inputs[2:])
        assert_near(prepared.sample(condition, inputs[1]).images, expected, 1e-12)


@pytest.mark.parametrize("case", ["paper-like", "all-attention"])
@torch.no_grad()
def test_the_kernels_give_the_same_images(case, monkeypatch):
    pytest.importorskip("triton")
    generator = make(case)
    labels, latents, *_ = draw(generator, batch=1)
    expected = naive.generate(generator, labels, latents)
    prepared = PreparedGenerator(generator.float())
    plain = prepared(labels, latents.float()).images
    own = (plain - expected).abs().max() / expected.abs().max()
    calls = take_fused(monkeypatch, kernels=True)
    assert_near(prepared(labels, latents.float()).images, expected, 4 * own)
    assert set(calls) == {"modulate", "inject_folded"}


@torch.no_grad()
def test_conditions_of_the_training_size_use_what_was_laid_out(monkeypatch):
    generator = make("wide-pyramid")
    prepared = PreparedGenerator(generator)
    spread = []
    original = _prepared_spade.add_spread

    def noted(out, small, given):
        spread.append(tuple(out.shape[2:]))
        return original(out, small, given)

    monkeypatch.setattr(_prepared_spade, "add_spread", noted)
    for size in ((32, 32), (32, 48), (64, 64)):
        inputs = draw(generator, size=size)[:2]
        expected = naive.generate(generator, *inputs)
        assert_near(prepared(*inputs).images, expected, 1e-12)
        condition = prepared.condition(inputs[0])
        assert_near(prepared.sample(condition, inputs[1]).images, expected, 1e-12)
    # in one pass and in two, by the first size alone
    assert spread == 2 * [(16, 16), (32, 32)]
    twin = PreparedGenerator(make("wide-pyramid").to(torch.float32))
    twin.load_state_dict(PreparedGenerator(generator.float()).state_dict())
    labels, latents, *_ = draw(generator, size=(32, 32), dtype=torch.float32)
    expected = naive.generate(generator, labels, latents)
    assert_near(twin(labels, latents).images, expected, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        # some twenty roundings to 8 bits
        assert_near(twin(labels, latents).images, expected, 0.1)


@torch.no_grad()
def test_blocks_of_other_classes_stay_as_they_are():
    class Own(SPADEResBlock):
        def forward(self, *args, **options):
            return super().forward(*args, **options) * 2

    generator = make("paper-like")
    generator.blocks[0].__class__ = Own
    inputs = draw(generator)[:2]
    prepared = PreparedGenerator(generator.eval())
    assert type(prepared.model.blocks[0]) is Own
    assert_near(prepared(*inputs).images, generator(*inputs).images, 1e-12)


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"joined-latent"}))
@torch.no_grad()
def test_one_condition_serves_many_latents(case):
    generator = make(case)
    labels, latents, extra, noise = draw(generator, extra=CASES[case].get("extra_channels", 0))
    prepared = PreparedGenerator(generator)
    whole = prepared.condition(labels, extra, noise)
    # used twice: nothing writes to it
    for _ in range(2):
        found = prepared.sample(whole, latents).images
        assert_near(found, naive.generate(generator, labels, latents, extra, noise), 1e-12)
    first = [None if maps is None else maps[:1] for maps in (labels, extra, noise)]
    found = prepared.sample(prepared.condition(*first), latents).images
    twice = [None if maps is None else maps.expand(2, *maps.shape[1:]) for maps in first]
    expected = naive.generate(generator, twice[0], latents, twice[1], twice[2])
    assert_near(found, expected, 1e-12)
    assert (found[0] - found[1]).abs().max() > 1e-5 or case == "no-attention"


@pytest.mark.parametrize("hidden", [None, 4])
@pytest.mark.parametrize("extra", [0, 2])
@torch.no_grad()
def test_oasis_is_equal_to_its_naive_formulation(hidden, extra):
    torch.manual_seed(0)
    generator = OasisGenerator(
        5, extra_channels=extra, channels=(12, 12, 8, 4), latent_dim=3, spade_hidden=hidden
    )
    generator = naive.randomise(generator.double())
    generator.spatial_noise, generator.stem.num_classes = 0, 5
    inputs = draw(generator, size=(12, 20), extra=extra)[:3]
    expected = naive.generate_oasis(generator, *inputs)
    assert_near(generator(*inputs).images, expected, 1e-12)
    assert_near(prepare_generator(generator)(*inputs).images, expected, 1e-12)


@torch.no_grad()
def test_the_tiny_preset_in_both_precisions():
    torch.manual_seed(0)
    generator = naive.randomise(build_generator(preset("tiny")).double())
    inputs = draw(generator, batch=1, size=(64, 64))[:2]
    expected = naive.generate(generator, *inputs)
    prepared = PreparedGenerator(generator)
    assert_near(prepared(*inputs).images, expected, 1e-12)
    # float32 may be as far from float64 as the generator itself is, with room for another order
    labels, latents = inputs[0], inputs[1].float()
    generator.float()
    own = (generator(labels, latents).images - expected).abs().max() / expected.abs().max()
    assert_near(prepare_generator(generator)(labels, latents).images, expected, 4 * own)


@torch.no_grad()
def test_copies_pickles_and_half_precision():
    generator = make("paper-like", torch.float32)
    inputs = draw(generator, dtype=torch.float32)[:2]
    prepared = PreparedGenerator(generator)
    expected = prepared(*inputs).images
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert_equal(twin(*inputs).images, expected)
    twin = PreparedGenerator(make("paper-like", torch.float32))
    twin.load_state_dict(prepared.state_dict())
    assert_equal(twin(*inputs).images, expected)
    assert not any(p.requires_grad for p in prepared.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert prepared(*inputs).images.isfinite().all()
    half = prepared.to(torch.bfloat16)
    assert half(inputs[0], inputs[1].bfloat16()).images.isfinite().all()


def test_training_mode_is_refused():
    prepared = PreparedGenerator(make("paper-like"))
    for part in (prepared, prepare_for_inference(OasisGenerator(3, channels=(4, 4, 2)))):
        with pytest.raises(InputError) as caught:
            part.train()
        assert_message(caught.value, "mode must be False", "prepare_for_inference", "got True")
        part.eval()
        assert not any(module.training for module in part.modules())


def test_conditions_that_do_not_fit():
    prepared = PreparedGenerator(make("paper-like"))
    labels, latents, *_ = draw(prepared.model)
    condition = prepared.condition(labels)
    for bad in (latents[:1], latents[:, :3]):
        with pytest.raises(InputError) as caught:
            prepared.sample(condition, bad)
        assert_message(caught.value, "PreparedGenerator.sample: latents must")
    with pytest.raises(InputError) as caught:
        PreparedGenerator(make("joined-latent")).condition(labels)
    assert_message(caught.value, "generator must inject its noise by cross-attention")


@pytest.mark.compile
def test_compiles_whole_and_equal():
    torch._dynamo.reset()
    config = unit_config()
    config = replace(config, generator=replace(config.generator, spade_hidden=4, spade_kernel=3))
    prepared = prepare_generator(naive.randomise(build_generator(config)))
    run = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    labels = torch.randint(0, NUM_CLASSES, (2, 32, 32), dtype=torch.uint8)
    latents = torch.randn(2, 64)
    with torch.no_grad():
        assert_near(run(labels, latents).images, prepared(labels, latents).images, 1e-5)
