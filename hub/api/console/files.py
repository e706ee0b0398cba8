"""Files of the console, read once and served from memory. They need no key, since they contain no data."""

import gzip
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...admission.login_codes import LoginCodes
from .login import add_login_route

DIGEST_CHARS = 16
DEMO_FILES = ("count.safetensors", "digits.safetensors", "shapes.safetensors")
MEDIA_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "safetensors": "application/octet-stream",
    "svg": "image/svg+xml",
}
# Stricter than the policy of other pages: no inline style. `blob:` is for thumbnails, which need the key.
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
IMMUTABLE = "public, max-age=31536000, immutable"  # the address has the digest of all files


@dataclass(frozen=True)
class File:
    """One file, as it is and compressed."""

    data: bytes
    compressed: bytes
    media_type: str
    etag: str


@dataclass(frozen=True)
class Console:
    """All files by their path below the digest, and the page."""

    digest: str
    page: File
    files: dict[str, File]


def add_console(api: FastAPI, codes: LoginCodes) -> None:
    """Add `GET /`, the files that the page names, and the exchange of a login link's code.

    The page names its files relatively, and their addresses have the digest of all files. The console therefore works
    below any path of a proxy, browsers keep the files for a year, and a new version of the hub has new addresses.
    """
    console()  # before the first request, which would otherwise compress all files on the event loop

    @api.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        reply = _reply(request, console().page, "no-cache")
        reply.headers["content-security-policy"] = POLICY
        return reply

    @api.api_route("/console/{digest}/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request, digest: str, path: str) -> Response:
        found = console().files.get(path)
        if found is None or digest != console().digest:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return _reply(request, found, IMMUTABLE)

    add_login_route(api, codes)


@cache
def console() -> Console:
    """Return the console of this installation."""
    return read_console(files("hub") / "web", files("adapters.demo"))


def read_console(web: Traversable, demo: Traversable) -> Console:
    """Read and compress all files.

    Args:
        web: the folder of the page.
        demo: the folder of the demo's adapters.
    """
    contents = dict(sorted(_contents(web)))
    contents |= {f"demo/{name}": (demo / name).read_bytes() for name in DEMO_FILES}
    whole = hashlib.sha256()
    for path, data in contents.items():
        whole.update(f"{path}\0{len(data)}\0".encode() + data)
    digest = whole.hexdigest()[:DIGEST_CHARS]
    page = contents.pop("index.html").replace(b"{digest}", digest.encode())
    served = {path: _file(path, data) for path, data in contents.items() if path.rpartition(".")[2] in MEDIA_TYPES}
    return Console(digest, _file("index.html", page), served)


def _contents(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _contents(entry, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}", entry.read_bytes()


def _file(path: str, data: bytes) -> File:
    etag = f'"{hashlib.sha256(data).hexdigest()[:DIGEST_CHARS]}"'
    return File(data, gzip.compress(data, mtime=0), MEDIA_TYPES[path.rpartition(".")[2]], etag)


def _reply(request: Request, file: File, caching: str) -> Response:
    """Return a file as the request's headers ask for it: compressed, or not at all if the browser has it."""
    headers = {"cache-control": caching, "etag": file.etag, "vary": "accept-encoding"}
    if file.etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    accepted = [part.replace(" ", "") for part in request.headers.get("accept-encoding", "").split(",")]
    if "gzip" in [part.partition(";")[0] for part in accepted if not part.endswith(";q=0")]:
        return Response(file.compressed, media_type=file.media_type, headers=headers | {"content-encoding": "gzip"})
    return Response(file.data, media_type=file.media_type, headers=headers)
