"""Contracts with Ray: one test for each undocumented part that the hub uses. A failure names what a release changed."""

import asyncio
import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve
from ray.serve._private import constants, replica
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.config import AutoscalingContext
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import RequestRouter
from ray.serve.schema import ServeDeploySchema

from hub.api.security_headers import RAY_HEADERS
from hub.cluster import app, ray_compat
from hub.cluster.autoscaling import workers_for_load
from hub.local.ports import free_port
from hub.local.ray_environment import STOCK_PROXY_MIDDLEWARE
from hub.worker.replica import Worker
from tests.support.serve import Replica, assigned, pending_call, running, running_router

SERVE_YAML = Path(__file__).parents[3] / "deploy" / "serve.yaml"
DIGESTS = [f"{i:064x}" for i in range(40)]


def in_new_process(code: str, variables: dict[str, str]) -> Any:
    """Return the JSON that Python code prints in a process with these environment variables."""
    command = [sys.executable, "-W", "ignore", "-c", f"import json\n{code}"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_installed_ray_is_of_the_checked_minor_release() -> None:
    assert version("ray").split(".")[:2] == ray_compat.CHECKED_VERSION.split(".")[:2]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("hub.cluster.ray_compat", ["ray", "httpx", "pydantic"]),  # each of Ray's Python workers imports it
        ("hub.local.hub", ["ray", "fastapi", "numpy", "torch"]),  # of `karst-hub serve`, which lasts as long as the hub
    ],
)
def test_a_module_of_long_lived_processes_imports_little(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print(json.dumps([name for name in {absent} if name in sys.modules]))"
    assert in_new_process(code, {}) == []


def test_serve_reads_every_haproxy_switch(tmp_path: Path) -> None:
    switches = ray_compat.haproxy_switches(Path("/bin/true"), tmp_path, 12345)
    code = """
from ray.serve._private import constants
names = [name for name in vars(constants) if name.isupper()]
print(json.dumps({name: str(getattr(constants, name)) for name in names}))
"""
    found = in_new_process(code, switches)
    found["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = found["PROXY_READY_CHECK_TIMEOUT_S"]
    as_read = {"1": ("1", "True", "1.0"), "60": ("60", "60.0")}
    for name, value in switches.items():
        assert found[name] in as_read.get(value, (value,)), name


def test_serve_calls_the_stock_proxy_s_middleware_switch() -> None:
    code = """
from ray.serve._private.http_util import configure_http_middlewares
from ray.serve.config import HTTPOptions
print(json.dumps([m.cls.__module__ for m in configure_http_middlewares(HTTPOptions()).middlewares]))
"""
    modules = in_new_process(code, ray_compat.stock_proxy_switches(STOCK_PROXY_MIDDLEWARE))
    assert {name.split(".")[0] for name in modules} == {"hub"}


def test_loopback_switch_makes_this_machine_s_address_loopback() -> None:
    code = "import ray.util; print(json.dumps(ray.util.get_node_ip_address()))"
    assert in_new_process(code, ray_compat.LOOPBACK_SWITCHES) == ray_compat.LOOPBACK


def test_ray_takes_its_token_from_the_file_of_the_switches(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-secret-of-this-test")
    code = """
from ray._private.authentication.authentication_utils import is_token_auth_enabled, validate_request_token
given = [validate_request_token("Bearer " + token) for token in ("a-secret-of-this-test", "another-secret")]
print(json.dumps([is_token_auth_enabled(), *given]))
"""
    assert in_new_process(code, ray_compat.ray_switches(tmp_path / "token", metrics=False)) == [True, True, False]


def test_ray_reads_the_other_switches_of_every_hub(tmp_path: Path) -> None:
    code = """
from ray._common.usage import usage_lib
from ray._private import ray_constants
print(json.dumps([usage_lib.usage_stats_enabled(), ray_constants.RAY_DEDUP_LOGS_SKIP_REGEX]))
"""
    switches = ray_compat.ray_switches(tmp_path / "token", metrics=False) | {"RAY_AUTH_MODE": "disabled"}
    assert in_new_process(code, switches) == [False, switches["RAY_DEDUP_LOGS_SKIP_REGEX"]]


def test_serve_reads_the_intervals_of_every_hub(tmp_path: Path) -> None:
    code = """
from ray.serve._private import constants
print(json.dumps([constants.CONTROL_LOOP_INTERVAL_S, constants.RAY_SERVE_METRICS_EXPORT_INTERVAL_MS]))
"""
    assert in_new_process(code, ray_compat.ray_switches(tmp_path / "token", metrics=False)) == [0.25, 1000]


def test_ray_and_serve_start_without_pandas_and_pyarrow_in_an_actor_that_can_import_them() -> None:
    code = """
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
@ray.remote
class Actor:
    def imports(self, _argument):
        import sys
        from ray import serve
        before = [name in sys.modules for name in ("pandas", "pyarrow")]
        import pandas, pyarrow
        return [*before, pandas.DataFrame.__name__, pyarrow.Table.__name__]
found = ray.get(Actor.remote().imports.remote("decoded by Ray"))
ray.shutdown()
print(json.dumps(found))
"""
    variables = ray_compat.LOOPBACK_SWITCHES | ray_compat.WORKER_START_SWITCHES
    assert in_new_process(code, variables) == [False, False, "DataFrame", "Table"]


def test_serve_run_asks_often_whether_the_deployments_run() -> None:
    code = """
from ray.serve._private import client
from hub.cluster.ray_compat import frequent_polls
name = "CLIENT_POLLING_INTERVAL_S"
with frequent_polls():
    inside = getattr(client, name)
reads = name in client.ServeControllerClient._wait_for_application_running.__code__.co_names
print(json.dumps([inside, getattr(client, name), reads]))
"""
    assert in_new_process(code, {}) == [0.1, 1.0, True]


def test_the_controller_is_there_once_serve_has_started() -> None:
    code = """
import ray
from ray import serve
from hub.cluster.ray_compat import serve_has_controller
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
before = serve_has_controller()
serve.start(proxy_location="Disabled")
found = [before, serve_has_controller()]
serve.shutdown()
ray.shutdown()
print(json.dumps(found))
"""
    assert in_new_process(code, ray_compat.LOOPBACK_SWITCHES) == [False, True]


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ("contextlib.nullcontext()", [True, True, True, False]),
        ("small_head(metrics=True)", [False, False, False, False]),
        ("small_head(metrics=False)", [False, False, False, True]),
    ],
)
def test_head_has_only_the_processes_of_a_hub_when_it_is_small(context: str, expected: list[bool]) -> None:
    """Without metrics the dashboard's agent, whose command is an argument of the raylet, is minimal."""
    code = f"""
import contextlib, psutil, ray
from hub.cluster.ray_compat import small_head
with {context}:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
commands = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
ray.shutdown()
names = "log_monitor.py", "/monitor.py", "/dashboard.py", "--minimal"
print(json.dumps([any(name in command for command in commands) for name in names]))
"""
    assert in_new_process(code, ray_compat.LOOPBACK_SWITCHES) == expected


def test_a_local_cluster_has_the_private_arguments_the_keys_of_its_node_and_its_files() -> None:
    code = f"""
import ray, sys, tempfile, time
from pathlib import Path
from hub.cluster.ray_compat import RUN_FOLDER_BYTES, actor_logs, cpus_of_this_node, local_cluster_options, process_logs
with tempfile.TemporaryDirectory(dir="/tmp", prefix="karst-hub-", ignore_cleanup_errors=True) as name:
    folder = Path(name)
    options = local_cluster_options({(port := free_port())}, folder)
    options |= dict(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.init(address="local", num_cpus=3, **options)
    (node,) = ray.nodes()
    @ray.remote
    class Actor:
        def speak(self):
            print("a line of an actor", file=sys.stderr, flush=True)
    actor = Actor.remote()
    ray.get(actor.speak.remote())
    spoken = any("a line of an actor" in path.read_text() for path in actor_logs(folder))
    sockets = [len(str(path)) - len(name) for path in folder.rglob("*") if path.is_socket()]
    found = [node["NodeManagerAddress"], node["MetricsExportPort"], cpus_of_this_node(), spoken]
    processes = sorted({{path.stem for path in process_logs(folder)}})
    ray.shutdown()
print(json.dumps([*found, processes, RUN_FOLDER_BYTES + max(sockets)]))
"""
    *found, longest = in_new_process(code, ray_compat.LOOPBACK_SWITCHES)
    assert found == [ray_compat.LOOPBACK, port, 3, True, ["gcs_server", "raylet"]]
    assert longest <= 107  # of Linux


def test_ray_brings_haproxy() -> None:
    found = ray_compat.find_haproxy()
    assert found is not None
    done = subprocess.run([found, "-v"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("HAProxy version 2.8.")


def test_ray_starts_haproxy_with_its_configuration_after_the_option_f(tmp_path: Path) -> None:
    """`haproxy.main` reads the file after `-f`; `drain` finds processes by a path in their arguments."""
    program = tmp_path / "haproxy"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$(dirname "$0")/arguments"\nexit 1\n')
    program.chmod(0o700)
    code = """
import asyncio, contextlib, os
from pathlib import Path
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
async def start():
    with contextlib.suppress(Exception):
        await HAProxyApi(HAProxyConfig()).start()
asyncio.run(start())
print(json.dumps(Path(os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]).with_name("arguments").read_text().split()))
"""
    arguments = in_new_process(code, ray_compat.haproxy_switches(program, tmp_path, 12345))
    assert arguments[arguments.index("-f") + 1] == str(tmp_path / "haproxy.cfg")


def test_deprecation_warning_is_the_only_effect_that_the_autoscaling_fence_removes() -> None:
    from ray.serve.config import AutoscalingConfig

    with pytest.warns(DeprecationWarning, match="metrics_interval_s"):
        plain = AutoscalingConfig(metrics_interval_s=2.0)
    assert ray_compat.autoscaling_config(metrics_interval_s=2.0) == plain


def test_autoscaling_takes_the_policy_function_and_gives_it_the_metrics() -> None:
    config = ray_compat.autoscaling_config(policy={"policy_function": workers_for_load})
    parameters = inspect.signature(AutoscalingContext).parameters
    values: dict[str, Any] = dict.fromkeys(parameters)
    values |= {"aggregated_metrics": {"images": {"a": 64.0}, "batch": {"a": 32.0}}, "total_queued_requests": 0.0}
    assert config.policy.get_policy()(AutoscalingContext(**values)) == (2, {})


def test_serve_calls_a_worker_s_report_methods_by_name() -> None:
    assert hasattr(Worker, constants.REQUEST_ROUTING_STATS_METHOD)
    assert "record_autoscaling_stats" in inspect.getsource(replica)
    assert hasattr(Worker, "record_autoscaling_stats")


def test_serve_ingress_without_application_builds_it_in_the_replica() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        """An ASGI application."""

    class Ingress(ray_compat.LateIngress):
        def build_asgi_app(self) -> Any:
            return application

    assert issubclass(serve.ingress()(Ingress), Ingress)
    assert getattr(Ingress(), replica.SERVE_BUILD_ASGI_APP_METHOD)() is application
    with pytest.raises(ValueError, match=replica.SERVE_BUILD_ASGI_APP_METHOD):
        serve.ingress()(object)


def test_serve_s_control_headers_are_those_that_the_proxies_remove() -> None:
    model = constants.SERVE_MULTIPLEXED_MODEL_ID
    assert {*RAY_HEADERS} == {
        constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
        constants.SERVE_SESSION_ID,
        model,
        model.replace("_", "-"),
    }


def test_a_handle_takes_a_session_id() -> None:
    assert "session_id" in inspect.signature(DeploymentHandle.options).parameters


def test_serve_turns_arguments_of_a_config_file_into_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_REDIS_URL", "redis://r")
    monkeypatch.setenv("HUB_STORE_URL", "/s")
    monkeypatch.setenv("HUB_DEVICE", "cpu")
    (config,) = ServeDeploySchema.model_validate(yaml.safe_load(SERVE_YAML.read_text())).applications
    assert (config.name, config.import_path) == (app.NAME, "hub.cluster.app:build")
    builder: Any = app.build  # Ray's annotation excludes typed functions
    assert isinstance(call_user_app_builder_with_args_if_necessary(builder, config.args), serve.Application)
    wrong: list[dict[str, Any]] = [{"max_worker": 2}, {"slots": "many"}]
    for arguments in wrong:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            call_user_app_builder_with_args_if_necessary(builder, arguments)


class TestRouter:
    """Serve's own request router, with replicas that are stand-ins."""

    def test_calls_of_one_http_request_get_their_own_replicas(self) -> None:
        async def route() -> None:
            router = await running_router(*(Replica(f"w{i}") for i in range(4)))
            calls = [pending_call(digest) for digest in DIGESTS]
            alone = [(await assigned(router, pending_call(digest)))[0] for digest in DIGESTS]
            assert await assigned(router, *calls) == alone

        asyncio.run(route())

    def test_a_router_knows_the_queue_lengths_that_replicas_report(self) -> None:
        async def route() -> None:
            busy, unknown = Replica("busy", queued=7), Replica("unknown")
            router = await running_router(busy)
            assert [ray_compat.queue_length(router, replica) for replica in running(busy, unknown)] == [7, 0]

        asyncio.run(route())

    def test_a_pending_call_has_a_session_id_and_a_pause_switch(self) -> None:
        async def route() -> None:
            call = pending_call("a digest")
            assert ray_compat.session_id(call) == "a digest"
            assert call.routing_context.should_backoff is False
            ray_compat.pause_between_rounds(call)
            assert call.routing_context.should_backoff is True

        asyncio.run(route())

    def test_a_cancelled_call_is_not_found_by_its_metadata(self) -> None:
        async def route() -> None:
            name = "_get_pending_request_matching_internal_request_id"
            assert hasattr(RequestRouter, name)
            index = ray_compat.PendingRequestIndex()
            find = getattr(index, name)
            waiting, cancelled = pending_call(), pending_call()
            for call in (waiting, cancelled):
                index.add_pending(call)
            cancelled.future.cancel()
            assert find(cancelled.metadata) is find(None) is None
            assert find(waiting.metadata) is waiting
            assert find(waiting.metadata) is None

        asyncio.run(route())
