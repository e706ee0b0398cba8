"""What every command of the line shares: where it prints, how it shows a result, how it says no."""

import json
import sys
from typing import Annotated, Any, NoReturn

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from ..settings import InvalidSettings, Settings, load_settings

# No markup: labels, paths and messages may hold brackets.
out = Console(highlight=False, markup=False)
err = Console(stderr=True, highlight=False, markup=False)

AsJson = Annotated[bool, typer.Option("--json", help="print JSON for scripts")]


def settings(**fixed: Any) -> Settings:
    """Return the settings of the environment, except for fixed fields; a wrong value is a usage error."""
    try:
        return load_settings(**fixed)
    except InvalidSettings as error:
        usage(str(error))


def checked(kind: Any, **values: Any) -> Any:
    """A config of the library (a pydantic class) from options; a value that it refuses is a usage error."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        usage(f"--{option} {first['input']}: {first['msg']}")


def show(value: BaseModel | dict[str, Any], as_json: bool) -> None:
    data = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        return
    texts = {n: item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for n, item in data.items()}
    if not out.is_terminal:  # a file has no edge to wrap at, and a digest is of use only in one piece
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


def fail(message: str) -> NoReturn:
    err.print(f"error: {message}", soft_wrap=True)
    raise SystemExit(1)


def usage(message: str) -> NoReturn:
    err.print(f"error: {message}", soft_wrap=True)
    raise SystemExit(2)
