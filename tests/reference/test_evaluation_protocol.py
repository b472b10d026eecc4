import os
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import chain, combinations, pairwise
from pathlib import Path

import pytest
import torch
from evaluation_parts import (
    ShadeDataset,
    ShadeGenerator,
    colour_extractor,
    instruments,
    pixel_distance,
    shade_segmenter,
    trained,
)
from hypothesis import given, settings, strategies as st
from support import assert_equal, assert_message
from unit_run import unit_config

from dpsims.errors import DTypeError, InputError, NonFiniteError
from dpsims_reference.datasets import build_dataset
from dpsims_reference.evaluation import Instruments, Process, Protocol, measure
from dpsims_reference.evaluation.images import as_8_bit, draw_images, load_batches, spread
from dpsims_reference.generator import build_generator
from dpsims_reference.sampling import TrainedGenerator

QUICK = Protocol(samples_per_map=3, speed=False)
COLOURS = Instruments((colour_extractor(),))
pytestmark = pytest.mark.filterwarnings("ignore:.*rank deficient:UserWarning")


# --- relations


def test_a_perfect_generator_is_at_distance_zero_and_the_ceiling():
    found = measure(trained(), ShadeDataset(20), instruments(), QUICK)
    figures = found.figures
    # sums of 24 terms below 1 against each other
    assert 0 <= figures["frechet/colours"] < 1e-12
    assert figures["miou/shades"] == figures["miou_real/shades"] == 1
    assert figures["pixel_accuracy/shades"] == 1
    assert figures["diversity/pixels"] == 0
    assert (found.num_images, found.num_diversity_maps, found.speed) == (20, 20, None)


def test_a_worse_generator_scores_worse():
    found = [
        measure(trained(ShadeGenerator(strength)), ShadeDataset(20), instruments(), QUICK).figures
        for strength in (0.05, 0.5)
    ]
    assert found[0]["frechet/colours"] < found[1]["frechet/colours"]
    assert found[0]["miou/shades"] > found[1]["miou/shades"]
    assert found[0]["diversity/pixels"] < found[1]["diversity/pixels"]


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_the_batch_size_changes_nothing(batch_size):
    model, dataset = trained(ShadeGenerator(0.2)), ShadeDataset(7, noise=0.1)
    whole = measure(model, dataset, instruments(), QUICK)
    found = measure(model, dataset, instruments(), replace(QUICK, batch_size=batch_size))
    # pooled means in float32
    assert found.figures == pytest.approx(whole.figures, rel=1e-5, abs=1e-6)
    assert_equal(found.scores["shades"].confusion, whole.scores["shades"].confusion)


def test_measuring_twice_gives_the_same_and_leaves_the_global_state():
    model, dataset = trained(ShadeGenerator(0.2)), ShadeDataset(7)
    state = torch.get_rng_state()
    first, second = (measure(model, dataset, instruments(), QUICK).figures for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    other = measure(model, dataset, instruments(), replace(QUICK, seed=1)).figures
    assert other["diversity/pixels"] != first["diversity/pixels"]


@given(count=st.integers(0, 40), world=st.integers(1, 7))
def test_processes_take_every_item_once(count, world):
    parts = [list(Process(rank, world).part(range(count))) for rank in range(world)]
    assert sorted(chain.from_iterable(parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(data=st.data(), length=st.integers(1, 60))
@settings(max_examples=30)
def test_fewer_images_are_spread_over_the_data(data, length):
    count = data.draw(st.integers(1, length))
    found = spread(length, count)
    assert found == sorted(set(found))
    assert len(found) == count
    gaps = [b - a for a, b in pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert spread(length, None) == list(range(length))


# --- the images


def test_images_depend_on_their_position_and_not_on_their_batch():
    config = unit_config()
    torch.manual_seed(0)
    generator = build_generator(config).eval()
    for gate in (p for n, p in generator.named_parameters() if n.endswith("gate")):
        torch.nn.init.constant_(gate, 1.0)
    dataset = build_dataset(config.data)
    model = TrainedGenerator(generator, config, dataset.spec)
    ((positions, batch),) = load_batches(dataset, [0, 3, 5], batch_size=3, instances=False)
    whole = draw_images(model, batch.labels, None, [(p, 0) for p in positions], seed=0)
    alone = draw_images(model, batch.labels[1:2], None, [(3, 0)], seed=0)
    # float32 sums differ by the batch; seldom enough to round to the next of 256 values
    steps = ((whole[1:2] - alone).abs() * 127.5).round()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 0.01
    other = draw_images(model, batch.labels[1:2], None, [(3, 1)], seed=0)
    assert (other != alone).any()


def test_images_have_the_256_values_of_a_png():
    images = torch.randn(2, 3, 5, 5)
    found = as_8_bit(images, [0, 1])
    assert_equal(as_8_bit(found, [0, 1]), found)
    bytes_ = (found + 1) * 127.5
    assert (bytes_ - bytes_.round()).abs().max() < 1e-4
    assert (found - images.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


def test_diversity_is_the_mean_distance_over_pairs_and_maps():
    model, dataset = trained(ShadeGenerator(0.2)), ShadeDataset(4)
    found = measure(
        model, dataset, Instruments(distances=(pixel_distance(),)), replace(QUICK, batch_size=2)
    )
    values = []
    for position in range(4):
        labels = dataset.view(position).labels[None]
        samples = [draw_images(model, labels, None, [(position, n)], seed=0) for n in range(3)]
        values += [float((a - b).abs().double().mean()) for a, b in combinations(samples, 2)]
    assert found.figures["diversity/pixels"] == pytest.approx(sum(values) / len(values), rel=1e-6)


def test_the_speed_says_on_what_it_was_measured():
    model = trained()
    found = measure(model, ShadeDataset(3), COLOURS, replace(QUICK, speed=True, batch_size=2))
    speed = found.speed
    assert speed.images_per_second > 0
    assert (speed.batch_size, speed.image_size, speed.threads) == (2, (8, 12), 1)
    assert speed.device.startswith("cpu")
    assert min(speed.warm_up, speed.timed) > 0
    # two batches; what is timed is a copy that is prepared for inference
    assert model.generator.calls == 2


def test_no_more_is_looked_at_than_asked_for():
    dataset = ShadeDataset(10)
    protocol = replace(QUICK, num_images=4, diversity_maps=2)
    found = measure(trained(), dataset, instruments(), protocol)
    assert (found.num_images, found.num_diversity_maps) == (4, 2)
    assert dataset.asked == [0, 2, 5, 7, 0, 5]
    none = measure(trained(), ShadeDataset(4), instruments(), replace(QUICK, diversity_maps=0))
    assert "diversity/pixels" not in none.figures


# --- bad inputs: found out before the first image


@pytest.mark.parametrize(
    ("given_instruments", "protocol", "parts"),
    [
        pytest.param(COLOURS, {"num_images": 9}, ["num_images", "8", "9"], id="too-many-images"),
        pytest.param(COLOURS, {"num_images": 0}, ["num_images", "0"], id="no-image"),
        pytest.param(COLOURS, {"num_images": 1}, ["num_images", "2"], id="one-image"),
        pytest.param(COLOURS, {"kernel_subset_size": 9}, ["subset_size", "9"], id="large-subset"),
        pytest.param(
            Instruments(segmenters=(shade_segmenter(num_classes=9),)),
            {},
            ["shades", "9"],
            id="segmenter-of-other-classes",
        ),
        pytest.param(
            Instruments((colour_extractor(), colour_extractor())),
            {},
            ["names", "colours"],
            id="one-name-twice",
        ),
    ],
)
def test_what_cannot_end_well_does_not_begin(given_instruments, protocol, parts):
    dataset = ShadeDataset(8)
    with pytest.raises(InputError) as caught:
        measure(trained(), dataset, given_instruments, replace(QUICK, **protocol))
    assert_message(caught.value, *parts)
    assert dataset.asked == []


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        pytest.param({"batch_size": 0}, InputError, "batch_size", id="empty-batch"),
        pytest.param({"samples_per_map": 1}, InputError, "samples_per_map", id="one-sample"),
        pytest.param({"num_images": 1.5}, DTypeError, "num_images", id="half-an-image"),
        pytest.param({"diversity_maps": -1}, InputError, "diversity_maps", id="negative-maps"),
        pytest.param({"seed": -1}, InputError, "seed", id="negative-seed"),
    ],
)
def test_the_protocol_is_checked(change, error, part):
    with pytest.raises(error) as caught:
        Protocol(**change)
    assert_message(caught.value, "Protocol", part)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_pixels_that_are_no_numbers_name_the_position(value):
    images = torch.zeros(3, 3, 4, 4)
    images[1, 2, 0, 0] = value
    with pytest.raises(NonFiniteError) as caught:
        as_8_bit(images, [5, 7, 9])
    assert_message(caught.value, "finite", "position 7")


def test_a_generator_that_gives_nan_stops_the_evaluation():
    with pytest.raises(NonFiniteError) as caught:
        measure(trained(ShadeGenerator(broken_at=2)), ShadeDataset(5), COLOURS, QUICK)
    assert_message(caught.value, "position 0")


@pytest.mark.parametrize(("rank", "world"), [(1, 1), (-1, 2), (0, 0)])
def test_a_process_is_one_of_its_world(rank, world):
    with pytest.raises(InputError) as caught:
        Process(rank, world)
    assert_message(caught.value, "rank", str(rank))


# --- several processes


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_equal_one(tmp_path):
    worker = Path(__file__).parent / "evaluation_worker.py"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    store, port = str(tmp_path / "store"), str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(worker), str(rank), store, port],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert output == "all equal\n"
