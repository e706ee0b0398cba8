"""A start against proxies, long paths, few open files, no home and an ASCII locale; a start after SIGKILL."""

import json
import os
import signal
from pathlib import Path

import httpx
import pytest

from adapters import load_backbone
from hub.client.client import Client
from hub.local.ports import free_port
from hub.local.run_folder import RECORD
from tests.support.hub_process import alive, command, descendants, serve
from tests.support.models import listens, png, random_adapter, wait_until

pytestmark = pytest.mark.slow

# A user without an entry in /etc/passwd; the capability only lets it read the virtual environment and the checkout.
NAMELESS = (
    *("setpriv", "--reuid", "12345", "--clear-groups"),
    *("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"),
)
OPEN_FILES = 1024
ENVIRONMENT = {
    **dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    "no_proxy": "",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a hub as another user")
def test_a_hub_starts_in_a_hostile_environment_and_after_sigkill(tmp_path: Path) -> None:
    home, temporary, port = tmp_path / "home", tmp_path / ("t" * 61), free_port()
    for folder in (home, temporary):
        folder.mkdir()
        os.chown(folder, 12345, 12345)
    without = [f"--unset={name}" for name in ("HOME", "USER", "LOGNAME")]
    prefix = ["prlimit", f"--nofile={OPEN_FILES}:{OPEN_FILES}", *NAMELESS, "env", *without]
    variables = ENVIRONMENT | {"TMPDIR": str(temporary), "HUB_LOG_LEVEL": "debug"}

    first = serve(home, port, prefix=prefix, **variables)
    assert first.key is not None
    group = descendants(first.process.pid)
    folder = Path((home / RECORD).read_text())
    try:
        assert httpx.get(f"{first.url}/readyz", trust_env=False).status_code == 200
        with Client(first.url, first.key, retry_s=0) as client:
            client.register("task", random_adapter(load_backbone("demo")).data)
            answer = client.classify("task", [png()])
        wait_until(lambda: "/v1/tasks/task/classify" in first.logged(), 20, "the request's line in the hub's log")
    finally:
        first.process.send_signal(signal.SIGKILL)
        first.process.communicate()
    wait_until(lambda: not listens(port), 60, "the end of the killed hub's HAProxy")
    assert folder.is_dir()  # Ray's agents stay for a minute

    second = serve(home, port, prefix=prefix, **variables)
    assert not folder.exists()
    assert [command(pid) for pid in group if alive(pid)] == []
    assert (second.key, second.admin_key) == (None, None)
    with Client(second.url, first.key, retry_s=0) as client:
        assert client.classify("task", [png()]).digest == answer.digest
    second.stop()
    assert not (home / RECORD).exists()
    assert list(temporary.iterdir()) == []
    lines = [json.loads(line) for line in second.logged().splitlines()]
    # On a busy machine an answer of Redis may take longer than its time limit.
    assert [line for line in lines if line["level"] == "error" and "TimeoutError" not in line["message"]] == []
    said = {line["message"].split(":")[0] for line in lines}
    assert {"starting", "The console", "ready; press Ctrl-C to stop", "stopping"} <= said
