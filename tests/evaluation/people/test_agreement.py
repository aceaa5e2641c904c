"""Agreement: worked by hand, and beside another program's numbers."""

import json

import pytest

from trl.evaluation.people.agreement import (
    agreement,
    cohen_kappa,
    fleiss_kappa,
    interval,
    wilson,
    write_agreement,
)
from trl.evaluation.people.items import Item, Vote


def test_cohens_kappa_by_hand():
    # Both yes 20, both no 15, first yes only 5, second yes only 10, of 50: p_o = 35/50 = .7;
    # first says yes 25/50, second 30/50: p_e = .5·.6 + .5·.4 = .5; κ = .2/.5 = .4.
    pairs = [(0, 0)] * 20 + [(1, 1)] * 15 + [(0, 1)] * 5 + [(1, 0)] * 10
    assert cohen_kappa(pairs) == pytest.approx(0.4, rel=1e-12)
    assert cohen_kappa([(0, 0)] * 3) is None
    assert cohen_kappa([(True, 1)] * 3) == 0.0  # True is not 1: they never agree


def test_fleiss_kappa_is_that_of_the_paper_s_form():
    # The example of 10 subjects, 14 raters, 5 categories: κ = 0.210 (Fleiss, 1971, as it is
    # usually shown); counts of each category for each subject.
    table = [
        *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
        *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
    ]
    told = [[k for k, count in enumerate(row) for _ in range(count)] for row in table]
    assert fleiss_kappa(told) == pytest.approx(0.20993, abs=5e-6)
    assert fleiss_kappa([*told, [3]]) == fleiss_kappa(told)  # one answer agrees with nobody
    assert fleiss_kappa([[1, 1], [1, 1]]) is None
    assert fleiss_kappa([[1]]) is None


def test_krippendorffs_alpha_by_hand():
    # Two people, two items, pairs (0, 0) and (0, 1): coincidences o_00 = 2, o_01 = o_10 = 1;
    # n_0 = 3, n_1 = 1, n = 4. α = 1 − (n − 1)·Σo_ck / Σ n_c·n_k = 1 − 3·1/(3·1) = 0.
    def item(*answers):
        votes = tuple(Vote(name, answer) for name, answer in zip("ab", answers, strict=False))
        return Item("p", ("x", "y"), votes=votes)

    found = agreement("pair", [item(0, 0), item(0, 1)])
    assert found["krippendorff_alpha"] == pytest.approx(0, abs=1e-12)
    # One more (1, 1): n_0 = 3, n_1 = 3, n = 6, o_01 = 1: α = 1 − 5·1/(3·3) = 4/9.
    found = agreement("pair", [item(0, 0), item(0, 1), item(1, 1), item("skip", 0), item(0)])
    assert found["krippendorff_alpha"] == pytest.approx(4 / 9, rel=1e-12)
    assert found["judged_by_several"] == 3
    assert agreement("pair", [item(0, 0)])["krippendorff_alpha"] is None


def test_wilsons_interval():
    # 8 of 10 (Newcombe, 1998, method 3): .4902 to .9433.
    found = interval(8, 10)
    assert (found["low"], found["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert interval(0, 10)["low"] == pytest.approx(0, abs=1e-12)
    assert interval(0, 0)["share"] is None
    # p = 0.8, n = 10, z² = 3.8415: (0.8 + 0.19207 ± 1.96·0.1600121) / 1.38415
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def votes(**answers):
    return tuple(Vote(name, answer, 2.0, shown=(0, 1)) for name, answer in answers.items())


def test_figures_of_people_and_sources(tmp_path):
    items = [
        Item("p0", ("x", "y"), ("one", "two"), votes=votes(ann=0, ben=0)),
        Item("p1", ("x", "y"), ("two", "one"), votes=votes(ann=0, ben="tie")),  # one: 0, .5
        Item("p2", ("x", "y"), ("one", "two"), votes=votes(ann="skip", ben="both_bad")),
        Item("known", ("x", "y"), gold=1, votes=votes(ann=1, ben=0)),
        Item("later", ("x", "y"), ("one", "two")),
    ]
    found = agreement("pair", items)
    ann, ben = found["annotators"]["ann"], found["annotators"]["ben"]
    assert (ann["votes"], ann["skipped"], ann["seconds_median"]) == (3, 1, 2.0)
    assert (ann["gold"]["share"], ben["gold"]["share"]) == (1.0, 0.0)
    (row,) = found["sources"]
    assert (row["sources"], row["items"]) == (["one", "two"], 3)
    assert row["mean"] == row["share"] == pytest.approx((1 + 0.25 + 0.5) / 3)
    assert row["low"] < row["share"] < row["high"]
    assert found["shown_first"]["of"] == 5  # ann: 0, 0, 1; ben: 0, 0
    assert found["shown_first"]["share"] == pytest.approx(4 / 5)
    assert (found["items"], found["judged"], found["votes"]) == (5, 4, 7)
    write_agreement(found, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == found


def test_ratings_and_best_of_four_tell_of_sources_too():
    rated = [Item(f"p{i}", ("x",), ("m",), votes=(Vote("a", i + 1),)) for i in range(3)]
    (row,) = agreement("rating", rated)["sources"]
    assert (row["sources"], row["mean"]) == (["m"], 2.0)
    best = Item("p", ("w", "x", "y"), ("a", "b", "c"), votes=(Vote("n", 1),))
    rows = {tuple(row["sources"]): row["mean"] for row in agreement("best", [best])["sources"]}
    assert rows == {("a", "b"): 0.0, ("b", "c"): 1.0}  # of a and c it says nothing


def test_the_page_shows_names_as_text(tmp_path):
    name = "<script>hit()</script>"
    item = Item("p", ("x", "y"), (name, "two"), votes=(Vote(name, 0), Vote("b", 1)))
    write_agreement(agreement("pair", [item, Item("q", ("x", "y"))]), tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3
    assert "Krippendorff" in page
