from dataclasses import replace
from fractions import Fraction

import pytest

from tests.evaluation.rollouts import make_rollout
from trl.evaluation import MathScorer, ScoringError, score
from trl.evaluation.final_answer import final_answer, marked_answer, number_in, plain


def found(pairs, **settings):
    """Score (right, response) pairs."""
    rollout = make_rollout(*[("", response) for _, response in pairs], lengths=[1] * len(pairs))
    rollout = replace(rollout, columns={"answer": tuple(right for right, _ in pairs)})
    return score(MathScorer(**{"seconds": 10.0} | settings), rollout).scores.tolist()


RIGHT = [
    ("72", r"so \boxed{72}"),
    ("72", "Natalia sold 48 + 24 = 72.\n#### 72"),
    ("48 + 24 = 72\n#### 72", "It is 72."),
    (72, "**72**"),
    ("1,234", r"\boxed{1234.0}"),
    ("1234", r"\boxed{1{,}234}"),
    ("1/2", r"\boxed{\frac{1}{2}}"),
    ("0.5", r"\boxed{\dfrac12}"),
    (0.5, "1/2"),
    ("-1/2", r"\boxed{\frac{-1}{2}}"),
    ("7/2", r"\boxed{3\frac{1}{2}}"),
    ("3.5", "#### 3 1/2"),
    ("50%", r"\boxed{0.5}"),
    ("50%", r"\boxed{50}"),
    ("0.5", "#### 50 percent"),
    ("1200", r"\boxed{1.2\times 10^{3}}"),
    ("0.0015", "1.5e-3 is \\boxed{1.5e-3}"),
    ("-3", r"\boxed{−3}"),
    ("x = 5", r"\boxed{5}"),
    ("5", r"\boxed{\text{x} = 5}"),
    ("5 cm", r"\boxed{5}"),
    ("5", r"\boxed{5\text{ cm}}"),
    ("5 m/s", r"\boxed{5 \mathrm{m/s}}"),
    ("5 square meters", r"\boxed{5 \text{ square meter}}"),
    ("$5", r"\boxed{5 dollars}"),
    ("$1,000", r"\boxed{\$1000}"),
    ("90", r"\boxed{90^\circ}"),
    ("12", "\\boxed{7} no, \\boxed{12}."),
]
WRONG = [
    ("72", "73"),
    ("72", ""),
    ("72", "I do not know."),
    ("72", r"\boxed{}"),
    ("72", r"\boxed{72"),
    ("72", "72 \\boxed{1}"),
    ("42", r"\boxed{12+30}"),
    ("42", r"\boxed{6 \cdot 7}"),
    ("5", r"\boxed{\sqrt{25}}"),
    ("42", "42 or 43"),
    ("42", r"\boxed{42, 43}"),
    ("5", r"\boxed{5x}"),
    ("5", r"\boxed{5 pi}"),
    ("5", r"\boxed{5 thousand}"),
    ("5 m", r"\boxed{5 km}"),
    ("$5", r"\boxed{€5}"),
    ("50%", r"\boxed{0.5\%}"),
    ("0.333", r"\boxed{1/3}"),
    ("0.0000001", "0"),
    ("0", "0/0"),
    ("1234", r"\boxed{12,34}"),
]


def test_right_and_wrong_numbers():
    assert found(RIGHT) == [1.0] * len(RIGHT)
    assert found(WRONG) == [0.0] * len(WRONG)


FORMULAS = [
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1),
    (r"2\sqrt{3}", r"so it is $\sqrt{12}$", 1),
    (r"\frac{\pi}{2}", r"\boxed{\pi/2}", 1),
    ("x^2+2x+1", r"\boxed{1 + 2x + x^2}", 1),
    ("(1,2)", r"\boxed{(1, 2)}", 1),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", 1),
    (r"\text{yes}", r"\boxed{yes}", 1),
    (r"2\sqrt{3}", r"\boxed{2\sqrt{2}}", 0),
    ("(1,2)", r"\boxed{(2,1)}", 0),
    (r"\text{yes}", r"\boxed{no}", 0),
    (r"\sqrt{2}", r"\boxed{\sqrt{2}, 3}", 0),
]


def test_formulas_are_compared_as_mathematics():
    assert found([each[:2] for each in FORMULAS]) == [each[2] for each in FORMULAS]


def test_an_answer_without_a_mark_may_be_none():
    pairs = [("72", "It is 72."), ("72", "#### 72")]
    assert found(pairs, marked=True) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} \boxed{\frac{1}{2}} end", r"\frac{1}{2}"),
        ("#### 1\n\\boxed{2}", "2"),
        ("\\boxed{2}\n#### 1 \nmore", "1"),
        ("####", ""),
        (r"\fbox{ 3 }", "3"),
        ("3", None),
    ],
)
def test_the_last_mark_counts(text, answer):
    assert marked_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("a 1/2.", "1/2"), ("5-3", "3"), ("(-3)", "-3"), ("1,234,567", "1,234,567"), ("50 %", "50 %")],
)
def test_without_a_mark_the_last_number_is_the_answer(text, answer):
    assert final_answer(text, marked=False, number=True) == answer


def test_numbers_are_exact():
    assert number_in("0.1").value == Fraction(1, 10)
    assert number_in(plain(r"$\frac{10}{4}$")).value == Fraction(5, 2)
    assert number_in("2e-2").value == Fraction(1, 50)
    assert number_in("5 km").unit == number_in("5 kms").unit == "km"
    assert number_in("1 2") is None
    assert number_in("5 y") is None


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(ScoringError, match=r"math must find the column 'gold' .* got \['answer'\]"):
        found([("1", "1")], key="gold")
    with pytest.raises(ScoringError, match="column 'answer' holds no answer: ''"):
        found([("1", "1"), ("", "1")])
    with pytest.raises(ValueError, match="`seconds` must be a finite number > 0, got 0"):
        MathScorer(seconds=0)


def test_a_right_answer_can_be_made_of_the_column():
    values = ["72", "48 + 24 = 72\n#### 72", r"\frac{1}{2}", 3.5, r"2\sqrt{3}"]
    assert MathScorer().right(values[1]) == r"\boxed{72}"
    assert found([(value, MathScorer().right(value)) for value in values]) == [1.0] * 5


@pytest.mark.parametrize(
    ("response", "right", "answer"),
    [
        (r"So \boxed{1,234.0}", "1234", "1234"),
        (r"\boxed{50\%}", "1/2", "1/2"),
        ("it is .5 or so", "1/2", "1/2"),
        ("#### 3 apples", "4", "3"),
        (r"\boxed{12+30}", "42", "12+30"),
        (r"\boxed{\dfrac{x}{2}}", r"\frac{x}{2}", r"\frac{x}{2}"),
        ("I do not know", "7", ""),
    ],
)
def test_the_answer_that_was_read_off_is_noted_in_one_form(response, right, answer):
    assert MathScorer().answer(response, right) == answer


def test_answers_are_notes_of_the_scores():
    rollout = make_rollout(("", r"\boxed{1,234.0}"), ("", "none"), lengths=[1, 1])
    rollout = replace(rollout, columns={"answer": ("1234", "5")})
    assert score(MathScorer(), rollout).notes == {"answer": ("1234", "")}
