"""The benchmark of peers (benchmarks.peers) on the demo architecture: every contender runs and answers alike."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adapters import load_backbone
from benchmarks import peers

pytestmark = pytest.mark.slow

ROOT = Path(peers.__file__).parents[1]


def run(output: Path, *arguments: str) -> dict[str, Any]:
    """The command with the demo backbone; what it wrote."""
    command = [sys.executable, "-m", "benchmarks.peers", "--backbone", "demo", "--output", str(output)]
    command += ["--rounds", "2", "--images", "6", "--batch", "4", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def check(result: dict[str, Any], sizes: list[int], names: list[str]) -> None:
    assert [row["adapters"] for row in result["rows"]] == sizes
    for row in result["rows"]:
        assert list(row["contenders"]) == names
        for entry in row["contenders"].values():
            assert entry["reason"] is None
            assert entry["largest_difference"] <= peers.TOLERANCE
            assert entry["images_per_s"]["median"] > 0
            assert entry["time_to_ours"]["median"] > 0
            assert set(entry["memory_mb"]) == {"private", "resident"}


@pytest.mark.long
def test_every_contender_but_serve_answers_as_merged_models(tmp_path: Path) -> None:
    names = ["ours", "LoRA", "LoKr", "processes"]
    result = run(tmp_path / "peers.json", "--sizes", "1", "2", "--contenders", *names)
    check(result, [1, 2], names)
    assert result["machine"]["threads"] >= 1
    console = Console(width=200)
    with console.capture() as captured:
        console.print(peers.table(result))
    assert captured.get().count("processes") == 2


@pytest.mark.skipif(
    "PEERS_SERVE" not in os.environ, reason="Ray takes 40 s and more to start and stop; set PEERS_SERVE"
)
def test_serve_keeps_as_many_models_as_fit(tmp_path: Path) -> None:
    result = run(tmp_path / "peers.json", "--sizes", "4", "--contenders", "ours", "Serve", "--memory-gb", "0.015")
    check(result, [4], ["ours", "Serve"])
    assert result["rows"][0]["contenders"]["Serve"]["notes"]["models_kept"] == 3  # of 4.8 MB


def test_what_is_not_ready_in_time_has_nulls_and_a_reason(tmp_path: Path) -> None:
    result = run(tmp_path / "peers.json", "--sizes", "1", "--contenders", "ours", "--setup-limit", "0")
    entry = result["rows"][0]["contenders"]["ours"]
    assert entry["reason"].startswith("not ready after 0 s")
    assert [entry[name] for name in ("images_per_s", "time_to_ours", "memory_mb")] == [None] * 3


@pytest.mark.parametrize("method", ["LoRA", "LoKr"])
def test_a_copied_peft_adapter_has_the_parts_of_an_added_one(method: str) -> None:
    peft = pytest.importorskip("peft")
    model = load_backbone("demo", pretrained=False).clone()
    config = {"LoRA": peft.LoraConfig, "LoKr": peft.LoKrConfig}[method]
    model = peft.get_peft_model(model, config(target_modules=["qkv", "fc1"]), adapter_name="t0")
    layers = [model.get_submodule(f"base_model.model.blocks.0.{name}") for name in ("attn.qkv", "mlp.fc1")]
    for layer in layers:
        peers._copy_adapter(layer, "t1")
    model.add_adapter("t2", config(target_modules=["qkv", "fc1"]))
    shapes = {
        name: {
            key.replace(name, "*"): tensor.shape
            for key, tensor in model.state_dict().items()
            if f".{name}." in f"{key}." and (".0.attn.qkv." in key or ".0.mlp.fc1." in key)
        }
        for name in ("t1", "t2")
    }
    assert shapes["t1"]
    assert shapes["t1"] == shapes["t2"]
    for layer in layers:
        assert layer.scaling["t1"] == layer.scaling["t2"]


def test_one_round_has_no_quartiles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["peers", "--rounds", "1"])
    with pytest.raises(SystemExit):
        peers.main()
    assert "--rounds must be at least 2" in capsys.readouterr().err
