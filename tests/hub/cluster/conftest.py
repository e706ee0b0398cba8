"""Imports Ray Serve once and ignores the warnings of that import. Pytest would turn them into errors of collection."""

import warnings
from collections.abc import Iterator

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve
    import ray.serve._private.haproxy
    import ray.serve.request_router

from hub.cluster.rendezvous import known_workers

assert ray.serve


@pytest.fixture(autouse=True)
def no_known_workers() -> Iterator[None]:
    """Forget the workers that routers of a test have found."""
    yield
    known_workers().update([])
