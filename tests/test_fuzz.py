"""Whatever trl is given, it takes or refuses in words: see `tests.fuzz`."""

import math

import pytest

from tests.fuzz import fuzz
from trl.report import read_runs


@pytest.mark.parametrize("inputs", [140, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_input_hangs_or_ends_in_a_bare_traceback(inputs):
    wrong = fuzz(inputs)
    assert not wrong, f"{len(wrong)} of {inputs}:\n" + "\n".join(wrong[:5])


def test_rows_of_odd_values_are_read_without_them(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 1, "a": 1{"0" * 400}, "b": 2}}\n{{"step": 1{"0" * 400}}}\n'
    )
    (tmp_path / "scores.jsonl").write_text('{"step": 1, "scores": 3}\n')
    sample = '{"step": 1, "prompt": ["p"], "response": 5, "parts": 7, "reward": [1]}\n'
    (tmp_path / "samples.jsonl").write_text(sample)
    (read,) = read_runs([tmp_path])
    assert math.isnan(read.metrics[0].pop("a"))
    assert read.metrics == [{"step": 1, "b": 2}]
    assert read.scores == {}
    assert [(s.prompt, s.response, s.parts) for s in read.samples[1]] == [("['p']", "5", {})]
