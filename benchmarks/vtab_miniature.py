"""Generator of miniature data roots in the exact layout of VTAB-1K and of the few-shot lists, to try the benchmark.

    python -m benchmarks.vtab_miniature DIR

DIR/vtab: 19 folders with train800.txt (16 lines), val200.txt (4), train800val200.txt (20), test.txt (8) and images/.
DIR/fewshot: 5 folders with images and annotations/, which has lists for every number of shots and seed. As in NOAH's
lists, paths start beneath images/; the paths of the cars start at the folder. The pictures are seeded drawings of
shapes.
"""

import argparse
from pathlib import Path

import numpy as np

from adapters.demo.draw import SHAPES, shape_image

from .vtab_protocol import FEW_SHOT_SETS, SEEDS, SHOTS, VTAB_TASKS

CLASSES = 2
VTAB_LINES = {"train800": 16, "val200": 4, "test": 8}
HELD_LINES = {"val": 4, "test": 8}


def make(root: Path) -> None:
    """Write both roots, with the same bytes each time."""
    for task in VTAB_TASKS:
        _vtab_task(root / "vtab" / task)
    for name in FEW_SHOT_SETS:
        folder = root / "fewshot" / name
        prefix = "cars_train/" if name == "stanford-cars" else "images/"
        _few_shot_set(folder, prefix, listed=prefix if name == "stanford-cars" else "")


def _vtab_task(folder: Path) -> None:
    lists = {}
    for part, count in VTAB_LINES.items():
        lists[part] = [f"images/{part.rstrip('0123456789')}/{i:06d}.png {i % CLASSES}" for i in range(count)]
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for part, lines in lists.items():
        _draw(folder, part, lines)
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")


def _few_shot_set(folder: Path, prefix: str, listed: str) -> None:
    annotations = folder / "annotations"
    annotations.mkdir(parents=True)
    lists = {f"{part}_meta.list": [f"{part} {i}.png {i % CLASSES}" for i in range(n)] for part, n in HELD_LINES.items()}
    pool = [[f"train {c} {i}.png {c}" for i in range(max(SHOTS) + 4)] for c in range(CLASSES)]
    for shots in SHOTS:
        for seed in SEEDS:
            order = np.random.default_rng(seed).permutation(len(pool[0]))[:shots]
            lists[f"train_meta.list.num_shot_{shots}.seed_{seed}"] = [lines[i] for lines in pool for i in order]
    for name, lines in lists.items():
        _draw(folder, name, [prefix + line for line in lines])
        (annotations / name).write_text("".join(f"{listed}{line}\n" for line in lines))


def _draw(folder: Path, part: str, lines: list[str]) -> None:
    for number, line in enumerate(lines):
        name, _, label = line.rpartition(" ")
        path = folder / name
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([number, *f"{folder.name}/{part}".encode()])
        shape_image(rng, SHAPES[int(label)]).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vtab_miniature", description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, metavar="DIR", help="a folder that is not there yet, or empty")
    root = parser.parse_args().root
    if root.exists() and any(root.iterdir()):
        parser.error(f"{root} is not empty")
    make(root)
    print(f"{root}/vtab and {root}/fewshot")


if __name__ == "__main__":
    main()
