"""Schemathesis hooks of `fuzz_api`: bodies that only a program can make, and a check for other tenants' data.

Schemathesis loads them in its own process; `FUZZ_*` in the environment name the caller.
"""

import base64
import os
from pathlib import Path
from typing import Any

import schemathesis
from schemathesis import Case, GenerationMode, HookContext, Response, SerializationContext
from schemathesis.checks import CheckContext

CALLER = os.environ["FUZZ_CALLER"]
SECRET = os.environ["FUZZ_SECRET"]  # a label of each of the owner's adapters
FOLDER = Path(os.environ["FUZZ_FOLDER"])
ADAPTERS = [path.read_bytes() for path in sorted(FOLDER.glob("*.safetensors"))]
PNG = (FOLDER / "image.png").read_bytes()
TAR = (FOLDER / "tenant.tar").read_bytes()
OPEN = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")


@schemathesis.serializer("application/x-tar")
def tar(_context: SerializationContext, value: Any) -> Any:
    return {"data": value if isinstance(value, bytes) else str(value).encode()}


@schemathesis.hook
def before_call(_context: HookContext, case: Case[Any], _kwargs: dict[str, Any]) -> None:
    """Put real adapters and images into most valid bodies: a schema cannot describe them."""
    positive = case.meta is None or case.meta.generation.mode == GenerationMode.POSITIVE
    if not positive or case.method != "POST" or case.id[-1] in "0123456789abcd":
        return
    text = base64.b64encode(PNG).decode()
    body: Any = case.body
    match case.operation.path.rpartition("/")[2], case.media_type, body:
        case "versions", "application/octet-stream", _:
            case.body = ADAPTERS[len(case.id[0].encode()) % len(ADAPTERS)]
        case "import", _, _:
            case.body = TAR
        case "classify" | "{task}", "image/*", _:
            case.body = PNG
        case "classify", "application/json", {"images": list(images)}:
            case.body = {"images": [text for _ in images]}
        case "classify", "application/json", {"inputs": list(inputs)}:
            entries: list[Any] = [entry for entry in inputs if isinstance(entry, dict)]
            case.body = {"inputs": [entry | {"image": text} for entry in entries]}
        case "{task}", "application/json", {"inputs": str()}:
            case.body = {**body, "inputs": text}
        case "infer", "application/json", dict():
            image: Any = {"name": "image", "shape": [2], "datatype": "BYTES", "data": [text, text]}
            case.body = {**body, "inputs": [image]}


@schemathesis.check
def nothing_of_another_s(_context: CheckContext, response: Response, case: Case[Any]) -> bool | None:
    """Fail if a caller without a key gets an answer, or another tenant learns that the owner's task exists."""
    if CALLER == "anonymous" and case.operation.path not in OPEN:
        assert response.status_code in (401, 404, 405), f"{response.status_code} without a key"
    if CALLER in ("anonymous", "visitor"):
        assert SECRET not in response.content.decode(errors="replace"), "an answer holds a label of the owner's"
    if CALLER == "visitor":
        named = [str(value) for value in (case.path_parameters or {}).values()]
        foreign = any(name == "default" or name.startswith("default:") for name in named)
        assert not (foreign and response.status_code < 400), f"{response.status_code} for what is another tenant's"
    return None
