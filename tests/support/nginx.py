"""A real nginx with TLS in front of a hub."""

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.models import wait_until
from tests.support.tls import certificate

CERTIFICATE, KEY = "cert.pem", "key.pem"  # in the server's folder
DEPLOY = Path(__file__).parents[2] / "deploy"
HUB_ADDRESS = "server 127.0.0.1:8000;"  # in deploy/nginx.conf
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def deployed_site(folder: Path, url: str, hub_port: int) -> str:
    """Return deploy/nginx.conf with another address, host and certificate, for `nginx` with the same folder and URL."""
    site, own = (DEPLOY / "nginx.conf").read_text(), httpx.URL(url)
    for before, after in {
        HUB_ADDRESS: f"server 127.0.0.1:{hub_port};",
        "listen 443 ssl;": f"listen 127.0.0.1:{own.port} ssl;",
        "/etc/ssl/hub.example.org.pem": str(folder / CERTIFICATE),
        "/etc/ssl/private/hub.example.org.key": str(folder / KEY),
        "hub.example.org": own.host,
    }.items():
        assert before in site
        site = site.replace(before, after)
    return site


@contextmanager
def nginx(folder: Path, site: str, url: str) -> Iterator[ssl.SSLContext]:
    """Run nginx until the end of the block; skip the test where it is not installed. Yield a context that trusts it.

    Args:
        folder: for its files. The certificate and its key are there under `CERTIFICATE` and `KEY`.
        site: the configuration inside of `http { }`.
        url: the hub's address at nginx; its host is the certificate's name.
    """
    if shutil.which("nginx") is None:
        pytest.skip("nginx (Debian's package `nginx-light`) is not installed")
    key, cert = certificate(httpx.URL(url).host)
    (folder / CERTIFICATE).write_bytes(cert)
    (folder / KEY).write_bytes(key)
    config = folder / "nginx.conf"
    folders = "".join(f"{name}_temp_path {folder}/{name};\n" for name in TEMPORARY)
    config.write_text(
        f"daemon off;\npid {folder}/pid;\nerror_log stderr warn;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{folders}{site}}}\n"
    )
    trusted = ssl.create_default_context(cafile=folder / CERTIFICATE)
    with subprocess.Popen(["nginx", "-c", str(config), "-p", str(folder)], stderr=subprocess.PIPE) as process:

        def answers() -> bool:
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                return httpx.get(f"{url}/healthz", verify=trusted).status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(answers)
            yield trusted
        finally:
            process.terminate()
