from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scipy import stats
from support import assert_equal, assert_message
from torch.utils.data import DataLoader

from dpsims import ClassBalancedSampler, image_sampling_weights
from dpsims.data._sampler_checks import check_agreement
from dpsims.errors import (
    DistributedError,
    DTypeError,
    IncompatibleCheckpointError,
    InputError,
)


def random_weights(num_images, *, seed=0):
    weights = torch.from_numpy(np.random.default_rng(seed).random(num_images)) + 0.1
    weights[::4] = 0
    return weights if bool(weights.any()) else weights + 1


def assert_drawn_like(weights, drawn):
    """A chi-square test that a right sampler fails once in a million seeds."""
    kept = weights.double().numpy() > 0
    counts = np.bincount(drawn, minlength=len(weights))
    assert counts[~kept].sum() == 0
    expected = weights.double().numpy()[kept]
    expected = expected / expected.sum() * len(drawn)
    assert stats.chisquare(counts[kept], expected).pvalue > 1e-6


# the distribution


def test_frequencies_follow_the_rarest_class():
    rng = np.random.default_rng(1)
    presence = torch.from_numpy(rng.random((40, 6)) < np.array([0.9, 0.6, 0.3, 0.2, 0.1, 0.05]))
    presence[:, 0] = True
    weights = image_sampling_weights(presence)
    assert_drawn_like(weights, list(ClassBalancedSampler(weights, num_samples=200_000)))


def test_equal_weights_draw_uniformly():
    weights = torch.full((50,), 3.0)
    assert_drawn_like(weights, list(ClassBalancedSampler(weights, num_samples=100_000, seed=4)))


def test_weights_over_twelve_orders_of_magnitude_stay_unbiased():
    # 10^6 heavy images first, so that the running sum is large where the light ones are drawn
    heavy, light = torch.full((1000,), 1e12), torch.full((10,), 1.0)
    weights = torch.cat([heavy, light, torch.full((1,), 1e15), light])
    drawn = torch.tensor(list(ClassBalancedSampler(weights, num_samples=100_000)))
    groups = torch.bincount(torch.bucketize(drawn, torch.tensor([999, 1009, 1010])), minlength=4)
    assert groups[1] + groups[3] == 0  # expected 1e-9 of the draws
    assert stats.binomtest(int(groups[0]), 100_000, 0.5).pvalue > 1e-6
    # among light images alone the proportions hold as well
    light = torch.tensor([1e-12, 3e-12, 0.0, 4e-12])
    assert_drawn_like(light, list(ClassBalancedSampler(light, num_samples=10_000)))


def test_huge_and_tiny_weights_do_not_overflow():
    huge = torch.tensor([1e308, 1e308, 0.0, 1e308], dtype=torch.float64)
    assert_drawn_like(huge / 1e308, list(ClassBalancedSampler(huge, num_samples=9000)))
    tiny = torch.tensor([5e-324, 5e-324, 0.0], dtype=torch.float64)
    assert set(ClassBalancedSampler(tiny, num_samples=100)) == {0, 1}


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_weight_zero_is_never_drawn(num_images, seed):
    weights = random_weights(num_images, seed=seed)
    drawn = list(ClassBalancedSampler(weights, num_samples=500, seed=seed))
    assert (weights[drawn] > 0).all()


def test_a_draw_at_the_very_end_stays_inside(monkeypatch):
    # the largest draw, times a sum just above a power of two, is rounded up to the sum
    sampler = ClassBalancedSampler(torch.tensor([1.0, 1.0, 0.0, 0.0]), num_samples=2)
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.ones(n, dtype=torch.float64))
    assert list(sampler) == [1, 1]


def test_more_than_2_to_the_24_images():
    weights = torch.zeros(2**24 + 3, dtype=torch.float64)
    weights[[1, 2**24, 2**24 + 2]] = 1
    drawn = list(ClassBalancedSampler(weights, num_samples=300))
    assert set(drawn) == {1, 2**24, 2**24 + 2}


def test_permuted_images_keep_their_probability():
    weights = random_weights(12, seed=3)
    order = torch.randperm(12)
    drawn = list(ClassBalancedSampler(weights[order], num_samples=50_000, seed=9))
    assert_drawn_like(weights, order[drawn].numpy())


# the sequence


@given(st.integers(0, 2**64), st.integers(0, 2**31), st.integers(1, 60))
def test_sequence_depends_on_seed_and_epoch_only(seed, epoch, num_samples):
    weights = random_weights(9)
    first = ClassBalancedSampler(weights, num_samples=num_samples, seed=seed)
    first.set_epoch(epoch)
    second = ClassBalancedSampler(weights, num_samples=num_samples, seed=seed)
    list(second)
    torch.rand(3)
    second.set_epoch(epoch)
    with warnings.catch_warnings():
        # epoch 0 has been drawn by the second one already
        warnings.simplefilter("ignore", UserWarning)
        assert list(first) == list(second)


def test_other_seeds_and_epochs_give_other_sequences():
    weights = torch.ones(1000)
    drawn = []
    for seed in range(3):
        sampler = ClassBalancedSampler(weights, seed=seed)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            drawn.append(tuple(sampler))
    assert len(set(drawn)) == 9


def test_sequence_is_the_published_one():
    # a change of these numbers breaks every saved run
    sampler = ClassBalancedSampler(torch.arange(1.0, 9.0), seed=1)
    assert list(sampler) == [6, 7, 1, 6, 1, 1, 3, 7]
    sampler.set_epoch(1)
    assert list(sampler) == [1, 6, 7, 3, 7, 7, 3, 5]


@given(st.integers(1, 50), st.integers(1, 7), st.integers(0, 100))
def test_ranks_take_turns_in_one_sequence(num_samples, world_size, seed):
    weights = random_weights(11, seed=seed)
    arguments = {"num_samples": num_samples, "seed": seed}
    if num_samples < world_size:
        with pytest.raises(InputError, match="num_samples must be at least world_size"):
            ClassBalancedSampler(weights, **arguments, rank=0, world_size=world_size)
        return
    ranks = [
        ClassBalancedSampler(weights, **arguments, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shares = [list(sampler) for sampler in ranks]
    assert {len(share) for share in shares} == {len(ranks[0])} == {-(-num_samples // world_size)}
    total = world_size * len(ranks[0])
    alone = list(ClassBalancedSampler(weights, num_samples=total, seed=seed))
    assert [index for turn in zip(*shares, strict=True) for index in turn] == alone


def test_default_is_one_draw_per_image():
    assert (
        len(ClassBalancedSampler(torch.ones(7)))
        == len(list(ClassBalancedSampler(torch.ones(7))))
        == 7
    )


def test_iterating_leaves_global_random_state_and_weights_alone():
    weights = random_weights(5)
    before, state = weights.clone(), torch.get_rng_state()
    list(ClassBalancedSampler(weights))
    assert_equal(torch.get_rng_state(), state)
    assert_equal(weights, before)


def test_later_changes_of_the_weights_do_not_count():
    weights = torch.tensor([1.0, 0.0])
    sampler = ClassBalancedSampler(weights)
    weights.copy_(torch.tensor([0.0, 1.0]))
    assert list(sampler) == [0, 0]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_continue_alike(clone):
    sampler = ClassBalancedSampler(random_weights(9), num_samples=20)
    sampler.start_at(7)
    again = clone(sampler)
    assert list(again) == list(sampler)


# epochs


def test_drawing_an_epoch_again_warns_once_and_repeats_it():
    sampler = ClassBalancedSampler(torch.ones(30))
    first = list(sampler)
    with pytest.warns(UserWarning, match="epoch 0 is drawn again"):
        assert list(sampler) == first
    # warnings are errors in this suite: a second one would raise
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_auto_epoch_steps_by_itself():
    weights = torch.ones(30)
    told, alone = ClassBalancedSampler(weights), ClassBalancedSampler(weights, auto_epoch=True)
    for epoch in range(3):
        told.set_epoch(epoch)
        assert list(told) == list(alone)
    assert alone.state_dict()["epoch"] == 2


# resume


@given(st.integers(1, 30), st.integers(1, 3), st.integers(0, 3), st.integers(0, 100), st.data())
def test_resume_anywhere_equals_uninterrupted(num_samples, world_size, epoch, seed, data):
    num_samples = max(num_samples, world_size)
    rank = data.draw(st.integers(0, world_size - 1))

    def build():
        return ClassBalancedSampler(
            random_weights(8, seed=seed),
            num_samples=num_samples,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    whole = build()
    expected = []
    for number in range(epoch + 2):
        whole.set_epoch(number)
        expected.append(list(whole))

    stopped = build()
    stopped.set_epoch(epoch)
    position = data.draw(st.integers(0, len(stopped)))
    iterator = iter(stopped)
    for _ in range(position):
        next(iterator)
    state = json.loads(json.dumps(stopped.state_dict()))

    resumed = build()
    resumed.load_state_dict(state)
    assert len(resumed) == len(whole)
    # what a training loop does first in a resumed epoch
    resumed.set_epoch(state["epoch"])
    assert list(resumed) == expected[epoch][position:]
    resumed.set_epoch(epoch + 1)
    assert list(resumed) == expected[epoch + 1]
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_behind_a_prefetching_loader(workers):
    def build():
        return ClassBalancedSampler(torch.arange(1.0, 50.0), num_samples=24, seed=3)

    def loader(sampler):
        return DataLoader(range(49), batch_size=4, sampler=sampler, num_workers=workers)

    expected = [batch.tolist() for batch in loader(build())]
    stopped = build()
    batches = iter(loader(stopped))
    seen = [next(batches).tolist() for _ in range(2)]
    if workers:
        # the loader has asked for more than it returned
        assert stopped.state_dict()["position"] > 8
    state = stopped.state_dict(consumed=8)
    resumed = build()
    resumed.load_state_dict(state)
    assert seen + [batch.tolist() for batch in loader(resumed)] == expected


def test_start_at_leaves_out_the_first_draws_once():
    sampler = ClassBalancedSampler(torch.ones(20))
    whole = list(sampler)
    sampler.start_at(15)
    assert sampler.state_dict()["position"] == 15
    assert list(sampler) == whole[15:]
    sampler.start_at(0)
    assert list(sampler) == whole


def test_another_epoch_starts_at_its_first_draw():
    sampler = ClassBalancedSampler(torch.ones(20))
    sampler.start_at(15)
    sampler.set_epoch(1)
    assert sampler.state_dict()["position"] == 0
    assert len(list(sampler)) == 20


def test_abandoned_iterator_does_not_move_the_position():
    sampler = ClassBalancedSampler(torch.ones(20))
    old = iter(sampler)
    next(old)
    sampler.set_epoch(1)
    new = iter(sampler)
    next(new)
    for _ in range(5):
        next(old)
    assert sampler.state_dict()["position"] == 1


def test_iterator_keeps_the_epoch_it_was_made_in():
    sampler = ClassBalancedSampler(torch.ones(20))
    expected = list(ClassBalancedSampler(torch.ones(20)))
    iterator = iter(sampler)
    sampler.set_epoch(1)
    assert list(iterator) == expected
    state = sampler.state_dict()
    assert (state["epoch"], state["position"]) == (1, 0)


def test_iterator_from_before_start_at_does_not_move_the_position():
    sampler = ClassBalancedSampler(torch.ones(20))
    iterator = iter(sampler)
    next(iterator)
    sampler.start_at(7)
    next(iterator)
    assert sampler.state_dict()["position"] == 7


class ResumeMachine(RuleBasedStateMachine):
    """Steps, saves, crashes and new epochs in any order draw what one run would draw."""

    @initialize(seed=st.integers(0, 50), num_samples=st.integers(1, 9))
    def begin(self, seed, num_samples):
        self.seed, self.num_samples = seed, num_samples
        self.sampler = self.build()
        self.iterator = iter(self.sampler)
        self.epoch = self.used = 0
        self.saved = self.sampler.state_dict()

    def build(self):
        return ClassBalancedSampler(
            torch.arange(1.0, 6.0), num_samples=self.num_samples, seed=self.seed
        )

    def expected(self):
        fresh = self.build()
        fresh.set_epoch(self.epoch)
        return list(fresh)

    @precondition(lambda self: self.used < self.num_samples)
    @rule()
    def step(self):
        assert next(self.iterator) == self.expected()[self.used]
        self.used += 1

    @rule()
    def save(self):
        self.saved = self.sampler.state_dict()

    @rule()
    def next_epoch(self):
        self.epoch += 1
        self.used = 0
        self.sampler.set_epoch(self.epoch)
        self.iterator = iter(self.sampler)

    @rule()
    def crash(self):
        self.sampler = self.build()
        self.sampler.load_state_dict(self.saved)
        self.iterator = iter(self.sampler)
        self.epoch, self.used = self.saved["epoch"], self.saved["position"]

    @invariant()
    def state_tells_the_truth(self):
        if hasattr(self, "sampler"):
            state = self.sampler.state_dict()
            assert (state["epoch"], state["position"]) == (self.epoch, self.used)


TestResumeMachine = ResumeMachine.TestCase
TestResumeMachine.settings = settings(max_examples=25, stateful_step_count=20)


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"weights": torch.ones(9)}, "fingerprint of the weights"),
        ({"weights": torch.arange(1.0, 9.0).flip(0)}, "fingerprint of the weights"),
        ({"num_samples": 9}, "num_samples"),
        ({"seed": 1}, "seed"),
        ({"rank": 0, "world_size": 2}, "world_size"),
    ],
    ids=["other-length", "other-weights", "other-num-samples", "other-seed", "other-world-size"],
)
def test_state_of_another_run_is_refused(other, part):
    arguments = {"weights": torch.arange(1.0, 9.0), "num_samples": 8}
    state = ClassBalancedSampler(**arguments).state_dict()
    sampler = ClassBalancedSampler(**{**arguments, **other})
    before = sampler.state_dict()
    with pytest.raises(IncompatibleCheckpointError) as caught:
        sampler.load_state_dict(state)
    assert_message(caught.value, f"{part} must be this sampler's", repr(state[part.split()[0]]))
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"position": 9}, ["position", "at most 8", "got 9"]),
        ({"position": -1}, ["position", "at least 0"]),
        ({"position": 1.5}, ["position", "int", "1.5"]),
        ({"epoch": -1}, ["epoch", "at least 0"]),
        ({"epoch": None}, ["epoch", "None"]),
        ({"extra": 1}, ["state must have the keys", "extra"]),
    ],
    ids=["past-the-end", "negative", "fraction", "negative-epoch", "no-epoch", "extra-key"],
)
def test_malformed_state_is_refused_and_changes_nothing(change, parts):
    sampler = ClassBalancedSampler(torch.ones(8))
    before = sampler.state_dict()
    with pytest.raises(IncompatibleCheckpointError) as caught:
        sampler.load_state_dict({**before, **change})
    assert_message(caught.value, "ClassBalancedSampler.load_state_dict: ", *parts)
    assert sampler.state_dict() == before


@pytest.mark.parametrize("state", [None, [], {"epoch": 0}], ids=["none", "list", "keys-missing"])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(IncompatibleCheckpointError, match="state must have the keys"):
        ClassBalancedSampler(torch.ones(8)).load_state_dict(state)


# bad input


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"weights": [1.0]}, DTypeError, ["weights", "torch.Tensor", "list"]),
        ({"weights": torch.ones(3).long()}, DTypeError, ["weights", "floating-point", "int64"]),
        ({"weights": torch.ones(3, 1)}, InputError, ["weights", "(I,)", "got (3, 1)"]),
        ({"weights": torch.ones(0)}, InputError, ["weights", "(I,)", "got (0,)"]),
        ({"weights": torch.zeros(3)}, InputError, ["weights", "not all be 0", "3 zeros"]),
        ({"weights": torch.tensor([1.0, -1.0])}, InputError, ["weights", "-1.0 at 1"]),
        ({"weights": torch.tensor([float("nan")])}, InputError, ["weights", "nan at 0"]),
        ({"weights": torch.tensor([float("inf")])}, InputError, ["weights", "inf at 0"]),
        ({"num_samples": 0}, InputError, ["num_samples", "at least 1", "got 0"]),
        ({"num_samples": -3}, InputError, ["num_samples", "at least 1", "got -3"]),
        ({"num_samples": 2.0}, DTypeError, ["num_samples", "int", "2.0"]),
        ({"num_samples": True}, DTypeError, ["num_samples", "int", "bool"]),
        ({"seed": 0.5}, DTypeError, ["seed", "int", "0.5"]),
        ({"rank": 2, "world_size": 2}, InputError, ["rank", "below world_size=2", "got 2"]),
        ({"rank": -1, "world_size": 2}, InputError, ["rank", "at least 0", "got -1"]),
        ({"rank": 0, "world_size": 0}, InputError, ["world_size", "at least 1", "got 0"]),
        ({"rank": 0}, InputError, ["rank and world_size", "together", "0 and None"]),
        ({"rank": 0, "world_size": 5}, InputError, ["num_samples", "world_size=5", "got 4"]),
    ],
    ids=[
        "list",
        "integers",
        "rank-2",
        "empty",
        "all-zero",
        "negative",
        "nan",
        "inf",
        "num-samples-zero",
        "num-samples-negative",
        "num-samples-float",
        "num-samples-bool",
        "seed-float",
        "rank-too-high",
        "rank-negative",
        "no-processes",
        "rank-alone",
        "fewer-draws-than-ranks",
    ],
)
def test_construction_refuses(arguments, error, parts):
    arguments = {"weights": torch.ones(4), **arguments}
    with pytest.raises(error) as caught:
        ClassBalancedSampler(**arguments)
    assert_message(caught.value, "ClassBalancedSampler: ", *parts)


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda s: s.set_epoch(-1), ["set_epoch: epoch", "at least 0"]),
        (lambda s: s.start_at(5), ["start_at: position", "at most 4", "got 5"]),
        (lambda s: s.state_dict(consumed=5), ["state_dict: consumed", "at most 4", "got 5"]),
    ],
    ids=["epoch", "position", "consumed"],
)
def test_methods_refuse(call, parts):
    with pytest.raises(InputError) as caught:
        call(ClassBalancedSampler(torch.ones(4)))
    assert_message(caught.value, "ClassBalancedSampler.", *parts)


# processes


def test_process_group_of_one_is_one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        sampler = ClassBalancedSampler(torch.arange(1.0, 9.0))
    finally:
        torch.distributed.destroy_process_group()
    assert (sampler.rank, sampler.world_size) == (0, 1)
    assert list(sampler) == list(ClassBalancedSampler(torch.arange(1.0, 9.0)))


def test_message_about_ranks_shows_both_sides(monkeypatch):
    def gather(received, mine):
        received[:] = [mine, mine, (7, *mine[1:])]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(DistributedError) as caught:
        check_agreement((3, 20, "abc"), 3)
    assert_message(caught.value, "(3, 20, 'abc') on rank 0", "(7, 20, 'abc') on rank 2")


def _rank(rank, store, seed_step, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    try:
        sampler = ClassBalancedSampler(torch.arange(1.0, 9.0), seed=seed_step * rank)
        results.put((rank, sampler.world_size, list(sampler)))
    except DistributedError as error:
        results.put((rank, "error", str(error)))
    finally:
        torch.distributed.destroy_process_group()


def _two_ranks(store, *, seed_step):
    # forked: a new Python would import torch again
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, store, seed_step, results)) for rank in range(2)
    ]
    with warnings.catch_warnings():
        # Python 3.12 warns about forking a process with threads; these do not use them
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    try:
        return sorted(results.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=60)
            process.kill()


def test_two_processes_share_one_sequence(tmp_path):
    first, second = _two_ranks(tmp_path / "store", seed_step=0)
    alone = list(ClassBalancedSampler(torch.arange(1.0, 9.0)))
    assert first == (0, 2, alone[0::2])
    assert second == (1, 2, alone[1::2])


def test_processes_with_different_seeds_are_told(tmp_path):
    for rank, kind, message in _two_ranks(tmp_path / "store", seed_step=1):
        assert kind == "error", (rank, message)
        assert "must be the same on all ranks" in message
