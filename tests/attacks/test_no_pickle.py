"""No file that the service reads can run code: `hub` has no pickle, and only training tools read `.pth`, as weights."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RUNS_CODE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
WEIGHTS = {
    "adapters/paper/checkpoint.py",
    "adapters/checkpoints.py",
}
TRAINING_TOOLS = {
    "adapters.paper.checkpoint",
    "adapters.convert.convert",
    "adapters.convert.importing",
    "adapters.paper.fit",
    "adapters.training.fit",
    "adapters.paper.train",
}
COMMANDS = {"hub/cli/adapters.py", "hub/cli/train.py"}  # neither gateway nor worker imports the training tools


def files(package: str) -> dict[str, ast.Module]:
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in sorted((ROOT / package).rglob("*.py"))}


def modules(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def calls(tree: ast.Module) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def name(call: ast.Call) -> str:
    return ast.unparse(call.func)


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {k.arg: ast.unparse(k.value) for k in call.keywords}


def test_the_hub_imports_no_module_that_can_run_code_from_a_file() -> None:
    for file, tree in files("hub").items():
        assert not {m.split(".")[0] for m in modules(tree)} & RUNS_CODE, file
        assert not [name(c) for c in calls(tree) if name(c) in ("torch.load", "eval", "exec", "compile")], file


def test_only_the_training_tools_read_pickles_and_only_as_weights() -> None:
    found = {}
    for file, tree in files("adapters").items():
        assert not {m.split(".")[0] for m in modules(tree)} & RUNS_CODE, file
        loads = [keywords(c).get("weights_only") for c in calls(tree) if name(c) == "torch.load"]
        if loads:
            found[file] = set(loads)
    assert found == {file: {"True"} for file in WEIGHTS}


def test_no_array_is_loaded_with_pickle() -> None:
    for package in ("hub", "adapters"):
        for file, tree in files(package).items():
            assert not [c for c in calls(tree) if keywords(c).get("allow_pickle", "False") != "False"], file
            assert not [name(c) for c in calls(tree) if name(c).endswith(("read_pickle", "load_pickle"))], file


def test_only_commands_import_the_training_tools() -> None:
    users = {file for file, tree in files("hub").items() if modules(tree) & TRAINING_TOOLS}
    assert users == COMMANDS


def test_no_subprocess_uses_a_shell() -> None:
    for package in ("hub", "adapters"):
        for file, tree in files(package).items():
            assert not [c for c in calls(tree) if keywords(c).get("shell", "False") != "False"], file
            assert not [name(c) for c in calls(tree) if name(c) in ("os.system", "os.popen")], file
