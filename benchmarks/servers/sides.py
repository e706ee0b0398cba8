"""Every contender from outside: how to start it, how to add a task, the bytes of a call, and the answer in a reply."""

import base64
import json
import os
import struct
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from hub.admin_schemas import LimitsChange
from hub.client.client import Client
from hub.local.ports import free_port

from ..load import Address, Connection, Reply, request
from .inputs import Inputs

HERE = Path(__file__).parent
START_S = 180
NO_LIMITS = LimitsChange(
    requests_per_second=1e6, images_per_second=1e7, images_in_flight=10**6, tasks=10**6, versions=10**5
)
Answer = tuple[str, float]


class Side(ABC):
    """A running server; `with_tasks` makes tasks 0 to n - 1 callable."""

    def __init__(self, inputs: Inputs, folder: Path, rivals: Path, kept: int) -> None:
        self.inputs, self.folder, self.rivals, self.kept = inputs, folder, rivals, kept
        self.port = free_port()
        self.tasks = 0

    @property
    def address(self) -> Address:
        return "127.0.0.1", self.port

    @abstractmethod
    def command(self) -> tuple[list[str], dict[str, str]]:
        """Return the command and its environment variables."""

    @abstractmethod
    def prepare(self, number: int) -> None:
        """Make a task's weights, which is not part of the time to add it."""

    @abstractmethod
    def add(self, number: int) -> None:
        """Make one task callable."""

    @abstractmethod
    def message(self, task: int, image: bytes) -> bytes:
        """Return the bytes of a call."""

    @abstractmethod
    def answer(self, reply: Reply) -> Answer:
        """Return label and score."""

    def ready(self) -> None:  # noqa: B027 (most servers need nothing)
        """Prepare the server after its start."""

    def with_tasks(self, count: int) -> None:
        for number in range(self.tasks, count):
            self.add(number)
        self.tasks = max(self.tasks, count)


class Rival(Side):
    """A server of `contenders`: a new task is a new file."""

    script = ""

    def command(self) -> tuple[list[str], dict[str, str]]:
        self.inputs.write(self.folder)
        python = str(self.rivals / "bin" / "python")
        return [python, self.script], {
            "SERVERS_FOLDER": str(self.folder),
            "SERVERS_PORT": str(self.port),
            "SERVERS_MODELS_KEPT": str(self.kept),
            "BENTOML_DO_NOT_TRACK": "True",
        }

    def prepare(self, number: int) -> None:
        self.inputs.task_file(number)

    def add(self, number: int) -> None:
        os.link(self.inputs.task_file(number), self.folder / "tasks" / f"task{number}.safetensors")

    def answer(self, reply: Reply) -> Answer:
        found = json.loads(reply.body)
        found = found[0] if isinstance(found, list) else found
        return found["label"], found["score"]


class FastApi(Rival):
    script = "fastapi_timm.py"

    def message(self, task: int, image: bytes) -> bytes:
        return request("POST", f"/classify/task{task}", image, content_type="application/octet-stream")


class LitServe(Rival):
    script = "litserve_app.py"

    def message(self, task: int, image: bytes) -> bytes:
        body = json.dumps({"task": f"task{task}", "image": base64.b64encode(image).decode()}).encode()
        return request("POST", "/classify", body, content_type="application/json")


class BentoMl(Rival):
    def command(self) -> tuple[list[str], dict[str, str]]:
        _, environment = super().command()
        program = str(self.rivals / "bin" / "bentoml")
        return [
            program,
            "serve",
            "bentoml_app:Classifier",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ], environment

    def message(self, task: int, image: bytes) -> bytes:
        body = json.dumps({"calls": [{"task": f"task{task}", "image": base64.b64encode(image).decode()}]}).encode()
        return request("POST", "/classify", body, content_type="application/json")


class PyTriton(Rival):
    """The stub of Triton's Python backend (nvidia-pytriton 0.7.0) has the core of an older Python 3.11.

    It fails with the standard library of 3.11.7, so an older 3.11 runs this server (install.sh).
    """

    script = "pytriton_app.py"

    def command(self) -> tuple[list[str], dict[str, str]]:
        command, environment = super().command()
        older = self.rivals / "triton" / "bin" / "python"
        if not older.exists():
            return command, environment
        packages = next((self.rivals / "lib").glob("python*/site-packages"))
        return [str(older), self.script], environment | {"LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs")}

    def message(self, task: int, image: bytes) -> bytes:
        parts = {
            name: struct.pack("<I", len(data)) + data for name, data in (("task", b"task%d" % task), ("image", image))
        }
        head = {
            "inputs": [
                {"name": name, "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
                for name, data in parts.items()
            ],
            "outputs": [{"name": name, "parameters": {"binary_data": False}} for name in ("label", "score")],
        }
        text = json.dumps(head).encode()
        length = {"inference_header_content_length": str(len(text)), "content_type": "application/octet-stream"}
        return request("POST", "/v2/models/classifier/infer", text + b"".join(parts.values()), **length)

    def answer(self, reply: Reply) -> Answer:
        found = {output["name"]: output["data"][0] for output in json.loads(reply.body)["outputs"]}
        return found["label"], found["score"]


class RayServe(Rival):
    script = "ray_serve_app.py"

    def message(self, task: int, image: bytes) -> bytes:
        return request("POST", "/classify", image, serve_multiplexed_model_id=f"task{task}")


class KarstHub(Side):
    """`karst-hub serve` with a new home; a new task is a registration over HTTP."""

    def command(self) -> tuple[list[str], dict[str, str]]:
        self.inputs.write(self.folder)
        return [str(Path(sys.executable).with_name("karst-hub")), "serve"], {
            "HUB_HOME": str(self.folder / "home"),
            "HUB_PORT": str(self.port),
            "HUB_BACKBONE": self.inputs.name,
            "HUB_CHECKPOINT": str(self.folder / "backbone.safetensors"),
            "HUB_IMAGE_SIZE": str(self.inputs.size_px),
            "HUB_SLOTS": str(self.inputs.slots),
            "HUB_MAX_RANK": str(self.inputs.config.rank),
            "HUB_MAX_KERNELS": str(max(1, self.inputs.config.kernels)),
            "HUB_LOG_LEVEL": "warning",
        }

    def ready(self) -> None:
        self.prepared: dict[int, bytes] = {}
        lines = (self.folder / "home" / "first-keys").read_text().splitlines()
        keys = dict(line.split("=", 1) for line in lines)
        with Client(f"http://127.0.0.1:{self.port}", keys["HUB_ADMIN_KEY"]) as admin:
            admin.change_limits("default", NO_LIMITS)
        self.key = keys["HUB_KEY"]
        self.client = Client(f"http://127.0.0.1:{self.port}", self.key)

    def prepare(self, number: int) -> None:
        self.prepared = {number: self.inputs.adapter(number).data}

    def add(self, number: int) -> None:
        if number not in self.prepared:
            self.prepare(number)
        self.client.register(f"task{number}", self.prepared[number])

    def message(self, task: int, image: bytes) -> bytes:
        path = f"/v1/tasks/task{task}/classify?top_k=1"
        return request("POST", path, image, authorization=f"Bearer {self.key}", content_type="image/jpeg")

    def answer(self, reply: Reply) -> Answer:
        found = json.loads(reply.body)["predictions"][0][0]
        return found["label"], found["score"]


SIDES: dict[str, type[Side]] = {
    "karst-hub": KarstHub,
    "FastAPI": FastApi,
    "LitServe": LitServe,
    "BentoML": BentoMl,
    "PyTriton": PyTriton,
    "Ray Serve": RayServe,
}
PACKAGES: Mapping[str, str] = {
    "FastAPI": "fastapi",
    "LitServe": "litserve",
    "BentoML": "bentoml",
    "PyTriton": "pytriton",
    "Ray Serve": "ray.serve",
}


def missing(name: str, rivals: Path) -> str | None:
    """Return the reason why a rival cannot start; None if its package is there."""
    if name not in PACKAGES:
        return None
    python = rivals / "bin" / "python"
    if not python.exists():
        return f"{rivals} does not exist: run benchmarks/servers/install.sh"
    done = subprocess.run([python, "-c", f"import {PACKAGES[name]}"], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


@contextmanager
def running(side: Side, log: Path) -> Iterator[tuple[psutil.Process, float]]:
    """Run a server until it answers its first task correctly; yield its process and the seconds that this took.

    Raises:
        RuntimeError: it ended, or it did not answer in time; the message has the end of its log.
    """
    command, extra = side.command()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HUB_", "RAY_"))}
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=HERE / "contenders" if isinstance(side, Rival) else side.folder,
            env=environment | extra,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    tree = psutil.Process(process.pid)
    try:
        _wait_for_port(side, process, began, log)
        side.ready()
        side.with_tasks(1)
        _wait_for_answer(side, process, began, log)
        yield tree, time.monotonic() - began
    finally:
        _stop(process, tree)


def _wait_for_port(side: Side, process: subprocess.Popen[bytes], began: float, log: Path) -> None:
    text = b""
    while True:
        text = log.read_bytes()
        if isinstance(side, Rival) or b"HUB_URL=" in text:
            try:
                Connection(side.address).close()
                return
            except OSError:
                pass
        _check(process, began, log)


def _wait_for_answer(side: Side, process: subprocess.Popen[bytes], began: float, log: Path) -> None:
    while True:
        last = "no connection"
        try:  # a server may close its port once more while it starts
            connection = Connection(side.address)
            reply = connection.call(side.message(0, side.inputs.images[0]))
            connection.close()
        except OSError as error:
            last = str(error)
        else:
            if reply.status == 200:
                return
            last = f"HTTP {reply.status}: {reply.body[:300]!r}"
        _check(process, began, log, last)


def _check(process: subprocess.Popen[bytes], began: float, log: Path, last: str = "no answer") -> None:
    end = " | ".join(log.read_text(errors="replace").strip().splitlines()[-4:])
    if process.poll() is not None:
        raise RuntimeError(f"it ended with exit code {process.returncode}: {end[-800:]}")
    if time.monotonic() - began > START_S:
        raise RuntimeError(f"not ready after {START_S} s ({last}): {end[-800:]}")
    time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes], tree: psutil.Process) -> None:
    """End the server with SIGTERM, and after a while all processes that it started."""
    try:
        family = [tree, *tree.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=5)
    for one in alive:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def pss_mb(tree: psutil.Process) -> float:
    """Return the memory of a server's processes together; shared pages count once (PSS)."""
    total = 0
    for process in [tree, *tree.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return round(total / 1e6, 1)
