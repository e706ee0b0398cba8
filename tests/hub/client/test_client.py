"""Tests of both Python clients over real HTTP against the hub's application, and of the requests that they send."""

import inspect
import io
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from PIL import Image

from adapters import Adapter, Backbone
from hub import AsyncClient, Client
from hub.admin_schemas import LimitsChange
from hub.client import admin_endpoints, endpoints
from hub.client.image_encoding import encode
from hub.client.transport import Call, CallSeries
from hub.errors import Conflict, Forbidden, InvalidAdapter, InvalidImage, InvalidRequest, NotFound, Unauthenticated
from tests.support.clients import KINDS
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import calibrated_adapter, encoded, flat_png, png, with_metadata

Kind = Callable[..., Any]  # `Client`, or `AsyncClient` with blocking methods
ROOT = Path(__file__).parents[3]


@pytest.fixture(params=KINDS, ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Kind:
    client_class: Kind = request.param
    return client_class


@pytest.fixture
def client(kind: Kind, url: str, hub: Hub) -> Iterator[Any]:
    with kind(url, hub.key) as client:
        yield client


def endpoint_functions() -> dict[str, Callable[..., Any]]:
    """Return every public function of `hub.client.endpoints`."""
    public = vars(endpoints) | vars(admin_endpoints)
    functions = {n: f for n, f in public.items() if inspect.isfunction(f) and not n.startswith("_")}
    return {n: f for n, f in functions.items() if f.__module__ in (endpoints.__name__, admin_endpoints.__name__)}


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_client_has_a_method_for_every_endpoint(client: type[Any]) -> None:
    own = {n: m for n, m in vars(client).items() if inspect.isfunction(m) and not n.startswith("_")}
    trained = {"create_task", "train", "trainings", "training", "cancel_training", "training_report", "compare"}
    trained |= {"review", "feedback", "task_usage", "backtest"}
    assert set(own) - {"close", "aclose"} == set(endpoint_functions()) | trained
    for name, endpoint in endpoint_functions().items():
        assert own[name].__name__ == name
        assert own[name].__doc__ == endpoint.__doc__
        signature, wanted = inspect.signature(own[name]), inspect.signature(endpoint)
        assert list(signature.parameters.values())[1:] == list(wanted.parameters.values())
        assert signature.return_annotation == get_args(wanted.return_annotation)[-1]
        assert inspect.iscoroutinefunction(own[name]) == (client is AsyncClient)


def test_client_manages_a_task_from_registration_to_deletion(
    client: Any, hub: Hub, adapters: list[Adapter], tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(adapters[0].data)
    first = client.register("life", file, alias="stable")
    assert (first.task, first.version, first.digest) == ("life", 1, adapters[0].digest)
    assert client.register("life", adapters[0].data).version == 1
    assert client.register("life", str(file)).version == 1
    assert client.register("life", adapters[1].data).version == 2
    assert [t.task for t in client.tasks().tasks] == ["life"]
    assert client.task("life").aliases == {"latest": {2: 1}, "stable": {1: 1}}
    assert client.version("life").digest == adapters[1].digest
    assert client.version("life", "stable").version == client.version("life", 1).version == 1

    assert client.download("life", tmp_path / "copy", version="stable") == tmp_path / "copy"
    assert (tmp_path / "copy").read_bytes() == adapters[0].data
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["a.safetensors", "copy"]

    assert client.set_alias("life", "stable", {1: 9, 2: 1}).aliases["stable"] == {1: 9, 2: 1}
    with pytest.raises(Conflict, match="stable"):
        client.delete_version("life", 1)
    assert client.set_alias("life", "stable", 2).aliases["stable"] == {2: 1}
    assert client.roll_back("life", "stable").aliases["stable"] == {1: 9, 2: 1}
    assert client.delete_alias("life", "stable") is None
    assert client.delete_version("life", 1) is None
    hub.key_of("b")
    assert client.share("life", tenants=["b"]).sharing.tenants == ["b"]
    assert client.share("life", public=True).sharing.public
    assert not client.share("life").sharing.public
    assert client.delete_task("life") is None
    with pytest.raises(NotFound, match="there is no task 'life'") as error:
        client.task("life")
    assert error.value.errors[0].field == "task"


def test_client_raises_an_error_when_arguments_are_invalid(kind: Kind, client: Any) -> None:
    with pytest.raises(InvalidAdapter):
        client.register("a", b"no adapter")
    with pytest.raises(FileNotFoundError):
        client.register("a", "no/such.safetensors")
    with pytest.raises(FileNotFoundError):
        client.classify("a", ["no/such.png"])
    for both in ({}, {"adapter": b"x", "source": "s3://x"}, {"adapter": b"x", "digest": "0"}):
        with pytest.raises(InvalidRequest, match="either"):
            client.register("a", **both)
    for name in ("", ".", ".."):
        with pytest.raises(InvalidRequest, match="is not a valid name"):
            client.usage(name)
    with pytest.raises(InvalidRequest, match="at least one"):
        client.classify("a", [])
    with pytest.raises(InvalidRequest, match="ASCII"):
        client.classify("a", [png()], canary_key="ü")
    for key in ("", " ", "kh_ü", "kh_\n\0"):
        with pytest.raises(Unauthenticated):
            kind("http://127.0.0.1", key)
    with pytest.raises(InvalidRequest, match="is invalid"):
        kind("http://here:there", "kh_x")


def test_client_with_a_caller_key_may_only_classify(kind: Kind, url: str, hub: Hub, adapters: list[Adapter]) -> None:
    with kind(url, hub.key) as owner:
        owner.register("a", adapters[0].data)
        key = owner.create_key("default", "laptop")
        assert [k.name for k in owner.keys("default").keys if k.id == key.id] == ["laptop"]
    with kind(url, key.key) as caller:
        caller.classify("a", png())
        with pytest.raises(Forbidden):
            caller.delete_task("a")
    with kind(url, hub.key) as owner:
        owner.revoke_key("default", key.id)


def test_client_returns_equal_predictions_for_every_form_of_an_image(
    client: Any, adapters: list[Adapter], tmp_path: Path
) -> None:
    client.register("a", adapters[0].data)
    (tmp_path / "a.png").write_bytes(png(1))
    image = Image.open(tmp_path / "a.png")
    stack = np.stack([np.asarray(image)] * 2)
    forms = [png(1), tmp_path / "a.png", str(tmp_path / "a.png"), image, np.asarray(image), stack[0]]
    forms += [bytearray(png(1)), memoryview(png(1)), memoryview(bytearray(png(1)))[:]]
    results = client.classify("a", [*forms, io.BytesIO(png(1))]).predictions
    results += client.classify("a", stack).predictions
    for image_form in forms:
        results += client.classify("a", image_form).predictions
    with (tmp_path / "a.png").open("rb") as file:
        results += client.classify("a", file).predictions
        with pytest.raises(InvalidImage, match=r"^images.0: the file has no bytes behind its position; rewind it"):
            client.classify("a", [file])
        file.seek(0)
        results += [found.predictions for found in client.classify_inputs([("a", file)]).results]
    with (
        (tmp_path / "a.png").open("r", encoding="latin-1") as text,
        pytest.raises(InvalidImage, match=r"^images.0: the file is open for text; open it with mode 'rb'"),
    ):
        client.classify("a", text)
    assert len(results) == 2 * len(forms) + 5
    for result in results:
        assert [p.label for p in result] == [p.label for p in results[0]]
        assert [p.score for p in result] == pytest.approx([p.score for p in results[0]], abs=1e-5)

    grey = np.asarray(image.convert("L"))
    turned = encoded(image, "PNG", exif=_turned())
    with Image.open(tmp_path / "a.png") as opened:
        cmyk = opened.convert("CMYK")
    for a, b in ((grey, Image.fromarray(grey)), (turned, _opened(turned)), (cmyk, encoded(cmyk, "TIFF"))):
        one, other = client.classify("a", [a, b]).predictions
        assert [p.score for p in one] == pytest.approx([p.score for p in other], abs=1e-5)
    assert client.classify("a", turned).predictions != client.classify("a", png(1)).predictions
    image.close()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_encode_rotates_a_pil_image_when_its_exif_has_odd_entries(kind: str) -> None:
    exif = _turned()
    image = _opened(encoded(Image.linear_gradient("L").resize((40, 20)).convert("RGB"), kind, exif=exif))
    image.load()
    image.getexif()[41729] = object()  # an entry that Pillow cannot write
    image.info["icc_profile"] = bytes(3_000_000)
    data = encode(image, "images.0")
    assert len(data) < 10_000
    assert _opened(data).size == (20, 40)
    assert not _opened(data).getexif()


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        None,
        3,
        b"",
        b"text",
    ],
)
def test_client_names_the_image_when_it_is_unusable(client: Any, adapters: list[Adapter], image: Any) -> None:
    client.register("a", adapters[0].data)
    with pytest.raises(InvalidImage) as error:
        client.classify("a", [png(), image])
    assert error.value.errors[0].field == "images.1"
    with pytest.raises(InvalidImage) as error:
        client.classify_inputs([("a", png()), ("a", image)])
    assert error.value.errors[0].field == "inputs.1.image"


def test_client_returns_predictions_in_order_when_images_need_several_calls(
    kind: Kind, url: str, hub: Hub, adapters: list[Adapter], capsys: pytest.CaptureFixture[str]
) -> None:
    responses: list[httpx.Response] = []
    with kind(url, hub.key, in_flight=3, on_response=responses.append) as client:
        for i in range(2):
            client.register(f"task{i}", adapters[i].data)
        alone = [client.classify("task0", png(i)).predictions[0] for i in range(8)]
        responses.clear()
        reply = client.classify("task0", (png(i % 8) for i in range(150)))
        assert [r.status_code for r in responses] == [200] * 3  # 64, 64, 22
        assert len(reply.predictions) == 150
        for i, predictions in enumerate(reply.predictions):
            assert [p.label for p in predictions] == [p.label for p in alone[i % 8]]
            assert [p.score for p in predictions] == pytest.approx([p.score for p in alone[i % 8]], abs=1e-4)
        assert "classifying" not in capsys.readouterr().err

        inputs = [(f"task{i % 2}", png(i % 8)) for i in range(150)]
        results = client.classify_inputs(inputs, top_k=1, progress=True).results
        assert [r.task for r in results] == [task for task, _ in inputs]
        assert [r.predictions[0].label for r in results[::2]] == [alone[i % 8][0].label for i in range(0, 150, 2)]
        shown = capsys.readouterr()
        assert "150/150" in shown.err
        assert shown.out == ""

    responses.clear()
    with kind(url, hub.key, call_bytes=3 * len(png()), on_response=responses.append) as client:
        assert len(client.classify("task0", [png()] * 10).predictions) == 10
        assert len(responses) == 4
        assert len(client.classify("task0", [png(1, (64, 64))] * 2).predictions) == 2
        assert len(responses) == 6  # each image is larger than `call_bytes`


def test_client_returns_typicality_and_sets_in_order_when_images_need_several_calls(
    client: Any, adapters: list[Adapter], backbone: Backbone
) -> None:
    client.register("old", adapters[0].data)
    registered = client.register("a", calibrated_adapter(backbone).data, unknown_below=0.02)
    assert (registered.unknown_below, registered.typicality) == (0.02, True)
    assert client.task("a").unknown_below == 0.02
    images = [flat_png() if i % 10 == 0 else png(i % 7) for i in range(100)]
    reply = client.classify("a", images, top_k=1, coverage=0.9)
    assert reply.unknown == [i % 10 == 0 for i in range(100)]
    assert len(reply.typicality) == len(reply.sets) == 100
    assert all(row[0].label == found[0] for row, found in zip(reply.predictions, reply.sets, strict=True))
    plain = client.classify("a", images)
    assert plain.sets is None
    assert plain.typicality == pytest.approx(reply.typicality, rel=1e-3, abs=1e-6)
    old = client.classify("old", [png()] * 70)
    assert (old.typicality, old.unknown, old.sets) == (None, None, None)

    one, other = client.classify_inputs([("a", png(1)), ("a", flat_png())], coverage=0.9).results
    assert (one.unknown, other.unknown) == (False, True)
    assert (one.set, one.typicality) == (reply.sets[1], pytest.approx(reply.typicality[1], rel=1e-3))


def test_client_classifies_one_image_with_many_tasks(client: Any, adapters: list[Adapter], backbone: Backbone) -> None:
    client.register("a", adapters[0].data)
    client.register("b", calibrated_adapter(backbone).data)
    client.create_task("empty")
    alone = client.classify("b", png(1), top_k=2, coverage=0.9)
    reply = client.classify_tasks(png(1), ["b", "a"], top_k=2)
    assert [result.task for result in reply.results] == ["b", "a"]
    assert reply.skipped is None
    assert [p.label for p in reply.results[0].predictions] == [p.label for p in alone.predictions[0]]
    assert reply.results[0].typicality == pytest.approx(alone.typicality[0], rel=1e-3)
    every = client.classify_tasks(png(1))
    assert [result.task for result in every.results] == ["a", "b"]
    assert [skipped.task for skipped in every.skipped] == ["empty"]
    sets = client.classify_tasks(png(1), coverage=0.9)
    assert [(result.task, result.set) for result in sets.results] == [("b", alone.sets[0])]
    with pytest.raises(NotFound, match="there is no task 'none'"):
        client.classify_tasks(png(1), ["a", "none"])
    with pytest.raises(InvalidImage) as error:
        client.classify_tasks(b"no image", ("a",))
    assert [problem.field for problem in error.value.errors] == ["image"]
    with pytest.raises(InvalidRequest, match="tasks"):
        client.classify_tasks(png(1), [])
    with pytest.raises(InvalidRequest, match="must be a list of names of tasks, or \\*"):
        client.classify_tasks(png(1), "a")


def test_client_changes_the_settings_of_a_task(client: Any, adapters: list[Adapter]) -> None:
    client.register("a", adapters[0].data)
    assert client.change_settings("a", unknown_below=0.5).unknown_below == 0.5
    assert client.change_settings("a").unknown_below == 0.5
    with pytest.raises(InvalidRequest, match="unknown_below"):
        client.change_settings("a", unknown_below=2)
    with pytest.raises(InvalidRequest, match="coverage: version 1 of task 'a' has no data for label sets"):
        client.classify("a", png(), coverage=0.95)
    with pytest.raises(InvalidRequest, match="coverage"):
        client.classify_inputs([("a", png())], coverage=2)
    assert client.change_settings("new", unknown_below=0.5).versions == []


def test_one_version_classifies_all_images_when_latest_moves_between_calls(
    kind: Kind, url: str, hub: Hub, adapters: list[Adapter]
) -> None:
    def release(_response: httpx.Response) -> None:
        hub.http.post("/v1/tasks/a/versions", content=adapters[1].data, headers=OCTETS)

    hub.http.post("/v1/tasks/a/versions", content=adapters[0].data, headers=OCTETS).raise_for_status()
    with kind(url, hub.key, on_response=release) as client:
        reply = client.classify("a", [png()] * 130, top_k=100)
    assert (reply.version, reply.digest) == (1, adapters[0].digest)
    assert {len(predictions) for predictions in reply.predictions} == {len(adapters[0].labels)}


def test_client_names_an_image_by_its_index_among_all_when_it_is_in_a_later_call(
    client: Any, adapters: list[Adapter]
) -> None:
    client.register("a", adapters[0].data)
    images = [png()] * 140
    images[100] = b"text"
    with pytest.raises(InvalidImage, match=r"^images\.100: ") as error:
        client.classify("a", images)
    assert [e.field for e in error.value.errors] == ["images.100"]
    with pytest.raises(InvalidImage, match=r"^inputs\.100\.image: ") as error:
        client.classify_inputs([("a", image) for image in images])
    assert [e.field for e in error.value.errors] == ["inputs.100.image"]
    with pytest.raises(NotFound):
        client.classify("nothing", [png()] * 140)


def test_client_reads_every_page_of_a_list(
    client: Any, kind: Kind, url: str, hub: Hub, adapters: list[Adapter]
) -> None:
    for i in range(4):
        client.register("long", with_metadata(adapters[0], metrics=json.dumps({"notes": "m" * 150_000, "i": i})))
    first_page = hub.http.get("/v1/tasks/long").json()
    assert len(first_page["versions"]) == 3  # a page is bounded by its bytes too
    task = client.task("long")
    assert [version.version for version in task.versions] == [1, 2, 3, 4]
    assert [(version.metrics or {})["i"] for version in task.versions] == [0, 1, 2, 3]
    assert task.next is None
    assert [found.task for found in client.tasks().tasks] == ["long"]
    assert client.keys("default").keys[0].role == "owner"
    with kind(url, hub.admin_key) as admin:
        tenants, keys = admin.tenants(), admin.admin_keys()
    assert [found.tenant for found in tenants.tenants] == ["default"]
    assert len(keys.keys) == 1


@pytest.mark.parametrize(
    ("call", "line", "body"),
    [
        (endpoints.task("a/b:c").first, "GET /v1/tasks/a%2Fb%3Ac", None),
        (
            endpoints.register("a", source="s3://b/c", digest="0" * 64, alias="x"),
            "POST /v1/tasks/a/versions",
            {"source": "s3://b/c", "digest": "0" * 64},
        ),
        (endpoints.set_alias("a", "x", {1: 2}), "PUT /v1/tasks/a/aliases/x", {"weights": {"1": 2}}),
        (endpoints.change_settings("a", unknown_below=0.2), "PUT /v1/tasks/a", {"unknown_below": 0.2}),
        (endpoints.share("a"), "PUT /v1/tasks/a/sharing", {"public": False, "tenants": []}),
        (admin_endpoints.backbone(), "GET /v1/backbone", None),
        (admin_endpoints.usage("t"), "GET /v1/tenants/t/usage", None),
        (admin_endpoints.audit("t", after="1-2"), "GET /v1/tenants/t/audit", None),
        (admin_endpoints.create_tenant("t"), "POST /v1/tenants", {"tenant": "t"}),
        (
            admin_endpoints.create_tenant("t", LimitsChange(tasks=0)),
            "POST /v1/tenants",
            {"tenant": "t", "limits": {"tasks": 0}},
        ),
        (
            admin_endpoints.change_limits("t", LimitsChange(weight=2)),
            "PATCH /v1/tenants/t",
            {"limits": {"weight": 2.0}},
        ),
        (
            admin_endpoints.create_key("t", "n", role="owner", expires=datetime(2030, 1, 2, tzinfo=UTC)),
            "POST /v1/tenants/t/keys",
            {"name": "n", "role": "owner", "expires": "2030-01-02T00:00:00+00:00"},
        ),
        (admin_endpoints.create_admin_key("n"), "POST /v1/admin/keys", {"name": "n"}),
        (admin_endpoints.revoke_admin_key("i"), "DELETE /v1/admin/keys/i", None),
        (admin_endpoints.status(), "GET /v1/status", None),
        (admin_endpoints.all_trainings(), "GET /v1/admin/trainings", None),
        (admin_endpoints.gc(5), "POST /v1/gc", {"older_than_s": 5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_endpoint_describes_the_request(call: Call[Any], line: str, body: dict[str, Any] | None) -> None:
    assert f"{call.method} {call.path}" == line
    assert (call.content is None) == (body is None)
    if body is not None:
        assert json.loads(call.content or b"") == body
        assert call.headers["content-type"] == "application/json"


def test_call_series_reads_images_only_when_a_call_needs_them() -> None:
    read: list[int] = []

    def images() -> Iterator[bytes]:
        for i in range(1000):
            read.append(i)
            yield b"image"

    series = endpoints.classify("a", images())
    assert isinstance(series, CallSeries)
    assert series.total is None
    assert read == []
    next(series.calls(10**6, []))
    assert len(read) == 65


def test_examples_of_the_documentation_run(
    url: str,
    hub: Hub,
    adapters: list[Adapter],
    backbone: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, adapter in zip(("flowers", "flowers-2", "trees"), adapters, strict=False):
        (tmp_path / f"{name}.safetensors").write_bytes(adapter.data)
    for i, name in enumerate(("rose", "tulip", "oak")):
        (tmp_path / f"{name}.png").write_bytes(png(i))
    (tmp_path / "noise.safetensors").write_bytes(calibrated_adapter(backbone).data)
    (tmp_path / "noise.png").write_bytes(png(1))
    (tmp_path / "empty.png").write_bytes(flat_png())
    hub.key_of("partner")  # the page shares a task with it
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 9
    names: dict[str, Any] = {"url": url, "key": hub.key, "admin_key": hub.admin_key}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "images.1\n" in shown
    assert "unknown ['class" in shown
    assert "there is no task 'nothing'" in shown
    assert (tmp_path / "copy.safetensors").read_bytes() == adapters[1].data
