"""Log records and problems contain no key and no part of an image; Redis contains no key in clear text."""

import base64
import io
import logging
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from adapters import Adapter
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import png

MARK = "a-face-that-must-stay-secret"
LOGGERS = ("hub", "asyncio", "uvicorn", "fastapi", "python_multipart", "PIL", "redis")
WRONG_KEY = "kh_" + "w" * 43
CANARY = "canary-key-of-a-patient"


def marked_png() -> bytes:
    """Return a real image with `MARK` in its metadata."""
    text, buffer = PngInfo(), io.BytesIO()
    text.add_text("Comment", MARK)
    Image.open(io.BytesIO(png())).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


IMAGE = marked_png()
TEXT = base64.b64encode(IMAGE).decode()
# The mark as text, as hex, and in base64 at each of the three alignments, without the characters that its neighbours
# change.
TRACES = [MARK, *[base64.b64encode(b"-" * i + MARK.encode())[4:-4].decode() for i in range(3)], MARK.encode().hex()]


def requests(hub: Hub) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield method, path and options of valid and invalid requests with secrets."""
    classify = "/v1/tasks/flowers/classify"
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [TEXT]}
    yield "POST", classify, {"content": IMAGE, "headers": {"x-canary-key": CANARY}}
    yield "POST", classify, {"json": {"images": [TEXT]}}
    yield "POST", classify, {"files": {"a": ("a.png", IMAGE)}}
    yield "POST", "/v1/classify", {"json": {"inputs": [{"task": "flowers", "image": TEXT}]}}
    yield "POST", "/models/flowers", {"json": {"inputs": TEXT}}
    yield "POST", "/v2/models/flowers/infer", {"json": {"inputs": [tensor]}}
    yield "GET", "/v1/tasks", {}
    yield "POST", "/v1/tenants/default/keys", {"json": {"name": "another"}}
    # Invalid requests.
    for length in (len(IMAGE) // 2, len(IMAGE) - 30):
        yield "POST", classify, {"content": IMAGE[:length]}
    yield "POST", classify, {"content": b"no image " + MARK.encode()}
    yield "POST", classify, {"json": {"images": [TEXT, 1]}}
    yield "POST", classify, {"json": {"images": TEXT}}
    yield "POST", classify, {"json": {"images": ["?" + TEXT]}}
    yield "POST", classify, {"content": f'{{"images": ["{TEXT}"', "headers": {"content-type": "application/json"}}
    yield "POST", classify, {"content": IMAGE, "headers": {"content-type": "multipart/form-data; boundary=x"}}
    yield "POST", "/v1/classify", {"json": {"inputs": [{"task": "flowers", "image": TEXT, "more": TEXT}]}}
    yield "POST", "/models/flowers", {"json": {"inputs": [TEXT]}}
    yield "POST", "/v2/models/flowers/infer", {"json": {"inputs": [{**tensor, "shape": [2]}]}}
    yield "POST", "/v1/tasks/flowers/versions", {"content": IMAGE, "headers": OCTETS}
    yield "POST", "/v1/tasks/absent/classify", {"content": IMAGE}
    for authorization in (f"Bearer {WRONG_KEY}", WRONG_KEY, f"Basic {WRONG_KEY}", f"Bearer  {hub.key}x"):
        yield "POST", classify, {"content": IMAGE, "headers": {"authorization": authorization}}
    yield "GET", "/v1/audit", {"headers": {"authorization": f"Bearer {hub.key}"}}
    yield "DELETE", "/v1/tenants/default/keys/0000000000000000", {}


def contents(record: logging.LogRecord) -> str:
    """Return everything of a record that a handler could write."""
    trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
    return f"{record.getMessage()} {record.__dict__} {trace}"


@pytest.fixture
def debug_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Records of level debug and above of all loggers."""
    caplog.set_level(logging.DEBUG)
    for name in LOGGERS:
        caplog.set_level(logging.DEBUG, name)
    return caplog


def test_no_log_record_or_problem_contains_a_secret(
    hub: Hub, adapters: list[Adapter], debug_log: pytest.LogCaptureFixture
) -> None:
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    secrets = [hub.key, hub.admin_key, WRONG_KEY, CANARY, *TRACES]
    failures = 0
    for method, path, options in requests(hub):
        reply = hub.http.request(method, path, **options)
        if path.endswith("/keys") and reply.status_code == 201:
            secrets.append(reply.json()["key"])
        elif reply.status_code >= 400:
            failures += 1
            assert not [s for s in secrets if s in reply.text or s in str(reply.headers)], (method, path, reply.text)
    hub.engine.slots[adapters[0].digest] = None  # type: ignore[assignment]  # breaks the engine
    broken = hub.http.post("/v1/tasks/flowers/classify", content=IMAGE)
    assert broken.status_code == 500
    assert not [s for s in secrets if s in broken.text]
    assert failures > 15
    records = [record for record in debug_log.records if not record.name.startswith(("httpx", "httpcore"))]
    assert [record for record in records if record.exc_info]  # the unexpected error is logged
    for record in records:
        assert not [s for s in secrets if s in contents(record)], contents(record)


def test_redis_contains_no_key_in_clear_text(hub: Hub) -> None:
    made = hub.http.post("/v1/tenants/default/keys", json={"name": "another"}).json()
    client = redis.Redis.from_url(hub.redis_url)
    dumps = [client.dump(name) or b"" for name in client.keys("*")]
    client.close()
    assert dumps
    for key in (hub.key, hub.admin_key, made["key"]):
        assert not [d for d in dumps if key.encode() in d or key.removeprefix("kh_").encode() in d]
