"""Parameters, docstrings, requests and reply types of the methods that `Client` and `AsyncClient` share.

Each function returns a `Call` or a `CallSeries` and sends nothing. The method of the same name in both clients takes
the same arguments, sends the calls, and returns the reply type: the last type parameter of the returned value.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from pydantic import BaseModel

from ..errors import InvalidRequest
from ..schemas import EVERY, LATEST, Classified, Registered, Results, TaskInfo, TaskList, VersionInfo
from .image_encoding import ImageSource, ImageSources, encode, iterate_images
from .replies import AnyPath, joined, model, nothing, to_file
from .request_parts import JSON, canary_header, item_count, json_body, route, without_none
from .transport import Call, CallSeries, PagedCall

Model = TypeVar("Model", bound=BaseModel)
TaskInput: TypeAlias = "tuple[str, ImageSource] | tuple[str, ImageSource, str]"

BINARY = {"content-type": "application/octet-stream"}


# Tasks


def tasks() -> PagedCall[TaskList]:
    """List the tasks of the key's tenant, then those that other tenants share with it by name, then public ones."""
    return PagedCall(Call("GET", "/v1/tasks", model(TaskList)), "tasks")


def task(name: str) -> PagedCall[TaskInfo]:
    """Return a task with its versions and aliases. The name of another tenant's shared task is `tenant:task`."""
    return PagedCall(Call("GET", route("tasks", name), model(TaskInfo)), "versions")


def version(name: str, version: int | str = LATEST) -> Call[VersionInfo]:
    """Return a version of a task, by number or alias, with digest, labels and preprocessing."""
    return Call("GET", route("tasks", name, "versions", str(version)), model(VersionInfo))


def register(
    name: str,
    adapter: AnyPath | bytes | None = None,
    *,
    source: str | None = None,
    digest: str | None = None,
    alias: str | None = None,
    unknown_below: float | None = None,
    stage: bool = False,
    labels_may_change: bool = False,
) -> Call[Registered]:
    """Register an adapter file as a version of a task.

    A new version becomes `latest`, which clients call that name no version. The same bytes again give the same version
    and move no alias.

    Args:
        adapter: path of the file, or its bytes.
        source: URL that the hub downloads the file from, such as `s3://bucket/flowers.safetensors`; replaces `adapter`.
        digest: expected sha256 of the file at `source`, in hex.
        alias: further alias that a new version gets.
        unknown_below: setting of the task, see `change_settings`; None: no change.
        stage: leave `latest` where it is.
        labels_may_change: accept labels that differ from those of the version behind `latest`.

    Raises:
        InvalidAdapter: The file is not a valid adapter for this hub; `errors` names each tensor or field.
        Conflict: The labels differ from those of the version behind `latest`.
        LimitReached: The tenant has reached a limit of tasks, versions or stored bytes.
    """
    path = route("tasks", name, "versions")
    options = {"stage": "true" if stage else None, "labels": "changed" if labels_may_change else None}
    params = without_none(alias=alias, unknown_below=unknown_below, **options)
    if (adapter is None) == (source is None) or (digest is not None and source is None):
        raise InvalidRequest.at("adapter", "set either adapter or source, not both; set digest only with source")
    if source is not None:
        body = json_body(without_none(source=source, digest=digest))
        return Call("POST", path, model(Registered), params=params, headers=JSON, content=body)
    if isinstance(adapter, bytes):
        return Call("POST", path, model(Registered), params=params, headers=BINARY, content=adapter)
    return Call("POST", path, model(Registered), params=params, headers=BINARY, upload=Path(adapter or ""))


def download(name: str, to: AnyPath, *, version: int | str = LATEST) -> Call[Path]:
    """Download the adapter file of a version to `to`, which appears only when complete. Needs an owner key."""
    return to_file(route("tasks", name, "versions", str(version), "file"), to)


def set_alias(name: str, alias: str, targets: int | Mapping[int, int]) -> Call[TaskInfo]:
    """Point an alias at a version, or at several versions with weights (a canary).

    The reply, as that of every change of a task, has the first page of the versions.

    Args:
        targets: a version number, or version number -> weight.
    """
    body = {"version": targets} if isinstance(targets, int) else {"weights": dict(targets)}
    return Call("PUT", route("tasks", name, "aliases", alias), model(TaskInfo), headers=JSON, content=json_body(body))


def roll_back(name: str, alias: str) -> Call[TaskInfo]:
    """Point an alias at its previous target."""
    return Call("POST", route("tasks", name, "aliases", alias, "rollback"), model(TaskInfo), idempotent=False)


def delete_alias(name: str, alias: str) -> Call[None]:
    """Delete an alias and keep its versions. The alias `latest` cannot be deleted."""
    return Call("DELETE", route("tasks", name, "aliases", alias), nothing)


def share(name: str, *, public: bool = False, tenants: Sequence[str] = ()) -> Call[TaskInfo]:
    """Let other tenants see a task and classify with it. The defaults end all sharing.

    Args:
        public: share with all tenants.
        tenants: share with these tenants.
    """
    body = {"public": public, "tenants": list(tenants)}
    return Call("PUT", route("tasks", name, "sharing"), model(TaskInfo), headers=JSON, content=json_body(body))


def change_settings(name: str, *, unknown_below: float | None = None) -> Call[TaskInfo]:
    """Change settings of a task; None keeps the value. The hub creates a task that does not exist.

    Args:
        unknown_below: an image with a lower typicality is unknown; 0 to 1, by default 0.01.
    """
    body = json_body(without_none(unknown_below=unknown_below))
    return Call("PUT", route("tasks", name), model(TaskInfo), headers=JSON, content=body)


def delete_task(name: str) -> Call[None]:
    """Delete a task with all its versions."""
    return Call("DELETE", route("tasks", name), nothing)


def delete_version(name: str, version: int) -> Call[None]:
    """Delete a version.

    Raises:
        Conflict: An alias points at the version.
    """
    return Call("DELETE", route("tasks", name, "versions", str(version)), nothing)


# Classification


def classify(
    name: str,
    images: ImageSources,
    *,
    top_k: int = 5,
    version: int | str = LATEST,
    coverage: float | None = None,
    canary_key: str | None = None,
    progress: bool = False,
) -> CallSeries[tuple[str, bytes], Classified, Classified]:
    """Classify any number of images with one task, in concurrent calls of limited size.

    Args:
        name: the task; another tenant's shared task is `tenant:task`.
        images: paths, bytes of image files, PIL images, or uint8 arrays (H, W, 3) or (H, W); read one at a time.
        top_k: number of labels per image, best first.
        version: version number or alias. One version classifies all images: the version of the first reply.
        coverage: such as 0.95. `sets` then has for each image the smallest set of labels that covers this share.
        canary_key: ASCII text. A canary alias maps equal keys to the same version.
        progress: show a progress bar on stderr.

    Raises:
        InvalidImage: An image is unusable; `errors` names it by its index, such as `images.17`.
        InvalidRequest: There are no images, `canary_key` is not ASCII, or the version has no sets of this coverage.
        NotFound: The tenant sees no such task, version or alias.
    """
    sources = iterate_images(images)

    def call(first: int, items: Sequence[tuple[str, bytes]], first_reply: Classified | None) -> Call[Classified]:
        number = version if first_reply is None else first_reply.version
        params = without_none(top_k=top_k, version=number, coverage=coverage)
        path = route("tasks", name, "classify")
        return Call("POST", path, model(Classified), params=params, headers=canary_header(canary_key), images=items)

    def items() -> Iterator[tuple[tuple[str, bytes], int]]:
        for i, image in enumerate(sources):
            data = encode(image, f"images.{i}")
            yield (f"images.{i}", data), len(data)

    return CallSeries(items(), call, joined, item_count(sources), progress)


def classify_inputs(
    inputs: Iterable[TaskInput],
    *,
    top_k: int = 5,
    coverage: float | None = None,
    canary_key: str | None = None,
    progress: bool = False,
) -> CallSeries[dict[str, str], Results, Results]:
    """Classify any number of images of several tasks, in concurrent calls of limited size.

    Args:
        inputs: (task, image) or (task, image, version); images as in `classify`.
        top_k: number of labels per image, best first.
        coverage: such as 0.95. `set` of each result is then the smallest set of labels that covers this share.
        canary_key: ASCII text. A canary alias maps equal keys to the same version.
        progress: show a progress bar on stderr.

    Raises:
        InvalidImage: An image is unusable; `errors` names it by its index, such as `inputs.17.image`.
        InvalidRequest: There are no inputs, `canary_key` is not ASCII, or a version has no sets of this coverage.
        NotFound: The tenant sees no such task, version or alias.
    """

    def call(first: int, items: Sequence[dict[str, str]], _first_reply: Results | None) -> Call[Results]:
        params, headers = without_none(top_k=top_k, coverage=coverage), JSON | canary_header(canary_key)
        body = json_body({"inputs": items})
        return Call("POST", "/v1/classify", model(Results), params=params, headers=headers, content=body, first=first)

    def join(parts: Sequence[Results]) -> Results:
        return Results(results=[result for part in parts for result in part.results])

    def items() -> Iterator[tuple[dict[str, str], int]]:
        for i, given in enumerate(inputs):
            data = base64.b64encode(encode(given[1], f"inputs.{i}.image")).decode()
            version = given[2] if len(given) == 3 else LATEST
            yield {"task": given[0], "image": data, "version": version}, len(data)

    return CallSeries(items(), call, join, item_count(inputs), progress)


def classify_tasks(
    image: ImageSource,
    tasks: Sequence[str] | str = EVERY,
    *,
    top_k: int = 5,
    coverage: float | None = None,
    canary_key: str | None = None,
) -> Call[Results]:
    """Classify one image with many tasks in one call: with the version `latest` of each.

    Args:
        image: as in `classify`.
        tasks: names, or `*` for every task of the key's tenant. `skipped` of the reply then names the tasks that cannot
            answer, with the reason.
        top_k: number of labels per task, best first.
        coverage: such as 0.95. `set` of each result is then the smallest set of labels that covers this share.
        canary_key: ASCII text. A canary alias maps equal keys to the same version.

    Raises:
        InvalidImage: The image is unusable.
        InvalidRequest: A name is there twice, or the tasks are more than 1,000 or cost more than 64 forward passes.
        NotFound: The tenant sees no task of one of the names, or it has no version.
    """
    params, headers = without_none(top_k=top_k, coverage=coverage), JSON | canary_header(canary_key)
    data = base64.b64encode(encode(image, "image")).decode()
    body = json_body({"image": data, "tasks": tasks if isinstance(tasks, str) else list(tasks)})
    return Call("POST", "/v1/classify", model(Results), params=params, headers=headers, content=body)
