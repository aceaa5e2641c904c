"""What a run shows: figures and samples before → after, its charts, its report, and comparisons.

    write_report([Path("runs/a")], Path("runs/a"))        runs/a/report.html and runs/a/report/*.png
    compare([Path("runs/a"), Path("runs/b")])             a table for the terminal

Everything here is made from plain Python values or from the files of a run, so that a report can be
made again at any time, also while the run goes on.
"""

from trl.report.figures import before_after_tables, compare
from trl.report.page import write_report
from trl.report.run import read_runs

__all__ = ["before_after_tables", "compare", "read_runs", "write_report"]
