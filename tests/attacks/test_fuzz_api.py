"""A short run of `make fuzz` over the HTTP application: without a key, as another tenant, as an owner, as an admin."""

from pathlib import Path

import pytest

from tests.fuzz_api import Outcome, fuzz, prepare, world

pytestmark = pytest.mark.slow

CALLERS = ("anonymous", "visitor", "owner", "admin")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    with world() as (url, key, admin_key):
        callers = prepare(url, key, admin_key, folder)
        assert [caller.name for caller in callers] == [*CALLERS]
        return {caller.name: fuzz(url, caller, 3, 1, folder, "--no-shrink") for caller in callers}


@pytest.mark.parametrize("caller", CALLERS)
def test_no_request_gets_an_answer_that_it_should_not(outcomes: dict[str, Outcome], caller: str) -> None:
    assert not outcomes[caller].failed, outcomes[caller].said


def test_there_were_many_requests_of_each(outcomes: dict[str, Outcome]) -> None:
    assert min(outcome.requests for outcome in outcomes.values()) > 500
    assert sum(outcome.requests for outcome in outcomes.values()) > 2000
