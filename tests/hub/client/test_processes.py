"""Clients in forked processes, in several event loops, in threads, and pickled."""

import asyncio
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hub import AsyncClient, Client
from hub.schemas import TaskInfo
from tests.support.clients import server

PROCESSES, CALLS = 4, 60

# Uses the client, forks, and uses it in every process at the same time. Prints the number of wrong answers.
FORKING = """
import asyncio, os, sys
from concurrent.futures import ThreadPoolExecutor
from hub import AsyncClient, Client

url, kind = sys.argv[1:3]

def calls(client, process):
    return sum(client.task(f"{process}-{i}").task != f"{process}-{i}" for i in range(%(calls)d))

async def async_calls(client, process):
    found = await asyncio.gather(*(client.task(f"{process}-{i}") for i in range(%(calls)d)))
    return sum(task.task != f"{process}-{i}" for i, task in enumerate(found))

def run(client, process):
    return calls(client, process) if kind == "Client" else asyncio.run(async_calls(client, process))

client = Client(url, "kh_x") if kind == "Client" else AsyncClient(url, "kh_x")
wrong = run(client, "before")
children = []
for process in range(%(processes)d):
    child = os.fork()
    if child == 0:
        os._exit(min(run(client, process), 99))
    children.append(child)
wrong += run(client, "parent")
wrong += sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
if kind == "Client":
    if os.fork() == 0:
        client.close()
        os._exit(0)
    os.wait()
    wrong += calls(client, "after-a-child-closed")
    client.close()
    child = os.fork()
    if child == 0:
        try:
            client.task("x")
        except RuntimeError as error:
            os._exit(0 if "is closed" in str(error) else 98)
        os._exit(97)
    wrong += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(wrong)
"""


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    """Yield the URL of a server that answers with the name of the requested task."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[1]
            body = TaskInfo(task=name, labels=[], versions=[], aliases={}).model_dump_json().encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 100

        def handle_error(self, request: object, client_address: object) -> None:
            """A process that ends closes its connections."""

    http = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
def test_forked_processes_get_their_own_answers_when_the_client_was_used_before(kind: str, echo: str) -> None:
    script = FORKING % {"calls": CALLS, "processes": PROCESSES}
    done = subprocess.run([sys.executable, "-c", script, echo, kind], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 0)


def test_async_client_works_when_a_second_loop_uses_it(echo: str) -> None:
    """In a process of its own: asyncio warns of connections that their closed loop left open."""
    script = """
import asyncio, sys
from hub import AsyncClient

client = AsyncClient(sys.argv[1], "kh_x")
names = [asyncio.run(client.task(name)).task for name in "abc"]

async def end():
    names.append((await client.task("d")).task)
    await client.aclose()
    try:
        await client.task("e")
    except RuntimeError as error:
        names.append(str(error))

asyncio.run(end())
print(names)
"""
    done = subprocess.run([sys.executable, "-c", script, echo], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.startswith("['a', 'b', 'c', 'd', 'this AsyncClient is closed; create a new one")


def test_threads_share_a_client(echo: str) -> None:
    found: dict[int, list[str]] = {}
    with Client(echo, "kh_x") as client:

        def calls(thread: int) -> None:
            found[thread] = [client.task(f"{thread}-{i}").task for i in range(20)]

        threads = [threading.Thread(target=calls, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {thread: [f"{thread}-{i}" for i in range(20)] for thread in range(8)}


def test_pickling_a_client_raises_type_error_with_the_remedy() -> None:
    message = r"^a Client cannot be pickled, since it holds connections; create one in each process$"
    with Client("http://127.0.0.1:9", "kh_x") as client, pytest.raises(TypeError, match=message):
        pickle.dumps(client)


def test_a_client_makes_one_connection_when_calls_follow_each_other() -> None:
    """Otherwise each call would pay for a new connection."""
    reply = TaskInfo(task="a", labels=[], versions=[], aliases={}).model_dump_json().encode()
    with server((200, {}, reply)) as told, Client(told.url, "kh_x") as client:
        for _ in range(3):
            client.task("a")
        assert told.connections == 1

    async def calls(url: str) -> None:
        async with AsyncClient(url, "kh_x") as client:
            for _ in range(3):
                await client.task("a")

    with server((200, {}, reply)) as told:
        asyncio.run(calls(told.url))
        assert told.connections == 1
