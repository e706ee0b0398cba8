"""Rules for the texts of an adapter file that the hub keeps and shows: its labels above all.

They are the hub's, not the file format's: the library reads a file that breaks them.
"""

import itertools

from adapters import Adapter, AdapterError
from adapters.format.errors import Problem

from ..control_characters import found_below, found_in
from ..field_types import MAX_LABEL_CHARACTERS

MAX_NAMED = 5  # wrong labels in one error


def check_texts(adapter: Adapter) -> None:
    """Check the labels' lengths, and all texts for control characters, which a terminal would obey.

    Raises:
        AdapterError: names each wrong metadata entry once, and of wrong labels the first ones.
    """
    long = [
        f"label {i} has {len(label)} characters"
        for i, label in enumerate(adapter.labels)
        if len(label) > MAX_LABEL_CHARACTERS
    ]
    problems: list[Problem] = []
    if long:
        more = f" and {len(long) - MAX_NAMED} more" if len(long) > MAX_NAMED else ""
        named = ", ".join(long[:MAX_NAMED]) + more
        problems.append(Problem("labels", f"{named}; the limit is {MAX_LABEL_CHARACTERS}; shorten them"))
    controls = [(i, found) for i, label in enumerate(adapter.labels) if (found := found_in(label)) is not None]
    if controls:
        more = f"; so have {len(controls) - MAX_NAMED} more labels" if len(controls) > MAX_NAMED else ""
        named = ", ".join(f"label {i} has the control character {found}" for i, found in controls[:MAX_NAMED])
        problems.append(Problem("labels", f"{named}{more}; remove the characters"))
    entries = {
        "backbone": adapter.backbone,
        "config": adapter.config.model_dump(),
        "metrics": adapter.metrics,
        "producer": adapter.producer,
    }
    for name, value in entries.items():
        for where, character in itertools.islice(found_below(name, value), 1):
            place = "" if where == name else f"{where} "
            problems.append(Problem(name, f"{place}has the control character {character}; remove it"))
    if problems:
        raise AdapterError(problems)
