"""The hub after a restart, with TLS at Serve's stock proxy."""

import httpx

from hub.client.client import Client
from tests.support.models import png

from .conftest import HOST, Restarted


def url(restarted: Restarted) -> str:
    """Return the hub's address under the name of its certificate."""
    return f"https://{HOST}:{httpx.URL(restarted.served.url).port}"


def test_restarted_hub_keeps_tasks_and_answers_and_shows_no_key_again(restarted: Restarted) -> None:
    assert (restarted.served.key, restarted.served.admin_key) == (None, None)
    with Client(url(restarted), restarted.key, tls=restarted.tls) as client:
        assert client.tasks() == restarted.tasks_before
        got = client.classify("kept", [png()], version="stable")
    assert got.digest == restarted.answer_before.digest
    before = restarted.answer_before.predictions[0]
    assert [p.label for p in got.predictions[0]] == [p.label for p in before]


def test_home_has_no_key_in_clear(restarted: Restarted) -> None:
    """The test took the file with the first keys away, as an operator does."""
    files = [path for path in restarted.home.rglob("*") if path.is_file()]
    assert files
    assert all(restarted.key not in path.read_text(errors="replace") for path in files)


def test_stock_proxy_serves_tls_and_does_not_trust_forwarded_addresses(restarted: Restarted) -> None:
    assert restarted.served.url.startswith("https://")
    with httpx.Client(base_url=url(restarted), verify=restarted.tls, timeout=60) as http:
        headers: list[tuple[bytes, bytes]] = [
            (b"authorization", f"Bearer {restarted.key}".encode()),
            (b"x-request-timeout-seconds", b"\xff"),
        ]
        assert http.get("/v1/tasks", headers=headers).status_code == 200
        admin = {"authorization": f"Bearer {restarted.admin_key}", "x-forwarded-for": "203.0.113.9"}
        http.post("/v1/tenants", json={"tenant": "after-restart"}, headers=admin).raise_for_status()
        entries = http.get("/v1/audit", params={"count": 1000}, headers=admin).json()["entries"]
    addresses = {e["address"] for e in entries if e["tenant"] == "after-restart"}
    assert addresses == {"127.0.0.1"}
