"""deploy/ is linted, validated and compared, without Docker, Kubernetes or a cloud.

The schemas come from Docker Compose, from Kubernetes's OpenAPI and from Ray's cluster launcher. No package contains
KubeRay's CRD; `RAY_SERVICE` below lists the fields of its API reference that the file may use.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from hub.local.ray_environment import ray_environment
from hub.settings import Settings, load_settings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda"]
CLUSTERS = [DEPLOY / "ray-cluster.yaml", DEPLOY / "ray-cluster-onprem.yaml"]
KUBERNETES = "1.33"
PASSWORDS = ("REDIS_PASSWORD", "RAY_REDIS_PASSWORD", "RAY_AUTH_TOKEN", "GRAFANA_PASSWORD")
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def fields(names: str) -> dict[str, None]:
    return dict.fromkeys(names.split())


# Fields of KubeRay's API reference (ray.io/v1). None: a type of Kubernetes, which another test validates.
RAY_SERVICE: dict[str, Any] = {
    "serveConfigV2": None,
    "serveService": None,
    "excludeHeadPodFromServeSvc": None,
    "upgradeStrategy": {"type": None},
    "rayClusterConfig": {
        "rayVersion": None,
        "enableInTreeAutoscaling": None,
        "headServiceAnnotations": None,
        "authOptions": {"mode": None},
        "autoscalerOptions": fields("version upscalingMode idleTimeoutSeconds resources env envFrom securityContext"),
        "gcsFaultToleranceOptions": fields("redisAddress redisUsername redisPassword externalStorageNamespace"),
        "headGroupSpec": fields("template rayStartParams serviceType headService"),
        "workerGroupSpecs": fields(
            "groupName replicas minReplicas maxReplicas idleTimeoutSeconds rayStartParams template"
        ),
    },
}


def run(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, env=env)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """Return compose.yaml as Docker Compose resolves it, with every secret set."""
    done = compose_config({name: f"secret-{name}" for name in PASSWORDS})
    assert done.returncode == 0, done.stderr
    resolved: dict[str, Any] = json.loads(done.stdout)
    return resolved


def compose_config(secrets: dict[str, str], file: Path = Path("/dev/null")) -> subprocess.CompletedProcess[str]:
    """Resolve compose.yaml with these variables and those of an environment file."""
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | secrets
    command = ["config", "--format", "json"]
    return run(BIN / "docker-compose", "--env-file", file, "-f", DEPLOY / "compose.yaml", *command, env=env)


def settings_of(variables: dict[str, str | None]) -> Settings:
    """Return the settings of a container with these variables; variables without a value are unset in it."""
    given = {name: value for name, value in variables.items() if name.startswith("HUB_") and value is not None}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        return load_settings()


@pytest.fixture(scope="module")
def kuberay() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text()))


@pytest.fixture(scope="module")
def ray_cluster(kuberay: list[dict[str, Any]]) -> dict[str, Any]:
    (service,) = (d for d in kuberay if d["kind"] == "RayService")
    cluster: dict[str, Any] = service["spec"]["rayClusterConfig"]
    return cluster


@pytest.fixture(scope="module")
def ingress() -> dict[str, dict[str, Any]]:
    """Return the documents of ingress.yaml by kind."""
    return {d["kind"]: d for d in yaml.safe_load_all((DEPLOY / "ingress.yaml").read_text())}


def serve_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    return config


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


class TestDockerfiles:
    @pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
    def test_hadolint_finds_no_fault(self, path: Path) -> None:
        done = run(BIN / "hadolint", "--no-color", "--failure-threshold", "style", path)
        assert done.returncode == 0, done.stdout

    @pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
    def test_copied_files_exist_and_are_not_ignored(self, path: Path) -> None:
        ignore = Path(f"{path}.dockerignore").read_text()
        copied = [
            name
            for line in re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.MULTILINE)
            for name in line.split()[:-1]
        ]
        assert "hub" in copied
        for name in copied:
            assert (ROOT / name).exists(), name
            assert f"!{name}\n" in ignore, name
        assert "\n*\n" in ignore  # all other files are ignored

    @pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
    def test_image_has_pinned_versions_a_user_a_health_check_and_no_secret(self, path: Path) -> None:
        text = path.read_text()
        assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-\w+$", text, re.MULTILINE)
        for install in re.findall(r"pip install --prefix=[^\n]+", text):
            assert "-c versions.txt" in install or "--no-deps" in install
        assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["1000:1000"]
        assert "\nHEALTHCHECK " in text
        assert not re.search(r"(PASSWORD|TOKEN|SECRET|KEY)\w*=", text)

    def test_both_images_differ_only_in_torch_and_device(self) -> None:
        cpu, cuda = (path.read_text().splitlines() for path in DOCKERFILES)
        only_cuda = [line for line in cuda if line not in cpu and not line.startswith("#")]
        assert only_cuda == [
            "    && pip install --prefix=/packages -c versions.txt -r torch.txt",
            "    HUB_DEVICE=cuda \\",
            "    NVIDIA_VISIBLE_DEVICES=all \\",
            "    NVIDIA_DRIVER_CAPABILITIES=compute,utility \\",
        ]

    def test_extra_packages_match_the_constraints(self) -> None:
        extra = dict(re.findall(r"^([\w.-]+)==(\S+)$", (DEPLOY / "s3.txt").read_text(), re.MULTILINE))
        assert {name for name in extra if PINS.get(name, extra[name]) != extra[name]} == {"python-dateutil"}
        assert extra["s3fs"] == PINS["fsspec"]

    @pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
    def test_nodes_have_the_switches_of_a_local_hub(self, path: Path, tmp_path: Path) -> None:
        image = dict(re.findall(r"^(?:ENV|   ) (\w+)=(\S+)", path.read_text(), re.MULTILINE))
        local = ray_environment(Settings(), tmp_path)
        for name in (
            "RAY_SERVE_THROUGHPUT_OPTIMIZED",
            "RAY_SERVE_ENABLE_HA_PROXY",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S",
            "RAY_USAGE_STATS_ENABLED",
        ):
            assert image[name] == local[name], name
        assert image["RAY_AUTH_MODE"] == "token"


class TestCompose:
    def test_only_http_and_grafana_are_published_on_loopback(self, compose: dict[str, Any]) -> None:
        published = {
            (name, port["host_ip"], port["target"])
            for name, service in compose["services"].items()
            for port in service.get("ports", [])
        }
        assert published == {("head", "127.0.0.1", 8000), ("grafana", "127.0.0.1", 3000)}
        assert not any(service.get("network_mode") for service in compose["services"].values())

    @pytest.mark.parametrize("missing", PASSWORDS)
    def test_no_secret_has_a_default(self, missing: str) -> None:
        done = compose_config({name: "x" for name in PASSWORDS if name != missing})
        assert done.returncode != 0
        assert missing in done.stderr
        assert f"{missing}=\n" in (DEPLOY / "example.env").read_text()

    def test_every_service_is_pinned_health_checked_and_unprivileged(self, compose: dict[str, Any]) -> None:
        for name, service in compose["services"].items():
            assert re.search(r":v?\d+\.\d+\.\d+(-\w+)?$", service["image"]), name
            assert service["restart"] in ("unless-stopped", "on-failure"), name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
            assert ("healthcheck" in service) == (name != "apply") or service["healthcheck"]["disable"], name

    def test_head_and_worker_use_one_image(self, compose: dict[str, Any]) -> None:
        images = {compose["services"][name]["image"] for name in ("head", "worker", "apply")}
        assert images == {f"karst-hub:{version('karst-hub')}"}
        build = compose["services"]["head"]["build"]
        assert Path(build["context"]) == ROOT
        assert (ROOT / build["dockerfile"]).is_file()

    def test_redis_syncs_every_change_and_requires_a_password(self, compose: dict[str, Any]) -> None:
        for name in ("redis", "ray-redis"):
            command = compose["services"][name]["command"][-1]
            assert "--appendonly yes --appendfsync always" in command
            assert "requirepass $$REDISCLI_AUTH" in command  # Compose doubles a dollar for the shell
            assert compose["services"][name]["volumes"][0]["target"] == "/data"

    def test_mounted_folders_exist(self, compose: dict[str, Any]) -> None:
        for service in compose["services"].values():
            for mount in service.get("volumes", []):
                if mount["type"] == "bind":
                    assert Path(mount["source"]).exists(), mount["source"]

    def test_a_container_has_time_to_drain(self, compose: dict[str, Any]) -> None:
        worker = compose["services"]["worker"]
        drain_s = int(worker["environment"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert worker["stop_grace_period"] == "1m30s"
        assert drain_s < 90

    def test_variables_that_are_not_set_leave_the_hub_s_defaults(self, compose: dict[str, Any]) -> None:
        for name in ("head", "worker", "apply"):
            service = compose["services"][name]
            found = settings_of(service["environment"])
            assert found.model_fields_set == {"backbone", "device", "redis_url", "store_url"}
            assert not int(service.get("mem_limit", 0))
            mounts = {mount["target"]: mount for mount in service["volumes"]}
            if name != "apply":  # it sends the configuration only
                assert (mounts["/checkpoints"]["type"], mounts["/checkpoints"]["read_only"]) == ("volume", True)

    def test_every_variable_of_the_example_reaches_its_container(self, tmp_path: Path) -> None:
        example = (DEPLOY / "example.env").read_text()
        offered = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", example, re.MULTILINE))
        file = tmp_path / "deploy.env"
        file.write_text("\n".join(f"{name}={value or 'secret'}" for name, value in offered.items()))
        done = compose_config({}, file)
        assert done.returncode == 0, done.stderr
        services = json.loads(done.stdout)["services"]
        for name in ("head", "worker", "apply"):
            found = settings_of(services[name]["environment"])
            assert {f"HUB_{field.upper()}" for field in found.model_fields_set} - {
                "HUB_REDIS_URL",
                "HUB_STORE_URL",
                "HUB_DEVICE",
            } == {variable for variable in offered if variable.startswith("HUB_")}
            assert found.cors_origins == ("https://app.example.org",)
            assert found.checkpoint == Path("/checkpoints/model.safetensors")
            mounts = {mount["target"]: mount for mount in services[name]["volumes"]}
            if name != "apply":
                assert mounts["/checkpoints"]["source"] == "/srv/checkpoints"
        assert int(services["worker"]["mem_limit"]) == 8 * 1024**3
        assert int(services["head"]["mem_limit"]) == 4 * 1024**3
        assert float(services["worker"]["cpus"]) == 2
        used = set(re.findall(r"\$\{([A-Z_]+)", (DEPLOY / "compose.yaml").read_text()))
        assert used <= set(offered)


class TestIngress:
    def test_objects_are_valid_for_kubernetes(self, ingress: dict[str, dict[str, Any]]) -> None:
        assert set(ingress) == {"Ingress", "ConfigMap"}
        for document in ingress.values():
            kubernetes_validate.validate(document, KUBERNETES, strict=True)

    def test_ingress_leads_to_the_hub_s_service_with_tls(
        self, ingress: dict[str, dict[str, Any]], kuberay: list[dict[str, Any]]
    ) -> None:
        rules = ingress["Ingress"]
        (rule,), (tls,) = rules["spec"]["rules"], rules["spec"]["tls"]
        (path,) = rule["http"]["paths"]
        service = kuberay[0]["metadata"]
        assert path["backend"]["service"] == {"name": f"{service['name']}-serve-svc", "port": {"number": 8000}}
        assert rules["metadata"]["namespace"] == service["namespace"]
        assert tls["hosts"] == [rule["host"]]

    def test_ingress_has_the_limits_of_nginx_conf(self, ingress: dict[str, dict[str, Any]]) -> None:
        options = ingress["Ingress"]["metadata"]["annotations"]
        nginx = (DEPLOY / "nginx.conf").read_text()
        prefix = "nginx.ingress.kubernetes.io/"
        assert f"client_max_body_size {options[prefix + 'proxy-body-size']};" in nginx
        assert f"proxy_request_buffering {options[prefix + 'proxy-request-buffering']};" in nginx
        assert f"proxy_read_timeout {options[prefix + 'proxy-read-timeout']}s;" in nginx
        assert Settings().max_adapter_bytes == 64 * 1024**2

    def test_every_pod_takes_its_settings_from_the_config_map(
        self, ingress: dict[str, dict[str, Any]], ray_cluster: dict[str, Any]
    ) -> None:
        config = ingress["ConfigMap"]
        found = settings_of(config["data"])
        assert len(found.model_fields_set) == len(config["data"])
        assert found.cors_origins == ("https://app.example.org",)
        for group in groups(ray_cluster):
            (container,) = group["template"]["spec"]["containers"]
            sources = [entry.get("configMapRef", {}) for entry in container["envFrom"]]
            assert {"name": config["metadata"]["name"], "optional": True} in sources
            own = {entry["name"] for entry in container["env"]}
            assert not own & set(config["data"])  # `env` would win


class TestKubernetes:
    def test_objects_are_valid_for_kubernetes(self, kuberay: list[dict[str, Any]]) -> None:
        own = [document for document in kuberay if document["kind"] != "RayService"]
        assert sorted(document["kind"] for document in own) == [
            *("NetworkPolicy", "NetworkPolicy", "PodDisruptionBudget"),
            *("Service", "Service", "StatefulSet", "StatefulSet"),  # no Secret: files hold none
        ]
        for document in own:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)

    def test_only_the_operator_s_namespace_reaches_ray_s_dashboard(self, kuberay: list[dict[str, Any]]) -> None:
        (policy,) = (d for d in kuberay if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == "karst-hub-ray")
        rules = [r for r in policy["spec"]["ingress"] if {"port": 8265} in r.get("ports", ())]
        operator = {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
        }
        assert rules == [{"from": [operator], "ports": [{"port": 8265}, {"port": 8000}]}]
        assert "--namespace kuberay --create-namespace" in (ROOT / "docs" / "deploy.md").read_text()

    def test_redis_has_no_known_fault_of_lua_scripts(self) -> None:
        """CVE-2025-49844 and the faults of July 2026 are fixed in 7.4.10."""
        texts = "".join((DEPLOY / name).read_text() for name in ("compose.yaml", "kuberay.yaml"))
        assert set(re.findall(r"image: redis:(\S+)", texts)) == {"7.4.10-bookworm"}

    def test_pods_of_ray_are_valid_for_kubernetes(self, ray_cluster: dict[str, Any]) -> None:
        for group in groups(ray_cluster):
            template = group["template"]
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", **template["metadata"]}}
            kubernetes_validate.validate(pod | {"spec": template["spec"]}, KUBERNETES, strict=True)

    def test_pods_with_the_lines_for_a_checkpoint_are_valid(self, ray_cluster: dict[str, Any]) -> None:
        text = (ROOT / "docs" / "deploy.md").read_text()
        (lines,) = re.findall(r"```yaml\n(volumeMounts:.*?)```", text, re.DOTALL)
        added = yaml.safe_load(lines)
        for group in groups(ray_cluster):
            template = copy.deepcopy(group["template"])
            template["spec"]["volumes"] += added["volumes"]
            template["spec"]["containers"][0]["volumeMounts"] += added["volumeMounts"]
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", **template["metadata"]}}
            kubernetes_validate.validate(pod | {"spec": template["spec"]}, KUBERNETES, strict=True)
            mounted = {mount["name"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
            assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}

    def test_ray_service_has_only_fields_of_kuberay(self, kuberay: list[dict[str, Any]]) -> None:
        def check(found: Any, known: dict[str, Any] | None, where: str) -> None:
            if isinstance(found, list):
                for entry in found:
                    check(entry, known, where)
            elif known is not None:
                assert set(found) <= set(known), where
                for name, value in found.items():
                    check(value, known[name], f"{where}.{name}")

        assert kuberay[0]["apiVersion"] == "ray.io/v1"
        check(kuberay[0]["spec"], RAY_SERVICE, "spec")
        cluster = kuberay[0]["spec"]["rayClusterConfig"]
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"]["upscalingMode"] in ("Default", "Aggressive", "Conservative")
        for group in groups(cluster):
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
            assert set(group["rayStartParams"]) <= {"dashboard-host", "num-cpus", "object-store-memory"}
        for group in cluster["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]

    def test_kuberay_serves_the_configuration_of_serve_yaml(self, kuberay: list[dict[str, Any]]) -> None:
        assert yaml.safe_load(kuberay[0]["spec"]["serveConfigV2"]) == serve_config()

    def test_ray_version_is_that_of_the_image(self, ray_cluster: dict[str, Any]) -> None:
        assert ray_cluster["rayVersion"] == PINS["ray"] == version("ray")
        images = {group["template"]["spec"]["containers"][0]["image"] for group in groups(ray_cluster)}
        assert images == {f"registry.example.com/karst-hub:{version('karst-hub')}-cuda"}

    def test_policies_and_budget_select_their_pods(self, kuberay: list[dict[str, Any]]) -> None:
        labels = [group["template"]["metadata"]["labels"] for group in groups(kuberay[0]["spec"]["rayClusterConfig"])]
        labels += [d["spec"]["template"]["metadata"]["labels"] for d in kuberay if d["kind"] == "StatefulSet"]
        for labels_of_pod in labels:
            selected = [
                d["metadata"]["name"]
                for d in kuberay
                if d["kind"] == "NetworkPolicy"
                and d["spec"]["podSelector"]["matchLabels"].items() <= labels_of_pod.items()
            ]
            assert len(selected) == 1, labels_of_pod
        (budget,) = (d for d in kuberay if d["kind"] == "PodDisruptionBudget")
        made_by_kuberay = {"ray.io/node-type": "worker"}
        assert budget["spec"]["selector"]["matchLabels"].items() <= (labels[1] | made_by_kuberay).items()

    def test_ray_uses_another_redis_than_the_registry(self, kuberay: list[dict[str, Any]]) -> None:
        names = {d["metadata"]["name"] for d in kuberay if d["kind"] == "Service"}
        address = kuberay[0]["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"]
        assert names == {"karst-hub-redis", "karst-hub-ray-redis"}
        assert address == "karst-hub-ray-redis:6379"

    def test_a_pod_has_time_to_drain(self, ray_cluster: dict[str, Any]) -> None:
        image = (DEPLOY / "Dockerfile.cuda").read_text()
        drain_s = int(re.findall(r"DRAIN_TIMEOUT_S=(\d+)", image)[0])
        for group in ray_cluster["workerGroupSpecs"]:
            spec = group["template"]["spec"]
            container = spec["containers"][0]
            before_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
            assert before_s + drain_s < spec["terminationGracePeriodSeconds"]
            assert {"readinessProbe", "livenessProbe"} <= container.keys()

    def test_the_file_s_comment_names_all_secrets(self, kuberay: list[dict[str, Any]]) -> None:
        text = (DEPLOY / "kuberay.yaml").read_text()
        described = text.partition("apiVersion")[0]
        for name, key in re.findall(r"secretKeyRef: \{ name: (\S+), key: (\S+) \}", text):
            assert name == "karst-hub"
            assert key in described


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
class TestRayUp:
    def test_file_is_valid_for_ray_s_launcher(self, path: Path) -> None:
        config = prepare_config(yaml.safe_load(path.read_text()))
        validate_config(config)
        assert config["setup_commands"] == config["head_setup_commands"] == []

    def test_secrets_are_read_before_ray_starts_and_are_not_in_the_file(self, path: Path) -> None:
        config = yaml.safe_load(path.read_text())
        for start in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
            assert start.index(". /home/hub/karst-hub.env") < start.index("ray start")
        assert all("~" in source for source in config["file_mounts"].values())


def test_serve_yaml_has_settings_and_no_secret() -> None:
    (application,) = serve_config()["applications"]  # tests/hub/cluster/test_ray_compat.py checks Serve's schema
    assert application["import_path"] == "hub.cluster.app:build"
    assert set(application["args"]) <= set(Settings.model_fields)
    assert not {"redis_url", "store_url"} & set(application["args"])


def test_every_setting_in_the_files_exists() -> None:
    known = {f"HUB_{name.upper()}" for name in Settings.model_fields}
    for path in [*DEPLOY.glob("*"), ROOT / "docs" / "deploy.md"]:
        if path.is_file():
            named = set(re.findall(r"\bHUB_[A-Z][A-Z_]*[A-Z]\b", path.read_text()))
            assert named <= known | {"HUB_ADMIN_KEY", "HUB_URL", "HUB_KEY"}, path.name


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit_and_rates_its_exposure_as_ok(tmp_path: Path) -> None:
    unit = tmp_path / "karst-hub.service"
    text = (DEPLOY / "karst-hub.service").read_text()
    unit.write_text(text.replace("/opt/karst-hub/bin/karst-hub", str(BIN / "karst-hub")))
    checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    limit = ["--offline=true", "--threshold=25"]  # tenths: 2.5 of 10
    rated = subprocess.run(["systemd-analyze", "security", *limit, str(unit)], capture_output=True, text=True)
    assert rated.returncode == 0, rated.stdout
