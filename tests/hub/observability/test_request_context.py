"""Context of a request: facts about it, the adapter of an asyncio task, and the origin of a call to a worker."""

import asyncio

from hub.observability import request_context
from hub.observability.request_context import CallOrigin, RequestContext


def test_notes_outside_of_a_request_have_no_effect() -> None:
    request_context.note_tenant("acme")
    request_context.note_error("not-found")
    request_context.note_images("digits", 1)
    request_context.note_answers("digits", 1, [0.5])
    assert request_context.log_fields() == {}


def test_each_asyncio_task_logs_its_own_adapter() -> None:
    async def work(task: str, version: int) -> dict[str, str | int]:
        request_context.note_task(task, version, task * 64)
        await asyncio.sleep(0)
        return request_context.log_fields()

    async def use() -> tuple[dict[str, str | int], dict[str, str | int]]:
        with request_context.use(context):
            return await asyncio.gather(work("a", 1), work("b", 2))

    context = RequestContext("r-1", "acme")
    first, second = asyncio.run(use())
    assert (first["task"], first["version"], first["request_id"]) == ("a", 1, "r-1")
    assert (second["task"], second["version"]) == ("b", 2)
    assert (context.task, context.version, context.digest) == ("several", None, "")


def test_a_worker_restores_the_context_from_the_origin() -> None:
    with request_context.use(RequestContext("r-1", "acme")):
        request_context.note_task("digits", 2, "d" * 64)
        origin = request_context.call_origin()
    assert origin == CallOrigin("r-1", "digits", "")
    with request_context.use_origin(origin, "acme", "d" * 64):
        fields = request_context.log_fields()
    assert fields == {"request_id": "r-1", "tenant": "acme", "task": "digits", "digest": "d" * 64}
    assert request_context.log_fields() == {}


def test_a_429_has_the_label_waiting_when_no_limit_is_named() -> None:
    for field, limit in (("images_per_second", "images_per_second"), ("", "waiting")):
        context = RequestContext("r-1")
        with request_context.use(context):
            request_context.note_error("limit-reached", field)
        assert (context.error, context.limit) == ("limit-reached", limit)


def test_only_a_429_has_a_limit() -> None:
    context = RequestContext("r-1")
    with request_context.use(context):
        request_context.note_error("not-found", "task")
    assert (context.error, context.limit) == ("not-found", "")
