import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl.report.words import marked, moved_words, words


def test_z_scores_by_hand(monkeypatch):
    monkeypatch.setattr("trl.report.words.PRIOR", 0.5)
    # before: a 3, b 1 (n = 4); after: a 1, b 1, c 2 (n = 4); prior 0.5 of the counts of both:
    # α_a = 2, α_b = 1, α_c = 1, α_0 = 4
    moved = {entry.word: entry for entry in moved_words(["a a", "a b"], ["c c a b"])}
    # a: log(3 / (8 − 3)) − log(5 / (8 − 5)) = log(9 / 25); variance 1/3 + 1/5 = 8/15
    assert moved["a"].z == pytest.approx(math.log(9 / 25) / math.sqrt(8 / 15), rel=1e-9)
    assert moved["a"].z == pytest.approx(-1.398954, rel=1e-5)
    # b: the same count on both sides
    assert moved["b"].z == pytest.approx(0, abs=1e-12)
    # c: log(3 / 5) − log(1 / 7) = log(21 / 5); variance 1/3 + 1
    assert moved["c"].z == pytest.approx(math.log(4.2) / math.sqrt(4 / 3), rel=1e-9)
    assert (moved["a"].before, moved["a"].after, moved["c"].before) == (3, 1, 0)
    assert list(moved) == ["c", "b", "a"]


texts = st.lists(st.lists(st.sampled_from("abcd"), max_size=6).map(" ".join), max_size=5)


@given(texts, texts)
def test_what_rises_one_way_falls_the_other(one, two):
    there = {entry.word: entry.z for entry in moved_words(one, two)}
    back = {entry.word: entry.z for entry in moved_words(two, one)}
    assert there == pytest.approx({word: -z for word, z in back.items()}, abs=1e-9)


def test_nothing_and_one_word_alone_do_not_move():
    assert moved_words([], []) == []
    assert [entry.z for entry in moved_words(["a a"], ["a"])] == [0]


def test_words_of_any_script():
    assert words("It’s GREAT -- isn't_it? Straße 2nd 好电影") == [
        *("it’s", "great", "isn't", "it", "strasse", "2nd"),
        *("好", "电", "影"),
    ]


signs = st.text("aAfilmnoßİ'’_- \n\t好😀\x00", max_size=30)


@given(signs)
def test_marked_pieces_are_the_text_again(text):
    moved = {entry.word: entry for entry in moved_words(["a film"], ["no film"])}
    pieces = marked(f"{text} A film{text}", moved)
    assert "".join(piece for piece, _ in pieces) == f"{text} A film{text}"
    assert all(piece.casefold() == entry.word for piece, entry in pieces if entry)
    assert any(entry for _, entry in pieces)
