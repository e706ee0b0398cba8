"""The part of docs/accuracy.md on what an answer is worth, from the results of `benchmarks.answers`."""

from typing import Any

from . import answers
from .accuracy_tasks import TASKS
from .common import markdown_table


def section(worth: dict[str, Any]) -> list[str]:
    """Return the paragraphs of docs/accuracy.md on the results of `benchmarks.answers`."""
    if not worth:
        return ["Not measured yet."]
    parts = [
        "The targets of probabilities, label sets, typicality and speed, on cached features of the same tasks. A "
        "classifier is fitted to 20 or 50 images of each class, in five draws, and measured on all other images of "
        "the task; for probabilities also on images that the other parts of this page leave out: 4,000 of "
        "Fashion-MNIST and of each drawn task, and all other solar cells. All classes have the same weight.",
        "\n".join(answers.bars(worth)),
    ]
    if "answers" in worth:
        head = [
            "task",
            "images a class",
            "held-out images",
            "leave-one-out",
            "held-out",
            "gap, 5 draws",
            "gap, 25 draws",
            "calibration error",
            "perfect",
            "best temperature",
            "coverage",
            "labels in a set",
        ]
        rows = [
            [
                row["task"],
                str(row["per_class"]),
                f"{row['held_out_images']:,}",
                f"{row['leave_one_out']:.1%}",
                f"{row['held_out']:.1%}",
                f"{100 * (row['leave_one_out'] - row['held_out']):+.1f} ± {100 * row['gap_error']:.1f}",
                f"{100 * row['many_gap']:+.1f} ± {100 * row['many_gap_error']:.1f}",
                f"{row['calibration_error']:.3f}",
                f"{row['calibration_noise']:.3f}",
                f"{row['calibration_at_best']:.3f}",
                f"{row['coverage']:.1%}",
                f"{row['set_size']:.1f}",
            ]
            for row in worth["answers"]["rows"]
        ]
        parts.append(
            "`gap` is leave-one-out minus held-out in points, with the standard error of its mean over the draws: the "
            "training images of a draw are few, so five draws leave an error of up to 3 points, and 25 draws show "
            "whether leave-one-out is biased. `perfect` is the calibration error that perfect probabilities would have "
            "on as many held-out images; `best temperature` is the error with the temperature that has the best "
            "likelihood on the held-out images themselves. The product fits the temperature to leave-one-out scores: "
            "midway between the one of the best likelihood and the one whose mean confidence equals the accuracy. "
            "This rule was chosen among six by the mean error over all six tasks, so its figures are slightly "
            "optimistic."
        )
        parts.append(markdown_table(head, rows))
    if "foreign" in worth:
        rows = [
            [
                row["task"],
                str(row["per_class"]),
                *(f"{row[name]:.1%}" if name in row else "" for name in TASKS),
                f"{row['refused_at_5']:.1%}",
                f"{row['false_refusals']:.1%}",
            ]
            for row in worth["foreign"]["rows"]
        ]
        parts += [
            "Typicality: a row is a task with its images a class. The columns are the shares of the other tasks' "
            "images that are refused where 5 % of the task's own held-out images are refused. Orientation and location "
            "show the same sprites, so they are not foreign to each other. The last two columns take typicality below "
            "0.05.",
            markdown_table(["task", "images a class", *TASKS, "others below 0.05", "own below 0.05"], rows),
        ]
    machine = next(iter(worth.values()))["machine"]
    parts.append(
        f"Measured on {machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}, on "
        f"{machine['date'][:10]}, while other work shared the machine. Where a time misses its target, the processor's "
        "time beside it shows the cost without that work."
    )
    return parts
