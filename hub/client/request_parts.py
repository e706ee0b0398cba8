"""Parts of requests: paths, JSON bodies, the canary header, and the number of items if it is known."""

import json
from collections.abc import Iterable, Sized
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from ..errors import InvalidRequest

JSON = {"content-type": "application/json"}


def json_body(body: Any) -> bytes:
    return json.dumps(body).encode()


def set_fields(limits: BaseModel) -> dict[str, Any]:
    return limits.model_dump(exclude_unset=True, exclude_none=True)


def without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def route(*names: str) -> str:
    """Return the path `/v1/...` of the names. Quoting keeps each name one segment of the path."""
    for name in names:
        if name in ("", ".", ".."):
            raise InvalidRequest.at("path", f"{name!r} is not a valid name")
    return "/v1/" + "/".join(quote(name, safe="") for name in names)


def canary_header(key: str | None) -> dict[str, str]:
    if key is None:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequest.at(
            "canary_key", "contains characters that an HTTP header cannot hold; use printable ASCII"
        )
    return {"x-canary-key": key}


def item_count(items: Iterable[Any]) -> int | None:
    return len(items) if isinstance(items, Sized) else None
