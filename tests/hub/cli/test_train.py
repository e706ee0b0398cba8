"""Tests of `karst-hub train`: adapter file, report, progress, resumption, and errors before the training starts."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from adapters import Adapter, DataError, KarstConfig, Recipe
from adapters.evaluation.outputs import report_folder
from adapters.evaluation.report import FILES
from adapters.method.config import PRESETS
from hub.cli import train as training
from hub.cli.adapters import adapter_config
from hub.cli.main import app, main
from hub.cli.train import ProgressWatch, progress_bar
from tests.support.models import coloured_noise

COLOURS = {"blue": (40, 40, 220), "red": (220, 40, 40)}
RECIPE = Recipe(epochs=2, warmup_epochs=1, batch_size=4, lr=1e-3)


def write(root: Path, count: int, seed: int) -> Path:
    return coloured_noise(root, COLOURS, count, seed)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    return {
        "data": write(tmp_path / "data", 5, 0),
        "output": tmp_path / "colours.safetensors",
        "backbone": "demo",
        "config": KarstConfig(kernels=1, rank=2),
        "recipe": RECIPE,
    }


def run(job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Train, and return the result, the numbers of the report, and the printed text."""
    printed = io.StringIO()
    result = training.run(Console(file=printed, width=200), **job)
    assert sorted(path.name for path in Path(result["report"]).iterdir()) == sorted(FILES)
    return result, json.loads(Path(result["report"], "report.json").read_text("utf-8")), printed.getvalue()


def test_train_writes_an_adapter_and_its_report(job: dict[str, Any], tmp_path: Path) -> None:
    done, numbers, printed = run(dict(job, test=write(tmp_path / "test", 3, 1), probe=True))
    adapter = Adapter.read(job["output"])
    assert done["file"] == str(job["output"])
    assert done["report"] == str(tmp_path / "colours.report")
    assert done["digest"] == adapter.digest == numbers["digest"]
    assert adapter.labels == ("blue", "red")
    assert (done["train_images"], done["val_images"], done["test_images"]) == (8, 2, 6)
    assert adapter.metrics is not None
    assert adapter.metrics["test_accuracy"] == done["test_accuracy"] == pytest.approx(numbers["accuracy"], abs=1e-4)
    assert adapter.metrics["recipe"] == RECIPE.model_dump()
    assert done["linear_probe_test_accuracy"] > 0.5
    assert numbers["measured_on"] == "test"
    assert (numbers["fingerprint"], numbers["backbone"], numbers["seed"]) == (adapter.fingerprint, "demo", 0)
    assert numbers["config"]["kernels"] == 1
    assert [epoch["epoch"] for epoch in numbers["history"]] == [1, 2]
    best = max(numbers["history"], key=lambda epoch: (epoch["val_accuracy"], epoch["epoch"]))
    assert done["epoch"] == best["epoch"]
    assert done["val_accuracy"] == best["val_accuracy"]
    assert "8 training images, 2 for validation, 6 held out; 2 classes" in printed
    assert "epoch 2: loss " in printed
    assert "images/s" in printed


def test_train_keeps_the_last_epoch_when_there_are_no_validation_images(job: dict[str, Any]) -> None:
    done, numbers, _ = run(dict(job, val_fraction=0))
    assert (done["epoch"], done["train_images"], numbers["measured_on"]) == (2, 10, "train")
    assert "val_accuracy" not in done
    assert "test_accuracy" not in done


def test_train_validates_on_the_images_of_val(job: dict[str, Any], tmp_path: Path) -> None:
    done, numbers, _ = run(dict(job, validation=write(tmp_path / "val", 2, 1)))
    assert (done["train_images"], done["val_images"], numbers["measured_on"]) == (10, 4, "validation")


def test_train_raises_data_error_when_an_image_is_unreadable_unless_skip_bad_is_set(job: dict[str, Any]) -> None:
    (job["data"] / "red" / "9.png").write_bytes(b"text")
    with pytest.raises(
        DataError, match=r"^1 of 11 images cannot be read \(repair them, or leave them out with --skip-bad\):\n .*9.png"
    ):
        run(job)
    assert not job["output"].exists()
    done, numbers, printed = run(dict(job, skip_bad=True))
    assert (done["train_images"], done["val_images"]) == (8, 2)
    assert "warning: 1 of 11 images cannot be read, left out:" in printed
    assert len(numbers["warnings"]) == 1


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_command_refuses_images_when_they_exceed_hub_max_image_pixels(
    command: str, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = Path(__file__).parents[3] / "adapters" / "demo"
    (tmp_path / "digits" / "7").mkdir(parents=True)
    (tmp_path / "digits" / "7" / "a.png").write_bytes(next((demo / "samples" / "digits").iterdir()).read_bytes())
    arguments = {
        "train": ["train", str(job["data"]), "-o", str(job["output"])],
        "evaluate": ["evaluate", str(demo / "digits.safetensors"), "--data", str(tmp_path / "digits")],
    }[command]
    monkeypatch.setenv("HUB_MAX_IMAGE_PIXELS", "10")
    monkeypatch.setenv("HUB_BACKBONE", "demo")
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, DataError)
    assert "pixels, but at most 10 are allowed; reduce the image first" in str(done.exception)


def test_train_raises_data_error_when_test_images_are_training_images(job: dict[str, Any]) -> None:
    with pytest.raises(
        DataError,
        match=r"^10 images are in two splits \(remove one copy, or leave out the earlier split's with --skip-bad\)",
    ):
        run(dict(job, test=job["data"]))


def test_train_uses_all_vtab_images_when_final_is_set(job: dict[str, Any]) -> None:
    lines = [f"{label}/{i}.png {k}" for k, label in enumerate(COLOURS) for i in range(5)]
    lists = {"train800": lines[:3] + lines[5:8], "val200": [lines[3], lines[8]], "test": [lines[4], lines[9]]}
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, part in lists.items():
        (job["data"] / f"{name}.txt").write_text("\n".join(part) + "\n")
    done, _, _ = run(job)
    assert (done["train_images"], done["val_images"], done["test_images"]) == (6, 2, 2)
    done, _, _ = run(dict(job, final=True, overwrite=True))
    assert (done["train_images"], done["test_images"], done["epoch"]) == (8, 2, 2)
    assert "val_images" not in done
    assert Adapter.read(job["output"]).labels == ("0", "1")


def test_train_raises_data_error_when_a_probe_has_no_test_images(job: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"data: no test split, which --probe needs; give test images with --test"):
        run(dict(job, probe=True))


def test_report_folder_raises_data_error_when_the_output_cannot_be_written(tmp_path: Path) -> None:
    assert report_folder(tmp_path / "a.safetensors") == tmp_path / "a.report"
    assert report_folder(tmp_path / "a.b") == tmp_path / "a.b.report"
    with pytest.raises(DataError, match=r"no/a: the folder .*/no does not exist; create it, or change --out$"):
        report_folder(tmp_path / "no" / "a")
    with pytest.raises(DataError, match=r"is a folder; --out must name a file$"):
        report_folder(tmp_path)
    (tmp_path / "a.report").write_text("mine")
    with pytest.raises(DataError, match=r"a.report: is a file, but the report needs a folder of this name"):
        report_folder(tmp_path / "a")


NO_OPTIONS: dict[str, Any] = dict.fromkeys(("kernels", "rank", "factor", "gain", "rescale", "norms"))


@pytest.mark.parametrize("preset", PRESETS)
def test_options_override_the_preset(preset: str) -> None:
    assert adapter_config(preset, None, **NO_OPTIONS) == PRESETS[preset]
    changed = adapter_config(preset, None, **NO_OPTIONS | {"factor": 4, "norms": not PRESETS[preset].norms})
    assert changed == PRESETS[preset].model_copy(update={"factor": 4, "norms": not PRESETS[preset].norms})


def test_adapter_config_has_the_defaults_when_there_is_no_preset() -> None:
    assert adapter_config(None, None, **NO_OPTIONS) == KarstConfig()
    assert adapter_config(None, "2,4", **NO_OPTIONS) == KarstConfig(rank=4, stage_ranks=(2, 4))
    given: dict[str, Any] = {"gain": 0.5, "rescale": "scalar", "kernels": 3}
    assert adapter_config(None, None, **NO_OPTIONS | given) == KarstConfig(**given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset vtab", "--preset vtab: expected one of karst-vtab, karst-fewshot, karst-swin"),
        ("--stage-ranks 2;4", "--stage-ranks 2;4: expected one rank per stage, such as 2,2,4,8"),
        ("--stage-ranks 2,4 --rank 8", "--rank 8: differs from the largest of the stage ranks 2,4"),
        ("--preset karst-swin --rank 4", "--rank 4: differs from the largest of the stage ranks 2,2,4,8"),
        ("--rescale some", "--rescale some: Input should be"),
        ("--gain 0", "--gain 0.0: Input should be greater than 0"),
        ("--final --val x", "--final trains on the validation images; omit --val"),
    ],
)
def test_train_names_the_option_when_its_value_is_invalid(arguments: str, message: str) -> None:
    done = CliRunner().invoke(app, ["train", "/absent", "-o", "x", *arguments.split()])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {message}")


def test_train_records_every_option_of_the_recipe(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "recipe": "paper",
        "kernels": "1",
        "rank": "2",
        "factor": "4",
        "gain": "0.25",
        "rescale": "scalar",
        "epochs": "1",
        "warmup-epochs": "0",
        "batch-size": "5",
        "lr": "0.002",
        "weight-decay": "0.01",
        "drop-path": "0.2",
        "lr-start": "0.5",
        "lr-end": "0.2",
        "seed": "3",
        "val-fraction": "0.4",
    }
    monkeypatch.setenv("HUB_BACKBONE", "demo")
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = CliRunner().invoke(app, ["train", str(job["data"]), "-o", str(job["output"]), "--json", *arguments])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["train_images"] == 6
    adapter = Adapter.read(job["output"])
    assert adapter.config == KarstConfig(kernels=1, rank=2, factor=4, gain=0.25, rescale="scalar")
    expected = {
        "epochs": 1,
        "warmup_epochs": 0,
        "batch_size": 5,
        "lr": 0.002,
        "weight_decay": 0.01,
        "drop_path": 0.2,
        "lr_start": 0.5,
        "lr_end": 0.2,
        "seed": 3,
    }
    assert adapter.metrics is not None
    assert adapter.metrics["recipe"] | expected == adapter.metrics["recipe"]


def arguments(job: dict[str, Any], output: Path) -> list[str]:
    return ["train", str(job["data"]), "-o", str(output), "--recipe", "paper", "--epochs", "40", "--batch-size", "4"]


def command(job: dict[str, Any], output: Path, *options: str) -> subprocess.Popen[str]:
    """Start the command in its own process."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("karst-hub"), *arguments(job, output), *options],
        env=os.environ | {"HUB_BACKBONE": "demo", "HUB_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(process: subprocess.Popen[str], number: signal.Signals, checkpoint: Path) -> str:
    """Send a signal once an epoch has ended, that is when the checkpoint is written; return stderr."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate()[1]


@pytest.mark.slow
def test_training_resumes_with_the_same_bits_when_it_receives_ctrl_c_and_then_a_kill(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut, checkpoint = (tmp_path / name for name in ("whole.safetensors", "cut.safetensors", "cut.checkpoint"))
    interrupted = command(job, cut)
    printed = stop(interrupted, signal.SIGINT, checkpoint)
    assert interrupted.returncode == 130
    assert "interrupted; continue with --resume" in printed

    killed = command(job, cut, "--resume")
    assert "--resume" not in stop(killed, signal.SIGKILL, checkpoint)
    assert killed.returncode == -9
    assert not cut.exists()

    monkeypatch.setenv("HUB_BACKBONE", "demo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes; otherwise another order of summation would change the bits
    try:
        refused = CliRunner().invoke(app, arguments(job, cut))
        assert isinstance(refused.exception, DataError)
        message = "cut.checkpoint: checkpoint of an interrupted training; continue with --resume, or delete the file"
        assert message in str(refused.exception)
        for output, options in ((cut, ["--resume"]), (whole, [])):
            done = CliRunner().invoke(app, [*arguments(job, output), *options])
            assert done.exit_code == 0, done.stderr
    finally:
        torch.set_num_threads(threads)
    ours, theirs = (Adapter.read(path).tensors for path in (cut, whole))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert not list(tmp_path.glob("*.checkpoint"))


def test_progress_watch_raises_keyboard_interrupt_when_python_dropped_the_first_one() -> None:
    console = Console(quiet=True)
    bar = ProgressWatch(console, progress_bar(console), RECIPE)
    bar.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        bar.step(1, 0.5, 0.5)


@pytest.mark.slow
def test_train_writes_one_adapter_when_two_devices_share_each_batch(job: dict[str, Any], tmp_path: Path) -> None:
    """Two processes on the CPU share each batch; only the first prints and writes."""
    output = tmp_path / "shared.safetensors"
    options = ["--devices", "2", "--epochs", "12", "--warmup-epochs", "1", "--lr", "0.01", "--json"]
    process = command(job, output, *options)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads(printed)["digest"] == Adapter.read(output).digest
    assert json.loads(printed)["train_accuracy"] > 0.7  # chance is 0.5
    assert "Traceback" not in errors


def test_train_prints_one_line_when_the_config_does_not_suit_the_backbone(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HUB_BACKBONE", "demo")
    options = [*arguments(job, tmp_path / "x.safetensors"), "--sites", "layers.*"]
    monkeypatch.setattr(sys, "argv", ["karst-hub", *options])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: sites is layers.*, which matches no layer; layers are named like blocks.0.attn.qkv"
    )


def test_train_writes_the_adapter_when_a_cluster_sets_rank(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable RANK of a cluster has no meaning for a training on one device."""
    monkeypatch.setenv("HUB_BACKBONE", "demo")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    output = tmp_path / "own.safetensors"
    options = [*arguments(job, output), "--epochs", "1", "--warmup-epochs", "0", "--json"]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == Adapter.read(output).digest


def test_train_reads_images_when_a_file_name_is_not_utf_8(job: dict[str, Any]) -> None:
    for path in list((job["data"] / "red").iterdir()):
        os.rename(os.fsencode(path), os.fsencode(path.parent) + b"/\xe9" + os.fsencode(path.name))
    tiny_lr = RECIPE.model_copy(update={"lr": 1e-12})  # no learning: the report then has to list wrong images
    run(dict(job, recipe=tiny_lr))
