"""`adapters.fit` in a notebook: a real kernel runs the cells and returns what it would show."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.image_sets import write_digits

nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel run the notebook")
pytest.importorskip("ipykernel", reason="nbclient and ipykernel run the notebook")

TRAIN = """
from adapters import KarstConfig, fit
from adapters.training.steps import KarstRecipe
quick = KarstRecipe(min_steps=5, passes=1, learning_rates=(1e-3,))
done = fit("digits", "digits.safetensors", config=KarstConfig(kernels=1), karst=quick)
"""
PAPER = """
from adapters import Recipe
epochs = Recipe(epochs=2, warmup_epochs=1, batch_size=8, lr=1e-3)
fit("digits", "paper.safetensors", config=KarstConfig(kernels=1), recipe=epochs)
"""
CELLS = [TRAIN, "done", "done.figures['errors']", "done.adapter", TRAIN, PAPER]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Run the cells in a folder with a set of digits; return the outputs of each cell."""
    nbformat: Any = pytest.importorskip("nbformat")
    folder = tmp_path_factory.mktemp("notebook")
    write_digits(folder / "digits", 0, 8)
    (folder / "digits" / "0" / ".DS_Store").write_bytes(b"")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    client = nbclient.NotebookClient(
        notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": str(folder)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        root = Path(__file__).parents[3]
        patch.setenv("PYTHONPATH", str(root), prepend=":")
        patch.setenv("HUB_BACKBONE", "demo")
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        client.execute()
    return [cell.outputs for cell in notebook.cells]


def printed(cell: list[dict[str, Any]]) -> str:
    streams = [output for output in cell if output["output_type"] == "stream"]
    warned = "".join(output["text"] for output in streams if output["name"] == "stderr")
    assert warned == "" or "IProgress not found" in warned  # of tqdm, which asks for ipywidgets
    return "".join(output["text"] for output in streams if output["name"] == "stdout")


def result(cell: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (output["data"] for output in cell if output["output_type"] == "execute_result")
    shown: dict[str, Any] = found
    return shown


@pytest.mark.slow
class TestNotebook:
    def test_cell_shows_progress_backbone_and_warnings(self, outputs: list[list[dict[str, Any]]]) -> None:
        text = printed(outputs[0])
        assert "backbone: demo (from HUB_BACKBONE)" in text
        assert re.search(r"reading images: 100%.*24/24", text)
        assert re.search(r"KARST: +\d+%.*loss \d", text)
        assert "left out: 1 files that macOS, Windows or a NAS added" in text
        assert "24 training images, 0 for validation, 0 held out; 3 classes" in text
        assert "instant: 100.0% of 24 left-out images are right" in text

    def test_result_is_one_line_as_text_and_has_its_figures_inline(self, outputs: list[list[dict[str, Any]]]) -> None:
        shown = result(outputs[1])
        assert len(shown["text/plain"]) < 300
        assert shown["text/plain"].startswith("<Trained digits.safetensors: 3 labels, ")
        assert "100.0% of 24 left-out images" in shown["text/plain"]
        pictures = re.findall(r'<img alt="(\w+)" src="data:image/png;base64,([^"]+)">', shown["text/html"])
        assert [name for name, _ in pictures] == ["curves", "confusion"]
        for _, data in pictures:
            Image.open(io.BytesIO(base64.b64decode(data))).load()

    def test_figure_at_the_end_of_a_cell_is_a_picture(self, outputs: list[list[dict[str, Any]]]) -> None:
        shown = result(outputs[2])
        Image.open(io.BytesIO(base64.b64decode(shown["image/png"]))).load()
        assert re.fullmatch(r"<PNG, [\d,]+ bytes>", shown["text/plain"])

    def test_adapter_is_a_few_hundred_characters(self, outputs: list[list[dict[str, Any]]]) -> None:
        assert len(result(outputs[3])["text/plain"]) < 800

    def test_cell_that_is_run_again_replaces_nothing(self, outputs: list[list[dict[str, Any]]]) -> None:
        (error,) = (output for output in outputs[4] if output["output_type"] == "error")
        assert error["ename"] == "DataError"
        assert "digits.safetensors exists, from an earlier training" in error["evalue"]
        assert "overwrite=True" in error["evalue"]

    def test_training_by_epochs_shows_its_steps_and_figures(self, outputs: list[list[dict[str, Any]]]) -> None:
        text = printed(outputs[5])
        assert re.search(r"training: 100%.*epoch 2, loss \d", text)
        assert "epoch 1: loss " in text
        assert 'alt="confusion"' in result(outputs[5])["text/html"]
