"""`karst-hub classify`: files and folders of images, in calls of limited size; a bad image does not stop the others."""

import csv
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from adapters.data.files import is_system_name

from ..client.client import Client
from ..client.replies import joined
from ..errors import HubError, InvalidImage, TooLarge
from ..schemas import EVERY, Classified, Result, Results

CALL_IMAGES = 256  # classified before the next bad images are looked for


@dataclass
class Answers:
    """Result for all files.

    Attributes:
        files: the classified ones, in the order of `reply`.
        refused: file -> reason of the hub.
    """

    files: list[Path] = field(default_factory=list)
    reply: Classified | None = None
    refused: dict[Path, str] = field(default_factory=dict)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the files, and all files below the folders in the order of their names, without hidden ones."""
    return [file for path in paths for file in (_below(path) if path.is_dir() else [path])]


def _below(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or is_system_name(entry.name):
            continue
        if entry.is_dir():
            yield from _below(Path(entry.path))
        else:
            yield Path(entry.path)


def run(
    client: Client,
    task: str,
    files: Sequence[Path],
    *,
    top_k: int,
    version: str,
    coverage: float | None,
    progress: bool,
) -> Answers:
    """Classify files. Leave out those that the hub refuses as images.

    Raises:
        HubError: any error that is not about single images.
    """
    answers, parts = Answers(), list[Classified]()
    for first in range(0, len(files), CALL_IMAGES):
        left = list(files[first : first + CALL_IMAGES])
        while left:
            chosen = parts[0].version if parts else version  # one version for all files
            try:
                part = client.classify(
                    task, list(left), top_k=top_k, version=chosen, coverage=coverage, progress=progress
                )
            except (InvalidImage, TooLarge) as error:
                bad = _bad_images(error)
                if not bad:
                    raise
                answers.refused |= {left[i]: message for i, message in bad.items()}
                left = [file for i, file in enumerate(left) if i not in bad]
            else:
                parts.append(part)
                answers.files += left
                break
    if parts:
        answers.reply = joined(parts)
    return answers


@dataclass
class ManyAnswers:
    """Results of many tasks for all files.

    Attributes:
        replies: file -> its reply.
        refused: file -> reason of the hub.
    """

    replies: dict[Path, Results] = field(default_factory=dict)
    refused: dict[Path, str] = field(default_factory=dict)

    @property
    def skipped(self) -> dict[str, str]:
        """Tasks that answered to no file, with the reason."""
        replies = self.replies.values()
        answered = {result.task for reply in replies for result in reply.results}
        skipped = {one.task: one.reason for reply in replies for one in reply.skipped or ()}
        return {task: reason for task, reason in sorted(skipped.items()) if task not in answered}


def task_names(text: str) -> list[str] | str:
    """Return the names of a list with commas, or `*`."""
    return EVERY if text == EVERY else [name.strip() for name in text.split(",")]


def run_many(
    client: Client, tasks: list[str] | str, files: Sequence[Path], *, top_k: int, coverage: float | None
) -> ManyAnswers:
    """Classify files with many tasks each. Leave out those that the hub refuses as images.

    Raises:
        HubError: any error that is not about single images.
    """
    answers = ManyAnswers()
    for file in files:
        try:
            answers.replies[file] = client.classify_tasks(file, tasks, top_k=top_k, coverage=coverage)
        except (InvalidImage, TooLarge) as error:
            if not any(problem.field == "image" for problem in error.errors):
                raise
            answers.refused[file] = "; ".join(problem.message for problem in error.errors)
    return answers


def _bad_images(error: HubError) -> dict[int, str]:
    """Return the reason for each image that an error names, by its index in the call."""
    named = ((re.fullmatch(r"images\.(\d+)", problem.field), problem.message) for problem in error.errors)
    return {int(found[1]): message for found, message in named if found}


def rows(answers: Answers) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield file, label, score, typicality and set of each label; the last two only once for each image."""
    reply = answers.reply
    if reply is None:
        return
    for i, (file, predictions) in enumerate(zip(answers.files, reply.predictions, strict=True)):
        typicality = ""
        if reply.typicality is not None and reply.unknown is not None:
            typicality = f"{reply.typicality[i]:.3f}" + (" unknown" if reply.unknown[i] else "")
        labels = ", ".join(reply.sets[i]) if reply.sets is not None else ""
        for prediction in predictions:
            yield str(file), prediction.label, f"{prediction.score:.3f}", typicality, labels
            typicality = labels = ""


def many_rows(answers: ManyAnswers) -> Iterator[tuple[str, ...]]:
    """Yield file, task, label, score, typicality and set of each label; the last two only once for each task."""
    for file, reply in answers.replies.items():
        for result in reply.results:
            typicality, labels = _typicality(result), ", ".join(result.set or ())
            for prediction in result.predictions:
                yield str(file), result.task, prediction.label, f"{prediction.score:.3f}", typicality, labels
                typicality = labels = ""


def _typicality(result: Result) -> str:
    return "" if result.typicality is None else f"{result.typicality:.3f}" + (" unknown" if result.unknown else "")


def many_table(answers: ManyAnswers) -> Table:
    """Return a table of tasks and labels, with typicality and label sets where the replies have them."""
    found = list(many_rows(answers))
    names = ("image", "task", "label", "score", "typicality", "set")
    used = [i < 4 or any(row[i] for row in found) for i in range(len(names))]
    shown = Table(*(name for name, use in zip(names, used, strict=True) if use))
    for row in found:
        shown.add_row(*(cell for cell, use in zip(row, used, strict=True) if use))
    return shown


def many_csv(answers: ManyAnswers) -> str:
    """Return CSV with a header: one row per label, and one per refused file or skipped task with its reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "task", "label", "score", "typicality", "set", "error"))
    writer.writerows((*row, "") for row in many_rows(answers))
    writer.writerows((file, "", "", "", "", "", reason) for file, reason in answers.refused.items())
    writer.writerows(("", task, "", "", "", "", reason) for task, reason in answers.skipped.items())
    return text.getvalue()


def many_dict(answers: ManyAnswers) -> dict[str, object]:
    """Return the replies for JSON, with the names of the files."""
    images = [{"image": str(file)} | reply.model_dump(mode="json") for file, reply in answers.replies.items()]
    return {"images": images, "refused": [{"image": str(f), "error": text} for f, text in answers.refused.items()]}


def table(answers: Answers) -> Table:
    """Return a table of labels, with typicality and label sets where the reply has them."""
    reply = answers.reply
    columns = [True, True, True, reply is not None and reply.typicality is not None]
    columns.append(reply is not None and reply.sets is not None)
    names = ("image", "label", "score", "typicality", "set")
    shown = Table(*(name for name, used in zip(names, columns, strict=True) if used))
    for row in rows(answers):
        shown.add_row(*(cell for cell, used in zip(row, columns, strict=True) if used))
    return shown


def as_csv(answers: Answers) -> str:
    """Return CSV with a header: one row per label, and one per refused file with its reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "label", "score", "typicality", "set", "error"))
    writer.writerows((*row, "") for row in rows(answers))
    writer.writerows((file, "", "", "", "", reason) for file, reason in answers.refused.items())
    return text.getvalue()


def as_dict(answers: Answers) -> dict[str, object]:
    """Return the reply for JSON, with the names of the files."""
    reply = answers.reply.model_dump(mode="json") if answers.reply is not None else {"predictions": []}
    refused = [{"image": str(file), "error": reason} for file, reason in answers.refused.items()]
    return reply | {"images": [str(file) for file in answers.files], "refused": refused}


def shows_progress(files: Sequence[Path]) -> bool:
    """Return whether a progress bar is of use: many files, on a terminal."""
    return len(files) > CALL_IMAGES // 4 and sys.stderr.isatty()
