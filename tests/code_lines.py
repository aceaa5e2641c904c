"""Count lines of code: without blank lines, comments, docstrings and the texts under fields.

python tests/code_lines.py          a line for each folder
python tests/code_lines.py --files  a line for each file, and functions of more than 60 lines
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "trl"
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> set[int]:
    """Return the numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return lines


def by_file(package: Path = PACKAGE) -> dict[str, int]:
    """Return the code lines of each file, by its path in the package."""
    return {
        path.relative_to(package).as_posix(): len(code_lines(path.read_text(encoding="utf-8")))
        for path in sorted(package.rglob("*.py"))
    }


def by_room(files: dict[str, int]) -> Counter[str]:
    """Return the code lines of each folder of the package, and of each file beside them."""
    rooms: Counter[str] = Counter()
    for name, count in files.items():
        rooms[name.split("/")[0]] += count
    return rooms


def long_functions(most: int, package: Path = PACKAGE) -> dict[str, int]:
    """Return the functions of more code lines than that, by file and name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = code_lines(source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = len(lines.intersection(range(node.lineno, node.end_lineno + 1)))
                if count > most:
                    found[f"{path.relative_to(package).as_posix()}:{node.name}"] = count
    return found


if __name__ == "__main__":
    files = by_file()
    counts = files if "--files" in sys.argv else by_room(files)
    for name, count in sorted(counts.items(), key=lambda pair: -pair[1]):
        print(f"{count:6}  {name}")
    print(f"{sum(files.values()):6}  in all")
    if "--files" in sys.argv:
        for name, count in long_functions(60).items():
            print(f"long function: {name} {count}")
