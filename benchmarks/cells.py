"""Trainings in processes of their own, each a line of a file, in the scripts that measure many.

A killed script goes on at the first cell without a line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def results(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of each cell, by name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


def main(
    script: str,
    cells: Iterable[Any],
    run: Callable[[Any, int | None], dict[str, Any]],
    table: Callable[[Mapping[str, dict[str, Any]]], str],
) -> None:
    """Run what the command line says.

    Args:
        script: The path of the script; its results have its name.
        cells: Dataclasses with a `name`, those that say most first.
        run: From a cell, and a number of steps in place of its own, to its result.
        table: From all results, by name, to Markdown.
    """
    path = RESULTS / f"{Path(script).stem}.jsonl"
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cells with this in their names")
    parser.add_argument("--cell", help="run this one here, whether it has a result or not")
    parser.add_argument("--steps", type=int, help="so many, to try a cell; nothing is kept then")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args()
    wanted = [cell for cell in cells if chosen.only in cell.name]
    if chosen.table:
        print(table(results(path)))
    elif chosen.list:
        found = results(path)
        print("\n".join(f"{'x' if cell.name in found else ' '} {cell.name}" for cell in wanted))
    elif chosen.cell:
        (cell,) = [cell for cell in wanted if cell.name == chosen.cell]
        started = time.time()
        result = {"name": cell.name, "cell": asdict(cell)} | run(cell, chosen.steps)
        result["seconds"] = round(time.time() - started)
        if chosen.steps is not None:
            print(json.dumps(result))
            return
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
    else:
        for cell in wanted:
            if cell.name not in results(path):
                subprocess.run([sys.executable, script, "--cell", cell.name], check=False)


def spread(numbers: Iterable[float | None], digits: int = 2) -> str:
    """The median of some seeds, with the lowest and the highest; "–" for one that has none."""
    known = [x for x in numbers if x is not None]
    if not known:
        return "–"
    shown = f"{statistics.median(known):.{digits}f}"
    return f"{shown} ({min(known):.{digits}f} to {max(known):.{digits}f})"
