"""A client that `openapi-python-client` generates from the OpenAPI document registers, classifies and imports.

The generator needs an older typer than the command line, so it is in a virtual environment of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapters import Adapter
from tests.support.asgi import listening
from tests.support.hub_app import Hub
from tests.support.models import png

pytestmark = pytest.mark.slow
GENERATOR = "openapi-python-client==0.29.1"
PROGRAM = """
import io, sys
from http import HTTPStatus
from pathlib import Path
from karst_client import AuthenticatedClient
from karst_client.api.classify import classify
from karst_client.api.hugging_face import classify_hugging_face
from karst_client.api.tasks import list_tasks, register_version, set_alias
from karst_client.api.tenants import create_tenant, import_tenant
from karst_client.models import Problem
from karst_client.models.alias_change import AliasChange
from karst_client.models.new_tenant import NewTenant
from karst_client.types import File

url, key, admin_key, folder = sys.argv[1:]
owner, admin = (AuthenticatedClient(base_url=url, token=token) for token in (key, admin_key))


def file(name):
    return File(payload=io.BytesIO((Path(folder) / name).read_bytes()), file_name=name)


made = register_version.sync(client=owner, task="flowers", body=file("a.safetensors"))
assert (made.task, made.version) == ("flowers", 1), made
aliases = set_alias.sync(client=owner, task="flowers", alias="stable", body=AliasChange(version=1)).aliases
assert aliases.additional_properties["stable"].additional_properties == {"1": 1}, aliases
[task] = list_tasks.sync(client=owner).tasks
assert task.task == "flowers"
answer = classify.sync(client=owner, task="flowers", body=file("a.png"), top_k=2, version="stable")
assert [len(labels) for labels in answer.predictions] == [2], answer
again = classify_hugging_face.sync(client=owner, task="flowers", body=file("a.png"))
assert again[0].label == answer.predictions[0][0].label
missing = classify.sync_detailed(client=owner, task="trees", body=file("a.png"))
assert missing.status_code == HTTPStatus.NOT_FOUND
assert isinstance(missing.parsed, Problem) and "'trees'" in missing.parsed.detail
create_tenant.sync(client=admin, body=NewTenant(tenant="copy"))
imported = import_tenant.sync(client=admin, tenant="copy", body=file("tenant.tar"))
assert [task.task for task in imported.tasks] == ["kept"], imported
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of a virtual environment with the generator."""
    folder = tmp_path_factory.mktemp("generator")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip: list[str | Path] = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", GENERATOR]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {GENERATOR}: {done.stderr.strip()[-300:]}")
    return folder / "bin" / "python"


def test_a_generated_client_registers_classifies_and_imports(
    hub: Hub, adapters: list[Adapter], python: Path, tmp_path: Path
) -> None:
    (tmp_path / "openapi.json").write_text(json.dumps(hub.api.openapi()))
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}  # the generator calls its own ruff
    options = ["--path", "openapi.json", "--meta", "none", "--output-path", "karst_client"]
    command: list[str | Path] = [python.parent / "openapi-python-client", "generate", *options]
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    operations = [o["operationId"] for methods in hub.api.openapi()["paths"].values() for o in methods.values()]
    generated = {path.stem for path in (tmp_path / "karst_client" / "api").rglob("*.py")} - {"__init__"}
    assert generated == set(operations)

    hub.http.post("/v1/tasks/kept/versions", content=adapters[1].data)
    (tmp_path / "tenant.tar").write_bytes(hub.http.get("/v1/tenants/default/export").content)
    hub.http.delete("/v1/tasks/kept")
    (tmp_path / "a.safetensors").write_bytes(adapters[0].data)
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "program.py").write_text(PROGRAM)
    with listening(hub.another_gateway().app) as url:
        run: list[str | Path] = [python, tmp_path / "program.py", url, hub.key, hub.admin_key, tmp_path]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
