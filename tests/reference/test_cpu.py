"""A CPU keeps the precision, the threads and the settings of torch that its user chose."""

import ast
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import assert_message
from unit_run import small_config

from dpsims_reference.batches import train_batches
from dpsims_reference.datasets import build_dataset
from dpsims_reference.trainer import Trainer

ROOT = Path(__file__).parents[2]
# a library that calls one of these decides for the whole process
GLOBAL = {
    "set_num_threads",
    "set_num_interop_threads",
    "set_flush_denormal",
    "set_float32_matmul_precision",
    "set_default_dtype",
    "set_default_device",
    "use_deterministic_algorithms",
}


def test_no_module_sets_what_belongs_to_the_process():
    files = [*ROOT.glob("dpsims/**/*.py"), *ROOT.glob("examples/**/*.py")]
    assert len(files) > 100
    for file in files:
        names = {
            node.attr
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute)
        }
        assert not names & GLOBAL, file


def test_bfloat16_on_a_cpu_is_a_warning_and_runs_in_float32(tmp_path):
    config = small_config(steps=1, precision="bf16")
    with pytest.warns(RuntimeWarning) as caught:
        trainer = Trainer(config, build_dataset(config.data), tmp_path)
    assert_message(caught[0].message, "optim.precision", "bf16", "float32")
    assert caught[0].filename == __file__
    with trainer.update._autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    trainer.close()


def test_float32_is_no_warning(tmp_path):
    config = small_config(steps=1, precision="float32")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(config, build_dataset(config.data), tmp_path).close()
    assert not caught, [str(each.message) for each in caught]


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_threads_of_the_process_alone(workers):
    config = small_config()
    config = replace(config, data=replace(config.data, workers=workers))
    threads = torch.get_num_threads(), torch.get_num_interop_threads()
    batches = train_batches(build_dataset(config.data), config)
    next(batches)
    batches.close()
    assert (torch.get_num_threads(), torch.get_num_interop_threads()) == threads
