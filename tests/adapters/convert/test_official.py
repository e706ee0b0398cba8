"""Import of official-style checkpoints, against a repaired forward pass with the official code's names."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from adapters import Adapter, AdapterError, Backbone, Site, load_backbone
from adapters.convert.convert import convert
from tests.support.models import random_pixels

State = dict[str, torch.Tensor]
CLASSES = 3
# Names of the layers in the official code; the Swin script has another name for fc2.
NAMES = {"attn.qkv": "attn.attention", "attn.proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
ST = {"attn.proj": ("attn.st_proj", "attn.st_x"), "mlp.fc2": ("mlp.st_h", None)}


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A Swin of two stages, small enough for a test, from a folder as timm saves it."""
    torch.manual_seed(3)
    model: Any = timm.models.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4), num_classes=7
    )
    model.pretrained_cfg = {
        "architecture": "swin_tiny_patch4_window7_224",
        "input_size": (3, 32, 32),
        "num_classes": 7,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "classifier": "head.fc",
        "first_conv": "patch_embed.proj",
    }
    args = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
    folder = tmp_path_factory.mktemp("swin")
    timm.models.save_for_hf(model, str(folder), model_args=args, safe_serialization=True)
    return load_backbone(f"local-dir:{folder}")


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.json"
    path.write_text('["cat", "dog", "owl"]')
    return path


def role(site: Site) -> str:
    return ".".join(site.name.split(".")[-2:])


def official(
    backbone: Backbone,
    *,
    kernels: int = 2,
    rank: int = 4,
    suffix: str = "ka",
    fc2_suffix: str | None = None,
    shared: bool = False,
    head: str = "head",
    rank_of: Callable[[Site], int] | None = None,
) -> State:
    """Return a random state dict, as a repaired run of the official code saves it."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    state = {f"{head}.weight": random(CLASSES, backbone.width), f"{head}.bias": random(CLASSES)}
    for site in backbone.sites:
        block = site.name.removesuffix(role(site))
        key = f"{block}{NAMES[role(site)]}_{(fc2_suffix or suffix) if role(site) == 'mlp.fc2' else suffix}"
        r = rank_of(site) if rank_of else rank
        a, b = site.d_out // site.splits // 8, site.d_in // 8
        if shared:
            state[f"{key}.w1_group_1"] = random(8, 8)
        for g in range(kernels):
            if not shared:
                state[f"{key}.w1_group.{g}"] = random(8, 8)
            for j in (".0", ".1", ".2") if site.splits == 3 else ("",):
                state[f"{key}.w2_group_a.{g}{j}"] = random(r, a)
            state[f"{key}.w2_group_b.{g}"] = random(b, r)
        for st in filter(None, ST.get(role(site), ())):
            state[f"{block}{st}_s"], state[f"{block}{st}_b"] = 1 + random(1), random(1)
    return state


def delta(state: State, key: str, multiplier: float) -> torch.Tensor:
    """Return dW from the official names, kernel by kernel with numpy's kron."""
    total: Any = 0
    g = 0
    while f"{key}.w2_group_b.{g}" in state:
        w1 = state[f"{key}.w1_group.{g}"] if f"{key}.w1_group.{g}" in state else state[f"{key}.w1_group_1"]
        w2_b = state[f"{key}.w2_group_b.{g}"]
        names = [f"{key}.w2_group_a.{g}.{j}" for j in range(3)]
        names = names if names[0] in state else [f"{key}.w2_group_a.{g}"]
        scale = multiplier * float(state.get(f"{key}.alpha", 1.0)) / w2_b.shape[1]
        parts = [np.kron(w1.double().numpy(), (state[n].T @ w2_b.T).double().numpy()) * scale for n in names]
        total = total + np.concatenate(parts) * multiplier
        g += 1
    return torch.from_numpy(total).float()


def repaired_forward(
    backbone: Backbone,
    state: State,
    pixels: torch.Tensor,
    *,
    multiplier: float = 1.0,
    norms: Sequence[str] = (),
    head: str = "head",
) -> torch.Tensor:
    """Return the logits of an official state dict, with no code of this project except the frozen backbone."""
    model = backbone.clone()
    for name in norms:
        norm = model.get_submodule(name)
        norm.weight, norm.bias = (torch.nn.Parameter(state[f"{name}.{part}"]) for part in ("weight", "bias"))

    def hook(site: Site) -> None:
        block = site.name.removesuffix(role(site))
        first = f"{block}{NAMES[role(site)]}_"
        key = next(k for k in state if k.startswith(first) and k.endswith(".w2_group_b.0"))
        dw = delta(state, key.removesuffix(".w2_group_b.0"), multiplier)
        out, context = ST.get(role(site), (None, None))

        def forward(linear: Any, x: torch.Tensor) -> torch.Tensor:
            if context:
                x = x * state[f"{block}{context}_s"] + state[f"{block}{context}_b"]
            y = F.linear(x, linear.weight + dw, linear.bias)
            return y * state[f"{block}{out}_s"] + state[f"{block}{out}_b"] if out else y

        linear = model.get_submodule(site.name)
        linear.forward = lambda x: forward(linear, x)

    for site in backbone.sites:
        hook(site)
    with torch.no_grad():
        pooled: torch.Tensor = model.forward_head(model.forward_features(pixels), pre_logits=True)
        return F.linear(pooled, state[f"{head}.weight"], state[f"{head}.bias"])


def imported(
    backbone: Backbone,
    state: dict[str, Any],
    tmp_path: Path,
    labels: Path | None,
    suffix: str = "pth",
    **options: Any,
) -> tuple[Adapter, dict[str, Any]]:
    path = tmp_path / f"official.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file({n: t.contiguous() for n, t in state.items()}, path)
    else:
        torch.save(state, path)
    report = convert(path, tmp_path / "out.safetensors", "karst", backbone, labels=labels, **options)
    assert report["source"] == "official checkpoint"
    return Adapter.read(tmp_path / "out.safetensors"), report


def assert_logits(adapter: Adapter, backbone: Backbone, expected: torch.Tensor, pixels: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(adapter.merge(backbone)(pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("multiplier", [1.0, 0.7])
def test_import_equals_the_repaired_forward_pass_of_the_vtab_script(
    backbone: Backbone, tmp_path: Path, labels: Path, multiplier: float, suffix: str
) -> None:
    state = official(backbone, kernels=3)
    adapter, report = imported(backbone, state, tmp_path, labels, suffix, multiplier=multiplier)
    assert (report["config"]["kernels"], report["config"]["rescale"], report["ignored"]) == (3, "scalar", 0)
    assert report["config"]["gain"] == pytest.approx(multiplier**2 / 4)
    assert report["serving"] == "a hub with HUB_MAX_KERNELS of at least 3 and HUB_MAX_RANK of at least 4"
    pixels = random_pixels(backbone, 3)
    assert_logits(adapter, backbone, repaired_forward(backbone, state, pixels, multiplier=multiplier), pixels)


@pytest.mark.parametrize("suffix", ["karst", "lokr"])
def test_import_equals_the_repaired_forward_pass_of_the_few_shot_script_with_norms(
    backbone: Backbone, tmp_path: Path, labels: Path, suffix: str
) -> None:
    state = official(backbone, suffix=suffix)
    frozen = backbone.model.state_dict()
    tuned = ["blocks.0.norm1", "blocks.4.norm2"]
    for name in ("blocks.0.norm1", "blocks.4.norm2", "blocks.5.norm1"):
        for part in ("weight", "bias"):
            state[f"{name}.{part}"] = frozen[f"{name}.{part}"] + (0.3 if name in tuned else 0)
    adapter, report = imported(backbone, state, tmp_path, labels)
    assert [name for name in adapter.layers if "norm" in name] == tuned
    assert (report["config"]["norms"], report["ignored"]) == (True, 2)
    pixels = random_pixels(backbone, 3)
    assert_logits(adapter, backbone, repaired_forward(backbone, state, pixels, norms=tuned), pixels)


def test_import_equals_the_repaired_forward_pass_of_the_swin_script(
    swin: Backbone, tmp_path: Path, labels: Path
) -> None:
    def ranks(site: Site) -> int:
        return 2 if site.name.startswith("layers.0.") else 4

    state = official(swin, fc2_suffix="kar", head="head.fc", rank_of=ranks)
    adapter, report = imported(swin, state, tmp_path, labels)
    assert report["config"]["rank"] == 4
    assert adapter.tensors["layers.0.blocks.1.mlp.fc1.karst_b"].shape[1] == 2
    pixels = random_pixels(swin, 3)
    assert_logits(adapter, swin, repaired_forward(swin, state, pixels, head="head.fc"), pixels)


def test_import_accepts_one_c_for_all_kernels(backbone: Backbone, tmp_path: Path, labels: Path) -> None:
    state = official(backbone, shared=True)
    adapter, _ = imported(backbone, state, tmp_path, labels)
    pixels = random_pixels(backbone, 3)
    assert_logits(adapter, backbone, repaired_forward(backbone, state, pixels), pixels)


def test_import_accepts_a_prefix_a_full_state_dict_and_alphas(backbone: Backbone, tmp_path: Path, labels: Path) -> None:
    state = official(backbone)
    for i in range(6):
        state[f"blocks.{i}.mlp.fc1_ka.alpha"] = torch.tensor(float(2 + i % 2))
    bare = dict(state)
    frozen = {n: t for n, t in backbone.model.state_dict().items() if not n.startswith("head")}
    full = {f"module.{n}": t for n, t in {**state, **frozen}.items()} | {
        "module.counter": torch.ones(1, dtype=torch.int64)
    }
    adapter, report = imported(backbone, {"state_dict": full, "epoch": 3}, tmp_path, labels)
    assert report["ignored"] == len(frozen) + 1
    pixels = random_pixels(backbone, 3)
    assert_logits(adapter, backbone, repaired_forward(backbone, bare, pixels), pixels)


@pytest.mark.parametrize("suffix", ["pth.tar", "ckpt", "bin"])
def test_import_reads_the_files_of_training_loops(
    backbone: Backbone, tmp_path: Path, labels: Path, suffix: str
) -> None:
    state = official(backbone)
    content = {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3), "best": np.float64(0.5)}
    adapter, _ = imported(backbone, content, tmp_path, labels, suffix)
    pixels = random_pixels(backbone, 3)
    assert_logits(adapter, backbone, repaired_forward(backbone, state, pixels), pixels)


def test_import_names_a_tensor_with_nan(backbone: Backbone, tmp_path: Path, labels: Path) -> None:
    state = official(backbone)
    state["blocks.0.mlp.fc1_ka.w1_group.0"][0, 0] = float("nan")
    with pytest.raises(
        AdapterError, match=r"blocks.0.mlp.fc1_ka.w1_group.0: has NaN or infinite numbers, so the train"
    ):
        imported(backbone, state, tmp_path, labels)


def test_import_refuses_weights_of_another_backbone(backbone: Backbone, tmp_path: Path, labels: Path) -> None:
    state = official(backbone) | {"blocks.0.mlp.fc1.weight": torch.ones(512, 128)}
    with pytest.raises(AdapterError, match=r"blocks\.0\.mlp\.fc1\.weight: differs from backbone 'demo'"):
        imported(backbone, state, tmp_path, labels)


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({"blocks.0.mlp.fc1_ka.w3_group.0": (8, 8)}, "blocks.0.mlp.fc1_ka.w3_group.0", "an unknown repair"),
        ({"blocks.0.attn.st_q_s": (1,)}, "blocks.0.attn.st_q_s", "an unknown repair"),
        ({"blocks.0.alpha": (1,)}, "blocks.0.alpha", "an unknown repair"),
        ({"blocks.0.mlp.fc1_ka.w1_group_1": (8, 8)}, "blocks.0.mlp.fc1_ka.w1_group_1", "is present beside w1_group.0"),
        ({"blocks.0.mlp.fc1_ka.w2_group_b.1": None}, "blocks.0.mlp.fc1_ka.w2_group_b.1", "is missing"),
        ({"blocks.0.attn.attention_ka.w2_group_a.1.2": None}, "w2_group_a.1.2", "is missing"),
        ({"blocks.0.mlp.fc1_ka.w2_group_a.0.0": (4, 64)}, "fc1_ka.w2_group_a.0.0", "does not belong to a layer with 1"),
        ({"blocks.0.mlp.fc1_ka.w2_group_b.0": (16, 5)}, "w2_group_b.1", "has shape (16, 4), expected (16, 5)"),
        ({"blocks.0.mlp.fc1_ka.w1_group.0": (7, 8)}, "fc1_ka.w1_group.0", "is 7 x 8, which does not divide 512"),
        ({"blocks.0.mlp.fc1_karst.w1_group.0": (8, 8)}, "fc1_karst.w1_group.0", "the same layer also has"),
        ({"blocks.0.mlp.fc1_ka.w1_group.999999999": (8, 8)}, "blocks.0.mlp.fc1_ka", "at most 256 are allowed"),
        ({"blocks.9.mlp.fc1_ka.w1_group.0": (8, 8)}, "blocks.9.mlp", "has no layer 'blocks.9.mlp.fc1' to adapt"),
        ({"blocks.0.mlp.st_h_b": None}, "blocks.0.mlp.st_h_b", "is missing"),
        ({"blocks.0.norm7.weight": (128,)}, "blocks.0.norm7.weight", "has no such norm layer"),
        ({"pos_embed": (1, 5, 128)}, "pos_embed", "has shape (1, 5, 128)"),
        ({"head.weight": None}, "head", "no classifier"),
        ({"head_dist.weight": (3, 128)}, "head_dist.weight", "may have been trained; remove it if the model does not"),
        ({"blocks.0.mlp.gate": (128,)}, "blocks.0.mlp.gate", "neither a weight of backbone 'demo' nor a known part"),
    ],
)
def test_import_names_a_wrong_tensor(
    backbone: Backbone,
    tmp_path: Path,
    labels: Path,
    change: dict[str, tuple[int, ...] | None],
    where: str,
    message: str,
) -> None:
    state = official(backbone)
    for name, shape in change.items():
        if shape is None:
            del state[name]
        else:
            state[name] = torch.ones(shape)
    with pytest.raises(AdapterError) as caught:
        imported(backbone, state, tmp_path, labels)
    assert any(where in p.where and message in p.message for p in caught.value.problems), caught.value.problems
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("multiplier", [0.0, -1.0, float("nan"), float("inf")])
def test_import_refuses_a_multiplier_that_is_not_positive(
    backbone: Backbone, tmp_path: Path, labels: Path, multiplier: float
) -> None:
    with pytest.raises(AdapterError, match=r"--multiplier: is .*, expected a positive number"):
        imported(backbone, official(backbone), tmp_path, labels, multiplier=multiplier)


def test_import_refuses_missing_or_wrong_labels(backbone: Backbone, tmp_path: Path, labels: Path) -> None:
    with pytest.raises(AdapterError, match="give them with --labels"):
        imported(backbone, official(backbone), tmp_path, None)
    labels.write_text("cat\ndog\n")
    with pytest.raises(AdapterError, match="for 2 labels"):
        imported(backbone, official(backbone), tmp_path, labels)
    labels.write_text('["cat", 3]')
    with pytest.raises(AdapterError, match="must be a JSON list of strings"):
        imported(backbone, official(backbone), tmp_path, labels)


class Code:
    """A value whose unpickling runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


def test_import_refuses_a_file_without_tensors(
    backbone: Backbone, tmp_path: Path, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "code.pth": (Code(), "cannot be read as tensors only"),
        "list.pth": ([torch.ones(1)], "holds a list, expected a dictionary"),
        "empty.pth": ({}, "has no adapted layer"),
    }
    for name, (value, message) in cases.items():
        torch.save(value, tmp_path / name)
        with pytest.raises(AdapterError, match=message):
            convert(tmp_path / name, tmp_path / "out.safetensors", "karst", backbone, labels=labels)
    for name, message in {
        "junk.pth": "cannot be read",
        "junk.safetensors": "not a valid safetensors file",
        "junk.ckpt": "not a PyTorch file, or a damaged one",
        "junk.h5": "the file must end in one of",
        "gone.pth": "no such file or folder",
    }.items():
        if not name.startswith("gone"):
            (tmp_path / name).write_bytes(b"junk" * 10)
        with pytest.raises(AdapterError, match=message):
            convert(tmp_path / name, tmp_path / "out.safetensors", "karst", backbone, labels=labels)
    assert "ran" not in capsys.readouterr().out
