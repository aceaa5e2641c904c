"""Run the notebooks from a clean kernel, and keep their outputs tidy.

    python notebooks/run.py                    # run all of them and store what they show
    python notebooks/run.py 02-ppo             # only one
    python notebooks/run.py --fast --check     # run copies with small settings; store nothing

What is stored is free of what differs from run to run: times, widgets, the kernel's version. A
notebook whose outputs hold an error, a warning or a path of this machine is not stored, and the
exit status is then 1. Pictures are stored with few colours, which makes them small.
"""

from __future__ import annotations

import argparse
import base64
import copy
import io
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = Path(__file__).resolve().parent
FAST = "TRL_NOTEBOOK_FAST"
LARGEST = 300_000
"""Most bytes of a stored notebook."""

KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
COLOURS = 64
PICTURE = "image/png"
WIDGET = "application/vnd.jupyter.widget-view+json"
ABSOLUTE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|var|work|opt|usr|mnt)/|[A-Z]:\\\\")
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")


def notebooks(names: list[str]) -> list[Path]:
    """Return the notebooks of these names, with or without ending; all of them if none is named."""
    every = sorted(FOLDER.glob("*.ipynb"))
    if not names:
        return every
    chosen = []
    for name in names:
        found = [path for path in every if path.stem == Path(name).stem]
        if not found:
            known = ", ".join(path.stem for path in every)
            raise SystemExit(f"there is no notebook {name!r}: there are {known}.")
        chosen += found
    return chosen


def execute(path: Path, *, fast: bool) -> nbformat.NotebookNode:
    """Run a copy of a notebook in a kernel of its own and return it.

    Raises:
        CellExecutionError: if a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("MPLBACKEND", None)  # the kernel has its own
    environment.pop(FAST, None)
    if fast:
        environment[FAST] = "1"
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        # The kernel talks to this process alone, over the loopback: no warning about that.
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        timeout=4 * 3600,  # of a cell: one that trains takes long on a busy machine
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env=environment)
    return notebook


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the notebook without what differs from run to run."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict(KERNEL)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.outputs:
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
            if PICTURE in output.get("data", {}):
                output.data[PICTURE] = _with_few_colours(output.data[PICTURE])
    return notebook


def _with_few_colours(picture: str) -> str:
    """Return a picture, PNG in base64, with a palette."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    small = io.BytesIO()
    image.quantize(COLOURS).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """Say what stored outputs must not hold, and what is missing."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.outputs for cell in code):
        found.append("there are no outputs: run `python notebooks/run.py`")
    counts = [cell.execution_count for cell in code if cell.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        found.append("its cells were not run in order from a clean kernel")
    for number, cell in enumerate(code, 1):
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"code cell {number} ended with {output.ename}")
            if output.get("name") == "stderr":
                found.append(f"code cell {number} wrote to stderr: {output.text.strip()[:300]}")
            text = _text(output)
            for what, pattern in (("an absolute path", ABSOLUTE_PATH), ("an address", ADDRESS)):
                if match := pattern.search(text):
                    start = max(0, match.start() - 40)
                    shown = text[start : match.end() + 40]
                    found.append(f"code cell {number} shows {what}: {shown!r}")
    size = len(nbformat.writes(notebook).encode())
    if size > LARGEST:
        found.append(f"it has {size:,} bytes, more than {LARGEST:,}")
    return found


def _text(output: nbformat.NotebookNode) -> str:
    """Return what an output shows in words; pictures are left out."""
    parts = [output.get("text", "")]
    parts += [entry for kind, entry in output.get("data", {}).items() if kind != PICTURE]
    return "\n".join(part for part in parts if isinstance(part, str))


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description="Run the notebooks from a clean kernel.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 02-ppo; none: all")
    parser.add_argument("--fast", action="store_true", help="few steps, small sizes")
    parser.add_argument("--check", action="store_true", help="run copies, store nothing")
    options = parser.parse_args(arguments)
    failed = False
    for path in notebooks(options.names):
        started = time.perf_counter()
        try:
            notebook = tidy(execute(path, fast=options.fast))
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            failed = True
            continue
        found = problems(notebook)
        for problem in found:
            print(f"{path.name}: {problem}", file=sys.stderr)
        failed = failed or bool(found)
        if not options.check and not found:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
