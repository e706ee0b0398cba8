"""Control characters are found and escaped; other text is unchanged."""

import json

import pytest

from hub.control_characters import escaped, escaped_json, escaped_lines, found_below, found_in

REFUSED = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xD800]
KEPT = "Grüße, 猫, 🐈, e\u0301, ا, \u200d \u00a0 [bold]x[/bold] \\x1b"


@pytest.mark.parametrize("code", REFUSED)
def test_control_character_is_found_and_escaped(code: int) -> None:
    text = f"a{chr(code)}b"
    assert found_in(text) == f"U+{code:04X}"
    assert chr(code) not in escaped(text)
    if chr(code) not in "\n\t":
        assert chr(code) not in escaped_lines(text)
        whole = escaped_json(json.dumps({"x": text}, ensure_ascii=False))
        assert chr(code) not in whole
        assert json.loads(whole) == {"x": text}


def test_other_text_is_unchanged() -> None:
    assert found_in(KEPT) is None
    assert escaped(KEPT) == escaped_lines(KEPT) == escaped_json(KEPT) == KEPT
    assert escaped_lines("a\n\tb") == "a\n\tb"


def test_texts_of_a_json_value_are_all_searched() -> None:
    value = {"a": ["ok", {"\x1b": 1}], "b": ("\x7f",), "c": 3, "d": None}
    assert [*found_below("x", value)] == [("a key of x", "U+001B"), ("x", "U+007F")]
