"""Merged export: what is written is loaded again by real timm and real onnxruntime, and computes what the bank does."""

import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import safetensors
import timm
import torch
from typer.testing import CliRunner

import adapters
from adapters import Adapter, AdapterError, Bank, load_backbone
from adapters.backbone import create_model
from adapters.convert import export
from adapters.convert.convert import convert
from hub.cli.main import app
from tests.support.models import random_adapter, random_pixels

LABELS = ["Katze", "собака", 'cat, "big"']


@pytest.fixture(scope="module")
def adapter(backbone: Backbone) -> Adapter:
    """Everything that an adapter can have: kernels, re-scaling of channels, norms."""
    return random_adapter(backbone, classes=3, labels=LABELS, kernels=2, rank=4, rescale="channel", norms=True)


def served(backbone: Backbone, adapter: Adapter, pixels: torch.Tensor) -> torch.Tensor:
    bank = Bank(backbone, slots=1)
    return torch.stack(bank.forward(pixels, [bank.put(adapter)] * len(pixels)))


def close(found, expected: tuple[int, int]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_reference_is_what_the_bank_serves(backbone: Backbone, adapter: Adapter) -> None:
    pixels = random_pixels(backbone, 3)
    with torch.inference_mode():
        close(export.unmerged(adapter, backbone)(pixels), served(backbone, adapter, pixels))


def test_a_timm_checkpoint(backbone: Backbone, adapter: Adapter, tmp_path: Path) -> None:
    adapter.write(tmp_path / "in.safetensors")
    report = convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "timm", backbone)
    assert report["largest_relative_difference"] < 1e-4
    model = create_model("demo", num_classes=3)
    timm.models.load_checkpoint(model, str(tmp_path / "out.safetensors"), strict=True)
    pixels = random_pixels(backbone, 3)
    with torch.inference_mode():
        close(model.eval()(pixels), served(backbone, adapter, pixels))
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["labels"]) == LABELS
    assert json.loads(metadata["preprocess"]) == adapter.preprocess
    assert metadata["adapter"] == adapter.digest


def test_timms_own_create_model_takes_the_checkpoint(tmp_path: Path) -> None:
    """A model of timm's registry, by name, as the docs say; the demo's is none."""
    backbone = load_backbone("test_vit", pretrained=False)
    adapter = random_adapter(backbone, classes=4)
    adapter.write(tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "timm", backbone)
    model = timm.create_model("test_vit", num_classes=4, checkpoint_path=str(tmp_path / "out.safetensors")).eval()
    pixels = random_pixels(backbone, 2)
    with torch.inference_mode():
        close(model(pixels), served(backbone, adapter, pixels))


def test_an_onnx_file(backbone: Backbone, adapter: Adapter, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapter.write(tmp_path / "in.safetensors")
    report = convert(tmp_path / "in.safetensors", tmp_path / "out.onnx", "onnx", backbone)
    assert report["largest_relative_difference"] < 1e-4
    assert capfd.readouterr().out == ""  # `--json` is for scripts
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors", "out.onnx"}  # one file, no data beside it

    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        pixels = random_pixels(backbone, count)
        close(torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0]), served(backbone, adapter, pixels))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"]) == LABELS
    assert json.loads(metadata["preprocess"]) == adapter.preprocess
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


@pytest.mark.parametrize("to", ["timm", "onnx"])
def test_a_merge_that_differs_is_never_written(
    backbone: Backbone, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """The check is a real one: with one merged weight off, nothing is written and what was there stays."""
    merge = Adapter.merge

    def off(self, onto):
        model = merge(self, onto)
        model.blocks[3].mlp.fc1.weight[0] += 1
        return model

    monkeypatch.setattr(Adapter, "merge", off)
    adapter.write(tmp_path / "in.safetensors")
    out = tmp_path / {"timm": "out.safetensors", "onnx": "out.onnx"}[to]
    out.write_text("mine")
    with pytest.raises(AdapterError, match="was not written: its logits differ"):
        convert(tmp_path / "in.safetensors", out, to, backbone)
    assert out.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors", out.name}


def test_an_adapter_of_another_backbone_is_refused(adapter: Adapter, tmp_path: Path) -> None:
    torch.manual_seed(9)
    other = load_backbone("demo", pretrained=False)
    adapter.write(tmp_path / "in.safetensors")
    with pytest.raises(AdapterError, match="fingerprint"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.onnx", "onnx", other)


def test_without_onnx_it_says_what_to_install(
    backbone: Backbone, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    adapter.write(tmp_path / "in.safetensors")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'karst-hub\[onnx\]'"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.onnx", "onnx", backbone)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Path(adapters.__file__).parent / "demo" / "digits.safetensors"
    out = tmp_path / "digits-timm.safetensors"
    run = ["convert", str(demo), "--backbone", "demo", "--out"]
    done = CliRunner().invoke(app, [*run, str(out), "--to", "timm", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["labels"] == 10
    assert out.stat().st_size == json.loads(done.stdout)["bytes"]

    assert CliRunner().invoke(app, [*run, str(out), "--to", "zip"]).exit_code == 2
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = CliRunner().invoke(app, [*run, str(tmp_path / "digits.onnx"), "--to", "onnx"])
    assert (done.exit_code, done.stderr) == (1, "error: ONNX needs onnxruntime: pip install 'karst-hub[onnx]'\n")
