"""Tests of `karst-hub evaluate`: one adapter, several adapters, a table; output and errors."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters import Adapter, KarstConfig, load_backbone
from adapters.evaluation.evaluate import Agreement
from adapters.serving.cpu_operators import has_int8
from hub.cli import evaluate as evaluating
from hub.cli import main as cli
from tests.support.models import png, random_adapter, with_tensors

Call = Callable[..., tuple[int, str, str]]
LABELS = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with two adapters of different factors for the demo backbone, and three image sets."""
    root: Path = tmp_path_factory.mktemp("evaluate")
    backbone = load_backbone("demo")
    random_adapter(backbone, seed=1, labels=LABELS, classes=6, kernels=2, rank=4).write(root / "one.safetensors")
    random_adapter(backbone, seed=2, labels=LABELS, classes=6, kernels=3, rank=2, factor=4).write(
        root / "two.safetensors"
    )
    for folder, labels in {"some": "abc", "all": LABELS, "other": "ax"}.items():
        for i, label in enumerate(labels):
            (root / folder / label).mkdir(parents=True)
            for j in range(2):
                (root / folder / label / f"{j}.png").write_bytes(png(10 * i + j))
    (root / "table.csv").write_text("adapter,data\none.safetensors,all\ntwo.safetensors,some\n")
    return root


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: object) -> tuple[int, str, str]:
        """Run the command, and return exit code, stdout and stderr."""
        monkeypatch.setenv("HUB_BACKBONE", "demo")
        monkeypatch.setattr(sys, "argv", ["karst-hub", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return call


def test_evaluate_reports_one_row_per_adapter(call: Call, root: Path) -> None:
    code, text, _ = call(
        root / "one.safetensors", root / "two.safetensors", "--data", root / "all", "--merged", "--json"
    )
    assert code == 0
    report = json.loads(text)
    assert [Path(row["adapter"]).name for row in report["rows"]] == ["one.safetensors", "two.safetensors"]
    assert {name: report[name] for name in ("backbone", "dtype", "batch_size", "seed")} == {
        "backbone": "demo",
        "dtype": "float32",
        "batch_size": 64,
        "seed": 0,
    }
    for row in report["rows"]:
        assert row["images"] == 12
        assert 0 <= row["top1_interval"][0] <= row["top1"] <= row["top1_interval"][1] <= 1
        assert row["top1"] <= row["top5"]
        assert list(row["per_class"]) == LABELS
        assert row["top1"] == pytest.approx(sum(row["per_class"].values()) / 6)  # two images each
        assert row["merged"]["agrees"]
        assert row["images_per_s"] > 0
    assert report["rows"][0]["nll"] != report["rows"][1]["nll"]


def test_evaluate_takes_an_adapter_that_is_a_head_alone(call: Call, root: Path, tmp_path: Path) -> None:
    adapter = Adapter.read(root / "one.safetensors")
    head = {name: tensor for name, tensor in adapter.tensors.items() if name.startswith("head.")}
    config = KarstConfig(kernels=0, rescale="none")
    alone = Adapter.create(
        head,
        config=config,
        backbone=adapter.backbone,
        fingerprint=adapter.fingerprint,
        labels=adapter.labels,
        preprocess=adapter.preprocess,
    )
    alone.write(tmp_path / "head.safetensors")
    code, text, _ = call(tmp_path / "head.safetensors", "--data", root / "all", "--json")
    assert code == 0
    assert json.loads(text)["rows"][0]["images"] == 12


def test_evaluate_uses_the_images_of_each_row_when_it_reads_a_table(call: Call, root: Path) -> None:
    code, text, _ = call("--table", root / "table.csv", "--json")
    assert code == 0
    rows = json.loads(text)["rows"]
    assert [(row["images"], "merged" in row) for row in rows] == [(12, False), (6, False)]
    assert rows[1]["per_class"]["d"] is None
    code, text, _ = call("--table", root / "table.csv")
    assert code == 0
    lines = text.splitlines()
    assert " ".join(lines[0].split()) == "adapter data images top-1 95 % interval top-5 ECE NLL images/s"
    values = [line.split() for line in lines[1:] if "%" in line]
    assert [row[row.index("-") - 3] for row in values if "-" in row] == [str(r["images"]) for r in rows]
    assert all(f"{row['top1']:.1%}" in line for row, line in zip(rows, [" ".join(v) for v in values], strict=True))


def test_evaluate_prints_each_class_when_there_is_one_adapter(call: Call, root: Path) -> None:
    code, text, _ = call(root / "one.safetensors", "--data", root / "some", "--merged")
    assert code == 0
    assert "no images" in text  # classes d, e and f
    assert "merged logits differ by" in text
    assert "forward passes only" in " ".join(text.split())


def test_evaluate_fails_when_the_merged_model_disagrees(
    call: Call, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No adapter is known to disagree, so the test replaces only the result of the comparison."""
    far = Agreement(largest_difference=0.5, largest_logit=2.0, label_changes=3, tolerance=1e-3)
    monkeypatch.setattr(evaluating, "compare_merged", lambda *_, **_options: far)
    code, text, stderr = call(root / "one.safetensors", "--data", root / "all", "--merged", "--json")
    assert code == 1
    assert json.loads(text)["rows"][0]["merged"]["agrees"] is False
    assert "differ by up to 0.5 (limit 0.001 of the largest logit, 2); 3 of 12 labels change" in stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give adapter files and --data, or --table"),
        (["one.safetensors"], 2, "give adapter files and --data, or --table"),
        (["one.safetensors", "--table", "table.csv"], 2, "omit adapter files and --data"),
        (["one.safetensors", "--data", "other"], 1, "x are not among the task's labels"),
        (["one.safetensors", "--data", "nothing"], 1, "no such folder"),
        (["nothing.safetensors", "--data", "all"], 1, "nothing.safetensors: No such file"),
        (["foreign.safetensors", "--data", "all"], 1, "foreign.safetensors: fingerprint"),
        (
            ["sides.safetensors", "--data", "all"],
            1,
            "sides.safetensors: blocks.0.attn.qkv.karst_c: has sides 4 x 8, expected 8 x 8",
        ),
        (["--table", "nothing.csv"], 1, "nothing.csv: cannot be read"),
        (["--table", "columns.csv"], 1, "no column adapter and no data"),
        (["--table", "empty.csv"], 1, "no rows"),
        (["--table", "short.csv"], 1, "line 3"),
    ],
)
def test_evaluate_names_the_fault_when_its_input_is_invalid(
    call: Call, root: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(root)
    (root / "columns.csv").write_text("file,images\none.safetensors,all\n")
    (root / "empty.csv").write_text("adapter,data\n")
    (root / "short.csv").write_text("adapter,data\none.safetensors,all\none.safetensors\n")
    one = Adapter.read(root / "one.safetensors")
    foreign = with_tensors(one, dict(one.tensors)).replace(one.fingerprint.encode(), b"0" * 64)
    (root / "foreign.safetensors").write_bytes(foreign)
    sides = random_adapter(load_backbone("demo"), labels=LABELS, classes=6, kernels=1, rank=2, rescale="none")
    qkv = {"c": (1, 4, 8), "a": (1, 3, 32, 2)}  # a valid file, but no bank has this factor
    changed = {f"blocks.0.attn.qkv.karst_{part}": torch.ones(size) for part, size in qkv.items()}
    (root / "sides.safetensors").write_bytes(with_tensors(sides, {**sides.tensors, **changed}))
    exit_code, _, stderr = call(*arguments)
    assert exit_code == code
    assert message in stderr
    assert "Traceback" not in stderr


@pytest.mark.skipif(not has_int8(), reason="this CPU has no VNNI")
def test_evaluate_compares_int8_with_float32(call: Call, root: Path) -> None:
    code, text, _ = call(root / "one.safetensors", "--data", root / "all", "--dtype", "int8", "--merged", "--json")
    assert code == 0
    report = json.loads(text)
    assert report["dtype"] == "int8"
    (row,) = report["rows"]
    assert row["merged"]["agrees"]  # merged and float32
    assert 0 <= row["float32"]["same_labels"] <= 1
    assert 0 < row["float32"]["largest_difference"] < 0.1 * row["merged"]["largest_logit"]
    code, text, _ = call(root / "one.safetensors", "--data", root / "all", "--dtype", "int8")
    assert code == 0
    assert "beside float32" in text
    assert f"{row['float32']['same_labels']:.1%}" in text


def test_evaluate_refuses_an_unknown_dtype(call: Call, root: Path) -> None:
    code, _, error = call(root / "one.safetensors", "--data", root / "all", "--dtype", "int3")
    assert code == 2
    assert "HUB_DTYPE" in error
