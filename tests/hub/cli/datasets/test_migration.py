"""The scripts of docs/migrate.md: from another service's images to an answer of the hub."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support.models import coloured_noise

from .conftest import COLOURS, Run, read

DOC = (Path(__file__).parents[4] / "docs" / "migrate.md").read_text(encoding="utf-8")
AZURE, MANIFEST = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
PROJECT, KEY = "bc3f7dad-5544-468c-8573-3ef04d55463e", "training-key"


class CustomVision(BaseHTTPRequestHandler):
    """Custom Vision's training API, as its reference describes it: pages of tagged images, and their files."""

    images: list[tuple[Path, list[str]]]  # file, tags

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if address.path.startswith("/blob/"):
            assert "Training-Key" not in self.headers, "the key went to the store of the files"
            self._send(self.images[int(address.path.removeprefix("/blob/"))][0].read_bytes(), "image/png")
            return
        assert address.path == f"/customvision/v3.3/training/projects/{PROJECT}/images/tagged"
        assert self.headers["Training-Key"] == KEY
        query = {name: int(values[0]) for name, values in parse_qs(address.query).items()}
        assert query["take"] <= 256
        page = range(len(self.images))[query["skip"] :][: min(query["take"], 4)]  # short pages, so that there are some
        self._send(json.dumps([self._image(number) for number in page]).encode(), "application/json")

    def _image(self, number: int) -> dict[str, Any]:
        return {
            "id": f"00000000-0000-0000-0000-{number:012}",
            "created": "2024-01-31T20:18:26Z",
            "width": 32,
            "height": 32,
            "originalImageUri": f"http://{self.headers['Host']}/blob/{number}?sig=secret",
            "tags": [{"tagId": name, "tagName": name, "created": "2024-01-31"} for name in self.images[number][1]],
        }

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def photos(tmp_path: Path) -> list[tuple[Path, list[str]]]:
    """Twelve image files with a tag each."""
    folder = coloured_noise(tmp_path / "there", COLOURS, count=6, seed=0)
    return [(path, [path.parent.name]) for path in sorted(folder.glob("*/*"))]


@pytest.fixture
def endpoint(photos: list[tuple[Path, list[str]]]) -> Iterator[str]:
    handler = type("Project", (CustomVision,), {"images": [*photos, (photos[0][0], ["red", "blue"])]})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def download(script: str, folder: Path, *arguments: str, **environment: str) -> str:
    """Run a script of the page in a folder; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def becomes_a_task_that_answers(run: Run, folder: Path) -> None:
    assert "added: 12" in run("images", "add", "crack", folder / "photos").stdout
    assert run("trainings", "start", "crack").exit_code == 0
    image = next((folder / "photos").glob("red/*"))
    assert "red" in run("classify", "crack", image).stdout


def test_a_project_of_custom_vision_becomes_a_task_that_answers(run: Run, endpoint: str, tmp_path: Path) -> None:
    printed = download(AZURE, tmp_path, AZURE_ENDPOINT=endpoint, AZURE_PROJECT=PROJECT, AZURE_TRAINING_KEY=KEY)
    assert printed == "left out: image 00000000-0000-0000-0000-000000000012 has 2 tags: red, blue\n"
    becomes_a_task_that_answers(run, tmp_path)


def test_a_manifest_becomes_a_task_that_answers(run: Run, photos: list[tuple[Path, list[str]]], tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {
            "source-ref": path.as_uri(),
            "anomaly-label": 1,
            "anomaly-label-metadata": {
                "confidence": 1,
                "job-name": "labeling-job/auto-label",
                "class-name": label,
                "human-annotated": "yes",
                "creation-date": "2020-11-10T03:37:09.600",
                "type": "groundtruth/image-classification",
            },
        }
        for path, (label,) in photos
    ]
    manifest = tmp_path / "train.manifest"
    manifest.write_text("\n".join(json.dumps(line) for line in [*lines, {"source-ref": "s3://bucket/new.png"}]) + "\n")
    assert download(MANIFEST, tmp_path, str(manifest)) == "left out: s3://bucket/new.png has no label\n"
    becomes_a_task_that_answers(run, tmp_path)
    assert len(read(run("images", "list", "crack", "--json"))["images"]) == 12
