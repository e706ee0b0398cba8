"""Requests made up from the OpenAPI document, by schemathesis: as each kind of caller, with all of its checks.

    python -m tests.fuzz_api [--cases 100] [--seed 0] [--only owner]
    python -m tests.fuzz_api --url http://127.0.0.1:8000 --key kh_... --admin-key kh_...

The HTTP application runs in this process, over a real Redis and store; or it is a running hub, whose tenant of the key
gets two tasks, and which gets a tenant `visitor`. Four callers: anonymous (no key), the visitor, the owner of the tasks
that all of them are after, an admin. `--cases` is the most per operation and phase. `make fuzz` runs it; the suite has
a short run. Exit code 1: an error of the hub, an answer that the document does not have, or one that the caller should
not have got.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import httpx

from adapters import Bank, load_backbone
from hub.local.embedded_redis import embedded_redis
from hub.storage.store import Store

from .support.asgi import listening
from .support.hub_app import OCTETS, Engine, bearer, first_keys_of, make_api
from .support.models import png, random_adapter

HOOKS = "tests.fuzz_api_hooks"
SECRET = "label of the owner alone"
TENANT = "default"
TASKS = ("flowers", "trees")
UNLIMITED = {"requests_per_second": 1e6, "images_per_second": 1e7, "tasks": 10**6}
# Statuses for a request that the schema refuses; 414 is for a label that makes the URL too long.
REFUSED = [400, 401, 403, 404, 405, 406, 409, 414, 415, 422, 428, 429, "5xx"]
# A schema cannot describe these requests: an image, an adapter, a label, an alias that is not a number. The hub may
# refuse one that the schema allows.
BEYOND_SCHEMA = (
    "/v1/classify",
    "/v1/tasks/{task}/aliases/{alias}",
    "/v1/tasks/{task}",
    "/v1/tasks/{task}/classify",
    "/v1/tasks/{task}/dataset/rename-label",
    "/v1/tasks/{task}/feedback",
    "/v1/tasks/{task}/images",
    "/v1/tasks/{task}/images/{digest}",
    "/v1/tasks/{task}/sharing",
    "/v1/tasks/{task}/trainings",
    "/v1/tasks/{task}/versions",
    "/v1/admin/keys",
    "/v1/tenants/{tenant}/import",
    "/v1/tenants/{tenant}/keys",
    "/v2/models/{task}/infer",
    "/v2/models/{task}/versions/{version}/infer",
    "/models/{task}",
)
# After a garbage collection the store refuses the same file for a while: 503 with Retry-After.
STORING = ("/v1/tasks/{task}/versions", "/v1/tenants/{tenant}/import")
NO_SERVER_ERROR = ["2xx", "3xx", "4xx", "503"]
ACCEPTED = ["2xx", "401", "403", "404", "409", "413", "422", "429"]


@dataclass(frozen=True)
class Caller:
    """A caller: its key, and tasks, images and trainings that exist, so that requests get beyond the first 404."""

    name: str
    key: str | None
    digests: tuple[str, ...]
    trainings: tuple[str, ...]
    tasks: tuple[str, ...] = TASKS


@dataclass(frozen=True)
class Outcome:
    """The results of a caller's requests; `said` is schemathesis's own report."""

    caller: str
    requests: int
    failed: bool
    said: str


@contextmanager
def world() -> Iterator[tuple[str, str, str]]:
    """A running application: its URL, the keys of an owner and of an admin."""
    with tempfile.TemporaryDirectory() as name, embedded_redis(Path(name)) as redis_url:
        store = Path(name) / "store"
        engine = Engine(Bank(load_backbone("demo"), slots=8, max_rank=8, max_kernels=4), Store(str(store)))
        keys = first_keys_of(redis_url)
        with listening(make_api(redis_url, store, engine)) as url:
            yield url, str(keys.owner), str(keys.admin)


def prepare(url: str, key: str, admin_key: str, folder: Path) -> list[Caller]:
    """Two tenants with tasks, and limits that do not get in the way; what the hooks need is written to `folder`."""
    backbone = load_backbone("demo")
    labels = [SECRET, "b", "c"]
    first, second, *others = [
        random_adapter(backbone, seed=i, classes=3, labels=labels if i < 2 else None).data for i in range(5)
    ]
    owner, admin = bearer(key), bearer(admin_key)
    with httpx.Client(base_url=url, timeout=30) as client:
        client.post("/v1/tenants", json={"tenant": "visitor"}, headers=admin)
        for tenant in (TENANT, "visitor"):
            changed = client.patch(f"/v1/tenants/{tenant}", json={"limits": UNLIMITED}, headers=admin)
            changed.raise_for_status()
        for task, adapter in zip((TASKS[0], *TASKS), (first, second, first), strict=True):
            path = f"/v1/tasks/{task}/versions"
            client.post(path, content=adapter, headers=owner | OCTETS).raise_for_status()
        parts = [("rose" if i % 2 else "tulip", (f"{i}.png", png(i))) for i in range(12)]
        digests, trainings = [], []
        for task in TASKS:
            added = client.post(f"/v1/tasks/{task}/images", files=parts, headers=owner).raise_for_status()
            digests += [image["digest"] for image in added.json()["added"]]
            trained = client.post(f"/v1/tasks/{task}/trainings", headers=owner, json={}).raise_for_status()
            trainings.append(trained.json()["id"])
        known = tuple(dict.fromkeys(digests)), tuple(trainings)
        made = client.post("/v1/tenants/visitor/keys", json={"name": "fuzz", "role": "owner"}, headers=admin)
        (folder / "tenant.tar").write_bytes(client.get(f"/v1/tenants/{TENANT}/export", headers=owner).content)
    for i, adapter in enumerate(others):
        (folder / f"{i}.safetensors").write_bytes(adapter)
    (folder / "image.png").write_bytes(png())
    foreign = tuple(f"{TENANT}:{task}" for task in TASKS)
    return [
        Caller("anonymous", None, *known),
        Caller("visitor", made.json()["key"], *known, foreign),
        Caller("owner", key, *known),
        Caller("admin", admin_key, *known),
    ]


def fuzz(url: str, caller: Caller, cases: int, seed: int, folder: Path, *options: str) -> Outcome:
    """All phases of schemathesis as one caller."""
    config = folder / f"{caller.name}.toml"
    config.write_text(_config(caller))
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        f"--config-file={config}",
        "run",
        f"{url}/openapi.json",
        "--checks=all",
        "--mode=all",
        f"--max-examples={cases}",
        f"--seed={seed}",
        "--continue-on-failure",
        "--generation-database=none",
        "--no-color",
        *options,
    ]
    environment = os.environ | {
        "SCHEMATHESIS_HOOKS": HOOKS,
        "FUZZ_CALLER": caller.name,
        "FUZZ_SECRET": SECRET,
        "FUZZ_FOLDER": str(folder),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    # In the folder, since it leaves a cache where it runs.
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    made = re.search(r"(\d+) generated", done.stdout)
    return Outcome(caller.name, int(made[1]) if made else 0, done.returncode != 0, done.stdout + done.stderr)


def _config(caller: Caller) -> str:
    lines = [f'headers = {{ Authorization = "Bearer {caller.key}" }}'] if caller.key else []
    words = {
        "task": caller.tasks,
        "tenant": (TENANT, "visitor"),
        "version": ("1", "2", "latest"),
        "alias": ("latest", "stable"),
        "digest": caller.digests,
        "training": caller.trainings,
    }
    lines.append(f"checks.negative_data_rejection.expected-statuses = {json.dumps(REFUSED)}")
    lines.append("[parameters]")
    lines += [f'"path.{name}" = {{ dictionary = "{name}", probability = 0.6 }}' for name in words]
    lines += [f"[dictionaries.{name}]\nvalues = {json.dumps(values)}" for name, values in words.items()]
    for path in BEYOND_SCHEMA:
        lines += [f"[[operations]]\ninclude-path = {json.dumps(path)}"]
        lines += [f"checks.positive_data_acceptance.expected-statuses = {json.dumps(ACCEPTED)}"]
        if path in STORING:
            lines += [f"checks.not_a_server_error.expected-statuses = {json.dumps(NO_SERVER_ERROR)}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("anonymous", "visitor", "owner", "admin"))
    parser.add_argument("--url")
    parser.add_argument("--key", help=f"of an owner of the tenant {TENANT!r}")
    parser.add_argument("--admin-key")
    options = parser.parse_args()
    running = world() if options.url is None else nullcontext((options.url, options.key, options.admin_key))
    outcomes = []
    with running as (url, key, admin_key), tempfile.TemporaryDirectory() as name:
        for caller in prepare(url, key, admin_key, Path(name)):
            if options.only in (None, caller.name):
                outcomes.append(outcome := fuzz(url, caller, options.cases, options.seed, Path(name)))
                print(outcome.said if outcome.failed else f"{outcome.caller}: {outcome.requests} requests, all well")
    sys.exit(1 if any(outcome.failed for outcome in outcomes) else 0)


if __name__ == "__main__":
    main()
