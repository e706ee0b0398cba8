"""From uploaded images to an answer inside the hub, each time beside its target; the results are in docs/datasets.md.

    python -m benchmarks.train_in_hub [--parts instant upload ...] [--output FILE]

* instant: 10 classes of 20 images are in the hub with their features. The time of `POST trainings` with the recipe
  `instant` until the first right answer of the new version over HTTP, beside `karst-hub train --recipe instant` on the
  same images, with the demo backbone and with that of `benchmarks.real_backbone` at 112 pixels.
* correction: 500 images. The time from the change of one label until the version that knows it answers.
* upload: 1,000 JPEG images in forms of 50: images a second until the last reply, and until the last image has its
  features. In turn with it one process decodes and runs a pass on the same images, without HTTP and registry.
* neighbour: the p95 of another tenant's classification, one call after another, alone, while another process uploads
  images of one tenant, and while a training with the recipe `karst` runs.
* page: a page of 100 images out of a dataset of 100,000.

Each backbone has one `karst-hub serve` with its default settings. Ratios compare times of the same run.
"""

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from hub.admin_schemas import LimitsChange
from hub.client.client import Client
from hub.errors import HubError
from hub.local.embedded_redis import embedded_redis
from hub.local.ports import free_port
from hub.registry.audit import OPERATOR
from hub.registry.datasets.entries import NewImage
from hub.registry.datasets.index import DatasetIndex
from hub.registry.redis.connection import RegistryConnection
from tests.support.datasets import unpaced_reads
from tests.support.hub_process import KARST_HUB, Served, serve
from tests.support.models import encoded, wait_until

from . import bare, real_backbone
from .common import machine
from .load import Reply, closed_loop, p95, request

OUTPUT = Path(__file__).parent / "results" / "train_in_hub.json"
REAL_SIDE_PX = 112
CLASSES, PER_CLASS, HELD_OUT = 10, 20, 50
CORRECTED_IMAGES = 500
UPLOADED_IMAGES, FORM_IMAGES = 1000, 50
UPLOADS = 4  # while the other tenant classifies, each of UPLOADED_IMAGES
LISTED_IMAGES, PAGE_IMAGES, ADDED_AT_ONCE = 100_000, 100, 500
ROUNDS, PAGES = 5, 50
ALONE_S, BESIDE_S = 15.0, 30.0
KARST_BUDGET_S = 120
WAIT_S = 600.0
NO_LIMITS = LimitsChange(
    requests_per_second=1e6, images_per_second=1e6, images_in_flight=10**6, images=10**7, image_bytes=10**13
)
# name: (path in the result, target, True if the value must be at most the target, unit)
TARGETS = {
    "instant training to the first right answer, demo": (("instant", "demo", "median_s"), 1.0, True, "s"),
    "instant training to the first right answer, ViT-S/14": (
        ("instant", "vit_s", "median_s"),
        2.0,
        True,
        "s",
    ),
    "one correction of 500 images to a live version": (("correction", "median_s"), 2.0, True, "s"),
    "upload of 1,000 JPEG / decoding and bare pass": (("upload", "ratio"), 0.7, False, ""),
    "another tenant's p95 beside an upload / alone": (("neighbour", "upload_ratio"), 1.5, True, ""),
    "another tenant's p95 beside a KARST training / alone": (("neighbour", "karst_ratio"), 1.5, True, ""),
    "page of 100 images out of 100,000 (p50)": (("page", "median_ms"), 50.0, True, "ms"),
}


@dataclass(frozen=True)
class Labelled:
    """An encoded image."""

    label: str
    data: bytes


@dataclass(frozen=True)
class Stage:
    """A running hub."""

    served: Served
    home: Path
    redis_url: str
    environment: dict[str, str]

    def client(self) -> Client:
        return Client(self.served.url, self.served.key)

    def wait_for_features(self, images: Sequence[bytes]) -> None:
        """Return when each image has its features."""
        names = {f"{hashlib.sha256(image).hexdigest()}.f16" for image in images}
        wait_until(lambda: names <= {path.name for path in self.home.rglob("*.f16")}, WAIT_S)


def main() -> None:
    """Measure, print a line per target, write the JSON file after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("instant", *PARTS), default=["instant", *PARTS])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}

    def keep(part: str, figures: dict[str, Any]) -> None:
        found[part] = {"machine": machine()} | figures
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        print(part, figures, flush=True)

    with hub("demo") as stage:
        demo = instant(stage) if "instant" in options.parts else {}
        for part in PARTS:
            if part in options.parts:
                keep(part, PARTS[part](stage))
    if demo:
        with hub("vit_s") as stage:
            keep("instant", {"demo": demo, "vit_s": instant(stage)})
    print(*verdicts(found), sep="\n")


@contextmanager
def hub(backbone: str) -> Iterator[Stage]:
    """Serve a hub of its own."""
    environment = {"HUB_BACKBONE": "demo"}
    if backbone != "demo":
        environment = {
            "HUB_BACKBONE": real_backbone.NAME,
            "HUB_CHECKPOINT": str(real_backbone.DEFAULT_OUTPUT),
            "HUB_IMAGE_SIZE": str(REAL_SIDE_PX),
        }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        home = Path(folder) / "home"
        (Path(folder) / "redis").mkdir()
        url = stack.enter_context(embedded_redis(Path(folder) / "redis"))
        served = serve(home, free_port(), HUB_REDIS_URL=url, **environment)
        try:
            change = {"limits": NO_LIMITS.model_dump(exclude_none=True)}
            key = {"authorization": f"Bearer {served.admin_key}"}
            httpx.patch(f"{served.url}/v1/tenants/default", json=change, headers=key).raise_for_status()
            yield Stage(served, home, url, environment)
        finally:
            served.stop()


def digits() -> list[Labelled]:
    """Return scikit-learn's handwritten digits as PNG of 64 x 64 pixels."""
    found = load_digits()
    images = []
    for pixels, number in zip(found.images, found.target, strict=True):
        image = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
        images.append(Labelled(str(number), encoded(image, "PNG")))
    return images


def fill(stage: Stage, task: str, images: Sequence[Labelled]) -> None:
    """Make a task with these images, and return when each has its features."""
    with stage.client() as client:
        client.create_task(task)
        for label in sorted({image.label for image in images}):
            client.images.add(task, [image.data for image in images if image.label == label], label=label)
    stage.wait_for_features([image.data for image in images])


def balanced(images: Sequence[Labelled], per_class: int) -> list[Labelled]:
    """Return the first images of each label."""
    return [
        image
        for label in sorted({image.label for image in images})
        for image in [one for one in images if one.label == label][:per_class]
    ]


def instant(stage: Stage) -> dict[str, Any]:
    """Measure trainings of images that are in the hub, beside `karst-hub train` on the same images."""
    images = digits()
    trained, held_out = balanced(images, PER_CLASS), images[-HELD_OUT:]
    fill(stage, "digits", trained)
    seconds, accuracy = [], 0.0
    with stage.client() as client:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            training = client.train("digits")
            answers_of(client, training.version, held_out)
            seconds.append(time.perf_counter() - began)
        labels = [found[0].label for found in client.classify("digits", [one.data for one in held_out]).predictions]
        accuracy = float(np.mean([label == one.label for label, one in zip(labels, held_out, strict=True)]))
    return {
        "images": len(trained),
        "median_s": round(median(seconds), 3),
        "seconds": [round(one, 3) for one in seconds],
        "held_out_accuracy": round(accuracy, 3),
        "command_s": round(command_s(stage, trained), 2),
    }


def answers_of(client: Client, version: int | None, images: Sequence[Labelled]) -> None:
    """Return after the first right answer of a version."""
    for image in images:
        answer = client.classify("digits", [image.data])
        if answer.version == version and answer.predictions[0][0].label == image.label:
            return
    raise RuntimeError(f"version {version} has no right answer")


def command_s(stage: Stage, images: Sequence[Labelled]) -> float:
    """Return the seconds of `karst-hub train` on a folder of these images, its start and its imports included."""
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(images):
            path = Path(folder) / "set" / image.label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image.data)
        output = str(Path(folder) / "digits.safetensors")
        command = [str(KARST_HUB), "train", str(Path(folder) / "set"), "--out", output, "--recipe", "instant"]
        began = time.perf_counter()
        subprocess.run(command, env=os.environ | stage.environment, check=True, stdout=sys.stderr)
        return time.perf_counter() - began


def correction(stage: Stage) -> dict[str, Any]:
    """Measure the time from a changed label to an answer of the version that was trained on it."""
    images = digits()[:CORRECTED_IMAGES]
    fill(stage, "corrected", images)
    seconds = []
    with stage.client() as client:
        client.train("corrected")
        for i in range(ROUNDS):
            digest = hashlib.sha256(images[i].data).hexdigest()
            began = time.perf_counter()
            client.images.label("corrected", digest, "corrected")
            training = client.train("corrected")
            answer = client.classify("corrected", [images[-1].data])
            seconds.append(time.perf_counter() - began)
            if answer.version != training.version:
                raise RuntimeError(f"version {answer.version} answered, not {training.version}")
    return {
        "images": len(images),
        "median_s": round(median(seconds), 3),
        "seconds": [round(one, 3) for one in seconds],
    }


def upload(stage: Stage) -> dict[str, Any]:
    """Measure an upload, in turn with the same work in one process without HTTP."""
    process, rounds = bare.Process(), []
    adapters = process.ask(bare.random_adapters, "demo", 1)
    for i in range(ROUNDS):
        images = pictures(i)
        work = process.ask(bare.work_per_second, "demo", adapters, images[:16], 16, 5.0)
        task = f"upload{i}"
        with stage.client() as client:
            client.create_task(task)
            began = time.perf_counter()
            send(client, task, images)
            replied_s = time.perf_counter() - began
        stage.wait_for_features(images)
        featured_s = time.perf_counter() - began
        rounds.append({"work": work, "replied": len(images) / replied_s, "featured": len(images) / featured_s})
    return {
        "image_bytes": round(float(np.mean([len(image) for image in images]))),
        **{name: round(median(row[name] for row in rounds), 1) for name in rounds[0]},
        "ratio": round(median(row["replied"] / row["work"] for row in rounds), 3),
        "featured_ratio": round(median(row["featured"] / row["work"] for row in rounds), 3),
    }


def send(client: Client, task: str, images: Sequence[bytes]) -> None:
    """Add images in forms of `FORM_IMAGES`, one after another."""
    for start in range(0, len(images), FORM_IMAGES):
        client.images.add(task, images[start : start + FORM_IMAGES], label="a")


def send_all(stage: Stage, task: str, images: Sequence[bytes]) -> None:
    """Add images with a client of this process."""
    with stage.client() as client:
        send(client, task, images)


def pictures(seed: int) -> list[bytes]:
    """Return JPEG images of 320 x 240 pixels like photographs; no two are equal."""
    generator, images = np.random.default_rng(seed), []
    x, y = np.linspace(0, 1, 320), np.linspace(0, 1, 240)[:, None]
    for _ in range(UPLOADED_IMAGES):
        a, b = generator.uniform(0.5, 3, 2)
        wave = np.stack([np.sin(2 * np.pi * (a * x + b * y + c)) for c in generator.uniform(0, 1, 3)], -1)
        pixels = np.clip(128 + 90 * wave + generator.normal(0, 8, wave.shape), 0, 255).astype(np.uint8)
        images.append(encoded(Image.fromarray(pixels), "JPEG", quality=90))
    return images


def neighbour(stage: Stage) -> dict[str, Any]:
    """Measure another tenant's p95 alone, beside an upload, and beside a training."""
    admin = {"authorization": f"Bearer {stage.served.admin_key}"}
    tenants = f"{stage.served.url}/v1/tenants"
    httpx.post(tenants, json={"tenant": "victim"}, headers=admin).raise_for_status()
    key = httpx.post(f"{tenants}/victim/keys", json={"name": "victim", "role": "owner"}, headers=admin)
    key.raise_for_status()
    images = digits()
    with Client(stage.served.url, key.json()["key"]) as victim:
        victim.create_task("digits")
        for label in map(str, range(CLASSES)):
            own = [image.data for image in images if image.label == label][:PER_CLASS]
            victim.images.add("digits", own, label=label)
        victim.train("digits")
    call = request(
        *("POST", "/v1/tasks/digits/classify", images[-1].data),
        authorization=f"Bearer {key.json()['key']}",
        content_type="application/octet-stream",
    )

    def replies(seconds: float) -> list[Reply]:
        host, port = httpx.URL(stage.served.url).host, httpx.URL(stage.served.url).port or 80
        return closed_loop((host, port), [call], 1, seconds)

    replies(3.0)
    alone = [p95(replies(ALONE_S))]
    with stage.client() as client:
        client.create_task("crowd")
    data = [image for seed in range(99, 99 + UPLOADS) for image in pictures(seed)]
    # A process of its own: beside it a thread would slow the victim's client.
    sending = multiprocessing.get_context("fork").Process(target=send_all, args=(stage, "crowd", data))
    began = time.perf_counter()
    sending.start()
    beside: list[Reply] = []
    while sending.is_alive():
        beside += replies(1.0)
    sending.join()
    upload_s, beside_upload = time.perf_counter() - began, p95(beside)
    if sending.exitcode != 0:
        raise SystemExit("the upload failed")
    stage.wait_for_features(data)
    alone.append(p95(replies(ALONE_S)))
    with stage.client() as client:
        fill(stage, "trained", balanced(images, PER_CLASS + 1))
        owner = {"authorization": f"Bearer {stage.served.key}"}
        body = {"recipe": "karst", "budget_s": KARST_BUDGET_S}
        started = httpx.post(f"{stage.served.url}/v1/tasks/trained/trainings", json=body, headers=owner)
        started.raise_for_status()
        path = f"{stage.served.url}/v1/tasks/trained/trainings/{started.json()['id']}"

        def stage_of() -> str:
            found = httpx.get(path, headers=owner).json()
            return str((found.get("progress") or {}).get("stage", found["state"]))

        wait_until(lambda: stage_of().startswith(("KARST", "done", "failed")), WAIT_S)
        reached = stage_of()
        beside_karst = p95(replies(BESIDE_S))
        httpx.delete(path, headers=owner).raise_for_status()
    base = median(alone)
    return {
        "alone_ms": round(base, 1),
        "uploaded_per_s": round(len(data) / upload_s, 1),
        "beside_upload_ms": round(beside_upload, 1),
        "beside_karst_ms": round(beside_karst, 1),
        "karst_stage": reached,
        "upload_ratio": round(beside_upload / base, 2),
        "karst_ratio": round(beside_karst / base, 2),
    }


def page(stage: Stage) -> dict[str, Any]:
    """Measure pages of a dataset whose images are written straight into the registry."""
    with stage.client() as client:
        client.create_task("listed")
        asyncio.run(list_images(stage, "listed"))
        taken = []
        for _ in range(PAGES):
            began = time.perf_counter()
            found = client.images.list("listed", label="label 3", count=PAGE_IMAGES)
            taken.append(1e3 * (time.perf_counter() - began))
            if len(found.images) != PAGE_IMAGES:
                raise RuntimeError(f"the page has {len(found.images)} images")
    return {"images": LISTED_IMAGES, "median_ms": round(median(taken), 1)}


async def list_images(stage: Stage, task: str) -> None:
    """Write entries of images without files."""
    connection = RegistryConnection(stage.redis_url)
    index = DatasetIndex(connection, unpaced_reads())
    try:
        for start in range(0, LISTED_IMAGES, ADDED_AT_ONCE):
            entries = [
                NewImage(hashlib.sha256(str(i).encode()).hexdigest(), f"{i}.png", 1000, f"label {i % 10}", None)
                for i in range(start, start + ADDED_AT_ONCE)
            ]
            await index.add(OPERATOR, "default", task, entries, {"files": len(entries)}, audited=True, patience_s=10**6)
    finally:
        await connection.close()


PARTS: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "correction": correction,
    "upload": upload,
    "neighbour": neighbour,
    "page": page,
}


def verdicts(found: dict[str, Any]) -> Iterator[str]:
    """Yield a line per target that was measured."""
    for name, (path, target, at_most, unit) in TARGETS.items():
        value: Any = found
        for step in path:
            value = value.get(step, {}) if isinstance(value, dict) else {}
        if isinstance(value, int | float):
            holds = value <= target if at_most else value >= target
            relation = "at most" if at_most else "at least"
            yield f"{name}: {value} {unit} ({relation} {target:g}: {'holds' if holds else 'does not hold'})"


if __name__ == "__main__":
    try:
        main()
    except HubError as error:
        sys.exit(f"error: {error.detail}")
