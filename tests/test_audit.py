"""The audit of pinned packages: it prints vulnerabilities, and the packages that it could not look up."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

AUDIT = runpy.run_path(str(Path(__file__).parent.parent / ".ci" / "audit.py"))
VULNERABILITY = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"]}
GOOD = {"name": "a", "version": "1.0", "vulns": []}
BAD = {"name": "b", "version": "1.0", "vulns": [VULNERABILITY]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}
Audit = Callable[..., int]


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> Audit:
    """Return a function that runs the audit on a service's answer, and returns the exit code."""

    def run(found: list[dict[str, Any]], problem: str = "", *options: str) -> int:
        monkeypatch.setitem(AUDIT["main"].__globals__, "ask", lambda _service: (found, problem))
        monkeypatch.setattr("sys.argv", ["audit.py", *options])
        with pytest.raises(SystemExit) as end:
            AUDIT["main"]()
        assert isinstance(end.value.code, int)
        return end.value.code

    return run


def test_audit_fails_when_a_package_has_a_known_vulnerability(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit([GOOD, BAD]) == 1
    printed = capsys.readouterr()
    assert printed.out == "b 1.0: PYSEC-1, fixed in 2.0; not explained\n"
    assert "2 packages audited" in printed.err
    assert audit([GOOD]) == 0


def test_audit_passes_when_the_vulnerability_is_explained(
    audit: Audit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AUDIT["main"].__globals__["EXPLAINED"], "CVE-1", "we do not call it")
    assert audit([BAD]) == 0
    assert "PYSEC-1, fixed in 2.0; we do not call it" in capsys.readouterr().out


@pytest.mark.parametrize(("found", "problem"), [([UNKNOWN], ""), ([], "no network")])
def test_audit_says_so_when_no_service_answers(
    audit: Audit, capsys: pytest.CaptureFixture[str], found: list[dict[str, Any]], problem: str
) -> None:
    assert audit(found, problem) == 0
    assert "NOT AUDITED: no service answered" in capsys.readouterr().err
    assert audit(found, problem, "--must") == 1


def test_audit_names_packages_that_were_not_looked_up(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit([GOOD, UNKNOWN]) == 0
    assert "NOT AUDITED: 1 packages, c" in capsys.readouterr().err
    assert audit([GOOD, UNKNOWN], "", "--must") == 1
