"""docs/operate.md: nginx in front of the hub, and a second hub on a copy of a running hub's home."""

import shutil
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
from tests.support.models import png, wait_until
from tests.support.tls import certificate

from .conftest import HOST, SharedHub

pytestmark = pytest.mark.timeout(400)
DEPLOY = Path(__file__).parents[2] / "deploy"
HUB_ADDRESS = "server 127.0.0.1:8000;"


@pytest.fixture
def nginx(hub: SharedHub, tmp_path: Path) -> Iterator[str]:
    """Run nginx with deploy/nginx.conf, with other ports, host and certificate; return its URL."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx (Debian's package `nginx-light`) is not installed")
    key, cert = certificate(HOST)
    (tmp_path / "cert.pem").write_bytes(cert)
    (tmp_path / "key.pem").write_bytes(key)
    site = (DEPLOY / "nginx.conf").read_text()
    port = free_port()
    for before, after in {
        HUB_ADDRESS: f"server 127.0.0.1:{httpx.URL(hub.url).port};",
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "/etc/ssl/hub.example.org.pem": str(tmp_path / "cert.pem"),
        "/etc/ssl/private/hub.example.org.key": str(tmp_path / "key.pem"),
        "hub.example.org": HOST,
    }.items():
        assert before in site
        site = site.replace(before, after)
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off;\npid {tmp_path}/pid;\nerror_log stderr warn;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}{site}}}\n"
    )
    with subprocess.Popen(["nginx", "-c", str(config), "-p", str(tmp_path)], stderr=subprocess.PIPE) as process:
        url, trusted = f"https://{HOST}:{port}", ssl.create_default_context(cafile=tmp_path / "cert.pem")

        def answers() -> bool:
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                return httpx.get(f"{url}/healthz", verify=trusted).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers)
        yield url
        process.terminate()


def test_clients_work_through_nginx(nginx: str, hub: SharedHub, adapters: list[Adapter], tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photo, compress_level=0)
    assert photo.stat().st_size > 8_000_000
    with httpx.Client(
        base_url=nginx, verify=ssl.create_default_context(cafile=tmp_path / "cert.pem"), timeout=60
    ) as http:
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
