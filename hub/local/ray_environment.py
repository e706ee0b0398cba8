"""Environment variables of a local hub. Ray, uvicorn and OpenMP read them when they are imported."""

import os
import secrets
from pathlib import Path

from ..cluster.haproxy_node import HAProxyUnavailable, install_haproxy
from ..cluster.ray_compat import LOOPBACK, haproxy_switches, ray_switches, stock_proxy_switches
from ..settings import Settings
from .errors import StartError
from .ports import free_port

STOCK_PROXY_MIDDLEWARE = "hub.api.security_headers:stock_proxy_middleware"


def ray_environment(settings: Settings, run_folder: Path) -> dict[str, str]:
    """Return the variables of this hub, and write Ray's token and HAProxy's files into its folder.

    Args:
        run_folder: private folder; with a folder each, two hubs can share a machine.

    Raises:
        StartError: HAProxy is required but not installed, or its certificate cannot be read.
    """
    token_file = run_folder / "ray-token"
    token_file.touch(0o600)
    token_file.write_text(secrets.token_hex(32))
    environment = ray_switches(token_file) | {
        # Ray sets one thread per actor where this is not set; the workers divide the cores themselves.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1)),
        # Threads that wait for each other spin briefly, so that gateway and proxy get their cores.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
        # Proxies whose X-Forwarded-For uvicorn trusts.
        "FORWARDED_ALLOW_IPS": LOOPBACK if settings.haproxy else ",".join(settings.trusted_proxies),
    }
    if not settings.haproxy:
        return environment | stock_proxy_switches(STOCK_PROXY_MIDDLEWARE)
    try:
        haproxy = install_haproxy(settings, settings.host, run_folder)
    except (OSError, HAProxyUnavailable) as error:
        raise StartError(str(error)) from error
    return environment | haproxy_switches(haproxy, run_folder, fallback_port=free_port())
