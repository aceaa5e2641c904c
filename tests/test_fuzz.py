"""Whatever trl is given, it takes or refuses in words: see `tests.fuzz`."""

import pytest

from tests.fuzz import fuzz


@pytest.mark.parametrize("inputs", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_input_hangs_or_ends_in_a_bare_traceback(inputs):
    wrong = fuzz(inputs)
    assert not wrong, f"{len(wrong)} of {inputs}:\n" + "\n".join(wrong[:5])
