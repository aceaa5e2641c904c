"""Tables of which some rows are run each time, and all of them by `make test-slow`."""

import pytest


def quick(rows, *names):
    """Return the rows of a table, values or tuples of them, slow but for those named."""
    assert set(names) <= set(rows), set(names) - set(rows)
    return [
        pytest.param(
            *(row if isinstance(row, tuple) else [row]),
            marks=[] if row in names else pytest.mark.slow,
        )
        for row in rows
    ]
