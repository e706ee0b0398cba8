"""Shared by all commands: consoles, settings, output of results, errors."""

import json
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..control_characters import escaped_json, escaped_lines
from ..settings import InvalidSettings, Settings, load_settings


class PlainConsole(Console):
    """Console that prints the control characters of names, labels and errors as escapes.

    Otherwise a name in a tenant's data could drive the terminal of an admin or of another tenant.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text for a cell or a line. Tables measure it, so columns have room for the escapes."""
        return super().render_str(escaped_lines(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments. Rich's own control codes, such as those of a progress bar, stay."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else escaped_lines(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


# Markup would swallow the brackets in labels, paths and messages.
out = PlainConsole(highlight=False, markup=False)
err = PlainConsole(stderr=True, highlight=False, markup=False)


def settings(**fixed: Any) -> Settings:
    """Return the settings of the environment, except for fixed fields; a wrong value is a usage error."""
    try:
        return load_settings(**fixed)
    except InvalidSettings as error:
        usage_error(str(error))


def checked(kind: Any, **values: Any) -> Any:
    """Return a pydantic config made from options. An invalid value is a usage error."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        usage_error(f"--{option} {first['input']}: {first['msg']}")


def show(value: BaseModel | dict[str, Any], as_json: bool) -> None:
    """Print a result to stdout, as JSON or as one row per field."""
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    if as_json:
        sys.stdout.write(escaped_json(json.dumps(data, indent=2, ensure_ascii=False)) + "\n")
        return
    texts = {n: item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for n, item in data.items()}
    if not out.is_terminal:  # otherwise a wrapped digest would be useless to a script
        width = max(map(len, texts), default=0)
        for name, text in texts.items():
            out.print(f"{name:<{width}}  {text}", soft_wrap=True)
        return
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    for name, text in texts.items():
        table.add_row(name, text)
    out.print(table)


def show_text(text: str) -> None:
    """Print a text of several lines to stdout as it is, but for control characters."""
    sys.stdout.write(escaped_lines(text))


def confirm(question: str, refused: str) -> None:
    """Ask a question on the terminal. No, or no terminal, ends the command.

    Args:
        refused: result of an answer that did not come, such as "nothing was deleted".
    """
    try:
        typer.confirm(question, abort=True)
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        out.print()  # end the line of the question
        usage_error(f"{refused}: no confirmation; without a terminal, add --yes")


def day(at: str | None) -> str:
    """Return the date of a time (RFC 3339, UTC), which fits into a table. `--json` shows the time."""
    return at[:10] if at is not None else "-"


def fail(message: str) -> NoReturn:
    """Print an error of the hub or of a file, and exit with code 1."""
    err.print(f"error: {message}", soft_wrap=True)
    raise SystemExit(1)


def usage_error(message: str) -> NoReturn:
    """Print a usage error, and exit with code 2."""
    err.print(f"error: {message}", soft_wrap=True)
    raise SystemExit(2)
