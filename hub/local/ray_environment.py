"""Environment variables of a local hub. Ray, uvicorn and OpenMP read them when they are imported."""

import os
import pwd
import secrets
from collections.abc import Mapping
from pathlib import Path

from ..cluster.haproxy_node import HAProxyUnavailable, install_haproxy
from ..cluster.ray_compat import LOOPBACK, haproxy_switches, ray_switches, stock_proxy_switches
from ..settings import Settings
from .errors import StartError
from .ports import free_port

STOCK_PROXY_MIDDLEWARE = "hub.api.stock_proxy:stock_proxy_middleware"


LOCAL_NAMES = ("localhost", LOOPBACK, "::1")


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
    environment = ray_switches(token_file, metrics=settings.metrics_port is not None) | {
        # Ray sets one thread per actor where this is not set; the workers divide the cores themselves.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1)),
        # Threads that wait for each other spin briefly, so that gateway and proxy get their cores.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
        # Proxies whose X-Forwarded-For uvicorn trusts.
        "FORWARDED_ALLOW_IPS": LOOPBACK if settings.haproxy else ",".join(settings.trusted_proxies),
        **no_proxy(os.environ),
        **home_variables(settings.home),
        # Ray writes HAProxy's configuration in the locale's encoding, and it has characters beyond ASCII.
        "PYTHONUTF8": "1",
    }
    if not settings.haproxy:
        return environment | stock_proxy_switches(STOCK_PROXY_MIDDLEWARE)
    try:
        haproxy = install_haproxy(settings, settings.host, run_folder)
    except (OSError, HAProxyUnavailable) as error:
        raise StartError(str(error)) from error
    return environment | haproxy_switches(haproxy, run_folder, fallback_port=free_port())


def no_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables with which no local call goes to the proxy of `http_proxy` and its relatives.

    gRPC reads the lower-case name, and Ray Serve calls workers by gRPC.
    """
    given = [name for variable in ("no_proxy", "NO_PROXY") for name in environment.get(variable, "").split(",")]
    names = ",".join(dict.fromkeys(name.strip() for name in (*given, *LOCAL_NAMES) if name.strip()))
    found = {"no_proxy": names, "NO_PROXY": names}
    if own := environment.get("no_grpc_proxy"):  # gRPC then ignores `no_proxy`
        found["no_grpc_proxy"] = ",".join([own, *LOCAL_NAMES])
    return found


def home_variables(home: Path) -> dict[str, str]:
    """Return variables for a user without an entry in the password database; nothing for any other user.

    Without HOME, libraries would create a folder named `~`. Without a name they fail.
    """
    try:
        pwd.getpwuid(os.getuid())
        return {}
    except KeyError:
        defaults = {"HOME": str(home), "LOGNAME": str(os.getuid())}
        return {name: os.environ.get(name) or value for name, value in defaults.items()}
