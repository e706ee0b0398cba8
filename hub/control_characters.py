"""Characters that a terminal obeys, or that change how the text around them reads.

The hub refuses them in names and labels. Everything that a person reads has escapes in their place, because a registry
may still have names and labels that an older hub accepted.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

# C0, DEL and C1; line and paragraph separator; embeddings, overrides and isolates of text direction; half of a pair.
_CLASS = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROL = re.compile(f"[{_CLASS}]")
_CONTROL_IN_LINES = re.compile(rf"(?![\n\t])[{_CLASS}]")


def found_in(text: str) -> str | None:
    """Return the first control character of a text as `U+001B`; None if there is none."""
    found = _CONTROL.search(text)
    return None if found is None else f"U+{ord(found[0]):04X}"


def found_below(where: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the place and the first control character of each text in a JSON value, keys of objects included."""
    if isinstance(value, str):
        if (found := found_in(value)) is not None:
            yield where, found
    elif isinstance(value, Mapping):
        for name, member in value.items():
            yield from found_below(f"a key of {where}", name)
            yield from found_below(where, member)
    elif isinstance(value, Sequence):
        for member in value:
            yield from found_below(where, member)


def escaped(text: str) -> str:
    r"""Return one line without control characters: `\x1b` or `\u202e` in their place."""
    return _CONTROL.sub(_python_escape, text)


def escaped_lines(text: str) -> str:
    r"""Return text without control characters, but with its line feeds and tabs."""
    return _CONTROL_IN_LINES.sub(_python_escape, text)


def escaped_json(text: str) -> str:
    r"""Return JSON with `\u001b` in place of control characters. Its values stay the same."""
    return _CONTROL_IN_LINES.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _python_escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _refuse(text: str) -> str:
    if (found := found_in(text)) is not None:
        raise PydanticCustomError("control_character", "has the control character {found}; remove it", {"found": found})
    return text


PLAIN = AfterValidator(_refuse)  # of a text field of a wire model that the hub keeps
