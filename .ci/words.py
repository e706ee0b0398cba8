"""Check of docs, docstrings, comments and strings for banned words; CONTRIBUTING.md names the alternatives.

    python .ci/words.py [FILE ...]

Without arguments the check reads every Markdown, Python and Lua file of the docs, the packages and the tests. It does
not check code between backticks. `prose: ok` on a line exempts that line. Exit code 1: the check found a banned word.
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SEARCHED = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "hub", "adapters", "tests")
TERM = "use the field's standard term"
BANNED = {
    "who|whom|whoever|whatever|nobody|no one": "name the actor: client, tenant, gateway, worker",
    "it is said|is told|are told|was told|told|of late|anew|likewise|stands|is no more|so many": "use plain English",
    "so much at once|under way|all the same": "use plain English",
    "doors?|tiers?|warmth|tally|tallies|pace|a board|the board|asked": TERM,
    "mend|mends|mended|mending|crowds?|strangers?|house": TERM,
}
PATTERNS = [
    (re.compile(r"\b(" + words.replace(" ", r"\s+") + r")\b", re.IGNORECASE), why) for words, why in BANNED.items()
]
# A sentence with "What" or "Which" as its subject; a question is allowed.
SUBJECT = re.compile(r"(?:^|(?<=[.:;]\s)|(?<=[.:;]\n))\s*(What|Which)\b[^?.]*(?:\.|$|\n)(?!.*\?)")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
PAGE = re.compile(r"[\w./-]*\w\.md\b")


def main() -> None:
    roots = [ROOT / name for name in sys.argv[1:] or SEARCHED]
    paths = sorted(path for root in roots for path in (root.rglob("*") if root.is_dir() else [root]))
    pages = {path.name for path in (*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md"))}
    found = [line for path in paths if path.suffix in {".md", ".py", ".lua"} for line in findings(path, pages)]
    print("\n".join(found))
    print(f"{len(found)} banned words", file=sys.stderr)
    sys.exit(bool(found))


def findings(path: Path, pages: set[str]) -> Iterator[str]:
    """Yield each finding in a file, as `file:line: word: advice`."""
    text = path.read_text()
    lines = text.splitlines()
    for first, prose in passages(path.suffix, text):
        plain = CODE.sub(lambda code: re.sub(r"[^\n]", "_", code[0]), prose)
        for pattern, why in [*PATTERNS, (SUBJECT, "no 'what' as a subject")]:
            for match in pattern.finditer(plain):
                line = first + plain.count("\n", 0, match.start(1))
                if "prose: ok" not in lines[line - 1]:
                    yield f"{path.relative_to(ROOT)}:{line}: {' '.join(match[1].split())!r}: {why}"
        for match in PAGE.finditer(prose):
            line = first + prose.count("\n", 0, match.start())
            if Path(match[0]).name not in pages and "prose: ok" not in lines[line - 1]:
                yield f"{path.relative_to(ROOT)}:{line}: {match[0]!r}: no such page"


def passages(suffix: str, text: str) -> Iterator[tuple[int, str]]:
    """Yield the prose of a file: the line number of its start, and the text."""
    if suffix == ".md":
        yield 1, text
    elif suffix == ".lua":
        for number, line in enumerate(text.splitlines(), 1):
            if "--" in line:
                yield number, line[line.index("--") + 2 :].strip()
    else:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string.lstrip("# ")
            elif token.type == tokenize.STRING and " " in token.string:
                yield token.start[0], re.sub(r"^\w*(\"\"\"|'''|\"|')", "", token.string).rstrip("\"'")


if __name__ == "__main__":
    main()
