"""The look for known vulnerabilities tells what it found, and what it could not look up."""

import runpy
from pathlib import Path

import pytest

AUDIT = runpy.run_path(str(Path(__file__).parent.parent / ".ci" / "audit.py"))
HOLE = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"]}
GOOD = {"name": "a", "version": "1.0", "vulns": []}
BAD = {"name": "b", "version": "1.0", "vulns": [HOLE]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.fixture
def audit(monkeypatch):
    def run(found, problem="", *options):
        monkeypatch.setitem(AUDIT["main"].__globals__, "ask", lambda _service: (found, problem))
        monkeypatch.setattr("sys.argv", ["audit.py", *options])
        with pytest.raises(SystemExit) as end:
            AUDIT["main"]()
        return end.value.code

    return run


def test_a_known_hole_is_named_and_fails(audit, capsys) -> None:
    assert audit([GOOD, BAD]) == 1
    said = capsys.readouterr()
    assert said.out == "b 1.0: PYSEC-1, mended in 2.0; not explained\n"
    assert "2 packages audited" in said.err
    assert audit([GOOD]) == 0


def test_an_explained_hole_is_named_and_passes(audit, capsys, monkeypatch) -> None:
    monkeypatch.setitem(AUDIT["main"].__globals__["EXPLAINED"], "CVE-1", "we do not call it")
    assert audit([BAD]) == 0
    assert "PYSEC-1, mended in 2.0; we do not call it" in capsys.readouterr().out


@pytest.mark.parametrize(("found", "problem"), [([UNKNOWN], ""), ([], "no network")])
def test_what_was_not_looked_up_is_said(audit, capsys, found, problem) -> None:
    assert audit(found, problem) == 0
    assert "NOT AUDITED: no service could be asked" in capsys.readouterr().err
    assert audit(found, problem, "--must") == 1


def test_packages_left_out_are_named(audit, capsys) -> None:
    assert audit([GOOD, UNKNOWN]) == 0
    assert "NOT AUDITED: 1 packages, c" in capsys.readouterr().err
    assert audit([GOOD, UNKNOWN], "", "--must") == 1
