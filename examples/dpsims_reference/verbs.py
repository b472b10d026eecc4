"""What each verb of the command line does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpsims.errors import IncompatibleCheckpointError, InputError
from dpsims_reference.batches import local_batch_size
from dpsims_reference.best import BestFigure, flat_figures
from dpsims_reference.config import Config
from dpsims_reference.config_json import from_dict
from dpsims_reference.crash import replay_crash
from dpsims_reference.data.folder import check_folder, format_report
from dpsims_reference.data.paired import PresenceScan
from dpsims_reference.data.pseudo_labels import pseudo_label_folder
from dpsims_reference.data.scan_progress import ScanProgress
from dpsims_reference.datasets import build_dataset
from dpsims_reference.demo import run_demo
from dpsims_reference.diagnosis import diagnose_run
from dpsims_reference.diagnosis_figures import write_diagnosis
from dpsims_reference.evaluation import Evaluator
from dpsims_reference.evaluation.command import evaluate_run
from dpsims_reference.experiments import describe, experiment, format_experiments
from dpsims_reference.export import export_generator
from dpsims_reference.export_card import card_path
from dpsims_reference.figures import plot_curves
from dpsims_reference.logs import read_log
from dpsims_reference.official_report import check_official
from dpsims_reference.options import (
    CheckData,
    Demo,
    Diagnose,
    Evaluate,
    Experiments,
    Export,
    Plan,
    PseudoLabels,
    Replay,
    Sample,
    Train,
)
from dpsims_reference.parallel import Parallel, start_processes
from dpsims_reference.parsing import resumed_config, train_config
from dpsims_reference.planning import GPUS, comparison_rst, format_plans, plan_runs
from dpsims_reference.runs import choose_folder, parse_run
from dpsims_reference.sampling import load_generator, sample_to_folder
from dpsims_reference.trainer import Trainer


def pick_device(device: str) -> str:
    """``"auto"`` as ``"cuda"`` where there is a CUDA device, else ``"cpu"``."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def train(options: Train) -> None:
    """Train, or continue; on every process that a launcher started."""
    parallel = start_processes(pick_device(options.device), timeout=options.timeout)
    config = train_config(options)
    if options.experiment is not None and parallel.rank == 0:
        print(describe(experiment(options.experiment), options.size))
    folder, checkpoint = choose_folder(
        options.out, options.resume, discard_later=options.discard_later
    )
    if checkpoint is not None:
        saved: Config = from_dict(Config, checkpoint.state["config"])
        config = resumed_config(saved, options)
        _check_processes(config, parallel)
        # the first process tidies the folder up when its trainer opens it
        parallel.barrier()
    # beside the run: a killed scan of 100 000 maps goes on where it stopped
    scan = PresenceScan(folder / "presence.safetensors", config.data.workers, ScanProgress())
    dataset = build_dataset(config.data, scan=scan)
    trainer = Trainer(
        config,
        dataset,
        folder,
        parallel=parallel,
        shard_backbones=options.shard_backbones,
        keep=options.keep,
        best=_best_figure(options.keep_best, config),
    )
    if checkpoint is not None:
        trainer.restore(checkpoint, allow=options.allow_change)
        if trainer.is_first:
            if options.discard_later:
                trainer.store.discard_after(trainer.step)
            print(f"continuing {options.resume} after step {trainer.step} in {folder}")
    trainer.run(
        save_every=options.save_every,
        picture_every=options.picture_every,
        diagnose_every=options.diagnose_every,
    )
    trainer.close()
    parallel.close()
    if not trainer.is_first:
        return
    plot_curves(folder / "curves.png", read_log(folder / "log.jsonl"))
    print(f"step {trainer.step}: everything is in {folder}")


def _check_processes(config: Config, parallel: Parallel) -> None:
    try:
        local_batch_size(config, parallel.world_size)
    except InputError as error:
        msg = f"train: the run cannot continue on {parallel.world_size} processes: {error}"
        raise IncompatibleCheckpointError(msg) from error


def _best_figure(rule: str | None, config: Config) -> BestFigure:
    """Judged by the log, or by the evaluation where the name has its dot: ``heldout.frechet``."""
    best = BestFigure(rule)
    if "." in best.name:
        evaluator = Evaluator(config)
        best.evaluate = lambda generator: flat_figures(evaluator.measure(generator))
    return best


def list_experiments(options: Experiments) -> None:
    """Print the rows of the paper's tables."""
    print(format_experiments(options.table))


def sample(options: Sample) -> None:
    """Label maps in, images out."""
    trained = load_generator(options.run, device=pick_device(options.device))
    written = sample_to_folder(
        trained,
        options.labels,
        options.out,
        num_noises=options.num_noises,
        interpolate=options.interpolate,
        seed=options.seed,
        instances=options.instances,
    )
    print(f"{len(written)} pictures in {options.out}")


def export(options: Export) -> None:
    """A trained generator in, a program with its card out."""
    card = export_generator(options.run, options.out, format=options.format)
    gap = card["check"]["largest_difference"]
    print(f"{options.out}: images differ by {gap:.1e} of the largest pixel")
    print(f"{card_path(options.out)}: inputs and outputs")


def run_evaluation(options: Evaluate) -> None:
    """Measure a run, print the table, write the card and the pictures."""
    evaluate_run(
        options.run,
        options.out or parse_run(options.run).folder / "evaluation",
        options.instruments,
        options.protocol,
        split=options.split,
        device=pick_device(options.device),
    )


def diagnose(options: Diagnose) -> None:
    """Look inside a run, print the tables, write them and the pictures."""
    found = diagnose_run(
        options.run,
        num_maps=options.num_maps,
        num_noises=options.num_noises,
        device=pick_device(options.device),
    )
    print(found.table())
    folder = parse_run(options.run).folder
    out = options.out or folder
    written = write_diagnosis(out, found, read_log(folder / "diagnosis.jsonl"))
    print(f"\nwritten to {out}: {', '.join(path.name for path in written)}")


def replay(options: Replay) -> None:
    """Run a crashed step again."""
    print(replay_crash(options.folder, device=pick_device(options.device)))


def plan(options: Plan) -> None:
    """Print what a training run would need."""
    plans = plan_runs(
        options.config,
        GPUS[options.gpu],
        options.gpus,
        options.batch or (options.config.optim.batch_size,),
        utilisation=options.utilisation,
    )
    print(comparison_rst(plans) if options.rst else format_plans(options.preset, plans))


def pseudo_labels(options: PseudoLabels) -> None:
    """Cluster a folder of photographs into classes."""
    out = options.out or options.folder
    pseudo_label_folder(options.folder, out, options.classes, seed=options.seed)
    print(f"labels and overview.png are in {out}; look at overview.png before you train")


def check_data(options: CheckData) -> None:
    """Print what a folder holds and what to put in the configuration."""
    if options.name != "folder":
        text = check_official(
            options.name, options.folder, workers=options.workers, partial=options.partial
        )
        print(text)
        return
    report = check_folder(
        options.folder, num_classes=options.num_classes, ignore_index=options.ignore_index
    )
    print(format_report(report))


def demo(options: Demo) -> None:
    """The demonstration of the README."""
    run_demo(options.out, seed=options.seed, minutes=options.minutes, steps=options.steps)


RUNNERS: dict[type, Callable[[Any], None]] = {
    Train: train,
    Sample: sample,
    Export: export,
    Evaluate: run_evaluation,
    Experiments: list_experiments,
    Diagnose: diagnose,
    Replay: replay,
    Plan: plan,
    PseudoLabels: pseudo_labels,
    CheckData: check_data,
    Demo: demo,
}
