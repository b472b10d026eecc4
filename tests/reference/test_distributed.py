import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_equal, assert_message
from unit_run import unit_config

from dpsims.data import ClassBalancedSampler
from dpsims.errors import IncompatibleCheckpointError, InputError
from dpsims_reference.batches import (
    _DrawOrder,
    local_batch_size,
    norm_images,
    train_batches,
)
from dpsims_reference.datasets import build_dataset
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.fakes import FakeSource
from dpsims_reference.generator import GeneratorOutput, build_generator
from dpsims_reference.logs import read_log
from dpsims_reference.objective import Objective
from dpsims_reference.parallel import (
    FabricParallel,
    Parallel,
    Shard,
    start_processes,
)
from dpsims_reference.resume import check_same_run
from dpsims_reference.sharding import shard_backbones_
from dpsims_reference.steps import TrainingStep

WORKER = Path(__file__).parent / "distributed_worker.py"
UNIT_OPTIONS = [
    *("--preset", "tiny", "--data", "scenes", "--device", "cpu"),
    *("--discriminator.backbone", "test_efficientnet"),
    *("--discriminator.weights", "None"),
    "--discriminator.no-pretrained",
    *("--data.image-size", "32", "32", "--data.num-scenes", "4"),
    *("--data.num-classes", "12", "--optim.batch-size", "16"),
    *("--generator.channels", "16", "16", "8", "8"),
]


def environment(**more):
    paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def run_worker(worker, *arguments, timeout=300):
    """Two processes, as a launcher would start them; their errors, after both have ended well."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), *map(str, arguments)],
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error
        assert error.endswith("all equal\n")


def test_two_processes_train_as_one(tmp_path):
    run_worker(WORKER, tmp_path)


@pytest.mark.gpu
def test_two_forward_passes_of_d_and_one_backward_on_a_device():
    # one process, whose DistributedDataParallel has all its hooks
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    class Alone(Parallel):
        def wrap(self, module):
            return DistributedDataParallel(module, device_ids=[0], broadcast_buffers=False)

    config = unit_config(batch_size=4)
    address = f"tcp://127.0.0.1:{free_port()}"
    distributed.init_process_group("nccl", init_method=address, rank=0, world_size=1)
    try:
        generator = build_generator(config).cuda()
        discriminator = build_discriminator(config).cuda()
        objective = Objective(config, discriminator).cuda()
        objective.diversity_hinge = 0.1
        step = TrainingStep(generator, discriminator, objective, config, parallel=Alone("cuda"))
        batch = next(train_batches(build_dataset(config.data), config)).to(torch.device("cuda"))
        for number in range(2):
            terms = step(batch, number)
        assert all(bool(value.isfinite()) for value in terms.values())
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_torchrun_and_the_command_line(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", free_port(), "-m", "dpsims_reference", "train"]
    command = [*launcher, "--out", str(tmp_path), "--optim.steps", "2", *UNIT_OPTIONS]
    done = subprocess.run(
        [sys.executable, *command],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("everything is in") == 1
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [0, 1]
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.slow
def test_fabric_run_ends_all_processes_when_one_dies(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, sys\n"
        "from dpsims_reference import cli, steps\n"
        "update = steps.TrainingStep.__call__\n"
        "def dying(self, batch, step):\n"
        "    if step == 1 and self.parallel.rank == 1:\n"
        "        os._exit(7)\n"
        "    return update(self, batch, step)\n"
        "steps.TrainingStep.__call__ = dying\n"
        "cli.main(sys.argv[1:])\n"
    )
    launcher = ["-c", "from lightning_fabric.cli import _main; _main()", "run"]
    launcher += ["--accelerator", "cpu", "--devices", "2"]
    launcher += ["--main-port", free_port(), str(script), "train", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *launcher, *UNIT_OPTIONS],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    # the first step was trained by both
    assert [record["step"] for record in read_log(tmp_path / "run" / "log.jsonl")] == [0], (
        done.stderr
    )


# what needs no second process


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
def test_shards_are_disjoint_and_make_the_whole(processes, parts, each):
    whole = torch.arange(processes * parts * each)
    pieces = [
        Shard(rank, processes).part(number, parts).rows(whole)
        for rank in range(processes)
        for number in range(parts)
    ]
    assert_equal(torch.cat(pieces).sort().values, whole)
    for rank in range(processes):
        own = Shard(rank, processes).rows(whole)
        for number in range(parts):
            part = Shard(number, parts).rows(own)
            assert_equal(part, Shard(rank, processes).part(number, parts).rows(whole))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(3, 30), st.integers(0, 9))
def test_draws_of_all_processes_are_those_of_one(processes, each, images, first):
    weights = torch.rand(images, generator=torch.Generator().manual_seed(images)).double()

    def batches(shard):
        sampler = ClassBalancedSampler(weights, seed=3, rank=0, world_size=1)
        order = iter(_DrawOrder(sampler, processes * each, first, shard))
        return [next(order) for _ in range(5)]

    whole = batches(Shard())
    split = [batches(Shard(rank, processes)) for rank in range(processes)]
    for number, batch in enumerate(whole):
        dealt = [part[number] for part in split]
        assert [draw for row in zip(*dealt, strict=True) for draw in row] == batch


@pytest.mark.parametrize("pairs", ["split_batch", "second_pass"])
def test_latents_and_noise_belong_to_a_place_in_the_batch(pairs):
    config = unit_config(pairs=pairs, batch_size=8)
    config = replace(config, generator=replace(config.generator, spatial_noise=2))
    generator = build_generator(config)
    batch = next(train_batches(build_dataset(config.data), config))
    seen = []

    def record(labels, latents, extra, noise):
        seen.append((labels, latents, noise))
        empty = torch.zeros(len(labels), 1, 1, 1)
        return GeneratorOutput(empty, empty)

    source = FakeSource(generator, record, config)

    def made(shard):
        seen.clear()
        source(batch.part(shard), shard, 5, phase=1)
        return list(seen)

    whole = made(Shard())
    assert len(whole) == (1 if pairs == "split_batch" else 2)
    for index in range(4):
        shard = Shard(index, 4)
        for one, other in zip(made(shard), whole, strict=True):
            for mine, all_of_them in zip(one, other, strict=True):
                assert_equal(mine, shard.rows(all_of_them))


@pytest.mark.parametrize(
    ("processes", "accumulate", "batch_size", "pairs", "expected"),
    [
        (1, 1, 5, "split_batch", 5),
        (2, 2, 8, "split_batch", 2),
        (2, 1, 6, "split_batch", None),
        (2, 1, 6, "second_pass", 3),
        (4, 1, 6, "second_pass", None),
    ],
)
def test_a_batch_must_be_dealt_out_evenly(processes, accumulate, batch_size, pairs, expected):
    config = unit_config(batch_size=batch_size, accumulate=accumulate, pairs=pairs)
    if expected is not None:
        assert local_batch_size(config, processes) == expected
        return
    with pytest.raises(InputError) as caught:
        local_batch_size(config, processes)
    assert_message(caught.value, "optim.batch_size", "multiple", str(batch_size))


def test_no_parts_are_refused():
    with pytest.raises(InputError) as caught:
        local_batch_size(unit_config(accumulate=0), 1)
    assert_message(caught.value, "optim.accumulate", "at least 1")


def test_images_of_a_norm_depend_on_the_processes_only_without_sync():
    config = unit_config(batch_size=16, accumulate=2)
    assert [norm_images(config, world) for world in (1, 2, 4)] == [8, 8, 8]
    config = replace(config, generator=replace(config.generator, norm="batch"))
    assert [norm_images(config, world) for world in (1, 2, 4)] == [8, 4, 2]
    state = {"norm_images": 8, "config": {}}
    with pytest.raises(IncompatibleCheckpointError) as caught:
        check_same_run(state, {"norm_images": 4})
    assert_message(caught.value, "4 images instead of 8", "sync_batch")
    check_same_run(state, {"norm_images": 4}, allow=("norm_images",))


def test_settings_that_an_old_checkpoint_lacks_have_their_defaults():
    state = {"config": {"optim": {"lr": 1.0}}}
    check_same_run(state, {"config": {"optim": {"lr": 1.0, "accumulate": 1}}, "norm_images": 4})
    with pytest.raises(IncompatibleCheckpointError) as caught:
        check_same_run(
            state, {"config": {"optim": {"lr": 1.0, "accumulate": 2}}, "norm_images": 4}
        )
    assert_message(caught.value, "config.optim.accumulate")


def test_one_process_is_torch_as_it_is(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    parallel = start_processes("cpu")
    assert type(parallel) is Parallel
    assert parallel.shard == (0, 1)
    module, value = torch.nn.Linear(1, 1), torch.ones(2)
    terms = {"a": value.sum()}
    assert parallel.wrap(module) is module
    assert parallel.sum(value) is value
    assert parallel.gather(value) is value
    assert parallel.mean(terms) is terms
    assert parallel.any(True)
    assert not parallel.any(torch.tensor(False))
    parallel.barrier()
    parallel.close()
    with parallel.no_sync(module):
        assert parallel.shard.rows(value) is not None


def test_one_process_has_nothing_to_share():
    config = unit_config()
    discriminator = build_discriminator(config)
    with pytest.raises(InputError) as caught:
        shard_backbones_(discriminator, Objective(config, discriminator), Parallel())
    assert_message(caught.value, "at least 2 processes")


def test_options_of_fabric_run_that_do_not_fit_are_named(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("LT_CLI_USED", "1")
    monkeypatch.setenv("LT_PRECISION", "16-mixed")
    with pytest.raises(InputError) as caught:
        FabricParallel("cpu")
    assert_message(caught.value, "fabric run", "precision")
