"""docs/operate.md: nginx in front of the hub, and a second hub on a copy of a running hub's home."""

import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from adapters import Adapter
from hub.client.client import Client
from hub.local.ports import free_port
from tests.support.hub_process import serve
from tests.support.models import png
from tests.support.nginx import deployed_site, nginx

from .conftest import HOST, SharedHub


@pytest.fixture
def proxied(hub: SharedHub, tmp_path: Path) -> Iterator[tuple[str, ssl.SSLContext]]:
    """Run nginx with deploy/nginx.conf, with other ports, host and certificate; return its URL and its certificate."""
    url = f"https://{HOST}:{free_port()}"
    site = deployed_site(tmp_path, url, httpx.URL(hub.url).port or 0)
    with nginx(tmp_path, site, url) as trusted:
        yield url, trusted


def test_clients_work_through_nginx(
    proxied: tuple[str, ssl.SSLContext], hub: SharedHub, adapters: list[Adapter], tmp_path: Path
) -> None:
    url, trusted = proxied
    photo = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photo, compress_level=0)
    assert photo.stat().st_size > 8_000_000
    with httpx.Client(base_url=url, verify=trusted, timeout=60) as http:
        owner = {"authorization": f"Bearer {hub.tenant('behind-nginx')}"}
        made = http.post("/v1/tasks/a/versions", content=adapters[0].data, headers=owner)
        assert made.status_code == 201
        answer = http.post("/v1/tasks/a/classify", content=photo.read_bytes(), headers=owner)
        assert answer.status_code == 200
        assert "decode;dur=" in answer.headers["server-timing"]
        refused = http.post("/v1/tasks/a/classify", content=photo.read_bytes())
        assert refused.status_code == 401
        assert refused.headers["content-type"] == "application/problem+json"


@pytest.mark.slow
def test_copy_of_a_running_hubs_home_is_a_backup(hub: SharedHub, adapters: list[Adapter], tmp_path: Path) -> None:
    with Client(hub.url, hub.key) as client:
        client.register("kept-in-backup", adapters[1].data, alias="stable")
        tasks, answer = client.tasks(), client.classify("kept-in-backup", [png(3)])
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in ("redis", "store"):
        subprocess.run(["cp", "-a", str(hub.home / part), str(copy)], check=True)
    served = serve(copy, free_port())
    try:
        assert (served.key, served.admin_key) == (None, None)
        with Client(served.url, hub.key) as client:
            assert client.tasks() == tasks
            restored = client.classify("kept-in-backup", [png(3)])
        assert restored.digest == answer.digest
        assert [p.label for p in restored.predictions[0]] == [p.label for p in answer.predictions[0]]
    finally:
        served.stop()
