"""Import and export of peft folders: equal logits in peft and in this project, on a timm model."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft.tuners.lokr.layer import factorization

from adapters import Adapter, AdapterError, Backbone, Bank, load_backbone
from adapters.backbone import create_model
from adapters.convert.convert import convert
from adapters.convert.importing import read_labels
from adapters.convert.peft_export import peft_side
from adapters.method import kronecker
from tests.support.models import random_adapter, random_pixels, with_metadata

UNFUSED = ["attn.proj", "mlp.fc1", "mlp.fc2"]
CLASSES = 3


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("cat\n\ndog\nowl\n")
    return path


def timm_model(backbone: Backbone) -> Any:
    """Return a new model with the backbone's weights and a random head."""
    torch.manual_seed(1)
    model = create_model("demo", num_classes=CLASSES)
    model.load_state_dict(backbone.model.state_dict(), strict=False)
    return model.eval()


def lokr(backbone: Backbone, folder: Path, **options: Any) -> Any:
    """Save a random LoKr with peft, and return its model."""
    arguments: dict[str, Any] = {"r": 4, "alpha": 6, "target_modules": UNFUSED, "modules_to_save": ["head"], **options}
    model: Any = peft.get_peft_model(timm_model(backbone), peft.LoKrConfig(**arguments)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lokr_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


def assert_logits(model: Any, adapter_file: Path, backbone: Backbone) -> None:
    pixels = random_pixels(backbone, 3)
    with torch.no_grad():
        expected, found = model(pixels), Adapter.read(adapter_file).merge(backbone)(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def assert_weights(model: Any, adapter_file: Path, backbone: Backbone, layers: list[str]) -> None:
    """Compare dW layer by layer, since logits may hide an error in one layer."""
    adapter = Adapter.read(adapter_file)
    found = adapter.layers
    modules = dict(model.base_model.model.named_modules())
    for layer in layers:
        c, a, b = (found[layer][part].double() for part in ("karst_c", "karst_a", "karst_b"))
        dw = kronecker.delta(c, a, b, adapter.config.effective_gain)
        expected = modules[layer].get_delta_weight("default").double()
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(dw, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"decompose_factor": 8},
        {"decompose_factor": 8, "decompose_both": True, "r": 2},
        {"decompose_factor": 8, "r": 40},  # w2 whole
        {"decompose_factor": -1},
        {
            "decompose_factor": 4,
            "rank_pattern": {"mlp.fc1": 2, r"blocks\.0\.attn\.proj": 3},
            "alpha_pattern": {"fc2": 9},
        },
    ],
    ids=["plain", "decompose_both", "w2 whole", "square root", "patterns"],
)
def test_import_of_a_lokr_is_exact(backbone: Backbone, tmp_path: Path, labels: Path, options: dict[str, Any]) -> None:
    model = lokr(backbone, tmp_path / "lokr", **options)
    report = convert(tmp_path / "lokr", tmp_path / "out.safetensors", "karst", backbone, labels=labels)
    assert report["source"] == "peft LoKr folder"
    assert report["config"]["kernels"] == 1
    assert Adapter.read(tmp_path / "out.safetensors").labels == ("cat", "dog", "owl")
    assert_weights(
        model, tmp_path / "out.safetensors", backbone, [f"blocks.{i}.{name}" for i in (0, 5) for name in UNFUSED]
    )
    assert_logits(model, tmp_path / "out.safetensors", backbone)


@pytest.mark.parametrize(("factor", "kernels"), [(8, 9), (6, 3), (12, 3), (-1, 9), (1, 9)])
@pytest.mark.parametrize("rank", [3, 100])
def test_import_of_a_fused_qkv_is_exact(
    backbone: Backbone, tmp_path: Path, labels: Path, factor: int, kernels: int, rank: int
) -> None:
    model = lokr(backbone, tmp_path / "lokr", target_modules=["attn.qkv", "mlp.fc1"], decompose_factor=factor, r=rank)
    report = convert(tmp_path / "lokr", tmp_path / "out.safetensors", "karst", backbone, labels=labels)
    assert report["config"]["kernels"] == kernels
    assert_weights(model, tmp_path / "out.safetensors", backbone, ["blocks.1.attn.qkv", "blocks.1.mlp.fc1"])
    assert_logits(model, tmp_path / "out.safetensors", backbone)


def test_the_report_names_the_settings_that_a_hub_needs(backbone: Backbone, tmp_path: Path, labels: Path) -> None:
    lokr(backbone, tmp_path / "good", target_modules=["attn.qkv"], decompose_factor=8)
    report = convert(tmp_path / "good", tmp_path / "good.safetensors", "karst", backbone, labels=labels)
    assert "HUB_MAX_KERNELS of at least 9 and HUB_MAX_RANK of at least 4" in report["serving"]
    good, pixels = Adapter.read(tmp_path / "good.safetensors"), random_pixels(backbone, 2)
    with pytest.raises(AdapterError, match="has 9 kernels, but at most 8 fit"):
        Bank(backbone, slots=1, max_kernels=8, max_rank=4).put(good)
    bank = Bank(backbone, slots=1, max_kernels=9, max_rank=4)
    served = torch.stack(bank.forward(pixels, [bank.put(good)] * 2))
    torch.testing.assert_close(served, good.merge(backbone)(pixels), rtol=1e-4, atol=1e-4)
    lokr(backbone, tmp_path / "odd", decompose_factor=4)
    report = convert(tmp_path / "odd", tmp_path / "odd.safetensors", "karst", backbone, labels=labels)
    assert report["serving"].startswith("no hub can serve it (blocks.0.attn.proj.karst_c: has sides 4 x 4")


def test_import_keeps_tuned_norms(backbone: Backbone, tmp_path: Path, labels: Path) -> None:
    options: dict[str, Any] = {"r": 4, "alpha": 4, "target_modules": UNFUSED, "decompose_factor": 8}
    model: Any = peft.get_peft_model(
        timm_model(backbone), peft.LoKrConfig(**options, modules_to_save=["head", "blocks.1.norm1"])
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lokr_" in name or ("norm1" in name and "modules_to_save" in name):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "lokr")
    convert(tmp_path / "lokr", tmp_path / "out.safetensors", "karst", backbone, labels=labels)
    adapter = Adapter.read(tmp_path / "out.safetensors")
    assert [n for n in adapter.layers if "norm" in n] == ["blocks.1.norm1"]
    assert_logits(model, tmp_path / "out.safetensors", backbone)


def test_import_takes_the_head_from_a_file(backbone: Backbone, tmp_path: Path, labels: Path) -> None:
    model = lokr(backbone, tmp_path / "lokr", decompose_factor=8, modules_to_save=None)
    with pytest.raises(AdapterError, match="no classifier"):
        convert(tmp_path / "lokr", tmp_path / "out.safetensors", "karst", backbone, labels=labels)
    head = model.base_model.model.head
    safetensors.torch.save_file({"weight": head.weight.data, "bias": head.bias.data}, tmp_path / "head.safetensors")
    convert(
        tmp_path / "lokr",
        tmp_path / "out.safetensors",
        "karst",
        backbone,
        labels=labels,
        head=tmp_path / "head.safetensors",
    )
    assert_logits(model, tmp_path / "out.safetensors", backbone)


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA'"),
        ({"use_rslora": True}, "use_rslora: is set"),
        ({"alpha": "8"}, "alpha: is '8'; expected a number"),
        ({"r": 0}, "r: is 0; expected a whole number of at least 1"),
        ({"rank_pattern": {"fc(": 3}}, r"rank_pattern: 'fc\(' is not a regular expression"),
    ],
)
def test_import_refuses_an_unsupported_config(
    backbone: Backbone, tmp_path: Path, labels: Path, changes: dict[str, Any], message: str
) -> None:
    lokr(backbone, tmp_path / "lokr", decompose_factor=8)
    edited(tmp_path / "lokr", **changes)
    with pytest.raises(AdapterError, match=message):
        convert(tmp_path / "lokr", tmp_path / "out.safetensors", "karst", backbone, labels=labels)
    assert not (tmp_path / "out.safetensors").exists()


def test_import_names_a_layer_that_karst_does_not_adapt(backbone: Backbone, tmp_path: Path, labels: Path) -> None:
    lokr(backbone, tmp_path / "lokr", target_modules=["mlp.fc1", "patch_embed.proj"], decompose_factor=8)
    with pytest.raises(AdapterError, match=r"patch_embed\.proj\.lokr_\w+: KARST adapts no layer 'patch_embed\.proj'"):
        convert(tmp_path / "lokr", tmp_path / "out.safetensors", "karst", backbone, labels=labels)


def test_import_names_tensors_that_do_not_fit(backbone: Backbone, tmp_path: Path, labels: Path) -> None:
    lokr(backbone, tmp_path / "lokr", decompose_factor=8)
    path = tmp_path / "lokr" / "adapter_model.safetensors"
    state = safetensors.torch.load_file(path)
    name = "base_model.model.blocks.2.mlp.fc1"
    del state[f"{name}.lokr_w1"]
    state["base_model.model.blocks.3.mlp.fc1.lokr_w1"] = torch.ones(3, 3)
    state["base_model.model.blocks.4.mlp.fc1.lokr_t2"] = torch.ones(4, 4, 3, 3)
    safetensors.torch.save_file(state, path)
    with pytest.raises(AdapterError) as caught:
        convert(tmp_path / "lokr", tmp_path / "out.safetensors", "karst", backbone, labels=labels)
    where = {problem.where: problem.message for problem in caught.value.problems}
    assert set(where) == {
        "blocks.2.mlp.fc1.lokr_w1",
        "blocks.3.mlp.fc1.lokr_w1",
        "blocks.4.mlp.fc1.lokr_t2",
    }


def exportable(backbone: Backbone, rank: int = 4, **config: Any) -> Adapter:
    """Return an adapter with one kernel, without re-scaling and fused layers."""
    adapter = random_adapter(backbone, classes=CLASSES, kernels=1, rank=rank, rescale="none", **config)
    return Adapter.create(
        {name: tensor for name, tensor in adapter.tensors.items() if ".qkv." not in name},
        config=adapter.config,
        backbone=adapter.backbone,
        fingerprint=adapter.fingerprint,
        labels=adapter.labels,
        preprocess=adapter.preprocess,
    )


def loaded_by_peft(backbone: Backbone, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(timm_model(backbone), folder).eval()


# Rank 9 leaves the w2 of fc1 and fc2 in two parts (32 / 2 < 64 / 2), and makes that of proj (16 x 16) whole.
@pytest.mark.parametrize(("rank", "factor"), [(4, 8), (9, 8), (40, 8), (4, 4)])
def test_export_to_a_lokr_round_trips_through_peft(backbone: Backbone, tmp_path: Path, rank: int, factor: int) -> None:
    adapter = exportable(backbone, rank, factor=factor)
    adapter.write(tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "lokr", "lokr", backbone)
    assert_logits(loaded_by_peft(backbone, tmp_path / "lokr"), tmp_path / "in.safetensors", backbone)

    convert(tmp_path / "lokr", tmp_path / "again.safetensors", "karst", backbone)
    again = Adapter.read(tmp_path / "again.safetensors")
    assert again.labels == adapter.labels
    assert again.config.factor == factor
    pixels = random_pixels(backbone, 2)
    torch.testing.assert_close(again.merge(backbone)(pixels), adapter.merge(backbone)(pixels), rtol=1e-5, atol=1e-5)
    if rank == 4:  # w2 stays in two parts, so the numbers are equal
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in adapter.tensors.items())


def test_export_keeps_different_ranks(backbone: Backbone, tmp_path: Path) -> None:
    adapter = exportable(backbone)
    tensors = dict(adapter.tensors)
    for name in ("blocks.1.mlp.fc1", "blocks.3.mlp.fc1"):
        tensors[f"{name}.karst_a"] = tensors[f"{name}.karst_a"][..., :2].contiguous()
        tensors[f"{name}.karst_b"] = tensors[f"{name}.karst_b"][:, :2].contiguous()
    fields = {name: getattr(adapter, name) for name in ("config", "backbone", "fingerprint", "labels", "preprocess")}
    Adapter.create(tensors, **fields).write(tmp_path / "in.safetensors")
    for to in ("lokr", "lora"):
        convert(tmp_path / "in.safetensors", tmp_path / to, to, backbone)
        assert_logits(loaded_by_peft(backbone, tmp_path / to), tmp_path / "in.safetensors", backbone)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kernels": 2, "rescale": "none"}, "has 2 kernels, but a LoKr has one"),
        ({"kernels": 1, "rescale": "none"}, "blocks.0.attn.qkv.karst_a: has 3 splits"),
        ({"kernels": 1, "rescale": "scalar"}, "blocks.0.attn.proj.in_scale: re-scales the layer's input"),
        ({"kernels": 1, "rescale": "none", "norms": True}, "norm_weight: tunes a norm layer"),
    ],
)
def test_export_to_a_lokr_refuses_an_adapter_that_is_none(
    backbone: Backbone, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    random_adapter(backbone, rank=4, **config).write(tmp_path / "in.safetensors")
    with pytest.raises(AdapterError) as caught:
        convert(tmp_path / "in.safetensors", tmp_path / "lokr", "lokr", backbone)
    assert any(message in f"{p.where}: {p.message}" for p in caught.value.problems)
    assert list(tmp_path.iterdir()) == [tmp_path / "in.safetensors"]


@pytest.mark.parametrize(("kernels", "rank", "exact"), [(1, 4, 32), (2, 4, 64), (3, 8, 128)])
def test_export_to_a_lora_is_exact_at_the_documented_rank(
    backbone: Backbone, tmp_path: Path, kernels: int, rank: int, exact: int
) -> None:
    """N q r, or the smaller side of the layer (128), if that is less; the fused qkv is no exception."""
    random_adapter(backbone, classes=CLASSES, kernels=kernels, rank=rank, rescale="none").write(
        tmp_path / "in.safetensors"
    )
    report = convert(tmp_path / "in.safetensors", tmp_path / "lora", "lora", backbone)
    assert (report["rank"], report["exact"]) == (exact, True)
    assert report["largest_error"] < 1e-6
    assert f"rank {exact}, exact" in (tmp_path / "lora" / "README.md").read_text()
    assert_logits(loaded_by_peft(backbone, tmp_path / "lora"), tmp_path / "in.safetensors", backbone)


def test_export_to_a_lora_reports_its_error_when_it_is_cut(backbone: Backbone, tmp_path: Path) -> None:
    adapter = random_adapter(backbone, classes=CLASSES, kernels=2, rank=4, rescale="none")
    adapter.write(tmp_path / "in.safetensors")
    report = convert(tmp_path / "in.safetensors", tmp_path / "lora", "lora", backbone, rank=8)
    assert (report["rank"], report["exact"]) == (8, False)

    model = loaded_by_peft(backbone, tmp_path / "lora").base_model.model
    lost, whole, errors = 0.0, 0.0, {}
    for name, parts in adapter.layers.items():
        c, a, b = (parts[p].double() for p in ("karst_c", "karst_a", "karst_b"))
        dw = kronecker.delta(c, a, b, 1 / 4)
        kept = dict(model.named_modules())[name].get_delta_weight("default").double()
        least = torch.linalg.svdvals(dw)[8:].norm()  # Eckart and Young: no matrix of rank 8 is closer
        torch.testing.assert_close((dw - kept).norm(), least, rtol=1e-4, atol=0)
        errors[name] = float(least / dw.norm())
        lost, whole = lost + float(least**2), whole + float(dw.norm() ** 2)
    assert report["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert report["largest_error"] == pytest.approx(max(errors.values()), rel=1e-4)
    assert report["largest_error_layer"] == max(errors, key=lambda name: errors[name])
    assert f"{report['error']:.2e}" in (tmp_path / "lora" / "README.md").read_text()


def test_export_to_a_lora_refuses_re_scaling(backbone: Backbone, tmp_path: Path) -> None:
    random_adapter(backbone, rescale="channel").write(tmp_path / "in.safetensors")
    with pytest.raises(
        AdapterError,
        match=r"re-scales the whole layer, frozen weights included \(like 11 other tensors\), which a LoRA cannot",
    ):
        convert(tmp_path / "in.safetensors", tmp_path / "lora", "lora", backbone)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("karst", {}, "is a karst/1 file already"),
        ("timm", {"rank": 3}, "--rank: applies to --to lora only"),
        ("lora", {"multiplier": 2.0}, "--multiplier: applies to official checkpoints"),
        ("timm", {"labels": Path("labels.txt")}, "--labels: does not apply"),
        ("lora", {"rank": 0}, "--rank: is 0, expected at least 1"),
        ("timm", {}, "out must end in .safetensors"),
        ("zip", {}, "--to: is 'zip'"),
    ],
)
def test_convert_refuses_options_that_do_not_apply(
    backbone: Backbone, tmp_path: Path, to: str, options: dict[str, Any], message: str
) -> None:
    exportable(backbone).write(tmp_path / "in.safetensors")
    with pytest.raises(AdapterError, match=message):
        convert(tmp_path / "in.safetensors", tmp_path / "out", to, backbone, **options)


def test_convert_keeps_an_existing_folder(backbone: Backbone, tmp_path: Path) -> None:
    exportable(backbone).write(tmp_path / "in.safetensors")
    (tmp_path / "mine").mkdir()
    with pytest.raises(AdapterError, match="mine exists"):
        convert(tmp_path / "in.safetensors", tmp_path / "mine", "lokr", backbone)
    assert list((tmp_path / "mine").iterdir()) == []


def test_peft_side_equals_peft_s_factorization() -> None:
    chosen = random.Random(0)
    for _ in range(500):
        dim, factor = chosen.randint(1, 400), chosen.choice([-1, chosen.randint(1, 60)])
        assert peft_side(dim, factor) == factorization(dim, factor)[0], (dim, factor)


def test_import_refuses_a_rank_that_differs_from_the_config(backbone: Backbone, tmp_path: Path, labels: Path) -> None:
    """dW is scaled by alpha / r, so another r gives another dW."""
    lokr(backbone, tmp_path / "lokr")
    path = tmp_path / "lokr" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    with pytest.raises(AdapterError, match=r"lokr_w2_b: has 4 rows, but adapter_config.json says r = 8"):
        convert(tmp_path / "lokr", tmp_path / "out.safetensors", "karst", backbone, labels=labels)


def test_preprocess_round_trips_through_a_peft_folder(backbone: Backbone, tmp_path: Path) -> None:
    adapter = random_adapter(backbone, kernels=1, rank=4, rescale="none", sites=("*.attn.proj", "*.mlp.*"))
    squashed = adapter.preprocess | {"crop_mode": "squash", "mean": [0.4, 0.5, 0.6]}
    (tmp_path / "own.safetensors").write_bytes(with_metadata(adapter, preprocess=json.dumps(squashed)))
    convert(tmp_path / "own.safetensors", tmp_path / "lokr", "lokr", backbone)
    report = convert(tmp_path / "lokr", tmp_path / "back.safetensors", "karst", backbone)
    assert report["preprocess"] == Adapter.read(tmp_path / "back.safetensors").preprocess == squashed
    other = tmp_path / "other.json"
    other.write_text(json.dumps(adapter.preprocess))
    convert(tmp_path / "lokr", tmp_path / "again.safetensors", "karst", backbone, preprocess=other)
    assert Adapter.read(tmp_path / "again.safetensors").preprocess == adapter.preprocess
    other.write_text("[]")
    with pytest.raises(AdapterError, match=r"other.json: must be a JSON object"):
        convert(tmp_path / "lokr", tmp_path / "again.safetensors", "karst", backbone, preprocess=other)


def test_read_labels_accepts_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")
    assert read_labels(tmp_path / "labels.txt") == ["cat", "dog"]


@pytest.mark.parametrize(("to", "name"), [("timm", "own.safetensors"), ("onnx", "own.safetensors")])
def test_convert_refuses_to_overwrite_its_source(backbone: Backbone, tmp_path: Path, to: str, name: str) -> None:
    random_adapter(backbone, kernels=1, rank=2).write(tmp_path / "own.safetensors")
    with pytest.raises(AdapterError, match=r"--out: .*own.safetensors is an input file"):
        convert(tmp_path / "own.safetensors", tmp_path / name, to, backbone)


# Folders of peft before 0.14, which stored alpha and did not use it. `peft_0_13/make.py` wrote them with that peft.

OLD = Path(__file__).parent / "peft_0_13"


@pytest.fixture(scope="module")
def demo() -> Backbone:
    """Return the demo backbone with its own weights, as in `peft_0_13`."""
    return load_backbone("demo")


def copied(folder: Path, **changes: Any) -> Path:
    """Copy the folder of peft 0.13, with changes of its config; None removes a field."""
    shutil.copytree(OLD / "lokr", folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def assert_old_logits(demo: Backbone, adapter_file: Path, equal: bool = True) -> None:
    expected = safetensors.torch.load_file(OLD / "expected.safetensors")
    with torch.no_grad():
        found = Adapter.read(adapter_file).merge(demo)(expected["pixels"].float())
    assert torch.allclose(found, expected["logits"], rtol=1e-4, atol=1e-4) is equal


def test_import_does_not_scale_a_lokr_when_peft_before_0_14_wrote_it(
    demo: Backbone, tmp_path: Path, labels: Path
) -> None:
    report = convert(OLD / "lokr", tmp_path / "out.safetensors", "karst", demo, labels=labels)
    assert report["notes"] == ["peft before 0.14 wrote the folder: dW is not multiplied by alpha / r, as in that peft"]
    assert_old_logits(demo, tmp_path / "out.safetensors")


def test_import_scales_a_lokr_when_its_config_says_so(demo: Backbone, tmp_path: Path, labels: Path) -> None:
    folder = copied(tmp_path / "new", rank_dropout_scale=False)
    report = convert(folder, tmp_path / "out.safetensors", "karst", demo, labels=labels)
    assert "notes" not in report
    assert_old_logits(demo, tmp_path / "out.safetensors", equal=False)
    assert_logits(loaded_by_peft(demo, folder), tmp_path / "out.safetensors", demo)


def test_import_refuses_a_lokr_when_its_config_does_not_show_the_scale(
    demo: Backbone, tmp_path: Path, labels: Path
) -> None:
    folder = copied(tmp_path / "unknown", auto_mapping=None, revision=None)
    with pytest.raises(
        AdapterError, match=r"alpha: is 16 for .* r = 4, and .* add \"rank_dropout_scale\": false if dW"
    ):
        convert(folder, tmp_path / "out.safetensors", "karst", demo, labels=labels)
    shutil.rmtree(folder)
    copied(folder, auto_mapping=None, alpha=4, alpha_pattern={"blocks.0.attn.proj": 40})
    convert(folder, tmp_path / "out.safetensors", "karst", demo, labels=labels)
    assert_old_logits(demo, tmp_path / "out.safetensors")


def test_import_scales_an_older_export_of_this_project(backbone: Backbone, tmp_path: Path) -> None:
    """Its config had no rank_dropout_scale, like those of peft before 0.14."""
    adapter = exportable(backbone)
    adapter.write(tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "lokr", "lokr", backbone)
    path = tmp_path / "lokr" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["alpha"] != config["r"]
    assert config.pop("rank_dropout_scale") is False
    path.write_text(json.dumps(config))
    convert(tmp_path / "lokr", tmp_path / "again.safetensors", "karst", backbone)
    again = Adapter.read(tmp_path / "again.safetensors")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    assert again.config.effective_gain == adapter.config.effective_gain


def test_import_reads_pickled_weights_of_a_peft_folder(demo: Backbone, tmp_path: Path, labels: Path) -> None:
    folder = copied(tmp_path / "bin")
    state = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapter_model.bin")
    convert(folder, tmp_path / "out.safetensors", "karst", demo, labels=labels)
    assert_old_logits(demo, tmp_path / "out.safetensors")
    torch.save(torch.nn.Linear(1, 1), folder / "adapter_model.bin")
    with pytest.raises(
        AdapterError, match=r"holds torch.nn.modules.linear.Linear, a Python object .*; save the state d"
    ):
        convert(folder, tmp_path / "other.safetensors", "karst", demo, labels=labels)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks.0.attn.proj.lora_A.weight", torch.ones(4, 128), "is neither a weight of backbone 'demo' nor a known"),
        (
            "head.fc1.weight",
            torch.ones(9, 128),
            "is neither a weight of backbone 'demo' nor a known part of an adapter",
        ),
        ("blocks.1.mlp.fc1.lokr_w1", torch.full((8, 8), float("nan")), "has NaN or infinite numbers"),
        ("head.bias", torch.full((3,), float("inf")), "has NaN or infinite numbers, so the training diverged"),
    ],
)
def test_import_names_a_tensor_that_it_would_drop_or_that_has_nan(
    demo: Backbone, tmp_path: Path, labels: Path, name: str, value: torch.Tensor, message: str
) -> None:
    folder = copied(tmp_path / "lokr")
    path = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path) | {f"base_model.model.{name}": value}, path)
    with pytest.raises(AdapterError) as caught:
        convert(folder, tmp_path / "out.safetensors", "karst", demo, labels=labels)
    assert any(p.where.endswith(name) and message in p.message for p in caught.value.problems), caught.value.problems
