"""Files, folders and hub datasets as tables of columns.

A file, by its ending (it may be followed by .gz):

    .txt             one text a line, without the blanks around it; the column is called text
    .jsonl           a JSON object, or a text, on each line
    .csv .tsv        the first line names the columns

Anything else is for the package datasets: a .json or .parquet file, a folder that `save_to_disk`
wrote, a folder of data files, or a dataset on the hub; `name:split` asks for a split other than
that of the settings.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.config import closest
from trl.config.errors import problem, refuse, shown
from trl.config.recipe import STARTER

MODEL = "model"
"""The source of prompts that the policy writes."""

COLUMNS = ("prompt", "query", "text", "messages")
"""Names of columns that hold prompts, likeliest first."""

HALF_A_PAIR = re.compile("[\ud800-\udfff]")
"""A surrogate, which no tokenizer takes."""

Rows = Iterator[tuple[int, dict[str, Any]]]
"""The rows of a file, each after the line that it ends in."""


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of equal length; those of a dataset are read when they are asked for."""

    source: str
    """What errors call it."""
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] = ()
    """The line of each row, where it has one."""
    before: int = 0
    """Rows of the source before these."""

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return list(self.columns)

    @property
    def size(self) -> int:
        """How many rows there are."""
        return len(next(iter(self.columns.values()), ()))

    def column(self, name: str) -> list[Any]:
        """Return the entries of a column."""
        return list(self.columns[name])

    def place(self, row: int) -> str:
        """Say where a row stands, counted from 1."""
        where = f"line {self.lines[row]}" if self.lines else f"row {self.before + row + 1}"
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
    if not path.exists() and (parts := SPLIT.fullmatch(source)):
        source, split = parts.groups()
        path = Path(source).expanduser()
    if told := missing(source, name):
        raise FileNotFoundError(told)
    _check_kind(path, name)
    if path.is_file() and _ending(source) in READERS:
        table = _read_file(path, name)
    else:
        if path.is_file() and _ending(source) not in BUILDERS:
            refuse(name, f"be a file that ends in one of {ENDINGS}", repr(source), "convert it")
        plain = _loaded([str(path)] if path.is_file() else [], source, subset, split, name)
        table = Table(source, {key: plain[key] for key in plain.column_names})
    if not table.size:
        refuse(name, "have at least one text", f"{source!r}, which is empty")
    return table


def chosen_column(table: Table, column: str | None, name: str) -> str:
    """Return the column that is meant: the one asked for, the only one, or the likeliest.

    Raises:
        ValueError: if there is none, naming those that there are.
    """
    likely = [known for known in COLUMNS if known in table.names]
    if column is None and (likely or len(table.names) == 1):
        column = (likely or table.names)[0]
    if column not in table.names:
        raise ValueError(
            f"`{beside(name, 'column')}` must name a column, got {column!r}: {listed(table)}."
            f"{closest(column or '', table.names)}"
        )
    return column


def checked_texts(table: Table, column: str, name: str) -> list[str]:
    """Return the entries of a column that holds texts.

    Raises:
        TypeError: if one of them is none, or no valid Unicode, naming its row.
    """
    texts = table.column(column)
    for row, text in enumerate(texts):
        if not isinstance(text, str) or HALF_A_PAIR.search(text):
            rule = f"have a text (of valid Unicode) in column {column!r} of each row"
            got = f"{shown(text)} in {table.place(row)}"
            refuse(name, rule, got, "correct that row, or choose another column", error=TypeError)
    return texts


# What reads a file


def _read_file(path: Path, name: str) -> Table:
    """Read a file whose ending says that this module knows it."""
    data = path.read_bytes()
    try:
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
        rows = dict(READERS[_ending(path.name)](data.decode("utf-8-sig")))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        rule = f"be a whole {path.suffix} file, its text in UTF-8"
        fix = "convert it, as with iconv -t UTF-8" if isinstance(error, UnicodeError) else "mend it"
        refuse(name, rule, f"{str(path)!r} ({error})", fix)
    names = dict.fromkeys(key for row in rows.values() for key in row)
    columns = {key: [row.get(key) for row in rows.values()] for key in names}
    return Table(str(path), columns, list(rows))


def _lines(text: str) -> Rows:
    # Not splitlines, which would also split at characters that may stand inside a text.
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        if line.strip():
            yield number, {"text": line.strip()}


def _json_lines(text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise ValueError("it is a list of JSON: name it .json")
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}, {shown(line)}: {error}") from error
        if not isinstance(row, (str, dict)):
            raise ValueError(f"line {number}, {shown(row)}, is neither an object nor a text")
        yield number, {"text": row} if isinstance(row, str) else row


def _csv(text: str, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> Rows:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # 128 KiB at first
    file = io.StringIO(text, newline="")
    reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
    line = 1
    try:
        names = reader.fieldnames or []
        line = reader.line_num + 1
        if len(names) == 1 and ";" in names[0]:
            raise csv.Error(f"the columns {names[0]!r} are parted by semicolons: write commas")
        if len(set(names)) < len(names):
            raise csv.Error(f"names of columns must differ, got {names}")
        for row in reader:
            line = reader.line_num
            if None in row or None in row.values():  # what is too much, and what is not there
                raise csv.Error(f"a row has {len(names)} entries, as the first line says")
            yield line, row
            line += 1  # where an error of the reader would begin
    except csv.Error as error:
        advice = 'put a text with separators or quotes in it between quotes, a quote as ""'
        raise ValueError(f"line {line}: {error}; {advice}") from error


def _tsv(text: str) -> Rows:
    try:
        yield from list(_csv(text, "\t"))
    except ValueError:  # quotes need not mean anything in such a file
        yield from _csv(text, "\t", csv.QUOTE_NONE)


READERS = {"jsonl": _json_lines, "csv": _csv, "tsv": _tsv, "txt": _lines}
"""What reads the text of a file, by its ending."""


def _loaded(
    files: Sequence[str], source: str, subset: str | None, split: str, name: str, **how: Any
) -> Any:
    """Return what the package datasets makes of files, or of a folder or name on the hub.

    Args:
        files: None for a folder or a name.
        source: That, or what errors call the files.
        subset: Configuration of a hub dataset.
        split: Split of a hub dataset or a folder.
        name: What errors call the source.
        **how: Passed to `load_dataset`.
    """
    path = Path(source).expanduser()
    try:
        import datasets
    except ImportError as error:
        needs = f"`{name}` needs the package datasets to read {source!r}: pip install datasets."
        there = "" if files or path.exists() else f" There is no file {source!r}.{_nearby(path)}"
        raise ImportError(needs + there) from error
    try:
        if files:
            builder, kind = BUILDERS[_ending(files[0])]
            more = {"data_files": list(files), "split": "train"}
            found = datasets.load_dataset(builder, **more, **kind, **how)
        elif any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
        else:
            where = str(path) if path.is_dir() else source
            found = datasets.load_dataset(where, subset, split=split, **how)
    except Exception as error:  # what it raises is of many kinds
        first = error.__cause__ or error
        cause = str(first).strip().partition("\n")[0] or type(first).__name__
        what = f"be a file or dataset that can be loaded, with its split {split!r}"
        hint = "" if files or path.exists() else _nearby(path)
        raise ValueError(f"`{name}` must {what}, got {source!r}: {cause}{hint}") from error
    if isinstance(found, dict):
        if split not in found:
            refuse(beside(name, "split"), f"be one of {list(found)} for {source!r}", repr(split))
        found = found[split]
    return found.with_format(None)


def streamed_dataset(
    sources: Sequence[str], *, subset: str | None = None, split: str = "train", name: str = "source"
) -> Any:
    """Return a `datasets.IterableDataset` of what is read as it is used, never all at once.

    Args:
        sources: Files of one kind, with * and ? for many, or one folder or hub dataset.
        subset: Configuration of a hub dataset.
        split: Split of a hub dataset or a folder.
        name: What errors call them.

    Raises:
        FileNotFoundError, ImportError, ValueError: if they cannot be read.
    """
    files: list[str] = []
    for source in sources:
        path = Path(source).expanduser()
        found = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
        if not found and (only_a_path(source) or len(sources) > 1 or glob.has_magic(source)):
            raise FileNotFoundError(f"`{name}` must be files, got {source!r}.{_nearby(path)}")
        for file in found:
            _check_kind(Path(file), name)
        files += found
    if len(files) == 1 and Path(files[0]).is_dir():
        files = []
    kinds = {_ending(file) for file in files}
    if len(kinds) > 1 or not kinds <= BUILDERS.keys():
        rule = f"be files of one ending, one of {ENDINGS}"
        refuse(name, rule, str(sorted(kinds)), "convert them")
    if files and all(map(_is_blank, files)):  # which the package datasets has no words for
        refuse(name, "have at least one text", f"{', '.join(sources)!r}, which is empty")
    found = _loaded(files, ", ".join(sources), subset, split, name, streaming=True)
    if kinds == {"txt"}:  # as `_lines` has them
        found = found.map(lambda row: {"text": row["text"].strip()})
    return found.to_iterable_dataset() if hasattr(found, "to_iterable_dataset") else found


def beside_recipe(source: Any, folder: Path) -> Any:
    """Return sources with the paths written out of those that are files in a folder."""
    if not isinstance(source, str):
        return source and tuple(beside_recipe(each, folder) for each in source)
    path = folder / source
    there = path.is_file() or (glob.has_magic(source) and glob.glob(str(path)))
    return str(path.resolve()) if there else source


SPLIT = re.compile(r"(.+):([\w.-]+(?:\[[^\]]*\])?)")
"""A source and its split, `imdb:test`."""
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "jsonl": ("json", {}),
    "json": ("json", {}),
    "parquet": ("parquet", {}),
    "csv": ("csv", {}),
    "tsv": ("csv", {"sep": "\t"}),
    "txt": ("text", {}),
}
"""What reads files in the package datasets, by their ending."""
ENDINGS = ", ".join(f".{ending}" for ending in BUILDERS)


def _check_kind(path: Path, name: str) -> None:
    """Raise for a pipe or a device, which may be waited for without end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        fix = "write what it gives into a file"
        refuse(name, "be a file", f"a pipe or a device, {str(path)!r}", fix)


def _is_blank(file: str) -> bool:
    """Tell whether a file has nothing but blanks in it."""
    unpacked = gzip.open if file.lower().endswith(".gz") else open
    try:
        with unpacked(file, "rb") as data:
            return not any(map(bytes.strip, iter(lambda: data.read(2**16), b"")))
    except (OSError, EOFError, zlib.error):  # to be told by what reads it
        return False


def _ending(source: str) -> str:
    """Return the ending of a file's name, without .gz after it."""
    return Path(source.lower().removesuffix(".gz")).suffix[1:]


def missing(source: str, name: str) -> str:
    """Return a sentence on a source that is nowhere; nothing: it is there, or may be on the hub."""
    parts = SPLIT.fullmatch(source)
    paths = [Path(each).expanduser() for each in (source, parts[1] if parts else source)]
    if any(path.exists() for path in paths) or not only_a_path(source) or glob.has_magic(source):
        return ""
    return problem(name, "be a file that is there", repr(source)) + _nearby(paths[0])


def only_a_path(source: str) -> bool:
    """Whether a source that is not there could only be a file or a folder."""
    local = source.startswith((".", "~", "/")) or source.count("/") > 1
    return local or _ending(source) in BUILDERS


# Words of errors


def _nearby(path: Path) -> str:
    """Return ' Did you mean …?' for what is like the path, or nothing."""
    there = [other.name for other in path.parent.glob("*")]
    return closest(path.name, [STARTER, MODEL, *there])


def beside(name: str, other: str) -> str:
    """Return the parameter that stands beside another: data.prompts → data.column."""
    return "".join(name.rpartition(".")[:2]) + other


def listed(table: Table) -> str:
    """Return a sentence on the columns of a table."""
    return f"the columns of {table.source} are {', '.join(map(shown, table.names))}"
