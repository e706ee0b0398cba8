"""The word list of `make lint`: it finds banned words in prose, and leaves code alone."""

import runpy
from pathlib import Path

import pytest

WORDS = runpy.run_path(str(Path(__file__).parent.parent / ".ci" / "words.py"))


def found(path: Path, text: str) -> list[str]:
    """Return `line: word` for each finding in a file with this text."""
    path.write_text(text)
    WORDS["main"].__globals__["ROOT"] = path.parent
    return [":".join(line.split(":")[1:3]) for line in WORDS["findings"](path, {"http.md"})]


@pytest.mark.parametrize(
    ("text", "line_and_word"),
    [
        ('"""A queue.\n\nIt is said to be\nfair."""\n', "3: 'It is said'"),  # prose: ok
        ('"""A client is\ntold."""\n', "1: 'is told'"),  # prose: ok
        ("x = 1  # whoever calls\n", "1: 'whoever'"),  # prose: ok
        ('x = f"no one has {1}"\n', "1: 'no one'"),  # prose: ok
        ('"""What the worker does."""\n', "1: 'What'"),
        ('"""A queue. What waits is counted."""\n', "1: 'What'"),  # prose: ok
        ("x = 1  # docs/absent.md has it\n", "1: 'docs/absent.md'"),  # prose: ok
    ],
)
def test_python_file_with_a_banned_word_is_reported_with_its_line(
    tmp_path: Path, text: str, line_and_word: str
) -> None:
    assert found(tmp_path / "a.py", text) == [line_and_word]


@pytest.mark.parametrize(
    "text",
    [
        "told = nobody = 1\n",  # prose: ok
        'x = "told"\n',  # prose: ok
        "x = 1  # `whoever` is a name\n",
        'x = "so many words"  # prose: ok\n',
        "x = 1  # docs/http.md has it\n",
        '"""What is a task?"""\n',
    ],
)
def test_python_file_without_a_banned_word_in_prose_passes(tmp_path: Path, text: str) -> None:
    assert found(tmp_path / "a.py", text) == []


def test_markdown_is_checked_outside_of_code(tmp_path: Path) -> None:
    assert found(tmp_path / "a.md", "`told`\n```\ntold\n```\nA client is\ntold.\n") == ["5: 'is told'"]  # prose: ok


def test_lua_comments_are_checked(tmp_path: Path) -> None:
    assert found(tmp_path / "a.lua", "local told = 1\n-- nobody\n") == ["2: 'nobody'"]  # prose: ok
