"""Loading, fingerprint, sites and clones of a backbone."""

import argparse
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from timm.layers.drop import DropPath
from torch import nn

from adapters import Backbone, BackboneError, load_backbone
from adapters.backbone import create_model, features, fingerprint
from tests.support.models import random_pixels


@pytest.fixture(scope="module")
def small() -> Backbone:
    """timm's smallest ViT with the layout of Google's checkpoints: one class token, one last norm."""
    torch.manual_seed(3)
    backbone = load_backbone("test_vit", pretrained=False)
    with torch.no_grad():  # norms and biases start at constants, which would hide swapped weights
        for parameter in backbone.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return backbone


def same_outputs(one: Backbone, other: Backbone) -> bool:
    pixels = random_pixels(one, 2)
    with torch.inference_mode():
        return torch.equal(features(one.model, pixels), features(other.model, pixels))


def google_layout(model: Any) -> dict[str, Any]:
    """Return the weights of a timm ViT by the names and shapes of `ViT-B_16.npz`."""
    w = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    width = w["cls_token"].shape[-1]
    out = {
        "cls": w["cls_token"],
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": w["pos_embed"],
        "Transformer/encoder_norm/scale": w.get("norm.weight", w.get("fc_norm.weight")),
        "Transformer/encoder_norm/bias": w.get("norm.bias", w.get("fc_norm.bias")),
    }
    for i in range(len(model.blocks)):
        timm, google = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{google}/{theirs}/scale"] = w[f"{timm}.{ours}.weight"]
            out[f"{google}/{theirs}/bias"] = w[f"{timm}.{ours}.bias"]
        attention = f"{google}/MultiHeadDotProductAttention_1"
        for k, part in enumerate(("query", "key", "value")):
            rows = slice(k * width, (k + 1) * width)
            out[f"{attention}/{part}/kernel"] = w[f"{timm}.attn.qkv.weight"][rows].T.reshape(width, heads, -1)
            out[f"{attention}/{part}/bias"] = w[f"{timm}.attn.qkv.bias"][rows].reshape(heads, -1)
        out[f"{attention}/out/kernel"] = w[f"{timm}.attn.proj.weight"].T.reshape(heads, -1, width)
        out[f"{attention}/out/bias"] = w[f"{timm}.attn.proj.bias"]
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            out[f"{google}/MlpBlock_3/{theirs}/kernel"] = w[f"{timm}.mlp.{ours}.weight"].T
            out[f"{google}/MlpBlock_3/{theirs}/bias"] = w[f"{timm}.mlp.{ours}.bias"]
    return out


def test_the_fingerprint_equals_the_documented_digest() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.copy_(torch.tensor([0.5]))
    bias = b"bias\0float32\0(1,)\0" + np.array([0.5], "<f4").tobytes()
    weight = b"weight\0float32\0(1, 2)\0" + np.array([1.0, -2.0], "<f4").tobytes()
    assert fingerprint(layer) == hashlib.sha256(bias + weight).hexdigest()


def test_the_fingerprint_is_equal_when_the_weights_are_equal(backbone: Backbone) -> None:
    torch.manual_seed(0)
    assert load_backbone("demo", pretrained=False).fingerprint == backbone.fingerprint
    assert fingerprint(backbone.model) == backbone.fingerprint


def test_the_fingerprint_changes_when_any_weight_changes(small: Backbone) -> None:
    model = create_model("test_vit")
    model.load_state_dict(small.model.state_dict())
    seen = {fingerprint(model)}
    tensors = model.state_dict()
    for tensor in tensors.values():
        tensor.view(-1)[-1].neg_()
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(tensors)


def test_the_fingerprint_changes_when_dtype_shape_or_name_change() -> None:
    models: list[nn.Module] = [
        nn.Linear(4, 4, bias=False),
        nn.Linear(2, 8, bias=False),
        nn.Linear(4, 4, bias=False).half(),
    ]
    models += [nn.Sequential(nn.Linear(4, 4, bias=False))]
    for model in models:
        nn.init.zeros_(next(model.parameters()))
    assert len({fingerprint(model) for model in models}) == 4


def test_the_fingerprint_does_not_change_when_the_weights_are_cast() -> None:
    torch.manual_seed(0)
    half = load_backbone("demo", pretrained=False, dtype=torch.bfloat16)
    torch.manual_seed(0)
    assert half.fingerprint == load_backbone("demo", pretrained=False).fingerprint
    assert half.dtype == torch.bfloat16


def test_a_backbone_is_frozen_and_lists_its_sites(backbone: Backbone) -> None:
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert (backbone.name, backbone.input_size, backbone.width) == ("demo", (3, 32, 32), 128)
    assert [site.name for site in backbone.sites[:4]] == [
        *("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"),
    ]
    assert [(s.d_in, s.d_out, s.splits) for s in backbone.sites[:4]] == [
        *((128, 384, 3), (128, 128, 1), (128, 512, 1), (512, 128, 1)),
    ]
    assert [(s.rescale_out, s.rescale_in) for s in backbone.sites[:4]] == [
        *((False, False), (True, True), (False, False), (True, False)),
    ]
    assert len(backbone.sites) == 6 * 4


def test_info_has_no_weights(backbone: Backbone) -> None:
    info = backbone.info()
    assert len(pickle.dumps(info)) < 10_000
    assert (info.fingerprint, info.sites) == (backbone.fingerprint, backbone.sites)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_load_reads_a_checkpoint(small: Backbone, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(small.model.state_dict(), path)
    loaded = load_backbone("test_vit", path)
    assert loaded.fingerprint == fingerprint(small.model)
    assert same_outputs(loaded, small)


@pytest.mark.parametrize(
    ("name", "prefix", "extra"),
    [
        (
            "model_best.pth.tar",
            "",
            {"epoch": 3, "args": argparse.Namespace(lr=1, out=Path("x")), "best": np.float64(1)},
        ),
        ("last.ckpt", "model.", {"epoch": 3, "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 1}}),
        ("ddp.pth", "module.", {}),
        ("compiled.pt", "_orig_mod.module.", {}),
        ("deep.ckpt", "student.backbone.", {}),
    ],
)
def test_load_reads_the_checkpoint_of_a_training_loop(
    small: Backbone, tmp_path: Path, name: str, prefix: str, extra: dict[str, Any]
) -> None:
    state = small.model.state_dict() | {"head.weight": torch.ones(10, 64)}
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}} | extra, tmp_path / name)
    assert load_backbone("test_vit", tmp_path / name).fingerprint == fingerprint(small.model)


def test_load_reads_a_flat_state_dict_beside_a_counter(small: Backbone, tmp_path: Path) -> None:
    torch.save(dict(small.model.state_dict()) | {"epoch": 3}, tmp_path / "flat.pth")
    assert load_backbone("test_vit", tmp_path / "flat.pth").fingerprint == fingerprint(small.model)


def test_load_refuses_a_checkpoint_that_has_the_model_twice(small: Backbone, tmp_path: Path) -> None:
    state = {p + key: value for p in ("model.", "ema.") for key, value in small.model.state_dict().items()}
    torch.save(state, tmp_path / "two.ckpt")
    with pytest.raises(
        BackboneError, match=r"two.ckpt: has the model's weights under model. and ema.; save one of them"
    ):
        load_backbone("test_vit", tmp_path / "two.ckpt")


def test_load_says_what_to_do_when_a_whole_model_was_pickled(small: Backbone, tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "model.pth")
    with pytest.raises(
        BackboneError,
        match=r"the file holds torch.nn.modules.linear.Linear, .* torch.save\(model.state_dict\(\), FILE\)$",
    ):
        load_backbone("test_vit", tmp_path / "model.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_load_names_the_weights_when_they_have_nan(small: Backbone, tmp_path: Path, suffix: str, number: float) -> None:
    path = tmp_path / f"diverged{suffix}"
    model = small.clone()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["blocks.0.norm1.weight"][3] = number
    if suffix == ".npz":
        spoilt = google_layout(small.model)
        spoilt["Transformer/encoderblock_0/LayerNorm_0/scale"] = state["blocks.0.norm1.weight"].numpy()
        np.savez(path, **spoilt)
    else:
        safetensors.torch.save_file(state, path)
    with pytest.raises(
        BackboneError, match=r"NaN or infinite numbers in blocks.0.norm1.weight \(1 tensors in all\); the"
    ):
        load_backbone("test_vit", path)


def test_load_says_that_positions_were_resampled_when_the_image_size_differs(
    small: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    side = 2 * small.input_size[1]
    larger = load_backbone("test_vit", pretrained=False, image_size=side)
    patches = larger.model.pos_embed.shape[1]
    for name in ("larger.pth", "larger.npz"):
        path = tmp_path / name
        if name.endswith(".npz"):
            np.savez(path, **google_layout(larger.model))
        else:
            torch.save(larger.model.state_dict(), path)
        with caplog.at_level("INFO", "adapters.checkpoints"):
            load_backbone("test_vit", path)
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert f"{name} is of another image or patch size; these weights were resampled" in record.message
        assert f"pos_embed from 1 x {patches} x 64 to 1 x {small.model.pos_embed.shape[1]} x 64" in record.message
        caplog.clear()
    torch.save(small.model.state_dict(), tmp_path / "small.pth")
    with caplog.at_level("INFO", "adapters.checkpoints"):
        load_backbone("test_vit", tmp_path / "small.pth")
        assert caplog.records == []
        load_backbone("test_vit", tmp_path / "small.pth", image_size=side)
    assert [record.levelname for record in caplog.records] == ["INFO"]  # the caller has chosen the size


def test_load_reads_a_google_npz(small: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "ViT.npz"
    np.savez(path, **google_layout(small.model))
    loaded = load_backbone("test_vit", path)
    assert loaded.fingerprint == fingerprint(small.model)
    assert same_outputs(loaded, small)


def test_load_casts_a_half_precision_checkpoint_to_float32(small: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    safetensors.torch.save_file({name: t.half() for name, t in small.model.state_dict().items()}, path)
    loaded = load_backbone("test_vit", str(path))
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.model.cls_token, small.model.cls_token.half().float())


def test_load_ignores_the_head_of_a_checkpoint(small: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "classifier.pth"
    torch.save(small.model.state_dict() | {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}, path)
    assert load_backbone("test_vit", path).fingerprint == fingerprint(small.model)


class Code:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_load_refuses_a_pickle_with_code_and_does_not_run_it(tmp_path: Path, suffix: str) -> None:
    path, trace = tmp_path / f"evil{suffix}", tmp_path / "trace"
    torch.save({"cls_token": Code(trace)}, path)
    with pytest.raises(BackboneError, match=rf"^checkpoint .*evil{suffix}: [Ww]eights.only"):
        load_backbone("test_vit", path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file does run code


def test_load_refuses_an_npz_with_code_and_does_not_run_it(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.npz", tmp_path / "trace"
    arrays: dict[str, Any] = {"embedding/kernel": np.array([Code(trace)], dtype=object)}
    np.savez(path, **arrays)
    with pytest.raises(BackboneError, match=r"^checkpoint .*evil.npz: Object arrays cannot be loaded"):
        load_backbone("test_vit", path)
    assert not trace.exists()


def test_load_names_an_unknown_model() -> None:
    with pytest.raises(BackboneError, match=r"^cannot load backbone 'vit_tny': Unknown model .*give a timm model name"):
        load_backbone("vit_tny", pretrained=False)
    with pytest.raises(BackboneError, match=r"^cannot load pretrained weights of backbone 'vit_tny'"):
        load_backbone("vit_tny")


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"^checkpoint .*none.safetensors: no such file$"):
        load_backbone("test_vit", tmp_path / "none.safetensors")


def test_load_refuses_an_unknown_suffix(tmp_path: Path) -> None:
    path = tmp_path / "weights.h5"
    path.write_bytes(b"anything")
    with pytest.raises(BackboneError, match=r"weights.h5: the file must end in one of .safetensors, .pth, .*, .npz$"):
        load_backbone("test_vit", path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_load_names_a_damaged_checkpoint(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(b"no weights at all")
    with pytest.raises(BackboneError, match=rf"^checkpoint .*damaged{suffix}: .+"):
        load_backbone("test_vit", path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls_token": None}, r"does not fit the model: missing \['cls_token'\], unexpected nothing \(1 missing and 0"),
        (
            {"extra": torch.ones(1)},
            r"does not fit the model: missing nothing, unexpected \['extra'\] \(0 missing and 1",
        ),
        ({"norm.bias": torch.ones(3)}, r": Error\(s\) in loading state_dict for VisionTransformer"),
    ],
)
def test_load_names_a_checkpoint_that_does_not_fit(
    small: Backbone, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    path = tmp_path / "odd.safetensors"
    state = small.model.state_dict() | change
    safetensors.torch.save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    with pytest.raises(BackboneError, match=rf"^checkpoint .*odd.safetensors.*{message}"):
        load_backbone("test_vit", path)


@pytest.mark.parametrize(
    "gone", ["cls", "Transformer/encoderblock_5/LayerNorm_0/scale", "Transformer/encoder_norm/bias"]
)
def test_load_names_the_missing_part_of_an_npz(small: Backbone, tmp_path: Path, gone: str) -> None:
    path = tmp_path / "part.npz"
    np.savez(path, **{name: array for name, array in google_layout(small.model).items() if name != gone})
    with pytest.raises(BackboneError, match=rf"^checkpoint .*part.npz: .*{gone}"):
        load_backbone("test_vit", path)


def test_load_refuses_an_npz_that_does_not_set_every_weight(backbone: Backbone, tmp_path: Path) -> None:
    """timm's reader does not look for the demo's last norm, and would leave it untrained."""
    path = tmp_path / "pooled.npz"
    np.savez(path, **google_layout(backbone.model))
    with pytest.raises(BackboneError, match=r"pooled.npz does not fit .* missing \['fc_norm.weight', 'fc_norm.bias'\]"):
        load_backbone("demo", path)


def test_load_refuses_an_npz_of_a_deeper_model(small: Backbone, tmp_path: Path) -> None:
    weights = google_layout(small.model)
    deeper = {name.replace("block_5", "block_6"): a for name, a in weights.items() if "block_5" in name}
    path = tmp_path / "deeper.npz"
    np.savez(path, **weights, **deeper)
    with pytest.raises(BackboneError, match=r"^checkpoint .*deeper.npz does not fit the model: .*encoderblock_6"):
        load_backbone("test_vit", path)


def test_load_refuses_a_model_without_sites() -> None:
    with pytest.raises(BackboneError, match=r"^backbone 'test_resnet' has none of the layers that KARST adapts .attn"):
        load_backbone("test_resnet", pretrained=False)


def test_load_names_the_sites_when_the_model_bypasses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.backbone._call_every_qkv", lambda model: None)
    with pytest.raises(BackboneError) as refusal:
        load_backbone("eva02_tiny_patch14_224", pretrained=False)
    assert str(refusal.value) == (
        "backbone 'eva02_tiny_patch14_224' cannot be adapted: its forward pass does not call these layers "
        "exactly once: " + ", ".join(f"blocks.{i}.attn.qkv" for i in range(12))
    )


def test_load_refuses_a_model_when_it_interleaves_the_rows_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(self: Any, x: torch.Tensor) -> Any:
        return self.fc2(self.act(self.fc1(x.transpose(0, 1)))).transpose(0, 1)

    monkeypatch.setattr("timm.layers.Mlp.forward", interleaved)
    with pytest.raises(BackboneError, match=r"get the rows of several images interleaved: blocks.0.mlp"):
        load_backbone("test_vit", pretrained=False)


@pytest.mark.parametrize(("name", "splits"), [("eva02_tiny_patch14_224", 3), ("vit_tiny_patch16_224", 3)])
def test_sites_and_norms_match_the_family(name: str, splits: int) -> None:
    backbone = load_backbone(name, pretrained=False)
    qkv = next(site for site in backbone.sites if site.name == "blocks.0.attn.qkv")
    assert (qkv.splits, qkv.stage) == (splits, None)
    assert [norm.name for norm in backbone.norms][-2:] == ["blocks.11.norm2", "norm" if "vit_t" in name else "fc_norm"]


def test_swin_sites_have_their_stage() -> None:
    backbone = load_backbone("swin_tiny_patch4_window7_224", pretrained=False)
    assert [site.stage for site in backbone.sites] == [0] * 8 + [1] * 8 + [2] * 24 + [3] * 8


def test_a_clone_shares_every_weight_and_no_module(backbone: Backbone) -> None:
    clone = backbone.clone()
    ours, theirs = backbone.model.state_dict(), clone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    assert not set(map(id, backbone.model.modules())) & set(map(id, clone.modules()))


def test_a_hook_on_a_clone_does_not_change_the_backbone(backbone: Backbone) -> None:
    pixels = random_pixels(backbone, 1)
    with torch.inference_mode():
        before = features(backbone.model, pixels)
        clone = backbone.clone()
        clone.blocks[0].register_forward_hook(lambda _module, _args, y: y * 2)
        assert not torch.equal(features(clone, pixels), before)
        assert torch.equal(features(backbone.model, pixels), before)


def test_drop_path_rises_over_the_blocks_of_a_clone_only(backbone: Backbone) -> None:
    blocks = backbone.clone(drop_path=0.5).blocks
    assert isinstance(blocks[0].drop_path1, nn.Identity)
    for part in ("drop_path1", "drop_path2"):
        assert [getattr(block, part).drop_prob for block in blocks[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert not any(isinstance(module, DropPath) for module in backbone.model.modules())
