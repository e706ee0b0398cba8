"""A hub below a path, such as `/hub/`: paths, problems and pages, also through nginx with TLS."""

import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from hub.local.ports import free_port
from tests.support.asgi import listening
from tests.support.hub_app import Hub, bearer
from tests.support.nginx import CERTIFICATE, KEY, nginx
from tests.support.protocols import IMAGES

HOST = "localhost"
HEALTH = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")


def below_hub(app: ASGIApp) -> ASGIApp:
    """Return the application below `/hub`, as Serve calls it with `route_prefix`."""

    async def at_path(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": "/hub"} if scope["type"] == "http" else scope, receive, send)

    return at_path


@pytest.fixture
def below(flowers: Hub) -> Iterator[TestClient]:
    """A client of another gateway, which is below `/hub`."""
    app, key = flowers.another_gateway().app, bearer(flowers.key)
    with TestClient(below_hub(app), headers=key, raise_server_exceptions=False) as http:
        yield http


@pytest.mark.parametrize("path", ["/v1/tasks", "/v1/usage", "/v2", *HEALTH])
def test_a_path_with_a_slash_too_many_gets_a_hint_and_no_redirect(flowers: Hub, below: TestClient, path: str) -> None:
    for http, prefix in ((flowers.http, ""), (below, "/hub")):
        for wrong in (f"{path}/", f"/{path}", path.replace("/", "//")):
            if prefix or not wrong.startswith("//"):  # httpx reads `//v1` as a host
                reply = http.get(prefix + wrong, follow_redirects=False)
                assert reply.status_code == 404
                assert "location" not in reply.headers
                assert reply.json()["detail"] == f"Not Found: the path has a slash too many; use {path}"
    assert flowers.http.get("/v3/").json()["detail"] == "Not Found"


@pytest.mark.parametrize("path", [*HEALTH, "/v2/models/flowers/ready", "/v2/models/flowers/versions/1/ready"])
def test_a_health_route_answers_head_as_get_without_content(flowers: Hub, path: str) -> None:
    reply = flowers.http.head(path)
    assert reply.status_code == 200
    assert reply.content == b""
    assert int(reply.headers["content-length"]) == len(flowers.http.get(path).content)


def test_problems_below_a_path_have_the_member_error(below: TestClient) -> None:
    for reply, status in (
        (below.get("/hub/v2/models/trees"), 404),
        (below.post("/hub/models/trees", content=IMAGES[0]), 404),
        (below.get("/hub/v2/nothing"), 404),
        (below.delete("/hub/v2"), 405),
        (below.get("/hub/v2?" + "a" * 9000), 414),
        (below.get("/hub/v2", headers={"x": "a" * 17_000}), 431),
        (below.get("/hub/v2", headers={"authorization": ""}), 401),
    ):
        assert reply.status_code == status
        assert reply.json()["error"] == reply.json()["detail"]
    assert "error" not in below.get("/hub/v1/tasks/trees").json()


def test_the_document_names_the_hub_relative_to_itself(below: TestClient) -> None:
    """Otherwise a page or a generated client would call the proxy's root."""
    document = below.get("/hub/openapi.json").json()
    assert [urljoin("https://a.example/hub/openapi.json", s["url"]) for s in document["servers"]] == [
        "https://a.example/hub/"
    ]


def test_triton_client_shows_errors_of_a_hub_below_a_path(flowers: Hub) -> None:
    app = flowers.another_gateway().app
    with listening(below_hub(app)) as url, triton.InferenceServerClient(f"{url.removeprefix('http://')}/hub") as client:
        key = {"Authorization": f"Bearer {flowers.key}"}
        assert client.is_server_live()
        with pytest.raises(triton.InferenceServerException, match=r"\[404\] .*'trees'"):
            client.get_model_metadata("trees", headers=dict(key))
        image = triton.InferInput("image", [1], "BYTES").set_data_from_numpy(np.array(IMAGES[:1], dtype=np.object_))
        assert client.infer("flowers", [image], headers=dict(key)).as_numpy("labels") is not None


@pytest.fixture
def proxied(flowers: Hub, tmp_path: Path) -> Iterator[tuple[str, ssl.SSLContext]]:
    """Run nginx with TLS in front of the hub, which is below `/hub/`; return its URL and its certificate."""
    port = free_port()
    url = f"https://{HOST}:{port}/hub"
    with listening(flowers.another_gateway().app) as hub:
        site = (
            f"server {{\nlisten 127.0.0.1:{port} ssl;\nserver_name {HOST};\n"
            f"ssl_certificate {tmp_path / CERTIFICATE};\nssl_certificate_key {tmp_path / KEY};\n"
            f"location /hub/ {{\nproxy_pass {hub}/;\nproxy_set_header Host $host;\n"
            "proxy_set_header X-Forwarded-Proto $scheme;\n}\n}\n"
        )
        with nginx(tmp_path, site, url) as trusted:
            yield url, trusted


@pytest.mark.slow
def test_nothing_leads_out_of_https_or_the_prefix_through_nginx(
    flowers: Hub, proxied: tuple[str, ssl.SSLContext]
) -> None:
    url, trusted = proxied
    with httpx.Client(verify=trusted, headers=bearer(flowers.key), follow_redirects=False) as http:
        for path in ("/v1/tasks/", "/v2/", "/v1/usage/", "/healthz/", "/docs/"):
            reply = http.get(url + path)
            assert reply.status_code == 404, path
            assert "location" not in reply.headers
        assert http.head(f"{url}/readyz").status_code == 200
        reply = http.get(f"{url}/v2/models/trees")
        assert (reply.status_code, reply.json()["error"]) == (404, reply.json()["detail"])
        document = http.get(f"{url}/openapi.json").json()
        root = urljoin(f"{url}/openapi.json", document["servers"][0]["url"]).rstrip("/")
        assert http.get(f"{root}/v1/tasks").json()["tasks"][0]["task"] == "flowers"
