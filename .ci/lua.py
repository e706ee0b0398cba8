"""Check of the Lua scripts: each compiles as Lua 5.1, which Redis runs, and uses no undefined name.

    python .ci/lua.py

The check compiles each script and reads the bytecode. The compiler turns every name that is not local into a GETGLOBAL
or SETGLOBAL instruction. Redis would report such a name only when the line runs.
"""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from lupa import lua51

sys.path.insert(0, str(Path(__file__).parent.parent))
from hub.registry.redis import scripts

GLOBALS = {
    "ARGV",
    "cjson",
    "ipairs",
    "math",
    "next",
    "pairs",
    "redis",
    "string",
    "table",
    "tonumber",
    "tostring",
    "unpack",
}
GETGLOBAL, SETGLOBAL = 5, 7
HEADER = b"\x1bLua\x51\x00\x01\x04\x08\x04\x08\x00"  # little endian; int 4, size_t 8, instruction 4, number 8 bytes
COMPILE = "function(text) local f, e = loadstring(text, '=script'); if f then return string.dump(f) end; return e end"


def main() -> None:
    families = {name: value for name, value in vars(scripts).items() if isinstance(value, scripts.LuaScript)}
    faults = [fault for script in families.values() for fault in check(script.names)]
    used = {name for script in families.values() for name in script.names}
    faults += [f"{path.name}: no script uses it" for path in FILES.glob("*.lua") if path.stem not in used]
    print(*sorted(set(faults)), sep="\n", file=sys.stderr)
    print(f"{len(used)} Lua files, {len(set(faults))} faults", file=sys.stderr)
    sys.exit(bool(faults))


FILES = Path(str(scripts.FOLDER))


def check(names: tuple[str, ...]) -> Iterator[str]:
    """Yield the faults of a script, each with its file and line."""
    places = [(name, i) for name in names for i, _ in enumerate((FILES / f"{name}.lua").open(), 1)]
    text = scripts.LuaScript(names).text.encode()
    compiled = lua51.LuaRuntime(encoding=None).eval(COMPILE.encode())(text)
    if not compiled.startswith(b"\x1bLua"):
        _, line, message = compiled.decode().split(":", 2)
        yield _fault(places, int(line), message.strip())
        return
    assert compiled.startswith(HEADER), "this Lua writes other numbers"  # noqa: S101
    for line, name, is_write in Reader(compiled[len(HEADER) :]).function():
        if is_write or name not in GLOBALS:
            yield _fault(places, line, f"{'assignment to ' if is_write else ''}undefined name {name}")


def _fault(places: list[tuple[str, int]], line: int, message: str) -> str:
    name, number = places[min(line, len(places)) - 1]
    return f"{name}.lua:{number}: {message}"


class Reader:
    """Reader of Lua 5.1 bytecode (lundump.c)."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def function(self) -> Iterator[tuple[int, str, bool]]:
        """Read a function with those inside it. Yield each access to a global: line, name, whether it is a write."""
        self._text()  # the source's name
        self._take("<iiBBBB")
        code = [self._take("<I") for _ in range(self._take("<i"))]
        constants = [self._constant() for _ in range(self._take("<i"))]
        for _ in range(self._take("<i")):
            yield from self.function()
        lines = [self._take("<i") for _ in range(self._take("<i"))]
        for _ in range(self._take("<i")):  # local variables
            self._text()
            self._take("<ii")
        for _ in range(self._take("<i")):  # upvalues
            self._text()
        for instruction, line in zip(code, lines, strict=True):
            if instruction & 0x3F in (GETGLOBAL, SETGLOBAL):
                yield line, str(constants[instruction >> 14]), instruction & 0x3F == SETGLOBAL

    def _take(self, layout: str) -> int:
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return int(values[0])

    def _text(self) -> str:
        size = self._take("<Q")
        self._at += size
        return self._data[self._at - size : self._at - 1].decode() if size else ""

    def _constant(self) -> str | None:
        match self._take("<B"):
            case 1:
                self._take("<B")
            case 3:
                self._take("<d")
            case 4:
                return self._text()
        return None


if __name__ == "__main__":
    main()
