import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trl.training.report import (
    before_after_summary,
    distinct_n,
    plot_learning_curve,
    samples_markdown,
    samples_table,
    summary_markdown,
    summary_table,
)

SAMPLE = {
    "prompt": "This film was",
    "before": " a [red]bad[/red] | one<br />\nreally",
    "score_before": -1.234,
    "after": " a good one",
    "score_after": 1.5,
}
ROWS = [
    {"step": 1, "reward/mean": 0.1, "reward/std": 0.5, "objective/kl": 0.0},
    {"step": 2, "reward/mean": 0.4, "reward/std": 0.4, "objective/kl": -0.1, "held_out/kl": 0.2},
    {"step": 3, "reward/mean": float("nan"), "ppo/policy/entropy": 2.0, "tokens_per_second": 9},
]


def shown(table):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        ([[1, 2, 3]], 2, 1.0),  # 12 23
        ([[1, 1, 1, 1]], 2, 1 / 3),  # 11 11 11
        ([[1, 2], [1, 2]], 2, 1 / 2),  # the same bigram in two texts counts once
        ([[1, 2], [3, 4]], 2, 1.0),  # 2 3 is not a bigram: it crosses texts
        ([[5, 5], [5]], 1, 1 / 3),
        ([["a", "b", "a", "b"]], 3, 1.0),  # aba bab
        ([[1], []], 2, 0.0),
        ([], 2, 0.0),
    ],
)
def test_distinct_n_by_hand(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected)


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=5), st.integers(1, 3))
def test_distinct_n_is_a_share_and_falls_when_the_texts_are_repeated(texts, n):
    share = distinct_n(texts, n)
    assert 0 <= share <= 1
    assert distinct_n(texts * 2, n) == pytest.approx(share / 2)
    naive = [gram for text in texts for gram in zip(*(text[i:] for i in range(n)), strict=False)]
    assert share * len(naive) == pytest.approx(len(list(itertools.groupby(sorted(naive)))))


def test_distinct_n_needs_a_length():
    with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
        distinct_n([[1]], 0)


@pytest.fixture
def summary():
    return before_after_summary(
        scores=([-1.0, 0.0, 4.0], [1.0, 2.0, 9.0]),
        positive=([0.25, 0.75], [0.9, 1.0]),
        kl=([0.0, 0.0], [8.0, 12.0]),
        tokens=([[1, 2, 3]], [[1, 1, 1]]),
    )


def test_before_after_summary_by_hand(summary):
    assert summary == {
        "reward/mean": (1.0, 4.0),
        "reward/median": (0.0, 2.0),
        "positive": (0.5, 0.95),
        "kl": (0.0, 10.0),
        "distinct_2": (1.0, 0.5),
    }


def test_before_after_summary_needs_prompts():
    with pytest.raises(ValueError, match="`kl` must hold at least one prompt"):
        before_after_summary(
            scores=([1.0], [1.0]), positive=([1.0], [1.0]), kl=([0.0], []), tokens=([[1]], [[1]])
        )


def test_summary_as_table_and_markdown(summary):
    text = shown(summary_table(summary))
    for part in ("mean reward", "+1.00", "+4.00", "0.500", "0.950", "10.0", "distinct-2"):
        assert part in text
    assert "| mean P(positive) | 0.500 | 0.950 |\n" in summary_markdown(summary)


def test_samples_as_table_show_text_as_it_is():
    text = " ".join(shown(samples_table([SAMPLE])).split())
    assert "[red]bad[/red]" in text
    assert "-1.23" in text
    assert "+1.50" in text


def test_samples_as_markdown_keep_one_row_per_sample():
    header, rule, row = samples_markdown([SAMPLE]).splitlines()
    assert header.count("|") == rule.count("|") == 6
    assert row == (
        "| This film was | a [red]bad[/red] \\| one&lt;br /> really | -1.23 | a good one | +1.50 |"
    )


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [{"step": 1, "held_out/distinct_2": 0.8}]])
def test_learning_curve_is_drawn_from_whatever_was_measured(tmp_path, rows, suffix):
    path = tmp_path / "new" / f"curve.{suffix}"
    plot_learning_curve(rows, path)
    assert path.stat().st_size > 5_000


def test_learning_curve_names_its_units(tmp_path):
    path = tmp_path / "curve.svg"
    plot_learning_curve(ROWS, path)
    text = path.read_text()
    for label in ("nats per response", "nats per token", "PPO step"):
        assert f"<!-- {label} -->" in text


def test_learning_curve_needs_rows(tmp_path):
    with pytest.raises(ValueError, match="`metrics` must hold at least one row"):
        plot_learning_curve([], tmp_path / "curve.png")
