"""`karst-hub usage TASK`: counts of a task's answers by day and label, and drift."""

from rich.table import Table

from ...usage_schemas import TaskUsage, UsageCounts
from ..output import out, show

SHOWN_LABELS = 10


def show_task_usage(found: TaskUsage, as_json: bool) -> None:
    """Print the days with answers or feedback, the most frequent labels, and the verdict about drift."""
    if as_json:
        return show(found, True)
    table = Table("day", "images", "versions", "typicality", "unknown", "kept", "confirmed", "corrected")
    for day in found.days:
        if day.images or day.kept or day.confirmed or day.corrections:
            table.add_row(day.day, *_cells(day))
    table.add_section()
    table.add_row("total", *_cells(found.total))
    out.print(table)
    labels = [f"{label} {images}" for label, images in [*found.total.by_label.items()][:SHOWN_LABELS]]
    if labels:
        more = len(found.total.by_label) - len(labels)
        out.print("labels: " + ", ".join(labels) + (f" and {more} more" if more else ""), soft_wrap=True)
    if found.drift is not None:
        out.print(found.drift.text, soft_wrap=True)


def _cells(counts: UsageCounts) -> list[str]:
    versions = ", ".join(f"{version}: {images}" for version, images in counts.by_version.items())
    typicality = "-" if counts.typicality is None else f"{counts.typicality:.2f}"
    numbers = (counts.unknown, counts.kept, counts.confirmed, counts.corrections)
    return [str(counts.images), versions or "-", typicality, *map(str, numbers)]
