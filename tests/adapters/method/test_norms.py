"""Optional parts of an adapter: norm layers, selected sites, ranks by stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import Adapter, AdapterError, Backbone, ConfigError, KarstConfig, attach
from adapters.method.karst import KarstLayer
from tests.support.models import random_adapter, random_model, random_pixels, small_swin, with_metadata, with_tensors

NORM = "blocks.0.norm1.norm_weight"


@pytest.fixture(scope="module")
def tuned(backbone: Backbone) -> Adapter:
    return random_adapter(backbone, kernels=1, rank=2, norms=True)


def config_of(adapter: Adapter) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(adapter.config.model_dump_json(exclude_defaults=True))
    return config | {
        "kernels": 1,
        "rank": 2,
        "factor": 8,
        "gain": 0.5,
        "rescale": "channel",
    }


def test_a_file_has_norms_in_its_config_only_when_it_has_norm_tensors(backbone: Backbone, tuned: Adapter) -> None:
    assert {name.rpartition(".")[0] for name in tuned.tensors if name.endswith("norm_bias")} == {
        norm.name for norm in backbone.norms
    }
    again = Adapter.read(tuned.data)
    assert again.config.norms
    plain = random_adapter(backbone, kernels=1, rank=2)
    assert set(json.loads(metadata(plain)["config"])) == {"kernels", "rank", "factor", "gain", "rescale"}
    assert set(json.loads(metadata(tuned)["config"])) == {"kernels", "rank", "factor", "gain", "rescale", "norms"}


def metadata(adapter: Adapter) -> dict[str, str]:
    """Return the metadata strings of the file."""
    length = int.from_bytes(adapter.data[:8], "little")
    found: dict[str, str] = json.loads(adapter.data[8 : 8 + length])["__metadata__"]
    return found


def test_a_model_with_norms_starts_at_the_backbone_s_norms(backbone: Backbone) -> None:
    model = attach(backbone, KarstConfig(norms=True), 3).eval()
    plain = attach(backbone, KarstConfig(), 3).eval()
    plain.head.load_state_dict(model.head.state_dict())
    pixels = random_pixels(backbone, 2)
    with torch.no_grad():
        assert torch.equal(model(pixels), plain(pixels))
    assert not any(p.data_ptr() == q.data_ptr() for p in model.parameters() for q in backbone.model.parameters())


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({NORM: None}, NORM, "is missing, but blocks.0.norm1.norm_bias is present"),
        ({NORM: torch.ones(2, 2)}, NORM, r"has shape \(2, 2\), expected \(d,\)"),
        ({NORM: torch.full((128,), float("nan"))}, NORM, "has a value that is not finite"),
    ],
)
def test_read_refuses_invalid_norm_tensors(
    tuned: Adapter, change: dict[str, torch.Tensor | None], where: str, message: str
) -> None:
    tensors = {name: tensor for name, tensor in {**tuned.tensors, **change}.items() if tensor is not None}
    with pytest.raises(AdapterError, match=f"{where}: {message}"):
        Adapter.read(with_tensors(tuned, tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NORM: torch.ones(64), "blocks.0.norm1.norm_bias": torch.ones(64)}, "has 64 numbers, expected 128"),
        (
            {"blocks.0.mlp.fc1.norm_weight": torch.ones(128), "blocks.0.mlp.fc1.norm_bias": torch.ones(128)},
            "blocks.0.mlp.fc1.norm_weight: the layer is not a norm layer",
        ),
        (
            {"blocks.0.norm1.scale": torch.ones(128), "blocks.0.norm1.shift": torch.ones(128)},
            "blocks.0.norm1.scale: the layer is a norm layer",
        ),
        (
            {"blocks.9.norm1.norm_weight": torch.ones(128), "blocks.9.norm1.norm_bias": torch.ones(128)},
            "blocks.9.norm1: backbone 'demo' has no such adaptable layer",
        ),
    ],
)
def test_check_refuses_norms_when_they_do_not_fit_the_backbone(
    backbone: Backbone, tuned: Adapter, change: dict[str, torch.Tensor], message: str
) -> None:
    adapter = Adapter.read(with_tensors(tuned, {**tuned.tensors, **change}))
    with pytest.raises(AdapterError, match=message):
        adapter.check(backbone)


def test_read_refuses_norm_tensors_when_config_norms_is_false(tuned: Adapter) -> None:
    with pytest.raises(AdapterError, match=r"config.norms is not true"):
        Adapter.read(with_metadata(tuned, config=json.dumps(config_of(tuned) | {"norms": False})))


@pytest.mark.parametrize(
    "change",
    [
        {"norms": 1},
        {"stage_ranks": "2"},
        {"stage_ranks": [1, 1]},
        {"stage_ranks": []},
        {"stage_ranks": [0, 2]},
        {"sites": [""]},
        {"sites": [3]},
        {"site": ["x"]},
    ],
)
def test_read_refuses_an_invalid_config(tuned: Adapter, change: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match="config: "):
        Adapter.read(with_metadata(tuned, config=json.dumps(config_of(tuned) | change)))


def test_only_selected_sites_are_in_the_file(backbone: Backbone) -> None:
    adapter = random_adapter(backbone, kernels=1, rank=2, norms=True, sites=("blocks.5.*", "norm", "fc_norm"))
    assert {name for name in adapter.layers if not name.startswith("blocks.5.")} == {"fc_norm"}
    assert Adapter.read(adapter.data).config.sites == ("blocks.5.*", "norm", "fc_norm")


def test_each_stage_has_its_own_rank_and_gain(tmp_path: Path) -> None:
    """The file has one gain, 1 / 8. A stage of rank 2 trains with gain 1 / 2, so its C is stored 4 times as large."""
    swin = small_swin(tmp_path)
    model = random_model(swin, kernels=1, rank=8, stage_ranks=(2, 2, 4, 8))
    tensors = model.tensors()
    for stage, rank in enumerate((2, 2, 4, 8)):
        name = f"layers.{stage}.blocks.0.mlp.fc1"
        assert tensors[f"{name}.karst_a"].shape[3] == rank
        layer = model.layers[name.replace(".", "/")]
        assert isinstance(layer, KarstLayer)
        c = layer.c
        torch.testing.assert_close(tensors[f"{name}.karst_c"], c * 8 / rank)


def test_attach_raises_when_stage_ranks_do_not_match_the_backbone(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stage_ranks has 2 ranks, but the backbone has a layer in no stage"):
        attach(backbone, KarstConfig(rank=4, stage_ranks=(2, 4)), 3)
    with pytest.raises(ConfigError, match="stage_ranks has 2 ranks, but the backbone has a layer in stage 2, counted"):
        attach(small_swin(tmp_path), KarstConfig(rank=4, stage_ranks=(2, 4)), 3)
