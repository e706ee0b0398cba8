"""A call through the hub's own address, as clients make it: the hub is ready when it is answered."""

import time
from http import HTTPStatus

import httpx

from ..settings import Settings

ALL_ADDRESSES = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (replaced by an address to call)
TIMEOUT_S = 60.0
COLD_TIMEOUT_S = 600.0  # a hub that scales to zero starts a worker for the call
PAUSE_S = 0.2
CERTIFICATE_REQUIRED = "certificate required"  # HAProxy's answer to a client without a certificate


def url_of(settings: Settings) -> str:
    """Return the URL of the hub as its settings name it."""
    return _url(settings, settings.host)


def wait_until_answered(settings: Settings, timeout_s: float | None = None) -> None:
    """Return when a worker has answered a call through the hub's address.

    Raises:
        TimeoutError: none did; the text has the last answer.
    """
    timeout_s = timeout_s or (TIMEOUT_S if settings.min_workers else COLD_TIMEOUT_S)
    url = f"{_url(settings, ALL_ADDRESSES.get(settings.host, settings.host))}/readyz"
    deadline = time.monotonic() + timeout_s
    # The certificate is for the name that clients use. The answer has nothing that needs to be trusted.
    with httpx.Client(trust_env=False, verify=False, timeout=timeout_s) as client:  # noqa: S501
        while True:
            try:
                response = client.get(url)
                if response.status_code == HTTPStatus.OK:
                    return
                last = f"status {response.status_code}: {response.text[:200]}"
            except httpx.TransportError as error:
                if settings.tls_client_ca is not None and CERTIFICATE_REQUIRED in str(error).lower():
                    return  # the hub has no certificate of a client
                last = f"{type(error).__name__}: {error}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} did not answer with status 200 within {timeout_s:.0f} s; last: {last}")
            time.sleep(PAUSE_S)


def _url(settings: Settings, host: str) -> str:
    scheme = "https" if settings.tls_cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"
