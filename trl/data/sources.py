"""Files, folders and hub datasets as tables of columns.

A file, by its ending (each but .parquet may end in .gz as well):

    .txt             one text a line, without the blanks around it; the column is called text
    .jsonl           a JSON object, or a text, on each line
    .json            a list of objects or of texts, an object of columns, or what .jsonl has
    .csv .tsv        the first line names the columns
    .parquet

Anything else is for the package datasets: a folder that `save_to_disk` wrote, a folder of data
files, or a dataset on the hub; `name:split` asks for a split other than that of the settings.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import importlib
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from trl.config import closest

STARTER, MODEL = "starter", "model"
"""The sources that are no files: prompts that ship with trl, and those that the policy writes."""

COLUMNS = ("prompt", "query", "text", "messages")
"""Names of columns that hold prompts, likeliest first."""


class Table(NamedTuple):
    """Columns of equal length that are read when they are asked for."""

    source: str
    """What errors call it."""
    names: list[str]
    size: int
    column: Callable[[str], list[Any]]
    """From a name to the entries."""
    lines: Sequence[int] = ()
    """The line of each row, where it has one."""

    def place(self, row: int) -> str:
        """Say where a row stands, counted from 1."""
        where = f"line {self.lines[row]}" if self.lines else f"row {row + 1}"
        return f"{where} of {self.source}"


def read_table(
    source: str, *, subset: str | None = None, split: str = "train", name: str = "source"
) -> Table:
    """Read a file, a folder or a hub dataset: see this module.

    Args:
        source: Its path or name.
        subset: Configuration of a hub dataset.
        split: Split of a hub dataset or a folder.
        name: What errors call the source, as "data.prompts".

    Raises:
        FileNotFoundError, ImportError, ValueError: if it cannot be read, or is empty.
    """
    path = Path(source).expanduser()
    if not path.exists() and (parts := re.fullmatch(r"(.+):([\w.-]+(?:\[[^\]]*\])?)", source)):
        source, split = parts.groups()
        path = Path(source).expanduser()
    if path.is_file():
        table = _read_file(path, name)
    elif path.is_dir() or not only_a_path(source):
        table = _read_dataset(source, path, subset, split, name)
    else:
        raise FileNotFoundError(
            f"`{name}` must be a file that is there, got {source!r}"
            + ("." if path.parent.is_dir() else f": there is no folder {str(path.parent)!r}.")
            + _nearby(path)
        )
    if not table.size:
        raise _empty(name, source)
    return table


def chosen_column(table: Table, column: str | None, name: str) -> str:
    """Return the column that is meant: the one asked for, the only one, or the likeliest.

    Raises:
        ValueError: if there is none, naming those that there are.
    """
    asked = beside(name, "column")
    if column is None:
        known = [known for known in COLUMNS if known in table.names]
        if len(table.names) == 1 or known:
            return known[0] if known else table.names[0]
        raise ValueError(
            f"`{asked}` must be given: {listed(table)}, none of which is called "
            f"{', '.join(COLUMNS)}."
        )
    if column not in table.names:
        raise ValueError(
            f"`{asked}` must name a column, got {column!r}: {listed(table)}."
            f"{nearest(column, table.names)}"
        )
    return column


def checked_texts(table: Table, column: str, name: str) -> list[str]:
    """Return the entries of a column that holds texts.

    Raises:
        TypeError: if one of them is none, naming its row.
        ValueError: if one of them is no valid Unicode.
    """
    texts = table.column(column)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"`{name}` must have a text in column {column!r} of each row, got {short(text)} "
                f"in {table.place(row)}: correct that row, or choose another column."
            )
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        row = next(row for row, text in enumerate(texts) if not _is_unicode(text))
        raise ValueError(
            f"`{name}` must be valid Unicode, got half of a surrogate pair in column {column!r}, "
            f"{table.place(row)}: correct that row."
        ) from None
    return texts


def _read_file(path: Path, name: str) -> Table:
    """Read a file by its ending."""
    endings = path.name.lower().removesuffix(".gz").rpartition(".")
    zipped = path.name.lower().endswith(".gz")
    ending = endings[2] if endings[1] else ""
    if ending == "parquet" and not zipped:
        return _read_parquet(path, name)
    if ending not in _READERS:
        known = ", ".join(f".{known}" for known in (*_READERS, "parquet"))
        raise ValueError(
            f"`{name}` must be a file that ends in one of {known} (all but the last may be "
            f"followed by .gz), got {str(path)!r}: rename or convert it."
        )
    text = _decoded(path, zipped, name)
    if not text.strip():
        raise _empty(name, str(path))
    return _READERS[ending](text, path, name)


def _decoded(path: Path, zipped: bool, name: str) -> str:
    """Return the text of a UTF-8 file, without the mark that it may begin with."""
    data = path.read_bytes()
    if zipped:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"`{name}` must be a whole gzip file if it ends in .gz, got {str(path)!r}: "
                f"{error}. Download or compress it again."
            ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        marked = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        origin = "UTF-16" if marked else "LATIN1"
        raise ValueError(
            f"`{name}` must be encoded as UTF-8, got {str(path)!r}, where byte "
            f"{data[error.start]:#04x} in line {line} is not"
            + (" (the file is marked as UTF-16)" if marked else "")
            + f": convert it, as with iconv -f {origin} -t UTF-8."
        ) from error


def _read_lines(text: str, path: Path, name: str) -> Table:
    # Not splitlines, which would also split at characters that may stand inside a text.
    every = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    kept = [(number, line.strip()) for number, line in enumerate(every, 1) if line.strip()]
    numbers, texts = [number for number, _ in kept], [line for _, line in kept]
    return Table(str(path), ["text"], len(texts), lambda _: texts, numbers)


def _read_json_lines(text: str, path: Path, name: str) -> Table:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"`{name}` must have a JSON value on each line, got {short(line)} in line "
                f"{number} of {path}: {error}."
            ) from error
        lines.append(number)
    return _table_of(rows, path, name, lines)


def _read_json(text: str, path: Path, name: str) -> Table:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a value on each line, as many programs write it
            return _read_json_lines(text, path, name)
        raise ValueError(
            f"`{name}` must be JSON, got {str(path)!r}, line {error.lineno}: {error}."
        ) from error
    if isinstance(found, list):
        return _table_of(found, path, name)
    columns = list(found.values()) if isinstance(found, dict) else []
    if columns and all(isinstance(column, list) for column in columns):
        if len({len(column) for column in columns}) == 1:
            return Table(str(path), list(found), len(columns[0]), found.__getitem__)
        sizes = ", ".join(f"{key!r}: {len(column)}" for key, column in found.items())
        raise ValueError(f"`{name}` must have columns of equal length, got {sizes} in {path}.")
    if found and isinstance(found, dict):
        return _table_of([found], path, name)
    raise ValueError(
        f"`{name}` must be a list of objects or of texts, or an object of columns, got "
        f"{short(found)} in {path}."
    )


def _table_of(rows: list[Any], path: Path, name: str, lines: Sequence[int] = ()) -> Table:
    """Return the table of JSON values: objects, or texts."""
    texts = bool(rows) and isinstance(rows[0], str)
    kind, what = (str, "a text, like the first") if texts else (dict, "an object")
    table = Table(str(path), ["text"], len(rows), lambda _: rows, lines)
    for index, row in enumerate(rows):
        if not isinstance(row, kind):
            raise ValueError(
                f"`{name}` must be objects or texts, all of one kind, got {short(row)} in "
                f"{table.place(index)}: write {what}."
            )
    if texts:
        return table
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    return table._replace(names=names, column=lambda key: [row.get(key) for row in rows])


def _read_csv(text: str, path: Path, name: str) -> Table:
    return _parsed_csv(text, path, name, ",")


def _read_tsv(text: str, path: Path, name: str) -> Table:
    try:
        return _parsed_csv(text, path, name, "\t")
    except ValueError:  # quotes need not mean anything in such a file
        return _parsed_csv(text, path, name, "\t", quoting=csv.QUOTE_NONE)


def _parsed_csv(
    text: str, path: Path, name: str, delimiter: str, quoting: int = csv.QUOTE_MINIMAL
) -> Table:
    limit = csv.field_size_limit(len(text) + 1)  # a text may be longer than the 128 KiB of old
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True
    )
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        begins = 1
        for row in reader:
            if row:
                rows.append(row)
                lines.append(begins)
            begins = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"`{name}` must be a table, got {str(path)!r}, line {begins}: {error}. Put a text that "
            'has quotes or commas between quotes, and write a quote in it as "".'
        ) from error
    finally:
        csv.field_size_limit(limit)
    names = rows[0]
    if len(set(names)) < len(names):
        raise ValueError(
            f"`{name}` must have names that differ in its first line, got {names} in {path}: the "
            "first line names the columns."
        )
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(names):
            raise ValueError(
                f"`{name}` must have {len(names)} entries in each row, as in its first line, got "
                f"{len(row)} in line {line} of {path}: put a text that has the separator in it "
                "between quotes."
            )

    def column(key: str) -> list[str]:
        index = names.index(key)
        return [row[index] for row in rows[1:]]

    return Table(str(path), names, len(rows) - 1, column, lines[1:])


_READERS: dict[str, Callable[[str, Path, str], Table]] = {
    "jsonl": _read_json_lines,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "txt": _read_lines,
}
"""What reads the text of a file, by its ending."""


def _read_parquet(path: Path, name: str) -> Table:
    parquet = _package("pyarrow.parquet", "pyarrow", "a parquet file", name)
    try:
        file = parquet.ParquetFile(path)
        names, size = list(file.schema_arrow.names), file.metadata.num_rows
    except Exception as error:  # what it raises is of several kinds
        raise ValueError(
            f"`{name}` must be a whole parquet file, got {str(path)!r}: {_first_line(error)}."
        ) from error

    def column(key: str) -> list[Any]:
        return parquet.read_table(path, columns=[key]).column(key).to_pylist()

    return Table(str(path), names, size, column)


def _read_dataset(source: str, path: Path, subset: str | None, split: str, name: str) -> Table:
    """Read what the package datasets knows: a folder, or a dataset on the hub."""
    missing = "" if path.is_dir() else f" There is no file {source!r}.{_nearby(path)}"
    datasets = _package("datasets", "datasets", "a folder or a hub dataset", name, missing)
    saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(str(path))
        else:
            where = str(path) if path.is_dir() else source
            found = datasets.load_dataset(where, subset, split=split)
    except Exception as error:  # what it raises is of many kinds
        if path.is_dir():
            advice = "pass a file of it, or write it with Dataset.save_to_disk."
        else:
            advice = (
                "the hub must be reachable, or its copy of an earlier time; or pass a file or a "
                f"folder.{_nearby(path)}"
            )
        cause = error.__cause__ or error
        raise ValueError(
            f"`{name}` must be a file, or a dataset that can be loaded, got {source!r} "
            f"({beside(name, 'subset')} {subset!r}, {beside(name, 'split')} {split!r}): "
            f"{_first_line(cause)}; {advice}"
        ) from error
    if isinstance(found, dict):
        if split not in found:
            raise ValueError(
                f"`{beside(name, 'split')}` must be one of {list(found)} for {source!r}, got "
                f"{split!r}.{nearest(split, found)}"
            )
        found = found[split]
    plain = found.with_format(None)
    return Table(source, list(plain.column_names), len(plain), lambda key: plain[key][:])


def _package(module: str, package: str, purpose: str, name: str, besides: str = "") -> ModuleType:
    """Import a package that trl does without unless it is asked for."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"`{name}` needs the package {package} for {purpose}: pip install {package}.{besides}"
        ) from error


def only_a_path(source: str) -> bool:
    """Whether a source that is not there could only be a file or a folder."""
    ending = source.lower().removesuffix(".gz").rpartition(".")[2]
    return (
        ending in (*_READERS, "parquet")
        or Path(source).is_absolute()
        or source.startswith(("./", "../", "~"))
        or source.count("/") > 1
        or "\\" in source
        or not source
    )


def _nearby(path: Path) -> str:
    """Return ' Did you mean …?' for what is like the path, or nothing."""
    there = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    words = [STARTER, MODEL] if path.parent == Path() else []
    match = difflib.get_close_matches(path.name, words + there, 1, 0.6)
    found = match and (match[0] if match[0] in words else str(path.parent / match[0]))
    return f" Did you mean `{found}`?" if found else ""


# Words of errors.


def _empty(name: str, source: str) -> ValueError:
    return ValueError(f"`{name}` must have at least one text, got {source!r}, which is empty.")


def beside(name: str, other: str) -> str:
    """Return the parameter that stands beside another: data.prompts → data.column."""
    return name.rpartition(".")[0] + name.rpartition(".")[1] + other


def listed(table: Table) -> str:
    """Return a sentence on the columns of a table."""
    shown = [repr(key if len(key) <= 40 else key[:39] + "…") for key in table.names]
    header = " (its first line)" if re.search(r"\.[ct]sv(\.gz)?$", table.source.lower()) else ""
    return f"the columns of {table.source}{header} are {', '.join(shown)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean …?' for the nearest known word, upper and lower case being equal."""
    known = list(known)
    same = [other for other in known if other.lower() == word.lower()]
    return f" Did you mean `{same[0]}`?" if same else closest(word, known)


def short(value: Any) -> str:
    """Return how a value is written, without its end if that is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
