"""Write README.md from the overview in index.ipynb.

    python notebooks/readme.py            # write it (make readme)
    python notebooks/readme.py --check    # write nothing; say what differs (make check)

Cells follow each other as they stand: Markdown as it is, code as a block of Python, and below it
what it prints. Not shown are

* cells with the tag `hidden`;
* the code of cells with the tag `output`, which print what a cell above has made;
* `# fmt: off` as the first line of a code cell, which is there for the formatter.

Links start from the folder of the notebook, and in the README from the root of the repository:
`../docs/metrics.md` becomes `docs/metrics.md`. What looks like a link in code is left alone.
"""

from __future__ import annotations

import argparse
import difflib
import posixpath
import re
import sys
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parent
NOTEBOOK = FOLDER / "index.ipynb"
README = FOLDER.parent / "README.md"
COMMAND = "make readme"
COMMENT = f"<!-- Written from notebooks/index.ipynb by `{COMMAND}`: change it there. -->"

HIDDEN, OUTPUT = "hidden", "output"
FOR_THE_FORMATTER = re.compile(r"\A# fmt: off\n")
# Code comes first, inline or fenced: what it holds is not looked at again.
CODE_OR_TARGET = re.compile(
    r"(?<!`)(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"
    r"|(?<=\]\()(?P<target>[^)\s]+)",
    re.DOTALL,
)
OUTSIDE = re.compile(r"[a-z][a-z+.-]*:|#|/")
"""How a target begins that is not a path from the notebook's folder."""


def readme(notebook: nbformat.NotebookNode) -> str:
    """Return the README that a notebook makes."""
    parts = [COMMENT]
    for cell in notebook.cells:
        source, tags = cell.source.strip("\n"), cell.metadata.get("tags", [])
        if HIDDEN in tags or not source:
            continue
        if cell.cell_type != "code":
            parts.append(relinked(source))
            continue
        if OUTPUT not in tags:
            parts.append(block(FOR_THE_FORMATTER.sub("", source), "python"))
        if printed := "".join(output.get("text", "") for output in cell.get("outputs", [])):
            parts.append(block(printed.rstrip("\n"), "text"))
    return "\n\n".join(parts) + "\n"


def block(text: str, kind: str) -> str:
    """Return a text in a fence that is longer than any that the text holds."""
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{kind}\n{text}\n{fence}"


def relinked(markdown: str) -> str:
    """Return Markdown with its relative links made to start from the root of the repository.

    Raises:
        ValueError: if a link leads out of the repository.
    """

    def link(found: re.Match[str]) -> str:
        target = found["target"]
        if target is None or OUTSIDE.match(target):
            return found[0]
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(FOLDER.name, path))
        if path.split("/")[0] == "..":
            raise ValueError(f"the link to {target} leads out of the repository.")
        return path + mark + anchor

    return CODE_OR_TARGET.sub(link, markdown)


def difference(old: str, new: str, most: int = 20) -> str:
    """Return the first lines of the diff between two texts."""
    lines = difflib.unified_diff(
        old.split("\n"), new.split("\n"), "README.md", "from the notebook", n=1, lineterm=""
    )
    shown = list(lines)
    left = len(shown) - most
    return "\n".join(shown[:most] + ([f"... and {left} more lines"] if left > 0 else []))


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description="Write README.md from notebooks/index.ipynb.")
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    options = parser.parse_args(arguments)
    new = readme(nbformat.read(NOTEBOOK, as_version=4))
    if not options.check:
        README.write_text(new, encoding="utf-8", newline="\n")
        return 0
    old = README.read_text(encoding="utf-8") if README.exists() else ""
    if old == new:
        return 0
    print(difference(old, new), file=sys.stderr)
    print(
        f"README.md is not what {FOLDER.name}/{NOTEBOOK.name} makes. Change the notebook, "
        f"then run `{COMMAND}`.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
