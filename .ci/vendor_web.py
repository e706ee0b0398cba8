"""Renew the console's vendored modules in `hub/web/vendor` from npm: `python .ci/vendor_web.py`.

`PACKAGES` has the version of each package and the digest of its archive. An archive that differs is refused.
Bare names of imports become relative, because a page without inline scripts cannot have an import map.
"""

import base64
import hashlib
import io
import json
import re
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parents[1] / "hub" / "web" / "vendor"
REGISTRY = "https://registry.npmjs.org"
MODULES = {
    "preact": "./preact.js",
    "preact/hooks": "./hooks.js",
    "@preact/signals-core": "./signals-core.js",
}


class Package(NamedTuple):
    """A package of npm."""

    version: str
    integrity: str  # of the archive, as npm's registry has it
    files: dict[str, str]  # name here -> path in the archive
    appended: str = ""


PACKAGES = {
    "preact": Package(
        "11.2.0",
        "sha512-/HfHI/7N84e6GrWBJ3J280z3mLaRJiDcSvj/A+y/4AbLnND/1UlGHe1sR6oYuTGwId0nP7dqDU9OnLxMPZ7xBg==",
        {"preact.js": "dist/preact.mjs", "hooks.js": "hooks/dist/hooks.mjs"},
    ),
    "htm": Package(
        "3.1.1",
        "sha512-983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4KVxbMmxX/85mtfdnDmTFoNKcg5DGAvxNQ==",
        {"htm.js": "dist/htm.mjs"},
    ),
    "@preact/signals-core": Package(
        "1.14.5",
        "sha512-vcRv7Ityz5JVmeiVqIluLFzT/PDS/AlhHUpw3/aUWqcVUs6bDGIPXE/6RSC4evBNWYvnniozg5Syfj33al3gkg==",
        {"signals-core.js": "dist/signals-core.mjs"},
    ),
    "@preact/signals": Package(
        "2.11.4",
        "sha512-Rb+5RPo9gWSaHtzJeauhHxiC8KP/IF2DEPkHPEOGOnuy2wnJzRqyeLRankUCYd6ADqtxS6GnWGv6Ie343d8aYw==",
        {"signals.js": "dist/signals.mjs"},
    ),
    # The module of this package is not minified; the minified script declares a global name. css/app.css has the rules
    # of its style sheet that the console's charts need.
    "uplot": Package(
        "1.6.32",
        "sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
        {"uplot.js": "dist/uPlot.iife.min.js"},
        "export default uPlot;\n",
    ),
}


def main() -> None:
    """Download, check and write every package, and the list of versions."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.iterdir():
        old.unlink()
    listed = {}
    for name, package in PACKAGES.items():
        about = json.loads(_get(f"{REGISTRY}/{name}/{package.version}"))
        archive = _get(about["dist"]["tarball"])
        algorithm, _, expected = package.integrity.partition("-")
        if base64.b64encode(hashlib.new(algorithm, archive).digest()).decode() != expected:
            raise SystemExit(f"{name} {package.version}: the archive differs from its digest")
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            for here, path in package.files.items():
                text = _member(files, f"package/{path}")
                (FOLDER / here).write_text(_adapted(here, text, package.appended))
            licence = next(n for n in files.getnames() if re.fullmatch(r"package/licen[cs]e(\.\w+)?", n, re.IGNORECASE))
            terms = _member(files, licence).splitlines()
        copyright_line = next((line.strip() for line in terms if line.strip().startswith("Copyright")), "")
        listed[name] = {
            "version": package.version,
            "licence": about["license"],
            "copyright": copyright_line,
            "files": list(package.files),
        }
        print(name, package.version)
    (FOLDER / "versions.json").write_text(json.dumps(listed, indent=1) + "\n")


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as response:  # noqa: S310 (npm's registry)
        data: bytes = response.read()
    return data


def _member(archive: tarfile.TarFile, path: str) -> str:
    file = archive.extractfile(path)
    if file is None:
        raise SystemExit(f"{path} is not a file")
    return file.read().decode()


def _adapted(name: str, text: str, appended: str) -> str:
    """Return a file's text with relative imports and without the name of its source map."""
    text = re.sub(r"\n?//# sourceMappingURL=\S+", "", text).rstrip() + "\n"
    if not name.endswith(".js"):
        return text
    for bare, relative in MODULES.items():
        text = re.sub(rf"""(from\s*|import\s*)(["']){re.escape(bare)}\2""", rf"\g<1>\g<2>{relative}\g<2>", text)
    return text + appended


if __name__ == "__main__":
    main()
