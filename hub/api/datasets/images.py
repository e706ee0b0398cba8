"""Routes of datasets: images of a task, and their labels."""

from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Query, Response
from starlette.datastructures import FormData

from ...admission.authentication import Caller
from ...dataset_schemas import (
    MAX_PAGE_GROUPS,
    MAX_PAGE_IMAGES,
    MAX_REVIEW_IMAGES,
    PAGE_GROUPS,
    PAGE_IMAGES,
    REVIEW_IMAGES,
    DatasetImage,
    DatasetInfo,
    Feedback,
    FeedbackGiven,
    ImageChange,
    ImagePage,
    ImagesAdded,
    ImagesChange,
    ImagesChanged,
    LabelRename,
    LabelRenamed,
    NearDuplicatePage,
    ReviewKind,
    ReviewQueue,
    Split,
    Use,
)
from ...errors import FieldProblem, InvalidRequest
from ...field_types import DIGEST_PATTERN, Label, clean_label
from ...schemas import MAX_IMAGES
from ...services.datasets.images import DatasetService, SentImage
from ...services.datasets.review import ReviewService
from ..base64_images import refuse_base64
from ..bodies import FORM, JSON, RequestBody, is_apple_double
from ..dependencies import CallerDependencies, LargeReply, TaskName, json_reply
from ..openapi import BINARY, OCTETS, request_body, schema_of
from ..problems import POSITION_PATTERN, invalid_fields

ZIPS = ("application/zip", "application/x-zip-compressed")
ZIP_START = b"PK\x03\x04"
NEUTRAL_PARTS = {"image", "images", "file", "files"}  # names of parts that are no labels
FORM_TEXTS = ("label", "split")
IMAGES_CONTENT: dict[str, Any] = {
    "image/*": BINARY,
    OCTETS: BINARY,
    FORM: {
        "type": "object",
        "properties": {
            "image": {"type": "array", "items": BINARY},
            "label": {"type": "string"},
            "split": {"enum": ["auto", "train", "test"]},
        },
    },
    ZIPS[0]: BINARY,
}
Digest = Annotated[str, Path(pattern=DIGEST_PATTERN, description="sha256 of the image's file")]
QueryLabel = Annotated[Label | None, Query(max_length=1000, description="label of the images")]
QuerySplit = Annotated[
    Split | None, Query(description="`auto`: the digest decides, a fifth of the images is for tests")
]
ListedLabel = Annotated[Label | None, Query(max_length=1000, description="only images with this label")]
ListedUse = Annotated[Use | None, Query(description="only images that train, or only images that test")]
Unlabelled = Annotated[bool, Query(description="only images without a label")]
Cursor = Annotated[str, Query(pattern=POSITION_PATTERN, description="`next` of the previous page")]
Count = Annotated[int, Query(ge=1, le=MAX_PAGE_IMAGES, description="images of a page")]
Kind = Annotated[
    ReviewKind, Query(description="`unlabelled`: images without a label; `errors`: labels that are probably wrong")
]
ReviewCount = Annotated[int, Query(ge=1, le=MAX_REVIEW_IMAGES, description="images of the reply")]
GroupCount = Annotated[int, Query(ge=1, le=MAX_PAGE_GROUPS, description="groups of a page")]
CACHED = {"cache-control": "private, max-age=86400, immutable"}  # a digest always names the same bytes


def add_dataset_routes(
    api: FastAPI,
    service: DatasetService,
    reviews: ReviewService,
    dependencies: CallerDependencies,
    *,
    max_request_bytes: int,
) -> None:
    """Add the routes of datasets. All of them need an owner's key."""
    Owner = Annotated[Caller, Depends(dependencies.owner)]
    Body = Annotated[RequestBody, Depends(dependencies.body)]
    large = [Depends(dependencies.large_reply)]

    @api.get(
        "/v1/tasks/{task}/dataset",
        summary="Count the images of a task by label and use",
        response_model=DatasetInfo,
        dependencies=large,
    )
    async def get_dataset(caller: Owner, task: TaskName) -> Response:
        return json_reply(await service.describe(caller, task))

    @api.post(
        "/v1/tasks/{task}/dataset/rename-label",
        summary="Rename a label, or merge it into another one",
        openapi_extra=request_body({JSON: schema_of(LabelRename)}),
    )
    async def rename_label(caller: Owner, task: TaskName, body: Body) -> LabelRenamed:
        return await service.rename_label(caller, task, await body.read_json(LabelRename))

    @api.post(
        "/v1/tasks/{task}/images",
        summary="Add images to a task's dataset",
        openapi_extra=request_body(IMAGES_CONTENT),
    )
    async def add_images(
        caller: Owner, task: TaskName, body: Body, label: QueryLabel = None, split: QuerySplit = None
    ) -> ImagesAdded:
        async with service.upload(caller, task):
            if body.content_type in ZIPS:
                return await service.add_zip(caller, task, body.stream(), label, split)
            if body.content_type == FORM:
                async with body.form(max_request_bytes) as form:
                    images = await _images_of_form(form, body, label, split)
            else:
                name, data = await body.read_image(max_request_bytes)
                if data.startswith(ZIP_START):
                    raise InvalidRequest.at("body", f"is a ZIP archive; send it with Content-Type: {ZIPS[0]}")
                images = [SentImage(name, data, label, split)]
            return await service.add(caller, task, images)

    @api.get(
        "/v1/tasks/{task}/images",
        summary="List images of a dataset, newest first",
        response_model=ImagePage,
        dependencies=large,
    )
    async def list_images(
        caller: Owner,
        task: TaskName,
        label: ListedLabel = None,
        unlabelled: Unlabelled = False,
        split: ListedUse = None,
        cursor: Cursor = "0",
        count: Count = PAGE_IMAGES,
    ) -> Response:
        if unlabelled and label is not None:
            raise InvalidRequest.at("unlabelled", "contradicts label; set one of them")
        page = await service.page(
            caller, task, label=label, unlabelled=unlabelled, use=split, before=int(cursor), count=count
        )
        return json_reply(page)

    @api.get(
        "/v1/tasks/{task}/images/{digest}",
        summary="Get an image's file",
        response_class=Response,
        dependencies=large,
        responses={200: {"content": {OCTETS: {"schema": BINARY}}}},
    )
    async def get_image(caller: Owner, task: TaskName, digest: Digest) -> Response:
        # Never as an image type: a browser would show the file of one tenant's upload under the hub's own origin.
        headers = CACHED | {"content-disposition": f'attachment; filename="{digest}"'}
        return LargeReply(await service.file(caller, task, digest), media_type=OCTETS, headers=headers)

    @api.get(
        "/v1/tasks/{task}/images/{digest}/thumbnail",
        summary="Get a small JPEG of an image, without its metadata",
        response_class=Response,
        dependencies=large,  # the image's whole file is in memory until it is decoded
        responses={200: {"content": {"image/jpeg": {"schema": BINARY}}}},
    )
    async def get_thumbnail(caller: Owner, task: TaskName, digest: Digest) -> Response:
        return Response(await service.thumbnail(caller, task, digest), media_type="image/jpeg", headers=CACHED)

    @api.patch(
        "/v1/tasks/{task}/images/{digest}",
        summary="Set label or split of an image",
        openapi_extra=request_body({JSON: schema_of(ImageChange)}),
    )
    async def change_image(caller: Owner, task: TaskName, digest: Digest, body: Body) -> DatasetImage:
        return await service.change(caller, task, digest, await body.read_json(ImageChange))

    @api.patch(
        "/v1/tasks/{task}/images",
        summary="Set label or split of several images in one step",
        openapi_extra=request_body({JSON: schema_of(ImagesChange)}),
    )
    async def change_images(caller: Owner, task: TaskName, body: Body) -> ImagesChanged:
        return await service.change_many(caller, task, await body.read_json(ImagesChange))

    @api.delete("/v1/tasks/{task}/images/{digest}", status_code=204)
    async def delete_image(caller: Owner, task: TaskName, digest: Digest) -> None:
        await service.remove(caller, task, digest)

    @api.get(
        "/v1/tasks/{task}/review",
        summary="List images to label or to correct, most useful first",
        response_model=ReviewQueue,
        dependencies=large,
    )
    async def get_review(
        caller: Owner, task: TaskName, kind: Kind = "unlabelled", count: ReviewCount = REVIEW_IMAGES
    ) -> Response:
        return json_reply(await reviews.review(caller, task, kind, count))

    @api.get(
        "/v1/tasks/{task}/near-duplicates",
        summary="List groups of near-duplicates, those across splits first",
        response_model=NearDuplicatePage,
        dependencies=large,
    )
    async def get_near_duplicates(
        caller: Owner, task: TaskName, cursor: Cursor = "0", count: GroupCount = PAGE_GROUPS
    ) -> Response:
        return json_reply(await reviews.near_duplicates(caller, task, int(cursor), count))

    @api.post(
        "/v1/tasks/{task}/feedback",
        summary="Give an image its true label, which confirms or corrects the answer",
        openapi_extra=request_body({JSON: schema_of(Feedback)}),
    )
    async def give_feedback(caller: Owner, task: TaskName, body: Body) -> FeedbackGiven:
        return await reviews.feedback(caller, task, await body.read_json(Feedback))


async def _images_of_form(form: FormData, body: RequestBody, label: str | None, split: Split | None) -> list[SentImage]:
    """Return the files of a form. The text fields `label` and `split` hold for all of them.

    Without a label, the name of a part is the label of its image, unless it is `image` or `file`.

    Raises:
        InvalidRequest: another text field, a field twice, no image, or too many.
    """
    texts: dict[str, list[str]] = {}
    files = []
    for name, part in form.multi_items():
        if isinstance(part, str):
            texts.setdefault(name, []).append(part)
            continue
        data = await part.read()
        if not is_apple_double(part.filename, data):
            files.append((name, part.filename or name, data))
    problems = [
        FieldProblem(n, f"is text; the text fields of this form are {', '.join(FORM_TEXTS)}")
        for n in texts
        if n not in FORM_TEXTS
    ]
    problems += [FieldProblem(n, f"is set {len(v)} times; set it once") for n, v in texts.items() if len(v) > 1]
    if problems:
        raise invalid_fields(problems)
    if "split" in texts and texts["split"][0] not in ("auto", "train", "test"):
        raise InvalidRequest.at("split", f"is {texts['split'][0]!r}; must be auto, train or test")
    chosen: Any = texts["split"][0] if "split" in texts else None
    split = body.option("split", split, chosen)
    label = body.option("label", label, _label("label", texts["label"][0]) if "label" in texts else None)
    if not files:
        raise InvalidRequest.at("body", "the form has no image; send each image as a file")
    if len(files) > MAX_IMAGES:
        raise InvalidRequest.at("body", f"the form has {len(files)} images; send at most {MAX_IMAGES}, or a zip")
    images = []
    for part_name, filename, data in files:
        refuse_base64(part_name, data)
        own = label
        if own is None and part_name not in NEUTRAL_PARTS:
            own = _label(part_name, part_name)
        images.append(SentImage(filename, data, own, split))
    return images


def _label(field: str, text: str) -> str:
    try:
        return clean_label(text)
    except ValueError as error:
        raise InvalidRequest.at(field, f"label {text[:40]!r} {error}") from error
