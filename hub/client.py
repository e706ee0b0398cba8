"""A Python client for a hub: typed replies, typed errors, one connection pool."""

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from . import errors
from .errors import FieldProblem, HubError
from .schemas import AliasChange, Classified, Input, InputsBody, Problem, Registered, Results, TaskInfo, TaskList

Reply = TypeVar("Reply", bound=BaseModel)
_KINDS: dict[str, type[HubError]] = {
    kind.code: kind
    for kind in (
        errors.InvalidRequest,
        errors.InvalidImage,
        errors.InvalidAdapter,
        errors.Unauthenticated,
        errors.Forbidden,
        errors.NotFound,
        errors.Conflict,
        errors.TooLarge,
        errors.LimitReached,
        errors.Unavailable,
    )
}


class Client:
    """Talks to one hub with one key.

    Every method raises the `HubError` kind that the hub answered with (`hub.errors`), and `Unavailable` where no
    hub answers.

    >>> with Client("http://127.0.0.1:8000", key="kh_...") as client:  # doctest: +SKIP
    ...     client.register("flowers", "flowers.safetensors")
    ...     client.classify("flowers", ["rose.jpg"]).predictions[0][0].label
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        timeout_s: float = 60.0,
        on_response: Callable[[httpx.Response], None] | None = None,
    ) -> None:
        """
        Args:
            url: where the hub is.
            key: an API key.
            timeout_s: for connecting, and for each wait for bytes.
            on_response: sees every response, such as its `Server-Timing` header, before it is read.
        """
        try:
            self._http = httpx.Client(
                base_url=url,
                timeout=timeout_s,
                headers={"authorization": f"Bearer {key}"},
                event_hooks={"response": [on_response]} if on_response is not None else None,
            )
        except httpx.InvalidURL as error:
            raise errors.InvalidRequest(f"{url!r} is no URL: {error}") from error
        except UnicodeEncodeError as error:
            raise errors.Unauthenticated("the key has characters that no key of a hub has") from error

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def tasks(self) -> TaskList:
        """The tenant's tasks."""
        return self._call(TaskList, "GET", "/v1/tasks")

    def task(self, name: str) -> TaskInfo:
        """One task with its versions and aliases."""
        return self._call(TaskInfo, "GET", f"/v1/tasks/{_quoted(name)}")

    def register(self, name: str, adapter: str | Path | bytes, *, alias: str | None = None) -> Registered:
        """Register an adapter file as a version of a task; the same bytes again are the same version.

        Args:
            alias: also moved to this version; `latest` always is.
        """
        data = adapter if isinstance(adapter, bytes) else Path(adapter).read_bytes()
        params = {"alias": alias} if alias is not None else {}
        headers = {"content-type": "application/octet-stream"}
        return self._call(
            Registered, "POST", f"/v1/tasks/{_quoted(name)}/versions", content=data, params=params, headers=headers
        )

    def set_alias(self, name: str, alias: str, targets: int | Mapping[int, int]) -> TaskInfo:
        """Point an alias at a version, or at several: version -> weight."""
        change = AliasChange(version=targets) if isinstance(targets, int) else AliasChange(weights=dict(targets))
        path = f"/v1/tasks/{_quoted(name)}/aliases/{_quoted(alias)}"
        return self._call(TaskInfo, "PUT", path, json=change.model_dump(exclude_none=True))

    def delete_task(self, name: str) -> None:
        self._send("DELETE", f"/v1/tasks/{_quoted(name)}")

    def delete_version(self, name: str, version: int) -> None:
        self._send("DELETE", f"/v1/tasks/{_quoted(name)}/versions/{version}")

    def classify(
        self, name: str, images: Sequence[str | Path | bytes], *, top_k: int = 5, version: str = "latest"
    ) -> Classified:
        """Classify images (paths or encoded bytes) with one task."""
        files = [("image", (f"{i}", _bytes(image), "application/octet-stream")) for i, image in enumerate(images)]
        params = {"top_k": top_k, "version": version}
        return self._call(Classified, "POST", f"/v1/tasks/{_quoted(name)}/classify", files=files, params=params)

    def classify_inputs(self, inputs: Sequence[tuple[str, str | Path | bytes]], *, top_k: int = 5) -> Results:
        """Classify (task, image) pairs in one call."""
        body = InputsBody(
            inputs=[Input(task=task, image=base64.b64encode(_bytes(image)).decode()) for task, image in inputs]
        )
        return self._call(Results, "POST", "/v1/classify", json=body.model_dump(), params={"top_k": top_k})

    def _call(self, reply: type[Reply], method: str, path: str, **options: Any) -> Reply:
        response = self._send(method, path, **options)
        try:
            return reply.model_validate_json(response.content)
        except ValueError as error:
            raise HubError(f"what answers at {self._http.base_url} is no hub: {response.text[:80]!r}") from error

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise errors.Unavailable(f"no hub answers at {self._http.base_url}: {error}") from error
        if response.is_error:
            raise _error_of(response)
        return response


def _error_of(response: httpx.Response) -> HubError:
    try:
        problem = Problem.model_validate_json(response.content)
    except ValueError:
        return HubError(f"HTTP {response.status_code}: {response.text[:200]}")
    kind = _KINDS.get(problem.type.removeprefix(errors.TYPE_PREFIX), HubError)
    retry_after = response.headers.get("retry-after", "")
    return kind(
        problem.detail,
        [FieldProblem(e.field, e.message) for e in problem.errors],
        int(retry_after) if retry_after.isdecimal() else None,
    )


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _bytes(image: str | Path | bytes) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()
