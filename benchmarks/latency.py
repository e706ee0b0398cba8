"""What HTTP, Ray and batching add to a forward pass, and how soon a new adapter answers.

    python -m benchmarks.latency [--rounds 200] [--output FILE]

Starts a hub of its own (demo backbone, one worker, embedded Redis). In each round one classify call over HTTP and
one bare forward pass of the frozen backbone on one image take turns, so whatever else the machine does falls on
both; nothing else is sent meanwhile. Then new adapters (the same numbers under a new digest, so the right answer is
known) are registered one by one: the time from `register` returning to the first correct answer.
"""

import argparse
import json
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters import Adapter, load_backbone
from adapters.backbone import features
from hub.client import Client
from hub.local import free_port, local_hub
from hub.settings import Settings

from .common import machine, spread

OUTPUT = Path(__file__).parent / "results" / "latency.json"
WARM_UP = 30
NEW_ADAPTERS = 20


def main() -> None:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    demo = Path(str(files("adapters.demo")))
    adapter = Adapter.read(demo / "digits.safetensors")
    image = next((demo / "samples" / "digits").glob("*.png"))
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(backbone="demo", home=Path(home), port=free_port(), batch_wait_ms=0)
        with local_hub(settings) as hub:
            assert hub.first_key is not None
            with Client(hub.url, hub.first_key) as client:
                result = calls(client, adapter, image, options.rounds)
                result |= {"first_answer_ms": spread(first_answers(client, adapter, image))}
    result |= {"adapter_bytes": len(adapter.data), "machine": machine()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    print(f"written to {options.output}")


def calls(client: Client, adapter: Adapter, image: Path, rounds: int) -> dict[str, object]:
    """Milliseconds of a call and of a bare forward pass, in turn."""
    backbone = load_backbone("demo")
    pixels = torch.randn(1, *backbone.input_size)
    client.register("digits", adapter.data)
    call_ms, bare_ms = [], []
    for _ in track(range(WARM_UP + rounds), "calls"):
        began = time.perf_counter()
        client.classify("digits", [image], top_k=1)
        call_ms.append(1e3 * (time.perf_counter() - began))
        began = time.perf_counter()
        with torch.inference_mode():
            features(backbone.model, pixels)
        bare_ms.append(1e3 * (time.perf_counter() - began))
    call_ms, bare_ms = call_ms[WARM_UP:], bare_ms[WARM_UP:]
    return {
        "rounds": rounds,
        "call_ms": spread(call_ms),
        "bare_forward_ms": spread(bare_ms),
        "added_ms": spread([call - bare for call, bare in zip(call_ms, bare_ms, strict=True)]),
    }


def first_answers(client: Client, adapter: Adapter, image: Path) -> list[float]:
    """Milliseconds from `register` returning to the first correct answer, for adapters that no worker has seen.

    Raises:
        RuntimeError: an answer that is not the new adapter's.
    """
    expected = client.classify("digits", [image], top_k=1).predictions[0][0].label
    taken_ms = []
    for i in range(NEW_ADAPTERS):
        fresh = Adapter.create(
            adapter.tensors,
            config=adapter.config,
            backbone=adapter.backbone,
            fingerprint=adapter.fingerprint,
            labels=adapter.labels,
            preprocess=adapter.preprocess,
            created=f"2026-01-01T00:00:{i:02d}+00:00",
        )
        client.register(f"new-{i}", fresh.data)
        began = time.perf_counter()
        answer = client.classify(f"new-{i}", [image], top_k=1)
        taken_ms.append(1e3 * (time.perf_counter() - began))
        if (answer.digest, answer.predictions[0][0].label) != (fresh.digest, expected):
            raise RuntimeError(f"wrong answer of new-{i}: {answer}")
    return taken_ms


def show(result: dict) -> None:
    table = Table("", "median", "quartiles")
    for name in ("call_ms", "bare_forward_ms", "added_ms", "first_answer_ms"):
        s = result[name]
        table.add_row(name.replace("_", " "), f"{s['median']:.2f}", f"{s['q1']:.2f} to {s['q3']:.2f}")
    Console().print(table)
    print(f"adapter file: {result['adapter_bytes']} bytes")


if __name__ == "__main__":
    main()
