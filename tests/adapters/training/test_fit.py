"""`adapters.fit` with the recipes `instant`, `karst` and `auto`, from folders of images to files."""

import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from adapters import Adapter, Backbone, BackboneError, Bank, ConfigError, DataError, KarstConfig, Watch, load_backbone
from adapters.data.images import normalise_for
from adapters.evaluation import html_report
from adapters.evaluation.html_report import FILES
from adapters.evaluation.outputs import AccuracyInUse
from adapters.evaluation.report import draw_confusion
from adapters.training.auto import Classifier
from adapters.training.auto_files import NotBetterThanChance
from adapters.training.fit import fit
from adapters.training.inference import Predictions
from adapters.training.steps import KarstRecipe
from tests.support.image_sets import coloured_images, write_digits
from tests.support.models import coloured_noise

QUICK = KarstRecipe(min_steps=5, passes=1, learning_rates=(1e-3,))


class Log(Watch):
    """Record of the callbacks."""

    def __init__(self) -> None:
        self.classifiers: list[Classifier] = []
        self.steps = 0

    def instant(self, classifier: Classifier) -> None:
        self.classifiers.append(classifier)

    def stepped(self, stage: str, loss: float) -> None:
        self.steps += 1


@pytest.fixture(scope="module")
def demo() -> Backbone:
    return load_backbone("demo")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), 0, 8)


def test_fit_reports_the_files_that_it_left_out(demo: Backbone, tmp_path: Path) -> None:
    root = write_digits(tmp_path / "data", 0, 4)
    (root / "0" / ".DS_Store").write_bytes(b"")
    (root / "0" / "0.png").rename(root / "loose.png")
    done = fit(root, tmp_path / "c.safetensors", backbone=demo, recipe="instant")
    numbers = json.loads((done.report / "report.json").read_text())
    assert {entry["reason"]: entry["count"] for entry in numbers["left_out"]} == {
        "images outside the class folders": 1,
        "files that macOS, Windows or a NAS added": 1,
    }
    assert [line for line in numbers["warnings"] if line.startswith("left out: 1 images outside the class folders: ")]
    page = (done.report / "report.html").read_text()
    assert "Files left out" in page
    assert "1 files that macOS, Windows or a NAS added: " in page


def test_instant_writes_a_head_with_calibration_and_a_report(demo: Backbone, data: Path, tmp_path: Path) -> None:
    test = write_digits(tmp_path / "test", 8, 3)
    log = Log()
    done = fit(data, tmp_path / "c.safetensors", backbone=demo, recipe="instant", test=test, watch=log)
    adapter = Adapter.read(done.file)
    assert adapter.config.kernels == 0
    assert set(adapter.layers) == set()
    assert "typicality.mean" in adapter.tensors
    assert adapter.coverage is not None
    assert adapter.metrics is not None
    assert adapter.metrics["leave_one_out_accuracy"] == 1.0
    assert adapter.metrics["test_accuracy"] == 1.0
    low, high = adapter.metrics["leave_one_out_interval"]
    assert 0.8 < low < high == 1.0
    assert adapter.metrics["classes"]["0"]["images"] == 8
    assert sorted(path.name for path in done.report.iterdir()) == sorted(FILES)
    assert log.steps == 0
    assert len(log.classifiers) == 1


def test_report_is_one_page_without_links_to_other_files(demo: Backbone, data: Path, tmp_path: Path) -> None:
    done = fit(data, tmp_path / "c.safetensors", backbone=demo, recipe="instant")
    page = (done.report / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("</html>", "")
    assert "100.0% of 24 left-out images are right" in page
    numbers = json.loads((done.report / "report.json").read_text())
    assert numbers["learning_curve"] == []  # of too few images
    assert "too few for a curve" in page
    assert numbers["advice"]
    assert numbers["digest"] == done.adapter.digest


def test_bank_serves_the_head_with_typicality_beside_other_adapters(demo: Backbone, data: Path, tmp_path: Path) -> None:
    head = fit(data, tmp_path / "c.safetensors", backbone=demo, recipe="instant").adapter
    bank = Bank(demo, slots=2)
    own = bank.put(head)
    from tests.support.models import random_adapter

    other = bank.put(random_adapter(demo, classes=4))
    images = coloured_images(tmp_path / "more", count=1, seed=3)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, *demo.input_size), dtype=torch.uint8, generator=generator)
    assert len(images) == 3
    alone = bank.score(normalise_for(demo, pixels), [own, own])
    mixed = bank.score(normalise_for(demo, pixels), [own, other])
    merged = head.merge(demo)
    with torch.inference_mode():
        expected = merged(normalise_for(demo, pixels))
    for scores in (alone[0], mixed[0]):
        torch.testing.assert_close(scores.logits, expected[0], rtol=1e-3, atol=1e-3)
        assert scores.typicality is not None
        assert 0 <= scores.typicality < 0.01  # noise is no digit
    assert mixed[1].typicality is None


def test_auto_writes_the_instant_adapter_before_karst(demo: Backbone, data: Path, tmp_path: Path) -> None:
    written: list[str] = []

    class Reading(Log):
        def instant(self, classifier: Classifier) -> None:
            written.append(Adapter.read(tmp_path / "c.safetensors").digest)
            assert classifier.adapter.digest == written[0]

    log = Reading()
    options = {"config": KarstConfig(kernels=1), "karst": QUICK, "budget_s": 600.0}
    done = fit(data, tmp_path / "c.safetensors", backbone=demo, watch=log, **options)  # type: ignore[arg-type]
    assert len(written) == 1
    assert log.steps > 0
    # All left-out images are right already, so KARST cannot be better.
    assert done.adapter.config.kernels == 0
    assert "not better" in done.metrics["comparison"]
    assert "KARST is not better" in (done.report / "report.html").read_text()


def test_adapter_that_is_not_better_than_chance_is_an_error_and_is_kept(demo: Backbone, tmp_path: Path) -> None:
    grey = dict.fromkeys(("a", "b"), (120, 120, 120))
    noise = coloured_noise(tmp_path / "noise", grey, 10, seed=5)
    output = tmp_path / "n.safetensors"
    with pytest.raises(
        NotBetterThanChance, match=r"not clearly better than a constant answer.*n\.rejected\.safetensors"
    ) as e:
        fit(noise, output, backbone=demo, recipe="instant")
    assert e.value.reason.endswith("or use a larger backbone: this one sees images at 32 x 32 pixels.")
    assert not output.exists()
    assert Adapter.read(tmp_path / "n.rejected.safetensors").labels == ("a", "b")
    assert (tmp_path / "n.report" / "report.html").exists()


def test_rejected_adapter_leaves_an_older_file_untouched(demo: Backbone, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "c.safetensors"
    older = fit(data, output, backbone=demo, recipe="instant").adapter
    grey = dict.fromkeys(("a", "b"), (120, 120, 120))
    noise = coloured_noise(tmp_path / "noise", grey, 10, seed=5)
    with pytest.raises(NotBetterThanChance):
        fit(noise, output, backbone=demo, recipe="instant", overwrite=True)
    assert Adapter.read(output).digest == older.digest


def test_figures_of_the_same_predictions_are_drawn_once_when_karst_is_not_kept(
    demo: Backbone, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def counted(predictions: Predictions) -> Figure:
        drawn.append(len(predictions.targets))
        return draw_confusion(predictions)

    monkeypatch.setattr(html_report, "draw_confusion", counted)
    done = fit(data, tmp_path / "c.safetensors", backbone=demo, config=KarstConfig(kernels=1), karst=QUICK)
    assert done.adapter.config.kernels == 0
    assert drawn == [24]


def test_fit_refuses_other_weights_before_it_reads_images(demo: Backbone, data: Path, tmp_path: Path) -> None:
    class Unread(Watch):
        def reading(self, images: int) -> None:
            raise AssertionError("images are read")

    with pytest.raises(BackboneError, match=rf"'demo' have the fingerprint {demo.fingerprint[:12]}.*0123456789ab"):
        fit(data, tmp_path / "c.safetensors", backbone=demo, fingerprint="0123456789abcdef", watch=Unread())


def test_report_shows_the_accuracy_of_the_version_in_use(demo: Backbone, data: Path, tmp_path: Path) -> None:
    in_use = AccuracyInUse("version 3 of digits", 0.9, (0.77, 0.96), 40, "held-out images")
    done = fit(data, tmp_path / "c.safetensors", backbone=demo, recipe="instant", in_use=in_use)
    page = (done.report / "report.html").read_text()
    assert "in use: version 3 of digits, 40 held-out images of its own" in page
    assert "77.0% to 96.0%" in page
    numbers = json.loads((done.report / "report.json").read_text())
    assert numbers["in_use"] | {"name": "version 3 of digits", "images": 40} == numbers["in_use"]
    assert "in_use" not in done.metrics


def test_accuracy_in_use_names_only_known_figures() -> None:
    assert AccuracyInUse("a", 0.5, None, None, "test images").sentence == "a: 50.0% of test images of its own"
    full = AccuracyInUse("a", 0.5, (0.25, 0.75), 8, "test images")
    assert full.sentence == "a: 50.0% of 8 test images of its own (95 % interval 25.0% to 75.0%)"


@pytest.mark.parametrize("option", ["val_fraction", "devices", "resume"])
def test_option_of_the_paper_recipe_is_refused_by_name(demo: Backbone, data: Path, tmp_path: Path, option: str) -> None:
    values = {"val_fraction": 0.1, "devices": 2, "resume": True}
    with pytest.raises(ConfigError, match=f"{option} belongs to the recipe `paper`"):
        fit(data, tmp_path / "c.safetensors", backbone=demo, **{option: values[option]})  # type: ignore[arg-type]


def test_fit_refuses_to_replace_an_earlier_result_until_it_may_overwrite(
    demo: Backbone, data: Path, tmp_path: Path
) -> None:
    class Unread(Watch):
        def reading(self, images: int) -> None:
            raise AssertionError("images are read")

    output = tmp_path / "c.safetensors"
    first = fit(data, output, backbone=demo, recipe="instant")
    with pytest.raises(DataError, match=r"c\.safetensors exists, from an earlier training.*overwrite=True"):
        fit(data, output, backbone=demo, recipe="instant", watch=Unread())
    output.unlink()
    with pytest.raises(DataError, match=r"c\.report/report\.json exists"):
        fit(data, output, backbone=demo, recipe="instant", watch=Unread())
    again = fit(data, output, backbone=demo, recipe="instant", overwrite=True)
    assert Adapter.read(output).digest == again.adapter.digest
    assert again.adapter.labels == first.adapter.labels


def test_fit_refuses_to_replace_a_rejected_adapter(demo: Backbone, data: Path, tmp_path: Path) -> None:
    (tmp_path / "c.rejected.safetensors").write_bytes(b"kept")
    with pytest.raises(DataError, match=r"c\.rejected\.safetensors exists"):
        fit(data, tmp_path / "c.safetensors", backbone=demo, recipe="instant")
    assert (tmp_path / "c.rejected.safetensors").read_bytes() == b"kept"


class Named(Watch):
    """Record of the backbone that a training takes."""

    def using(self, backbone: str, origin: str) -> None:
        self.named = backbone, origin


def test_fit_takes_the_backbone_of_hub_backbone(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Named()
    monkeypatch.setenv("HUB_BACKBONE", "no_such_model")
    with pytest.raises(BackboneError, match="no_such_model"):
        fit(data, tmp_path / "c.safetensors", recipe="instant", watch=watch)
    assert watch.named == ("no_such_model", "from HUB_BACKBONE")
    monkeypatch.setenv("HUB_BACKBONE", "demo")
    monkeypatch.setenv("HUB_CHECKPOINT", str(tmp_path / "missing.safetensors"))
    with pytest.raises(BackboneError, match=r"missing\.safetensors"):
        fit(data, tmp_path / "c.safetensors", recipe="instant")
    monkeypatch.setenv("HUB_IMAGE_SIZE", "big")
    with pytest.raises(BackboneError, match="HUB_IMAGE_SIZE is 'big'"):
        fit(data, tmp_path / "c.safetensors", recipe="instant")


def test_fit_names_the_demo_backbone_when_nothing_selects_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HUB_BACKBONE", "HUB_CHECKPOINT", "HUB_IMAGE_SIZE", "HUB_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    watch = Named()
    done = fit(data, tmp_path / "c.safetensors", recipe="instant", watch=watch)
    assert done.adapter.backbone == "demo"
    assert watch.named == ("demo", "the default; HUB_BACKBONE or `backbone=` selects another one")


def test_fit_keeps_a_given_backbone_beside_hub_backbone(
    demo: Backbone, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_BACKBONE", "no_such_model")
    monkeypatch.setenv("HUB_CHECKPOINT", str(tmp_path / "missing.safetensors"))
    for backbone in (demo, "demo"):
        done = fit(data, tmp_path / "c.safetensors", backbone=backbone, recipe="instant", overwrite=True)
        assert done.adapter.backbone == "demo"
