"""The house stays as it was drawn: walls, arrows, no cycles, short files, a public surface that is a list."""

import ast
import re
from pathlib import Path

import pytest

import adapters
import hub

ROOT = Path(__file__).parent.parent
FILES = sorted(p for package in ("adapters", "hub") for p in (ROOT / package).rglob("*.py"))
WALLS = {
    "ray": {"hub/app.py", "hub/gateway.py", "hub/routing.py", "hub/scaling.py", "hub/telemetry.py"},
    "redis": {"hub/database.py", "hub/embedded.py"},
    "timm": {"adapters/backbone.py", "adapters/data.py", "adapters/demo/pretrain.py"},
    "sklearn": {"adapters/train.py", "adapters/demo/tasks.py"},
    "PIL": {"adapters/data.py", "adapters/demo/draw.py", "adapters/demo/tasks.py", "hub/pictures.py"},
    "fastapi": {
        f"hub/{name}.py" for name in ("assembly", "gateway", "http", "openapi", "protocols", "routes", "routes_admin")
    },
}


def imports(path: Path, *, at_import_only: bool = False) -> set[str]:
    """Modules that a file imports: `ray.serve`, or `hub.errors` for one of ours."""
    tree = ast.parse(path.read_text())
    package = path.parent.relative_to(ROOT).parts
    found = set()
    for node in tree.body if at_import_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module or "")))
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("library", WALLS)
def test_walls(library) -> None:
    users = {name(p) for p in FILES if any(m.split(".")[0] == library for m in imports(p))}
    assert users == WALLS[library]


def test_adapters_never_import_the_hub() -> None:
    assert [
        name(p) for p in FILES if name(p).startswith("adapters/") and any(m.split(".")[0] == "hub" for m in imports(p))
    ] == []


def test_the_hub_knows_nothing_of_kronecker_products() -> None:
    words = re.compile(r"kronecker|karst_[abc]\b", re.IGNORECASE)
    found = [name(p) for p in FILES if name(p).startswith("hub/") and words.search(p.read_text())]
    assert found == ["hub/cli_library.py"]  # the help of `train --kernels`


def test_no_import_cycles() -> None:
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    graph = {m: imports(p, at_import_only=True) & (set(modules) - {m, m.split(".")[0]}) for m, p in modules.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    assert len(done) == len(FILES)


def test_files_are_short() -> None:
    assert {name(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 400} == {}


def test_only_settings_reads_the_environment() -> None:
    users = {name(p) for p in FILES if re.search(r"os\.(environ|getenv)", p.read_text())}
    assert users == {"hub/local.py"}  # hands Ray its switches


@pytest.mark.parametrize("package", [adapters, hub])
def test_the_public_surface_is_a_list(package) -> None:
    assert package.__all__ == sorted(package.__all__)
    assert all(getattr(package, exported).__module__.startswith(package.__name__) for exported in package.__all__)
