"""Route for clients of Hugging Face's image classification, such as `huggingface_hub.InferenceClient`."""

from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ...admission.authentication import Caller
from ...concurrency import TenantConcurrencyLimit
from ...schemas import LATEST, Prediction
from ...services.classification import ClassificationService
from ..base64_images import NamedImage, decode_base64
from ..bodies import JSON, RequestBody, parse_json
from ..dependencies import CallerDependencies, CanaryKey, QueryVersion, TaskName, TopK, batch_headers
from ..openapi import BINARY, OCTETS, request_body, schema_of

MAX_JSON_VALUES = 100
DEFAULT_TOP_K = 5


def _only_softmax(function: Any) -> Any:
    if function in ("sigmoid", "none"):
        message = "the hub returns probabilities only; omit function_to_apply, or send softmax"
        raise PydanticCustomError("not_supported", message)
    return function


class HuggingFaceParameters(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    top_k: int | None = Field(None, ge=1, le=1000, description=f"labels in the reply; default {DEFAULT_TOP_K}")
    function_to_apply: Annotated[Literal["softmax"] | None, BeforeValidator(_only_softmax)] = None


class HuggingFaceBody(BaseModel):
    """One image as base64 text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    inputs: str
    parameters: HuggingFaceParameters | None = None


def add_huggingface_routes(
    api: FastAPI,
    service: ClassificationService,
    dependencies: CallerDependencies,
    concurrency_limit: TenantConcurrencyLimit,
    *,
    max_request_bytes: int,
) -> None:
    """Add `/models/{task}` to an application.

    Args:
        concurrency_limit: classifications of one tenant at once. A queued request's body stays unread.
        max_request_bytes: limit of a body, before and after decompression.
    """
    TenantCaller = Annotated[Caller, Depends(dependencies.tenant_caller)]
    Body = Annotated[RequestBody, Depends(dependencies.body)]

    @api.post(
        "/models/{task}",
        summary="Classify an image",
        openapi_extra=request_body({"image/*": BINARY, OCTETS: BINARY, JSON: schema_of(HuggingFaceBody)}),
    )
    async def classify_hugging_face(
        caller: TenantCaller,
        task: TaskName,
        body: Body,
        response: Response,
        top_k: TopK = DEFAULT_TOP_K,
        version: QueryVersion = LATEST,
        canary: CanaryKey = None,
    ) -> list[Prediction]:
        async with concurrency_limit.acquire(caller.tenant):
            if body.content_type == JSON:
                image, own = await body.parse(_parse, await body.read(max_request_bytes))
                top_k = body.option("top_k", top_k, own)
            else:
                image = await body.read_image(max_request_bytes)
            classified, stats = await service.classify(caller, task, version, [image], top_k, canary)
        response.headers.update(batch_headers(stats))
        return classified.predictions[0]


def _parse(body: bytes) -> tuple[NamedImage, int | None]:
    """Return the image of a JSON body, and its number of labels in the reply."""
    request = parse_json(HuggingFaceBody, body, MAX_JSON_VALUES)
    [image] = decode_base64([("inputs", request.inputs)])
    return image, request.parameters.top_k if request.parameters else None
