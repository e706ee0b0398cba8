"""VTAB-1K and few-shot benchmarks with KARST as in its paper: one command each, on all GPUs of the Ray cluster.

    python -m benchmarks.vtab vtab --data ROOT --out DIR [--checkpoint ViT-B_16.npz] [--lr 1e-3 5e-3 ...]
    python -m benchmarks.vtab fewshot --data ROOT --out DIR

One trial runs on one GPU, or on one CPU core without a GPU. The benchmark writes a trial's result to DIR when the trial
ends, and does not repeat a trial with a result. You can stop and restart at any time. A failed trial does not stop the
others. The benchmark lists the failed trials at the end (exit code 1). `vtab_protocol.py` has the trials and the
averages; docs/evaluation.md has the data and the protocol.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console
from rich.table import Table

from adapters import BackboneError, DataError, load_backbone
from adapters.format.atomic_write import write_atomically
from adapters.method.config import PRESETS
from adapters.paper.recipe import Recipe

from .vtab_protocol import (
    FEW_SHOT_SETS,
    GROUPS,
    SHOTS,
    VTAB_TASKS,
    Plan,
    Trial,
    few_shot_summary,
    few_shot_trials,
    run_trial,
    vtab_summary,
    vtab_trials,
)

BACKBONE = "vit_base_patch16_224.augreg_in21k"
PRESET = {"vtab": "karst-vtab", "fewshot": "karst-fewshot"}
SUMMARY = "summary.json"
REPOSITORY = Path(__file__).parent.parent


def main() -> None:
    """Run the missing trials, then print the table of all results."""
    options = _options()
    try:
        failed = run(options)
    except (BackboneError, DataError, OSError, ConnectionError) as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit("\n".join(f"error: {name}: {why}" for name, why in failed.items()))


def run(options: argparse.Namespace) -> dict[str, str]:
    """Run the missing trials, and return the failed ones with their errors.

    Raises:
        BackboneError: as `load_backbone`.
        DataError: no such data root, or results in the output folder that belong to another plan.
        ConnectionError: no Ray cluster at the address.
    """
    if not options.data.is_dir():
        raise DataError(f"{options.data}: no such folder; --data names the one with a folder for each data set")
    plan = _plan(options)
    make = vtab_trials if options.protocol == "vtab" else few_shot_trials
    every = make(options.data.resolve())
    trials = make(options.data.resolve(), options.tasks)
    options.out.mkdir(parents=True, exist_ok=True)
    # The results of earlier calls in the folder are checked, too, before any training.
    done_before = {trial for trial in every if _result(options.out, plan, trial) is not None}
    left = [trial for trial in trials if trial not in done_before]
    print(f"{len(trials)} trials, {len(trials) - len(left)} of them done before")
    done = 0

    def keep(trial: Trial, result: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        _write(options.out / f"{trial.name}.json", result)
        print(f"{done}/{len(left)} {trial.name}: {result['accuracy']:.2%}, chosen {result['chosen']}", flush=True)

    failed = _on_ray(plan, left, options.ray_address, keep) if left else {}
    _summarise(options.out, plan, every)
    return failed


def _on_ray(
    plan: Plan, trials: Sequence[Trial], address: str | None, keep: Callable[[Trial, dict[str, Any]], None]
) -> dict[str, str]:
    """Run trials as Ray has capacity; call `keep` as each ends. Return the failed ones with their errors."""
    local: dict[str, Any] = {} if address else {"include_dashboard": False}
    ray.init(
        address=address or "local",
        log_to_driver=False,
        logging_level="warning",
        runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}},  # workers import `benchmarks`
        **local,
    )
    try:
        one = {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) >= 1 else {"num_cpus": 1}
        task = ray.remote(**one)(_in_worker)
        running = {task.remote(plan, trial): trial for trial in trials}
        failed = {}
        while running:
            (ready,), _ = ray.wait(list(running))
            trial = running.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                failed[trial.name] = f"{type(cause).__name__}: {cause}"
                print(f"failed: {trial.name}", flush=True)
            else:
                keep(trial, result)
        return failed
    finally:
        ray.shutdown()


def _in_worker(plan: Plan, trial: Trial) -> dict[str, Any]:
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    return run_trial(plan, trial, device)


def _plan(options: argparse.Namespace) -> Plan:
    checkpoint = options.checkpoint.resolve() if options.checkpoint is not None else None
    return Plan(
        protocol=options.protocol,
        backbone=options.backbone,
        checkpoint=checkpoint,
        fingerprint=load_backbone(options.backbone, checkpoint).fingerprint,
        config=PRESETS[options.preset or PRESET[options.protocol]],
        recipe=Recipe(),
        lrs=tuple(options.lr),
        epochs=tuple(options.epochs),
    )


def _result(out: Path, plan: Plan, trial: Trial) -> dict[str, Any] | None:
    """Return a trial's result, or None.

    Raises:
        DataError: it belongs to another plan, or is not a result.
    """
    path = out / f"{trial.name}.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        there, _ = found["plan"], found["lists"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no result of this benchmark; remove it, or choose another --out") from error
    wanted = plan.described()
    other = [name for name, value in wanted.items() if there.get(name) != value]
    if trial.source.is_dir() and found["lists"] != trial.digest():
        raise DataError(f"{path} was made with other lists than {trial.source} has now; choose another --out")
    if other:
        raise DataError(
            f"{path} was made with another {other[0]}: {there.get(other[0])}, now {wanted[other[0]]}; "
            "choose another --out"
        )
    return found


def _summarise(out: Path, plan: Plan, trials: Sequence[Trial]) -> None:
    """Print the table of all results in the folder, also of earlier calls, and write the averages."""
    results = {t: found for t in trials if (found := _result(out, plan, t)) is not None}
    if not results:
        return
    if plan.protocol == "vtab":
        summary = vtab_summary({t.data_set: found["accuracy"] for t, found in results.items()})
        table = _vtab_table({t.data_set: found for t, found in results.items()}, summary)
    else:
        keyed = {(t.data_set, t.shots, t.seed): found["accuracy"] for t, found in results.items() if t.shots}
        summary = few_shot_summary(keyed)
        table = _few_shot_table(summary)
    first = next(iter(results.values()))
    shape, images = plan.config, first["preprocess"]
    table.caption = (
        f"KARST N = {shape.kernels}, r = {shape.rank}, re-scaling {shape.rescale}, norms {shape.norms}: "
        f"{first['trained_numbers_without_head']} numbers without the head; {plan.backbone} "
        f"{plan.fingerprint[:12]}; mean {images['mean']}, std {images['std']}; "
        f"timm {', '.join(sorted({found['timm'] for found in results.values()}))}"
    )
    Console().print(table)
    about = {name: first[name] for name in ("plan", "preprocess", "trained_numbers_without_head")}
    versions = sorted({found["timm"] for found in results.values()})
    _write(out / SUMMARY, {"results": len(results), "of": len(trials), **summary, **about, "timm": versions})


def _vtab_table(results: dict[str, dict[str, Any]], summary: dict[str, Any]) -> Table:
    table = Table("task", "accuracy, %", "learning rate", "epochs")
    for group, tasks in GROUPS.items():
        for task in tasks:
            found = results.get(task)
            chosen = (f"{found['chosen']['lr']:g}", str(found["chosen"]["epochs"])) if found else ("", "")
            table.add_row(task, _percent(found["accuracy"] if found else None), *chosen)
        table.add_row(f"mean of {group}", _percent(summary["groups"][group]), end_section=True)
    table.add_row("mean of the three group means", _percent(summary["mean_of_groups"]))
    table.add_row("mean over 19 data sets", _percent(summary["mean_of_tasks"]))
    return table


def _few_shot_table(summary: dict[str, Any]) -> Table:
    table = Table("set (mean over 3 seeds, %)", *(f"{shots}-shot" for shots in SHOTS))
    for name, means in summary["sets"].items():
        table.add_row(name, *(_percent(means[shots]) for shots in SHOTS))
    table.add_section()
    table.add_row("mean of the sets", *(_percent(summary["mean_of_sets"][shots]) for shots in SHOTS))
    return table


def _percent(value: float | None) -> str:
    return "not complete" if value is None else f"{100 * value:.2f}"


def _write(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=1, default=str) + "\n").encode())


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vtab", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="protocol", required=True)
    for protocol, names in (("vtab", VTAB_TASKS), ("fewshot", tuple(FEW_SHOT_SETS))):
        command = commands.add_parser(protocol, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--data", type=Path, required=True, help="folder with a folder for each data set")
        command.add_argument(
            "--out", type=Path, required=True, help="folder for results; what is there is not run again"
        )
        command.add_argument("--backbone", default=BACKBONE, help="timm name or `demo`")
        command.add_argument("--checkpoint", type=Path, help="local weights, such as ViT-B_16.npz")
        command.add_argument("--preset", choices=PRESETS, default=PRESET[protocol], help="N, r and the rest")
        command.add_argument("--lr", type=float, nargs="+", default=[Recipe().lr], help="candidates")
        command.add_argument("--epochs", type=int, nargs="+", default=[Recipe().epochs], help="candidates")
        command.add_argument("--tasks", nargs="+", choices=names, default=[], metavar="T", help="only these data sets")
        command.add_argument("--ray-address", help="a cluster that runs already; else one on this machine")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
