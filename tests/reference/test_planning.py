import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_message
from torch import nn
from unit_run import unit_config

from dpsims.errors import DTypeError, InputError
from dpsims.nn import SPADE, CrossAttentionNoiseInjector, SelfAttention2d, SPADEResBlock
from dpsims_reference.batches import train_batches
from dpsims_reference.cli import main
from dpsims_reference.datasets import build_dataset
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.generator import build_generator
from dpsims_reference.objective import Objective
from dpsims_reference.options import Plan
from dpsims_reference.parsing import parse_plan
from dpsims_reference.planning import (
    GPUS,
    Cluster,
    StepCounts,
    comparison_rst,
    count_step,
    count_steps,
    estimate,
    plan_runs,
)
from dpsims_reference.planning.estimate import all_reduce_volume, energy, split_batch
from dpsims_reference.planning.live import Meter
from dpsims_reference.planning.phases import Phase
from dpsims_reference.steps import TrainingStep

# both orders of a step: G's half on D's fakes, and with fakes of its own and a second pass
STEPS = {
    "reuse": {"reuse_fake": True, "pairs": "split_batch"},
    "own": {"reuse_fake": False, "pairs": "second_pass"},
}


@functools.cache
def config_of(name):
    config = unit_config(**STEPS[name])
    # one of the two with spectral norm
    part = replace(config.discriminator, spectral_norm=name == "own")
    return replace(config, discriminator=part)


@functools.cache
def both(name):
    return dict(zip((2, 4), count_steps(config_of(name), (2, 4)), strict=True))


def counted(name, batch=4):
    return both(name)[batch]


def phase(counts, half, name):
    return next(p for p in counts.phases if (p.half, p.name) == (half, name))


@functools.cache
def networks(name):
    torch.manual_seed(0)
    config = config_of(name)
    discriminator = build_discriminator(config)
    objective = Objective(config, discriminator)
    objective.diversity_hinge = 0.1
    return build_generator(config), discriminator, objective


@functools.cache
def batch_of(name):
    config = config_of(name)
    return next(train_batches(build_dataset(config.data), config))


# --- operations, by formula


ATTENTION = (CrossAttentionNoiseInjector, SelfAttention2d)
LAYERS = (nn.Conv2d, nn.Linear, SPADEResBlock, *ATTENTION)


def is_direct(part):
    """A SPADE whose one convolution, of side 1, reads the condition itself."""
    return isinstance(part, SPADE) and part.hidden is None


class Formula:
    """Twice the multiply-adds of every layer that runs, from shapes; and of its backward."""

    def __init__(self, *modules):
        self.forward = self.backward = self.attention = 0
        self.handles = [
            part.register_forward_hook(self.see)
            for module in modules
            for part in module.modules()
            if isinstance(part, LAYERS)
        ]

    def see(self, part, inputs, output):
        if isinstance(part, nn.Conv2d):
            kernel = part.kernel_size[0] * part.kernel_size[1]
            work = 2 * output.numel() * part.in_channels // part.groups * kernel
        elif isinstance(part, SPADEResBlock):
            # the convolutions that read the condition run as one, beside the modules
            pixels = output.shape[2] * output.shape[3]
            outputs = sum(m.modulation.out_channels for m in part.modules() if is_direct(m))
            work = 2 * len(output) * pixels * part.cond_channels * outputs
        elif isinstance(part, nn.Linear):
            work = 2 * output.numel() * part.in_features
        else:
            self.see_attention(part, inputs, output)
            return
        self.forward += work
        # one product for the weight, one for the input if something below wants it
        self.backward += work * (1 + inputs[0].requires_grad)

    def see_attention(self, part, inputs, output):
        pixels, channels = output.shape[2] * output.shape[3], part.channels
        if isinstance(part, SelfAttention2d):
            # queries, keys, values and what joins the map; scores and reading
            work = 2 * len(output) * pixels * channels * 4 * part.attn_dim
            self.attention += 2 * 2 * len(output) * pixels * pixels * part.attn_dim
        else:
            # the projections meet at the tokens, and the map meets keys and values of its width
            tokens = inputs[1].shape[1]
            projected = 2 * part.attn_dim * (part.token_dim + channels)
            work = 2 * len(output) * tokens * (projected + 2 * pixels * channels)
        self.forward += work
        self.backward += 2 * work

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.forward += self.attention
        # five products of the scores' size stand against two in the forward pass
        self.backward += self.attention * 5 // 2
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("name", STEPS)
def test_the_generators_operations_are_the_sum_over_its_layers(name):
    generator, _, _ = networks(name)
    batch = batch_of(name)
    with Formula(generator) as formula, torch.no_grad():
        generator(batch.labels, torch.zeros(4, 64))
    assert phase(counted(name), "D", "fakes").flops == formula.forward
    if name == "own":
        # with a second image for the diversity loss
        assert phase(counted(name), "G", "fakes").flops == 2 * formula.forward


def test_the_decoders_operations_are_the_sum_over_its_layers():
    _, discriminator, _ = networks("own")
    images = batch_of("own").images
    with torch.no_grad():
        features = discriminator.encode(images)
    with Formula(discriminator.decoder) as formula:
        discriminator.decode(images, features)
    counts = counted("own")
    # real and fake
    assert phase(counts, "D", "decoder and loss, forward").flops == 2 * formula.forward
    assert phase(counts, "D", "decoder and loss, backward").flops == 2 * formula.backward


def test_the_generators_backward_is_the_sum_over_its_layers():
    generator, _, _ = networks("own")
    with Formula(generator) as formula:
        generator(batch_of("own").labels, torch.zeros(4, 64))
    found = phase(counted("own"), "G", "generator, backward").flops
    # the latents' first layer, and the second image, which the diversity loss only reaches
    # through the features, leave the last convolution out once
    last = 2 * 4 * 32 * 32 * 8 * 3 * 9
    assert found == 2 * formula.backward - 2 * last


@pytest.mark.parametrize("name", STEPS)
def test_operations_grow_with_the_batch(name):
    two, four = counted(name, 2), counted(name, 4)
    assert four.flops == 2 * two.flops
    assert four.weight_bytes == two.weight_bytes
    assert two.peak_bytes < four.peak_bytes < 2 * two.peak_bytes


def test_parameters_are_those_of_the_networks():
    generator, discriminator, objective = networks("own")

    def size(module):
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    frozen = discriminator.backbone._frozen_network
    counts = counted("own")
    assert counts.parameters == {
        "generator": size(generator),
        "decoder": size(discriminator),
        "projector": size(objective),
        "frozen": sum(p.numel() for p in frozen.parameters()),
    }
    assert counts.gradient_bytes == 4 * counts.trained
    assert counts.optimizer_bytes == 8 * counts.trained
    state = [*generator.state_dict().values()]
    assert counts.ema_bytes == sum(value.nbytes for value in state)
    buffers = [b for m in (generator, discriminator, objective, frozen) for b in m.buffers()]
    weights = 4 * sum(counts.parameters.values())
    assert counts.weight_bytes == weights + sum(buffer.nbytes for buffer in buffers)


# --- memory, against a real step on this machine


def real_step(name):
    step = TrainingStep(*networks(name), config_of(name))
    # gradients and Adam's moments exist from the second step on
    step(batch_of(name), 0)
    return step


def test_live_bytes_of_a_hand_computed_case():
    with Meter() as live:
        x = torch.zeros(1000)
        y = x + 1
        z = y.view(10, 100)
        del x
        assert live.now == 4000
        del y
        assert live.now == 4000
        del z
    assert live.now == 0
    assert live.peak == 8000


@pytest.mark.parametrize("name", STEPS)
def test_the_predicted_peak_is_that_of_a_real_step(name):
    step = real_step(name)
    held = sum(
        p.grad.nbytes
        for group in (step.generator_parameters, step.discriminator_parameters)
        for p in group
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        step(batch_of(name), 1)
    events = profile.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, size in sizes:
        now += size
        peak = max(peak, now)
    measured = peak + held
    predicted = counted(name).peak_bytes
    # the profiler sees the allocations themselves, work space of kernels among them; the
    # prediction takes apart a step that really runs in one piece
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("name", STEPS)
def test_the_predicted_peak_needs_no_values(name):
    step = real_step(name)
    held = sum(
        p.grad.nbytes
        for group in (step.generator_parameters, step.discriminator_parameters)
        for p in group
    )
    with Meter() as live:
        step(batch_of(name), 1)
    assert counted(name).peak_bytes == pytest.approx(live.peak + held, rel=0.1)


@pytest.mark.parametrize("name", STEPS)
def test_what_is_kept_for_the_backward_is_what_a_real_decoder_keeps(name):
    _, discriminator, objective = networks(name)
    batch = batch_of(name)
    with torch.no_grad():
        features = discriminator.encode(batch.images)
    lasting = {p.untyped_storage()._cdata for p in discriminator.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in lasting:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        real = discriminator.decode(batch.images, features)
        fake = discriminator.decode(batch.images.clone(), [f.clone() for f in features])
        total = objective.discriminator_loss(real, fake, batch.labels).total
    found = phase(counted(name), "D", "decoder and loss, forward").saved_bytes
    assert found == sum(kept.values())
    assert total.requires_grad


def test_half_precision_keeps_less():
    config = config_of("reuse")
    mixed = replace(config, optim=replace(config.optim, precision="bf16"))
    half, single = count_step(mixed, 4), counted("reuse")
    assert half.flops == single.flops
    assert half.saved_bytes["D"] < 0.8 * single.saved_bytes["D"]
    assert half.weight_bytes == single.weight_bytes


# --- arithmetic, by hand

COUNTS = StepCounts(
    batch=8,
    parameters={"generator": 6, "decoder": 3, "projector": 1, "frozen": 90},
    weight_bytes=10_000,
    ema_bytes=2_000,
    gradient_bytes=1_000,
    phases=(
        Phase("a", "D", True, 3_000_000, 10),
        Phase("b", "D", False, 4_000_000, 20),
        Phase("c", "G", False, 5_000_000, 40),
    ),
    peak_bytes=9_000,
)


def gpu(**numbers):
    return replace(
        GPUS["h100"], **({"bf16_flops": 1e6, "memory_bytes": 1e6, "node_bytes": 1e6} | numbers)
    )


def plan(cluster, **options):
    return estimate(COUNTS, cluster, **({"images": 6400, "image_size": (16, 32)} | options))


def test_sums_over_phases():
    assert COUNTS.flops == 12_000_000
    assert COUNTS.flops_of(half="D") == 7_000_000
    assert COUNTS.flops_of(frozen=False) == 9_000_000
    assert COUNTS.saved_bytes == {"D": 30, "G": 40}
    assert COUNTS.trained == 10
    assert COUNTS.optimizer_bytes == 80
    assert COUNTS.memory_bytes == 10_000 + 2_000 + 80 + 9_000


def test_a_plan_by_hand():
    found = plan(Cluster(gpu(), gpus=4, utilisation=0.5, cores_per_gpu=2, images_per_core=4))
    assert found.batch == 32
    assert found.steps == 200
    # 12 MFLOP at half of 1 MFLOP/s; 2 * 3 / 4 of 1000 bytes at 1 MB/s; 8 images at 8 a second
    assert found.seconds == {"compute": 24.0, "links": 1500 / 1e6, "input": 1.0}
    assert found.bound == "compute"
    assert found.step_seconds == 24
    assert found.hours == pytest.approx(200 * 24 / 3600)
    assert found.gpu_hours == pytest.approx(4 * found.hours)
    assert found.kilowatt_hours == pytest.approx(found.gpu_hours * 700 * 1.1 / 1000)
    assert found.images_per_second == pytest.approx(32 / 24)
    assert found.memory_bytes == pytest.approx(1.1 * 21_080)
    assert found.load["memory"] == pytest.approx(1.1 * 21_080 / 1e6)
    assert found.load["input"] == pytest.approx(1 / 24)
    # weights, EMA, moments and gradients stay; 1000 bytes come with every image
    assert found.largest_batch == int((1e6 / 1.1 - 13_080) / 1000)
    assert found.image_bytes == 8 * 16 * 32 * 13
    assert found.fits


@pytest.mark.parametrize(
    ("cluster", "bound"),
    [
        (Cluster(gpu(), gpus=2, cores_per_gpu=1, images_per_core=0.1), "input"),
        (Cluster(gpu(node_bytes=1), gpus=2), "links"),
        (Cluster(gpu(network_bytes=1), gpus=16), "links"),
        (Cluster(gpu(network_bytes=1), gpus=8), "compute"),
    ],
)
def test_what_the_step_waits_for(cluster, bound):
    found = plan(cluster)
    assert found.bound == bound
    assert found.load[bound] == 1


def test_too_little_memory_is_said_so():
    found = plan(Cluster(gpu(memory_bytes=20_000)))
    assert not found.fits
    assert found.load["memory"] > 1
    assert plan(Cluster(gpu(memory_bytes=10))).largest_batch == 0


def test_float32_runs_at_the_tf32_rate():
    found = plan(Cluster(gpu(tf32_flops=5e5), gpus=1, utilisation=1.0), precision="float32")
    assert found.seconds["compute"] == 24
    assert found.seconds["links"] == 0


@given(gpus=st.integers(1, 1024), share=st.floats(0.05, 1))
def test_relations(gpus, share):
    # a processor count that never holds the step up
    one = plan(Cluster(gpu(), gpus=gpus, utilisation=share, images_per_core=1e9))
    twice = plan(Cluster(gpu(), gpus=gpus, utilisation=share / 2, images_per_core=1e9))
    assert twice.seconds["compute"] == pytest.approx(2 * one.seconds["compute"])
    assert one.memory_bytes == plan(Cluster(gpu())).memory_bytes
    assert one.all_reduce_bytes < 2 * COUNTS.gradient_bytes
    assert one.steps * one.batch >= 6400 > (one.steps - 1) * one.batch
    assert max(one.seconds.values()) == one.step_seconds
    assert math.isclose(one.gpu_hours, gpus * one.hours)


def test_the_papers_energy():
    # COCO-Stuff: ten days on eight GPUs of 250 W, "528 kWh"
    assert energy(10 * 24 * 8, 250, 1.1) == pytest.approx(528)


def test_ring_all_reduce():
    assert all_reduce_volume(100, 1) == 0
    assert all_reduce_volume(100, 2) == 100
    assert all_reduce_volume(100, 4) == 150


# --- bad inputs and the command line


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        pytest.param(lambda: split_batch(64, 12), InputError, ["12 GPUs", "64"], id="no-share"),
        pytest.param(lambda: split_batch(64, 128), InputError, ["128 GPUs"], id="too-many"),
        pytest.param(lambda: split_batch(64, 0), InputError, ["gpus"], id="no-gpu"),
        pytest.param(lambda: Cluster(gpu(), gpus=0), InputError, ["Cluster", "gpus"], id="none"),
        pytest.param(lambda: Cluster(gpu(), gpus=2.0), DTypeError, ["gpus"], id="fraction"),
        pytest.param(
            lambda: Cluster(gpu(), utilisation=0.0), InputError, ["utilisation"], id="idle"
        ),
        pytest.param(
            lambda: Cluster(gpu(), utilisation=1.1), InputError, ["utilisation"], id="over-peak"
        ),
        pytest.param(lambda: Cluster(gpu(), pue=0.9), InputError, ["pue"], id="pue"),
        pytest.param(lambda: count_step(config_of("own"), 0), InputError, ["batch"], id="empty"),
        pytest.param(
            lambda: count_step(config_of("reuse"), 1), InputError, ["at least 2"], id="no-pair"
        ),
        pytest.param(
            lambda: plan_runs(config_of("own"), gpu(), (8, 16, 32), (64, 64)),
            InputError,
            ["1 or 3 entries", "got 2"],
            id="lengths",
        ),
    ],
)
def test_bad_arguments(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    assert_message(caught.value, *parts)


def test_options_start_from_the_preset():
    options = parse_plan(["--gpus", "8", "64", "--batch", "64", "512", "--optim.steps", "7"])
    assert isinstance(options, Plan)
    assert (options.preset, options.gpus, options.batch) == ("ade20k", (8, 64), (64, 512))
    assert options.config.data.num_classes == 151
    assert options.config.optim.steps == 7
    assert parse_plan(["--preset", "cityscapes"]).config.data.image_size == (256, 512)


SMALL = ["--discriminator.backbone", "test_efficientnet"]
SMALL += ["--generator.channels", "16", "16", "8", "8"]


def test_the_verb_prints_a_plan(capsys):
    main(["plan", "--preset", "tiny", *SMALL, "--gpus", "2", "--gpu", "h200"])
    text = capsys.readouterr().out
    for part in ("nothing was run", "H200", "parameters", "frozen networks, backward"):
        assert part in text
    for part in ("Adam's moments", "energy, kWh", "load with 2 GPUs"):
        assert part in text


def test_several_plans_as_a_table():
    table = comparison_rst([plan(Cluster(gpu(), gpus=n)) for n in (2, 64)])
    assert table.startswith(".. list-table::")
    assert "   * - GPUs\n     - 2\n     - 64\n" in table
    assert "   * - steps\n     - 400\n     - 13\n" in table
    assert "(too much)" not in table
    assert "(too much)" in comparison_rst([plan(Cluster(gpu(memory_bytes=1e4)))])
