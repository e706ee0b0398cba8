"""The hub for clients that exist: Hugging Face's image classification, and the Open Inference Protocol v2 of KServe and
Triton. Routes and bodies only; the work is `Service`'s, as under /v1.
"""

import zlib
from collections.abc import Awaitable, Callable
from importlib.metadata import version as installed_version
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, Header, Path, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool

from ..admission.authentication import Caller
from ..concurrency import Turns
from ..errors import TooLarge
from ..schemas import LATEST, TASK_PATTERN, Prediction
from ..services.classification import Service, decode_base64
from .dependencies import BINARY, JSON, content_type, documented, parse_json, read_body, schema_of, tell
from .oip_tensors import (
    EXTENSIONS,
    InferReply,
    InferRequest,
    ModelInfo,
    Wanted,
    read_images,
    refused,
    tensors_of,
    wanted_outputs,
    write_reply,
)

OCTETS = "application/octet-stream"
MAX_JSON_VALUES = 2**20  # six images of 224 x 224 pixels; more go as binary data
MAX_HUGGING_FACE_VALUES = 100
DEFAULT_TOP_K = 5

TenantKey = Callable[..., Awaitable[Caller]]
TaskName = Annotated[str, Path(pattern=TASK_PATTERN, description="a task: `flowers`, or `tenant:flowers`")]
Version = Annotated[str, StringConstraints(max_length=63)]  # a number or an alias; in the path, or else in the query
Canary = Annotated[
    str | None,
    Header(alias="x-canary-key", max_length=256, description="calls of one key get one version of an alias"),
]
JSON_BYTES = "Inference-Header-Content-Length"
JsonBytes = Annotated[int | None, Header(alias=JSON_BYTES, ge=0, description="of JSON, where binary data follow it")]


def _probabilities_only(function: Any) -> Any:
    if function in ("sigmoid", "none"):
        message = "the hub gives probabilities only: leave function_to_apply out, or send softmax"
        raise PydanticCustomError("not_offered", message)
    return function


class HuggingFaceParameters(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    top_k: int | None = Field(None, ge=1, le=1000, description=f"labels in the reply; {DEFAULT_TOP_K} where not given")
    function_to_apply: Annotated[Literal["softmax"] | None, BeforeValidator(_probabilities_only)] = None


class HuggingFaceBody(BaseModel):
    """One image, as base64 text."""

    model_config = ConfigDict(strict=True)

    inputs: str
    parameters: HuggingFaceParameters | None = None


class Live(BaseModel):
    live: Literal[True] = True


class Ready(BaseModel):
    ready: Literal[True] = True


class ModelReady(Ready):
    name: str


class ServerInfo(BaseModel):
    name: str
    version: str
    extensions: list[str]


def add_protocols(
    api: FastAPI, service: Service, tenant_key: TenantKey, turns: Turns, *, max_request_bytes: int
) -> None:
    """Add `/models/{task}` and `/v2` to the application.

    Args:
        tenant_key: a dependency that gives the caller, whose key must be a tenant's.
        turns: a tenant's classifications at once; their bodies are read when it is their turn.
        max_request_bytes: of a body, as it is sent and as it is when it was compressed.
    """
    _add_hugging_face(api, service, tenant_key, turns, max_request_bytes)
    _add_descriptions(api, service, tenant_key)
    _add_infer(api, service, tenant_key, turns, max_request_bytes)


def _add_hugging_face(
    api: FastAPI, service: Service, tenant_key: TenantKey, turns: Turns, max_request_bytes: int
) -> None:
    body = documented({"image/*": BINARY, OCTETS: BINARY, JSON: schema_of(HuggingFaceBody)})

    @api.post("/models/{task}", openapi_extra=body)
    async def hugging_face(
        who: Annotated[Caller, Depends(tenant_key)],
        task: TaskName,
        request: Request,
        response: Response,
        version: Version = LATEST,
        canary: Canary = None,
    ) -> list[Prediction]:
        async with turns.turn(who.tenant):
            image, top_k = await _hugging_face_image(request, max_request_bytes)
            classified, passes = await service.classify(who, task, version, [image], top_k, canary)
        tell(response, passes)
        return classified.predictions[0]


def _add_descriptions(api: FastAPI, service: Service, tenant_key: TenantKey) -> None:
    """What `/v2` tells of itself and of tasks."""
    server_info = ServerInfo(name="karst-hub", version=installed_version("karst-hub"), extensions=[*EXTENSIONS])

    @api.get("/v2/health/live")
    async def live() -> Live:
        return Live()

    @api.get("/v2/health/ready")
    async def ready() -> Ready:
        await service.ready()
        return Ready()

    @api.get("/v2")
    async def server(_who: Annotated[Caller, Depends(tenant_key)]) -> ServerInfo:
        return server_info

    @api.get("/v2/models/{task}")
    @api.get("/v2/models/{task}/versions/{version}")
    async def model(
        who: Annotated[Caller, Depends(tenant_key)], task: TaskName, version: Version = LATEST
    ) -> ModelInfo:
        chosen = await service.version(who, task, version)
        numbers = [str(v.version) for v in (await service.task(who, task)).versions]
        inputs, outputs = tensors_of(chosen.labels, chosen.preprocess["input_size"])
        return ModelInfo(name=task, versions=numbers, inputs=inputs, outputs=outputs)

    @api.get("/v2/models/{task}/ready")
    @api.get("/v2/models/{task}/versions/{version}/ready")
    async def model_ready(
        who: Annotated[Caller, Depends(tenant_key)], task: TaskName, version: Version = LATEST
    ) -> ModelReady:
        await service.version(who, task, version)
        await service.ready()
        return ModelReady(name=task)


def _add_infer(api: FastAPI, service: Service, tenant_key: TenantKey, turns: Turns, max_request_bytes: int) -> None:
    options: dict[str, Any] = {
        "response_class": Response,
        "responses": {200: {"model": InferReply, "content": {OCTETS: {"schema": BINARY}}}},
        "openapi_extra": documented({JSON: schema_of(InferRequest), OCTETS: BINARY}),
    }

    @api.post("/v2/models/{task}/infer", **options)
    @api.post("/v2/models/{task}/versions/{version}/infer", **options)
    async def infer(
        who: Annotated[Caller, Depends(tenant_key)],
        task: TaskName,
        request: Request,
        version: Version = LATEST,
        json_bytes: JsonBytes = None,
        canary: Canary = None,
    ) -> Response:
        async with turns.turn(who.tenant):
            body = await _body(request, max_request_bytes)
            members, images, wanted = await run_in_threadpool(_read_infer, body, json_bytes)
            chosen, answers = await service.predict(who, task, version, images, canary)
        members = {"model_name": task, "model_version": str(chosen.version), **members}
        probabilities = np.stack([answer.probabilities for answer in answers])  # (B, K)
        content, length = await run_in_threadpool(write_reply, members, wanted, chosen.labels, probabilities)
        response = Response(content, media_type=JSON if length is None else OCTETS)
        if length is not None:
            response.headers[JSON_BYTES] = str(length)
        tell(response, [answer.computed for answer in answers])
        return response


def _read_infer(
    body: bytes, json_bytes: int | None
) -> tuple[dict[str, str], list[tuple[str, bytes | np.ndarray]], list[Wanted]]:
    """What of the request comes back, its images, and the outputs it wants."""
    length = len(body) if json_bytes is None else json_bytes
    if json_bytes is not None and not 0 < length <= len(body):
        message = f"is {length}, but must be the length of the JSON that starts the body of {len(body)} bytes"
        raise refused(JSON_BYTES, message)
    request = parse_json(InferRequest, body[:length], MAX_JSON_VALUES)
    wanted = wanted_outputs(request)
    images = read_images(request.inputs[0], memoryview(body)[length:])
    return {} if request.id is None else {"id": request.id}, images, wanted


async def _hugging_face_image(request: Request, limit_bytes: int) -> tuple[tuple[str, bytes], int]:
    """The image with its name for errors, and how many labels are wanted."""
    body = await _body(request, limit_bytes)
    if content_type(request) != JSON:
        return ("body", body), DEFAULT_TOP_K
    asked = await run_in_threadpool(parse_json, HuggingFaceBody, body, MAX_HUGGING_FACE_VALUES)
    [image] = await run_in_threadpool(decode_base64, [("inputs", asked.inputs)])
    top_k = asked.parameters.top_k if asked.parameters else None
    return image, top_k or DEFAULT_TOP_K


async def _body(request: Request, limit_bytes: int) -> bytes:
    """The whole body, decompressed where it was compressed."""
    body = await read_body(request, limit_bytes, "body")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    return body if coding == "identity" else await run_in_threadpool(_inflated, body, coding, limit_bytes)


def _inflated(body: bytes, coding: str, limit_bytes: int) -> bytes:
    """Stops as soon as there is more than the limit, whatever else the body would become."""
    if coding not in ("gzip", "deflate"):
        raise refused("Content-Encoding", f"{coding!r} is not offered; send gzip, deflate or no compression")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # takes gzip's header and zlib's
    try:
        plain = inflater.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise refused("body", f"is not {coding}: {error}") from error
    if len(plain) > limit_bytes:
        message = f"the body has more than the {limit_bytes} bytes that are allowed when it is decompressed"
        raise TooLarge.at("body", message)
    if not inflater.eof or inflater.unused_data:
        raise refused("body", f"is cut off, or has more than one {coding} stream")
    return plain
