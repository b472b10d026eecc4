"""What each verb of the command line does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dpsims.errors import CheckpointError
from dpsims_reference import cli
from dpsims_reference.checkpoints import CheckpointStore
from dpsims_reference.config import Config, from_dict
from dpsims_reference.crash import replay_crash
from dpsims_reference.data.folder import check_folder, format_report
from dpsims_reference.data.pseudo_labels import pseudo_label_folder
from dpsims_reference.datasets import build_dataset
from dpsims_reference.demo import run_demo
from dpsims_reference.diagnosis import diagnose_run
from dpsims_reference.diagnosis_figures import write_diagnosis
from dpsims_reference.evaluation import evaluate, format_figures
from dpsims_reference.figures import plot_curves
from dpsims_reference.logs import read_log
from dpsims_reference.planning import GPUS, comparison_rst, format_plans, plan_runs
from dpsims_reference.sampling import load_generator, sample_to_folder
from dpsims_reference.trainer import Trainer


def pick_device(device: str) -> str:
    """``"auto"`` as ``"cuda"`` where there is a CUDA device, else ``"cpu"``."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def train(options: cli.Train) -> None:
    """Train, or continue."""
    config, folder, checkpoint = options.config, options.out, None
    config = replace(config, data=cli.data_config(config, options.data))
    if options.resume is not None:
        folder = options.resume
        checkpoint = CheckpointStore.read_latest(folder / "checkpoints")
        if checkpoint is None:
            msg = f"train: resume must be a folder with a checkpoint; got none in {folder}"
            raise CheckpointError(msg)
        saved: Config = from_dict(Config, checkpoint.state["config"])
        config = _changed(saved, config, options.allow_change)
    trainer = Trainer(
        config, build_dataset(config.data), folder, device=pick_device(options.device)
    )
    if checkpoint is not None:
        trainer.restore(checkpoint, allow=options.allow_change)
        print(f"continuing {folder} after step {trainer.step}")
    trainer.run(
        save_every=options.save_every,
        picture_every=options.picture_every,
        diagnose_every=options.diagnose_every,
    )
    trainer.store.close()
    plot_curves(folder / "curves.png", read_log(folder / "log.jsonl"))
    print(f"step {trainer.step}: everything is in {folder}")


def _changed(saved: Config, given: Config, allow: tuple[str, ...]) -> Config:
    """The saved configuration, with the named settings taken from the command line."""
    for name in allow:
        _, *path, last = name.split(".")
        source: Any = given
        for part in path:
            source = getattr(source, part)
        value = getattr(source, last)
        if path:
            inner = replace(getattr(saved, path[0]), **{last: value})
            saved = replace(saved, **{path[0]: inner})
        else:
            saved = replace(saved, **{last: value})
    return saved


def sample(options: cli.Sample) -> None:
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


def run_evaluation(options: cli.Evaluate) -> None:
    """Measure a run, print the table, write evaluation.json."""
    trained = load_generator(options.run, device=pick_device(options.device))
    figures = evaluate(trained, num_images=options.num_images, with_lpips=options.lpips)
    print(format_figures(figures))
    path = (options.out or options.run) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


def diagnose(options: cli.Diagnose) -> None:
    """Look inside a run, print the tables, write them and the pictures."""
    found = diagnose_run(
        options.run,
        num_maps=options.num_maps,
        num_noises=options.num_noises,
        device=pick_device(options.device),
    )
    print(found.table())
    out = options.out or options.run
    written = write_diagnosis(out, found, read_log(options.run / "diagnosis.jsonl"))
    print(f"\nwritten to {out}: {', '.join(path.name for path in written)}")


def replay(options: cli.Replay) -> None:
    """Run a crashed step again."""
    print(replay_crash(options.folder, device=pick_device(options.device)))


def plan(options: cli.Plan) -> None:
    """Print what a training run would need."""
    plans = plan_runs(
        options.config,
        GPUS[options.gpu],
        options.gpus,
        options.batch or (options.config.optim.batch_size,),
        utilisation=options.utilisation,
    )
    print(comparison_rst(plans) if options.rst else format_plans(options.preset, plans))


def pseudo_labels(options: cli.PseudoLabels) -> None:
    """Cluster a folder of photographs into classes."""
    out = options.out or options.folder
    pseudo_label_folder(options.folder, out, options.classes, seed=options.seed)
    print(f"labels and overview.png are in {out}; look at overview.png before you train")


def check_data(options: cli.CheckData) -> None:
    """Print what a folder holds and what to put in the configuration."""
    report = check_folder(
        options.folder, num_classes=options.num_classes, ignore_index=options.ignore_index
    )
    print(format_report(report))


def demo(options: cli.Demo) -> None:
    """The demonstration of the README."""
    run_demo(options.out, seed=options.seed, minutes=options.minutes, steps=options.steps)


RUNNERS: dict[type, Callable[[Any], None]] = {
    cli.Train: train,
    cli.Sample: sample,
    cli.Evaluate: run_evaluation,
    cli.Diagnose: diagnose,
    cli.Replay: replay,
    cli.Plan: plan,
    cli.PseudoLabels: pseudo_labels,
    cli.CheckData: check_data,
    cli.Demo: demo,
}
