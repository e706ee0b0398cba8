"""The console's files: what a browser gets, how long it keeps them, and that they name nothing elsewhere."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import hub as package
from hub.api.console import files
from hub.api.console.files import console
from tests.support.hub_app import Hub

ROOT = Path(package.__file__).parents[1]
WEB = ROOT / "hub" / "web"
FILES = sorted(path for path in WEB.rglob("*") if path.is_file())
NAMESPACES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1998/Math/MathML")
MAX_BYTES, MAX_COMPRESSED = 225_000, 90_000  # of all files; browsers get them compressed


def get(hub: Hub, path: str, **headers: str) -> Any:
    return hub.http.get(path, headers={"authorization": "", "accept-encoding": "identity"} | headers)


def named_files(hub: Hub) -> list[str]:
    """Return the paths of the page's own files."""
    found = re.findall(r'(?:src|href)="([^"]+)"', get(hub, "/").text)
    assert all(re.fullmatch(r"console/[0-9a-f]{16}/[\w./-]+", path) for path in found)  # relative: below any prefix
    return [f"/{path}" for path in found]


def test_page_and_its_files_need_no_key(hub: Hub) -> None:
    assert get(hub, "/").headers["content-type"] == "text/html; charset=utf-8"
    for path in named_files(hub):
        reply = get(hub, path)
        assert reply.status_code == 200
        assert reply.content == (WEB / path.split("/", 3)[3]).read_bytes()


def test_files_are_read_and_compressed_before_the_first_request(hub: Hub) -> None:
    console.cache_clear()
    hub.another_gateway()
    assert console.cache_info().currsize == 1


def test_digest_of_the_addresses_changes_when_an_adapter_of_the_demo_changes(tmp_path: Path) -> None:
    before = console()
    for name in files.DEMO_FILES:
        shutil.copy(ROOT / "adapters" / "demo" / name, tmp_path)
    assert files.read_console(WEB, tmp_path) == before
    (tmp_path / "digits.safetensors").write_bytes(b"another adapter")
    after = files.read_console(WEB, tmp_path)
    assert after.digest != before.digest
    assert after.files["demo/digits.safetensors"].etag != before.files["demo/digits.safetensors"].etag
    assert after.files["js/app.js"] == before.files["js/app.js"]


def test_page_has_a_strict_policy_and_no_inline_code(hub: Hub) -> None:
    reply = get(hub, "/")
    assert reply.headers["content-security-policy"].startswith("default-src 'self';")
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", reply.text)
    assert "set-cookie" not in reply.headers


def test_browsers_keep_files_and_ask_again_for_the_page(hub: Hub) -> None:
    page, file = get(hub, "/"), get(hub, named_files(hub)[0])
    assert page.headers["cache-control"] == "no-cache"
    assert "immutable" in file.headers["cache-control"]
    for path in ("/", named_files(hub)[0]):
        etag = get(hub, path).headers["etag"]
        again = get(hub, path, **{"if-none-match": f'"other", W/{etag}'})
        assert (again.status_code, again.content) == (304, b"")
        assert get(hub, path, **{"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize(("accepted", "compressed"), [("br, gzip", True), ("gzip;q=0", False), ("identity", False)])
def test_files_are_compressed_where_the_browser_takes_it(hub: Hub, accepted: str, compressed: bool) -> None:
    reply = get(hub, "/", **{"accept-encoding": accepted})
    assert (reply.headers.get("content-encoding") == "gzip") is compressed
    assert reply.headers["vary"] == "accept-encoding"


@pytest.mark.parametrize(
    "path", ["js/none.js", "../settings.py", "%2e%2e/settings.py", "js", "", "vendor/versions.json"]
)
def test_other_paths_are_not_found(hub: Hub, path: str) -> None:
    digest = named_files(hub)[0].split("/")[2]
    assert get(hub, f"/console/{digest}/{path}").status_code == 404
    assert get(hub, "/console/0000000000000000/js/app.js").status_code == 404


def test_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < MAX_BYTES
    assert sum(len(gzip.compress(path.read_bytes())) for path in FILES) < MAX_COMPRESSED


def test_files_name_no_other_host() -> None:
    for path in (path for path in FILES if path.suffix != ".json"):
        found = set(re.findall(r"https?://[^\s\"'`)<>]+", path.read_text()))
        assert found <= {"http://www.w3.org/1999/xhtml", "https://github.com/leeoniya/uPlot", *NAMESPACES}, path


def test_every_import_is_a_file() -> None:
    for path in WEB.rglob("*.js"):
        for name in re.findall(r"""(?:from\s*|import\s*\(?\s*)["']([^"']+)["']""", path.read_text()):
            assert name.startswith("."), (path, name)
            assert (path.parent / name).resolve() in FILES, (path, name)


def test_vendored_packages_have_version_and_licence() -> None:
    listed = json.loads((WEB / "vendor" / "versions.json").read_text())
    files = {name for entry in listed.values() for name in entry["files"]} | {"versions.json"}
    assert files == {path.name for path in (WEB / "vendor").iterdir()}
    assert all(entry["licence"] in ("MIT", "Apache-2.0") and entry["version"] for entry in listed.values())


@pytest.mark.slow  # it builds a wheel
def test_wheel_has_every_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("hub", "adapters"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("hub/web/")}
    assert packed == {f"hub/web/{path.relative_to(WEB).as_posix()}" for path in FILES}
