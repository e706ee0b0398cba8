"""Rules of the source tree that no linter checks; the layers are contracts of import-linter, in pyproject.toml."""

import re
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import grimp
import pytest

import adapters
import hub

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("adapters", "hub") for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 400
MAX_MODULES = 12


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_modules_never_import_each_other_in_a_cycle() -> None:
    graph = grimp.build_graph("adapters", "hub", exclude_type_checking_imports=True)
    imported = {
        module: graph.find_modules_directly_imported_by(module) - {"adapters", "hub"} for module in graph.modules
    }
    TopologicalSorter(imported).prepare()  # raises CycleError with the cycle


def test_only_help_texts_of_the_hub_mention_kronecker_products() -> None:
    words = re.compile(r"kronecker|karst_[abc]\b", re.IGNORECASE)
    users = {name(path) for path in FILES if path.is_relative_to(ROOT / "hub") and words.search(path.read_text())}
    assert {user for user in users if not user.startswith("hub/cli/")} == set()


def test_modules_have_at_most_400_lines() -> None:
    assert {name(path): n for path in FILES if (n := len(path.read_text().splitlines())) > MAX_LINES} == {}


def test_packages_have_two_to_twelve_modules() -> None:
    packages = {path.parent for path in FILES}
    sizes = {
        name(package): len([path for path in package.glob("*.py") if path.name != "__init__.py"])
        for package in packages
    }
    assert {package: n for package, n in sizes.items() if not 2 <= n <= MAX_MODULES and package != "adapters"} == {}


def test_only_the_local_hub_and_one_module_of_the_library_read_environment_variables() -> None:
    """Ray and Serve take switches as environment variables; every setting of the hub itself is in `Settings`.

    `adapters.fit` without a backbone reads the variables of the hub's, and the library does not import `Settings`.
    """
    users = {name(path) for path in FILES if re.search(r"os\.(environ|getenv)", path.read_text())}
    assert {user for user in users if not user.startswith("hub/local/")} == {"adapters/environment.py"}


@pytest.mark.parametrize("package", [adapters, hub])
def test_public_names_are_a_sorted_list_of_own_things(package: ModuleType) -> None:
    public = package.__all__
    assert public == sorted(public)
    assert all(getattr(package, exported).__module__.startswith(package.__name__) for exported in public)
