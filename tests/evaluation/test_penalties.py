import pytest

from tests.evaluation.rollouts import make_rollout
from trl.evaluation import LengthPenalty, RepetitionPenalty, score


def test_length_by_hand():
    # L_max 10, L_cache 4: 0 up to 6 tokens, (6 − 7)/4, (6 − 9)/4, −1 from 10 on.
    rollout = make_rollout(*[("q", "r")] * 6, lengths=[1, 6, 7, 9, 10, 30])
    assert score(LengthPenalty(10, 4), rollout).scores.tolist() == [0, 0, -0.25, -0.75, -1, -1]


def test_length_counts_what_the_policy_wrote():
    rollout = make_rollout(("q", "r"), lengths=[8], holes=[(0, 2), (0, 3)])
    assert score(LengthPenalty(10, 4), rollout).scores.tolist() == [0]


def test_repetition_by_hand():
    texts = ["a b c d", "a b a b a b", "A b a B", "a", "", "a a a a a"]
    rollout = make_rollout(*[("q", text) for text in texts])
    # 3 of 3 distinct; 2 of 5 (ab, ba); 2 of 3; none; none; 1 of 4.
    wanted = pytest.approx([0, -3 / 5, -1 / 3, 0, 0, -3 / 4])
    assert score(RepetitionPenalty(2), rollout).scores.tolist() == wanted


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LengthPenalty(10, 11), r"`soft_tokens` must be <= max_tokens \(10\), got 11"),
        (lambda: LengthPenalty(0, 1), "`max_tokens` must be an integer > 0, got 0"),
        (lambda: RepetitionPenalty(0), "`ngram` must be an integer > 0, got 0"),
    ],
)
def test_what_cannot_work_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()
