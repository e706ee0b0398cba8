"""Checks of the references that the hub refuses to download."""

import pytest

from hub.errors import HubError, InvalidRequest, Unavailable
from hub.storage.remote_sources import RemoteSources

DATA = b"adapter" * 100


def refusal(sources: RemoteSources, source: str, kind: type[HubError] = InvalidRequest) -> str:
    """Return the error text of a download that is refused."""
    with pytest.raises(kind) as caught:
        sources.fetch(source)
    if kind is not Unavailable:
        assert [e.field for e in caught.value.errors] == ["source"]
    return caught.value.detail
