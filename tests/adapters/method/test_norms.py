"""The optional parts of a `karst/1` file: norm layers, chosen sites, ranks by stage; and what is refused of them."""

import json

import pytest
import torch

from adapters import Adapter, AdapterError, ConfigError, KarstConfig, attach
from tests.support.models import random_adapter, random_model, random_pixels, small_swin, with_metadata, with_tensors

NORM = "blocks.0.norm1.norm_weight"


@pytest.fixture(scope="module")
def tuned(backbone) -> Adapter:
    return random_adapter(backbone, kernels=1, rank=2, norms=True)


def config_of(adapter: Adapter) -> dict:
    return json.loads(adapter.config.model_dump_json(exclude_defaults=True)) | {
        "kernels": 1,
        "rank": 2,
        "factor": 8,
        "gain": 0.5,
        "rescale": "channel",
    }


def test_norms_are_in_the_file_and_only_then_in_its_config(backbone, tuned) -> None:
    assert {name.rpartition(".")[0] for name in tuned.tensors if name.endswith("norm_bias")} == {
        norm.name for norm in backbone.norms
    }
    again = Adapter.read(tuned.data)
    assert again.config.norms
    plain = random_adapter(backbone, kernels=1, rank=2)
    assert set(json.loads(metadata(plain)["config"])) == {"kernels", "rank", "factor", "gain", "rescale"}
    assert set(json.loads(metadata(tuned)["config"])) == {"kernels", "rank", "factor", "gain", "rescale", "norms"}


def metadata(adapter: Adapter) -> dict[str, str]:
    length = int.from_bytes(adapter.data[:8], "little")
    return json.loads(adapter.data[8 : 8 + length])["__metadata__"]


def test_a_model_starts_with_the_backbone_s_norms(backbone) -> None:
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
        ({NORM: None}, NORM, "is missing, while blocks.0.norm1.norm_bias is there"),
        ({NORM: torch.ones(2, 2)}, NORM, r"has shape \(2, 2\), expected \(d,\)"),
        ({NORM: torch.full((128,), float("nan"))}, NORM, "has a value that is not finite"),
    ],
)
def test_a_file_with_bad_norms_is_refused(tuned, change, where, message) -> None:
    tensors = {name: tensor for name, tensor in (tuned.tensors | change).items() if tensor is not None}
    with pytest.raises(AdapterError, match=f"{where}: {message}"):
        Adapter.read(with_tensors(tuned, tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NORM: torch.ones(64), "blocks.0.norm1.norm_bias": torch.ones(64)}, "has 64 numbers, the norm layer has 128"),
        (
            {"blocks.0.mlp.fc1.norm_weight": torch.ones(128), "blocks.0.mlp.fc1.norm_bias": torch.ones(128)},
            "blocks.0.mlp.fc1.norm_weight: this is no norm layer",
        ),
        (
            {"blocks.0.norm1.scale": torch.ones(128), "blocks.0.norm1.shift": torch.ones(128)},
            "blocks.0.norm1.scale: this is a norm layer",
        ),
        (
            {"blocks.9.norm1.norm_weight": torch.ones(128), "blocks.9.norm1.norm_bias": torch.ones(128)},
            "blocks.9.norm1: backbone 'demo' has no such adaptable layer",
        ),
    ],
)
def test_norms_that_do_not_fit_the_backbone_are_refused(backbone, tuned, change, message) -> None:
    adapter = Adapter.read(with_tensors(tuned, tuned.tensors | change))
    with pytest.raises(AdapterError, match=message):
        adapter.check(backbone)


def test_norms_need_the_config_s_word(tuned) -> None:
    with pytest.raises(AdapterError, match="config does not say norms = true"):
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
def test_a_config_that_makes_no_sense_is_refused(tuned, change) -> None:
    with pytest.raises(AdapterError, match="config: "):
        Adapter.read(with_metadata(tuned, config=json.dumps(config_of(tuned) | change)))


def test_chosen_sites_are_in_the_file_and_no_others(backbone) -> None:
    adapter = random_adapter(backbone, kernels=1, rank=2, norms=True, sites=("blocks.5.*", "norm", "fc_norm"))
    assert {name for name in adapter.layers if not name.startswith("blocks.5.")} == {"fc_norm"}
    assert Adapter.read(adapter.data).config.sites == ("blocks.5.*", "norm", "fc_norm")


def test_every_stage_has_its_rank_and_its_gain(tmp_path) -> None:
    """The file has one gain, 1 / 8; a stage of rank 2 trains with 1 / 2, so that its C is four times as large there."""
    swin = small_swin(tmp_path)
    model = random_model(swin, kernels=1, rank=8, stage_ranks=(2, 2, 4, 8))
    tensors = model.tensors()
    for stage, rank in enumerate((2, 2, 4, 8)):
        name = f"layers.{stage}.blocks.0.mlp.fc1"
        assert tensors[f"{name}.karst_a"].shape[3] == rank
        c = model.layers[name.replace(".", "/")].c
        torch.testing.assert_close(tensors[f"{name}.karst_c"], c * 8 / rank)


def test_stages_that_the_backbone_does_not_have_are_refused(backbone, tmp_path) -> None:
    with pytest.raises(ConfigError, match="stage_ranks has 2 ranks, but the backbone has a layer outside of any stage"):
        attach(backbone, KarstConfig(rank=4, stage_ranks=(2, 4)), 3)
    with pytest.raises(ConfigError, match="stage_ranks has 2 ranks, but the backbone has a layer in stage 2, counted"):
        attach(small_swin(tmp_path), KarstConfig(rank=4, stage_ranks=(2, 4)), 3)
