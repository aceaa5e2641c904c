import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.run_folders import make_run, write_lines
from trl.report.charts import Chart, Curve, Panel, charts_of, histogram, series, thin
from trl.report.drawing import DASHES, SERIES, draw
from trl.report.run import read_runs

nan = math.nan


def test_histogram_by_hand():
    edges, shares = histogram([[0.0, 1.0, 1.9, 4.0], [2.0, 3.0]], bins=4)
    assert edges == [0, 1, 2, 3, 4]
    assert shares == [[0.25, 0.5, 0, 0.25], [0, 0, 0.5, 0.5]]


def test_histogram_of_values_that_are_nearer_than_numbers_can_tell():
    edges, (shares,) = histogram([[0.0, 5e-324]])
    assert (edges[0], edges[-1]) == (-0.5, 0.5)
    assert sum(shares) == 1


def test_histogram_of_one_value():
    edges, shares = histogram([[3.0, 3.0]], bins=2)
    assert edges == [2.5, 3, 3.5]
    assert shares == [[0, 1]]


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=1), min_size=1, max_size=3))
def test_histogram_counts_every_value_once(groups):
    edges, shares = histogram(groups)
    assert len(edges) == 25
    assert all(sum(share) == pytest.approx(1) for share in shares)


def test_thin_takes_means_of_blocks_without_nan():
    assert thin([1, 3, nan, 5, nan, nan, 7], most=4) == pytest.approx([2, 5, nan, 7], nan_ok=True)
    assert thin([1, 2, 3], most=3) == [1, 2, 3]
    assert thin([]) == []


def test_series_is_empty_where_nothing_was_measured():
    rows = [{"step": 0}, {"step": 1, "a": nan, "b": nan}, {"step": 2, "a": 4.0, "b": nan}]
    assert series(rows, "b") == series(rows, "c") == ([], [])
    steps, values = series(rows, "a")
    assert steps == [1, 2]
    assert math.isnan(values[0])


def charts_by_slug(*folders):
    return charts_of(read_runs(folders))


def test_charts_of_a_whole_run(tmp_path):
    charts, missing = charts_by_slug(make_run(tmp_path / "run"))
    assert list(charts) == [
        *("reward", "kl", "reward-against-kl", "scores", "entropy", "length", "diversity"),
        *("clipfrac", "explained-variance", "losses", "gradient", "learning-rate", "time"),
        "throughput",
    ]
    assert missing == []
    line, held_out = charts["reward"].panels[0].curves
    assert (line.kind, held_out.kind) == ("line", "points")
    assert held_out.x == [0, 10, 20, 30, 40]
    assert line.low[4] == pytest.approx(2 * line.y[4] - line.high[4])
    assert [panel.unit for panel in charts["kl"].panels] == ["nats per response", "coefficient"]
    assert [curve.label for curve in charts["scores"].legend] == ["step 1", "step 21", "step 40"]


def test_runs_of_other_lengths_and_algorithms(tmp_path):
    long = make_run(tmp_path / "long", steps=30)
    short = make_run(tmp_path / "rloo", steps=12, algorithm="rloo", scorers=("a", "b"))
    charts, missing = charts_by_slug(long, short)
    assert [(c.label, len(c.x)) for c in charts["entropy"].panels[0].curves] == [
        ("long", 30),
        ("rloo", 12),
    ]
    assert [c.label for c in charts["explained-variance"].panels[0].curves] == ["long"]
    assert [panel.unit for panel in charts["scores"].panels] == ["long", "rloo"]
    assert {c.style for c in charts["reward"].panels[0].curves} == {0, 1}
    assert missing == []
    assert charts_by_slug(short)[1] == ["Explained variance"]


def test_a_coefficient_that_stays_is_said_and_not_drawn(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl",
        [{"step": s, "objective/kl": s, "objective/kl_coef": 0.052} for s in (1, 2)],
    )
    charts, _ = charts_by_slug(tmp_path)
    assert len(charts["kl"].panels) == 1
    assert "Coefficient: 0.052 throughout." in charts["kl"].note


def test_a_run_without_a_reference_has_no_chart_of_kl(tmp_path):
    row = {"step": 1, "reward/mean": 1.0, "objective/kl": nan, "objective/kl_coef": 0.0}
    write_lines(tmp_path / "metrics.jsonl", [row, row | {"step": 2}])
    charts, missing = charts_by_slug(tmp_path)
    assert "kl" not in charts
    assert "KL to the reference" in missing


def test_thirty_runs_differ_in_colour_or_line():
    assert len({(n % len(SERIES), n % len(DASHES)) for n in range(30)}) == 30


@pytest.mark.parametrize("values", [[1.0], [nan, 2.0, nan], [1e300, -1e300, nan], [0.0, 0.0]])
@pytest.mark.parametrize("kind", ["line", "points"])
def test_what_is_hard_to_draw_is_drawn(tmp_path, values, kind):
    curve = Curve(
        "_$x^2$ \x1b 😀 שלום", 0, 0, [float(i) for i in range(len(values))], values, kind=kind
    )
    chart = Chart('One "a"', "<b>", [Panel("$ <b> \x00", floor=0, curves=[curve])])
    element, places = draw(chart, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 3_000
    assert "var(--s0)" in element
    assert SERIES[0] not in element
    assert """aria-label='One "a". &lt;b&gt;'""" in element
    assert "$ &lt;b&gt;" in element
    left, right, low, high = places[0]["x"]
    assert 0 < left < right <= 4.4 * 72
    assert low < high


def test_a_point_alone_gets_a_mark(tmp_path):
    def marks(values):
        curve = Curve("c", 0, 0, list(range(len(values))), values)
        chart = Chart("C", "", [Panel("u", curves=[curve])])
        svg, _ = draw(chart, tmp_path / "c.png")
        runs = svg[svg.index('class="run0') :]
        return runs.count("<use")

    assert marks([1.0]) == marks([nan, 1.0, nan]) == 1
    assert marks([1.0, nan, 1.0]) == 2
    assert marks([1.0, 2.0]) == 0


def test_places_lead_from_figures_to_pixels(tmp_path):
    curve = Curve("c", 0, 0, [0.0, 10.0], [0.0, 1.0], kind="points")
    chart = Chart("C", "", [Panel("u", curves=[curve])])
    element, places = draw(chart, tmp_path / "c.png")
    left, right, low, high = places[0]["x"]
    bottom, top, under, over = places[0]["y"]
    x = left + (10 - low) / (high - low) * (right - left)
    y = bottom + (1 - under) / (over - under) * (top - bottom)
    assert f'x="{x:.2f}" y="{y:.2f}"' in element
