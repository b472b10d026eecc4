import math
import re
from dataclasses import replace

import pytest
import torch
from support import assert_equal, assert_message
from tracing import CountingBackend
from unit_run import small_config, unit_config

from dpsims.errors import InputError, NonFiniteError
from dpsims.nn import UNetDecoder
from dpsims_reference.batches import train_batches
from dpsims_reference.datasets import build_dataset
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.ema import GeneratorEMA
from dpsims_reference.generator import build_generator
from dpsims_reference.objective import Objective
from dpsims_reference.parallel import Shard
from dpsims_reference.steps import Part, TrainingStep, _frozen, learning_rate


def build(config):
    torch.manual_seed(0)
    generator = build_generator(config)
    discriminator = build_discriminator(config)
    objective = Objective(config, discriminator)
    objective.diversity_hinge = 0.1
    return TrainingStep(generator, discriminator, objective, config)


@pytest.fixture(scope="module")
def batch():
    config = unit_config()
    return next(train_batches(build_dataset(config.data), config))


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module, before):
    return {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("pairs", ["split_batch", "second_pass"])
@pytest.mark.parametrize("reuse", [True, False])
def test_a_step_changes_both_networks_and_its_losses_are_finite(batch, pairs, reuse):
    step = build(unit_config(pairs=pairs, reuse_fake=reuse))
    before_g, before_d = snapshot(step.generator), snapshot(step.discriminator)
    before_p = snapshot(step.objective)
    terms = step(batch, 0)
    assert set(terms) == {"d_real", "d_fake", "g_pixel", "g_contrastive", "g_diversity"}
    assert all(math.isfinite(value) for value in terms.values())
    assert changed(step.discriminator, before_d) == set(before_d)
    assert changed(step.objective, before_p) == set(before_p)
    # behind closed gates the noise path has gradient 0, and Adam leaves it
    still = set(before_g) - changed(step.generator, before_g)
    assert still
    noise_path = re.compile(r"mapper\.|.*(attention|inject|attend)")
    assert [name for name in sorted(still) if not noise_path.match(name)] == []


def test_each_half_gives_gradients_to_its_own_network_only(batch):
    step = build(unit_config())
    seen = {}

    def spy(optimizer, own, other):
        original = optimizer.step

        def record():
            seen[own] = [p.grad is not None for p in getattr(step, f"{own}_parameters")]
            seen[f"{own}-other"] = [p.grad for p in getattr(step, f"{other}_parameters")]
            return original()

        optimizer.step = record

    spy(step.discriminator_optimizer, "discriminator", "generator")
    step.generator_optimizer.zero_grad()
    step(batch, 0)
    assert all(seen["discriminator"])
    assert all(grad is None for grad in seen["discriminator-other"])
    kept = [p.grad.clone() for p in step.discriminator_parameters]
    step.discriminator_optimizer.step = lambda: None
    step.discriminator_optimizer.zero_grad = lambda set_to_none: None
    for p, grad in zip(step.discriminator_parameters, kept, strict=True):
        p.grad = grad.clone()
    fake = step._fakes(batch, Shard(), 1, phase=1)
    features = step.discriminator.encode(fake.output.images)
    maps = step.objective.contrastive_maps(batch.images, step.discriminator.encode(batch.images))
    part = Part(batch, Shard(), [m.detach() for m in maps], fake, features)
    with _frozen(step.discriminator_parameters):
        step._generator_part(part, None, 1)
    for p, grad in zip(step.discriminator_parameters, kept, strict=True):
        assert_equal(p.grad, grad)


def test_the_backbone_never_changes(batch):
    step = build(unit_config())
    before = step.discriminator.backbone.identity
    for index in range(2):
        step(batch, index)
    assert step.discriminator.backbone.identity == before


def test_a_step_depends_on_its_number_not_on_the_global_generator(batch):
    results = []
    for junk in (1, 2):
        step = build(unit_config())
        torch.manual_seed(junk)
        results.append(step(batch, 5))
    for name, value in results[0].items():
        assert_equal(value, results[1][name])


def test_non_finite_loss_stops_before_any_weight_of_that_half_changes(batch):
    step = build(unit_config())
    before = snapshot(step.discriminator)
    poisoned = batch._replace(images=torch.full_like(batch.images, torch.nan))
    with pytest.raises(NonFiniteError) as caught:
        step(poisoned, 0)
    assert_message(caught.value, "loss", "finite", "nan")
    assert not changed(step.discriminator, before)


def test_clipping_bounds_the_gradient(batch):
    limit = 1e-3
    step = build(unit_config(clip_grad=limit))
    step(batch, 0)
    norm = torch.stack([p.grad.norm() for p in step.discriminator_parameters]).norm()
    # clip_grad_norm_ adds 1e-6 to the norm it divides by
    assert norm <= limit * 1.001


def test_diversity_needs_a_calibrated_hinge(batch):
    step = build(unit_config())
    step.objective.diversity_hinge = None
    with pytest.raises(InputError) as caught:
        step(batch, 0)
    assert_message(caught.value, "diversity_hinge", "calibrate")


def test_terms_can_be_switched_off(batch):
    config = unit_config()
    config = replace(
        config,
        objective=replace(config.objective, contrastive_weight=0.0, diversity_weight=0.0),
    )
    step = build(config)
    assert set(step(batch, 0)) == {"d_real", "d_fake", "g_pixel"}
    assert step.objective.contrastive is None


def test_learning_rate_follows_half_a_cosine():
    optim = unit_config(steps=100, final_lr=1.0).optim
    assert learning_rate(optim, 0) == learning_rate(optim, 99) == optim.lr
    optim = replace(optim, final_lr=0.1)
    rates = [learning_rate(optim, step) for step in range(101)]
    assert rates[0] == optim.lr
    assert rates[50] == pytest.approx(0.55 * optim.lr)
    assert rates[100] == pytest.approx(0.1 * optim.lr)
    assert rates == sorted(rates, reverse=True)


def test_integer_betas_are_accepted(batch):
    step = build(unit_config(betas=(0, 0.99)))
    assert math.isfinite(step(batch, 0)["d_real"])


def without_norms(config):
    """Parts of a batch are independent; D's coarsest map, one pixel, has no instance norm."""
    return replace(
        config,
        generator=replace(config.generator, norm="instance", spectral_norm=False),
        discriminator=replace(config.discriminator, norm="none", spectral_norm=False),
    )


def gradients(config, batch):
    """Of both halves, on the same D: Adam's first step would make much of rounding."""
    step = build(config)
    step.discriminator_optimizer.step = lambda: None
    terms = step(batch, 0)
    parameters = step.discriminator_parameters + step.generator_parameters
    return terms, [parameter.grad for parameter in parameters]


def assert_close_gradients(actual, expected):
    """Equal but for float32 sums in another order, seen against the largest entry."""
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1e-2)


@pytest.mark.parametrize("pairs", ["split_batch", "second_pass"])
def test_gradients_of_the_parts_add_up(batch, pairs):
    config = without_norms(unit_config(pairs=pairs, reuse_fake=False))
    whole_terms, whole = gradients(config, batch)
    parts_terms, parts = gradients(
        replace(config, optim=replace(config.optim, accumulate=2)), batch
    )
    for name, value in whole_terms.items():
        torch.testing.assert_close(parts_terms[name], value, rtol=1e-5, atol=1e-6)
    assert_close_gradients(parts, whole)


def test_a_checkpointed_decoder_changes_no_bit(batch):
    config = unit_config()
    config = replace(config, discriminator=replace(config.discriminator, spectral_norm=True))
    thrifty = replace(config, discriminator=replace(config.discriminator, checkpoint_decoder=True))
    for one, other in zip(gradients(config, batch)[1], gradients(thrifty, batch)[1], strict=True):
        assert_equal(one, other)


def test_parts_need_new_fakes():
    with pytest.raises(InputError) as caught:
        build(unit_config(accumulate=2, reuse_fake=True))
    assert_message(caught.value, "optim.accumulate", "reuse_fake", "2")


def test_a_checkpointed_decoder_is_not_compiled():
    config = unit_config(compile=True)
    config = replace(config, discriminator=replace(config.discriminator, checkpoint_decoder=True))
    with pytest.raises(InputError) as caught:
        build(config)
    assert_message(caught.value, "optim.compile", "checkpoint_decoder")


def test_latents_take_no_step_of_the_spectral_norm(batch):
    config = unit_config()
    step = build(replace(config, generator=replace(config.generator, spectral_norm=True)))
    before = {name: b.clone() for name, b in step.generator.named_buffers()}
    step.generator.sample_latents(2, generator=torch.Generator())
    with step._autocast():
        pass
    for name, buffer in step.generator.named_buffers():
        assert_equal(buffer, before[name])


@pytest.mark.compile
@pytest.mark.slow
# torch looks at the .grad of the fakes when it traces
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_networks_give_the_same_steps_and_are_traced_once(batch, monkeypatch):
    # without a step of the weights, rounding stays rounding
    config = small_config(lr=0.0, reuse_fake=False)
    # few layers to trace
    small = replace(config.discriminator, backbone="test_resnet")
    config = replace(config, discriminator=small)
    eager = build(config)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs, compile_ = [CountingBackend("eager"), CountingBackend("aot_eager")], torch.compile

    def traced(module):
        # D's weights alone serve two forward passes before a backward one: trace that too
        return compile_(module, backend=graphs[isinstance(module, UNetDecoder)])

    monkeypatch.setattr(torch, "compile", traced)
    compiled = build(replace(config, optim=replace(config.optim, compile=True)))
    averages = [GeneratorEMA(step.generator, decay=0.9) for step in (eager, compiled)]
    counts = []
    for number in range(3):
        for step, average in zip((eager, compiled), averages, strict=True):
            step(batch, number)
            average.update(step.generator)
        counts.append(sum(each.graphs for each in graphs))
        found = ([p.grad for p in _trained(step)] for step in (compiled, eager))
        assert_close_gradients(*found)
    # G and the backbone without and with gradients, D's decoder while it trains and while not
    assert counts == [6, 6, 6]
    assert not torch._dynamo.utils.counters["graph_break"]
    for one, other in zip(
        compiled.discriminator.buffers(), eager.discriminator.buffers(), strict=True
    ):
        torch.testing.assert_close(one, other)


def _trained(step):
    return step.discriminator_parameters + step.generator_parameters
