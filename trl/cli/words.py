"""What the command line says of what went wrong."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import trl
from trl.config import SettingsError
from trl.config.errors import hidden
from trl.watch.markdown import visible


def is_main_process() -> bool:
    """Tell whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def complain(text: str) -> None:
    """Print to the standard error, once for all processes, without secrets and escapes."""
    if is_main_process():
        print(hidden(visible(text)), file=sys.stderr)


def told(error: SettingsError) -> str:
    """Return everything wrong with the settings, a line for each problem."""
    if len(error.found) == 1:
        return f"trl: {error}"
    problems = "".join(f"\n  {problem}" for problem in filter(None, (*error.found, error.advice)))
    return f"trl: {error.owner} has {len(error.found)} problems:{problems}"


def sentence(error: Exception) -> str:
    """Return what an error says, without the number of the system's error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    return str(error)


def is_explained(error: Exception) -> bool:
    """Tell an error that trl raised on purpose, or the system's (a file, a disk), from a bug.

    What comes out of another library's code keeps its traceback.
    """
    if isinstance(error, OSError):
        return True
    if isinstance(error, ImportError) and error.name is not None:
        return False  # of an import, not of a sentence on what to install
    if not isinstance(error, (ArithmeticError, ImportError, RuntimeError, TypeError, ValueError)):
        return False
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return Path(innermost.filename).is_relative_to(Path(trl.__file__).parent)
