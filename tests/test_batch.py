from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ragged
from trl.batch import Rollout, pad_rows, score_tensor


def test_layout_of_a_ragged_rollout():
    rollout = Rollout.from_lists(
        [torch.tensor([5]), torch.tensor([6, 7, 8])],
        [torch.tensor([1, 2]), torch.tensor([3])],
    )
    assert rollout.queries.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert rollout.responses.tolist() == [[1, 2], [3, 0]]
    assert rollout.query_mask.tolist() == [[False, False, True], [True, True, True]]
    assert rollout.response_mask.tolist() == [[True, True], [True, False]]
    assert rollout.input_ids.tolist() == [[0, 0, 5, 1, 2], [6, 7, 8, 3, 0]]
    assert rollout.attention_mask.tolist() == [
        [False, False, True, True, True],
        [True, True, True, True, False],
    ]
    assert rollout.position_ids.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]
    assert rollout.lengths.tolist() == [3, 4]
    assert len(rollout) == 2


def test_equal_length_tensors_have_no_padding():
    rollout = Rollout.from_lists(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4).long())
    assert rollout.query_mask.all()
    assert rollout.response_mask.all()


def test_tokens_after_the_first_eos_do_not_count():
    rollout = Rollout.from_lists([torch.tensor([1])], [torch.tensor([3, 9, 4, 9])], eos_token_id=9)
    assert rollout.response_mask.tolist() == [[True, True, False, False]]
    assert rollout.responses.tolist() == [[3, 9, 0, 0]]


def test_a_hole_in_the_response_is_attended_to():
    rollout = Rollout(
        queries=torch.tensor([[1, 2]]),
        query_mask=torch.tensor([[True, True]]),
        responses=torch.tensor([[3, 4, 5, 0]]),
        response_mask=torch.tensor([[True, False, True, False]]),
    )
    assert rollout.attention_mask.tolist() == [[True, True, True, True, True, False]]


def test_select_leaves_out_columns_that_are_padding_in_all_rows():
    rollout = Rollout.from_lists(ragged([1, 3, 2]), ragged([5, 1, 2]))
    part = rollout.select(torch.tensor([2]))
    assert part.queries.shape == (1, 2)
    assert part.responses.shape == (1, 2)
    assert part.query_mask.all()
    assert part.response_mask.all()
    assert torch.equal(part.queries[0], ragged([1, 3, 2])[2])


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12),
    max_rows=st.none() | st.integers(1, 5),
    max_tokens=st.integers(1, 60),
)
def test_micro_batches_cover_every_row_once_and_fit(lengths, max_rows, max_tokens):
    rollout = Rollout.from_lists(ragged([q for q, _ in lengths]), ragged([r for _, r in lengths]))
    groups = list(rollout.micro_batches(max_rows=max_rows, max_tokens=max_tokens))
    assert sorted(torch.cat(groups).tolist()) == list(range(len(lengths)))
    for group in groups:
        part = rollout.select(group)
        assert max_rows is None or len(group) <= max_rows
        assert len(group) == 1 or part.input_ids.numel() <= max_tokens
        # Trimming loses nothing.
        assert part.query_lists() == [ragged([q for q, _ in lengths])[i].tolist() for i in group]
        assert part.response_lists() == [ragged([r for _, r in lengths])[i].tolist() for i in group]


def test_pad_rows_on_both_sides():
    rows = [torch.tensor([1, 2]), torch.tensor([3])]
    tokens, mask = pad_rows(rows, left=True)
    assert tokens.tolist() == [[1, 2], [0, 3]]
    assert mask.tolist() == [[True, True], [False, True]]
    tokens, mask = pad_rows(rows, left=False)
    assert tokens.tolist() == [[1, 2], [3, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("scores", [torch.tensor([1, 2]), [1, 2.0], [torch.tensor(1.0), 2]])
def test_scores_may_be_a_tensor_or_numbers(scores):
    rollout = Rollout.from_lists(ragged([1, 2]), ragged([2, 1]))
    assert score_tensor(scores, rollout).tolist() == [1.0, 2.0]
    assert score_tensor(scores, rollout).dtype == torch.float32


def recorded() -> Rollout:
    """Three ragged rows with everything that a sampler may add; row 1 has a hole."""
    rollout = Rollout.from_lists(
        ragged([1, 3, 2]),
        ragged([5, 3, 2]),
        response_masks=[torch.ones(5), torch.tensor([1, 0, 1]), torch.ones(2)],
    )
    return replace(
        rollout,
        behaviour_logprobs=-torch.rand(3, 5) * rollout.response_mask,
        values=torch.rand(3, 5) * rollout.response_mask,
        group_ids=torch.tensor([0, 0, 1]),
        ended=torch.tensor([True, False, True]),
        query_texts=("a", "b", "c"),
        response_texts=("d", "e", "f"),
    )


def test_select_takes_what_was_recorded_along():
    whole = recorded()
    whole.check()
    part = whole.select(torch.tensor([2, 1]))
    part.check()
    assert part.response_mask.tolist() == [[True, True, False], [True, False, True]]
    assert torch.equal(part.behaviour_logprobs, whole.behaviour_logprobs[[2, 1], :3])
    assert torch.equal(part.values, whole.values[[2, 1], :3])
    assert part.group_ids.tolist() == [1, 0]
    assert part.ended.tolist() == [True, False]
    assert part.query_texts == ("c", "b")
    assert part.response_texts == ("f", "e")


def test_split_yields_every_row_once_and_in_order():
    parts = list(recorded().split(2))
    assert [len(part) for part in parts] == [2, 1]
    assert sum((part.response_texts for part in parts), ()) == ("d", "e", "f")


@pytest.mark.parametrize("whole", [recorded(), Rollout.from_lists(ragged([1, 2]), ragged([2, 1]))])
def test_save_and_load_give_the_same_rollout(whole, tmp_path):
    whole.save(tmp_path / "rollout.safetensors")
    loaded = Rollout.load(tmp_path / "rollout.safetensors")
    for entry in fields(Rollout):
        before, after = getattr(whole, entry.name), getattr(loaded, entry.name)
        if isinstance(before, torch.Tensor):
            assert before.dtype == after.dtype
            assert torch.equal(before, after)
        else:
            assert before == after


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"behaviour_logprobs": torch.zeros(3, 4)},
            r"`behaviour_logprobs` .* \[3, 5\], got \[3, 4\]",
        ),
        ({"group_ids": torch.zeros(2)}, r"`group_ids` .* \[3\], got \[2\]"),
        ({"response_texts": ("a",)}, r"`response_texts` .* 3 rows, got 1"),
    ],
)
def test_check_names_a_recorded_field_that_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(recorded(), **changes).check()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([torch.ones(2)], "each of the 2 responses, got 1"),
        ([torch.ones(2), torch.ones(3)], r"response_masks\[1\].* \[2\] .*got \[3\]"),
        ([torch.ones(2), torch.zeros(2)], r"response_masks\[1\].* must count a token"),
        ([torch.ones(2), [1, 1]], r"response_masks\[1\].* got list"),
    ],
)
def test_bad_response_masks_are_named(masks, message):
    with pytest.raises(ValueError, match=message):
        Rollout.from_lists(ragged([1, 2]), ragged([2, 2]), response_masks=masks)


@pytest.mark.parametrize(
    "scores",
    [
        [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10]],  # one for each token, those in the hole left out
        [[1, 2, 3, 4, 5], [6, 8], [9, 10]],  # one for each counted token
        torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 99, 99], [9, 10, 99, 99, 99]]),
    ],
)
def test_scores_of_tokens_come_to_their_places(scores):
    assert score_tensor(scores, recorded()).tolist() == [
        [1, 2, 3, 4, 5],
        [6, 0, 8, 0, 0],
        [9, 10, 0, 0, 0],
    ]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[1.0] * 5, [1.0], [1.0] * 2], r"`scores\[1\]` must be .* 3 tokens .* shape \[1\]"),
        ([[1.0] * 5, [1.0] * 3], r"3 rows .* got 2"),
        (torch.zeros(3, 4), r"\[3, 5\] of the responses, got shape \[3, 4\]"),
        ([[1.0] * 5, [1.0, 2.0, float("nan")], [1.0] * 2], "finite, got nan at row 1"),
    ],
)
def test_bad_scores_of_tokens_are_named(scores, message):
    with pytest.raises(ValueError, match=message):
        score_tensor(scores, recorded())


def test_any_of_several_ends_ends_a_response():
    queries = [torch.tensor([1]), torch.tensor([1])]
    responses = [torch.tensor([3, 9, 4, 8]), torch.tensor([8, 9, 9])]
    rollout = Rollout.from_lists(queries, responses, eos_token_id=[9, 8])
    assert rollout.response_lists() == [[3, 9], [8]]
    assert Rollout.from_lists(queries, responses, eos_token_id=()).response_mask.sum() == 7


@pytest.mark.parametrize("eos", ["</s>", 9.0, True, [9, None]])
def test_an_end_that_is_no_token_is_refused(eos):
    with pytest.raises(TypeError, match="`eos_token_id` must be a token id, a list of .* got"):
        Rollout.from_lists([torch.tensor([1])], [torch.tensor([3, 9])], eos_token_id=eos)


def test_a_rollout_is_shown_in_a_line():
    rollout = recorded()
    first = rollout.texts[0]
    assert repr(rollout) == (
        f"Rollout of 3: queries {list(rollout.queries.shape)}, responses "
        f"{list(rollout.responses.shape)}, with behaviour_logprobs, values, group_ids, ended; "
        f"first: {first!r}"
    )
    bare = Rollout.from_lists([torch.tensor([1, 2])], [torch.tensor([3])])
    assert repr(bare) == "Rollout of 1: queries [1, 2], responses [1, 1]"
    long = replace(rollout, query_texts=("a\n" * 500, "", ""))
    assert len(repr(long)) < 250
    assert repr(long).endswith(" …'")


def test_rows_can_be_chosen_by_a_mask():
    whole = recorded()
    part = whole.select(whole.ended)
    assert part.response_lists() == [whole.response_lists()[row] for row in (0, 2)]
    assert part.response_texts == ("d", "f")
    with pytest.raises(ValueError, match="`rows` must choose at least one row, got none"):
        whole.select(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="`rows` must choose at least one row, got none"):
        whole.select(torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match=r"mask of the shape \[3\] of the rows, got a mask \[2\]"):
        whole.select(torch.ones(2, dtype=torch.bool))


def test_the_text_of_a_row_has_a_space_where_query_and_response_stand_apart():
    pairs = [("w3 w4", "w31"), ("a ", "b"), ("a", "\nb"), ("a", ""), ("", "b")]
    queries, responses = zip(*pairs, strict=True)
    rows = ragged([1] * len(pairs))
    rollout = replace(Rollout.from_lists(rows, rows), query_texts=queries, response_texts=responses)
    assert rollout.texts == ("w3 w4w31", "a b", "a\nb", "a", "b")
    assert replace(rollout, texts_apart=True).texts == ("w3 w4 w31", "a b", "a\nb", "a", "b")
    assert replace(rollout, response_texts=None).texts is None


def test_messages_stay_with_their_rows(tmp_path):
    chats = tuple([{"role": "user", "content": text}] for text in "abc")
    whole = replace(recorded(), query_messages=chats, texts_apart=True)
    whole.check()
    part = whole.select(torch.tensor([2, 0]))
    assert part.query_messages == (chats[2], chats[0])
    part.save(tmp_path / "rollout")
    loaded = Rollout.load(tmp_path / "rollout")
    assert loaded.query_messages == part.query_messages
    assert loaded.texts_apart
    with pytest.raises(ValueError, match="`query_messages` .* one entry for each of its 3 rows"):
        replace(whole, query_messages=chats[:2]).check()


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    tokens, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    rollout = Rollout(tokens, mask, tokens, mask)
    rollout.save(tmp_path / "rollout")
    assert torch.equal(Rollout.load(tmp_path / "rollout").responses, tokens)


def test_a_rollout_without_rows_is_named():
    tokens, mask = torch.ones(0, 3, dtype=torch.long), torch.ones(0, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="a Rollout must have at least one row, got none"):
        Rollout(tokens, mask, tokens, mask).check()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_concat_undoes_split(data):
    sizes = st.lists(st.integers(1, 5), min_size=1, max_size=7)
    query_sizes = data.draw(sizes)
    rows = len(query_sizes)
    response_sizes = data.draw(st.lists(st.integers(1, 5), min_size=rows, max_size=rows))
    queries, responses = ragged(query_sizes), ragged(response_sizes, seed=1)
    groups = torch.arange(rows) // data.draw(st.integers(1, rows))
    rollout = replace(
        Rollout.from_lists(queries, responses),
        group_ids=groups,
        ended=torch.arange(rows) % 2 == 0,
        temperature=0.7,
        query_texts=tuple(f"q{row}" for row in range(rows)),
    )
    rollout = replace(rollout, behaviour_logprobs=-rollout.responses.float())
    cut = data.draw(st.integers(1, rows))
    joined = Rollout.concat(list(rollout.split(cut)))
    for name in (
        "queries",
        "query_mask",
        "responses",
        "response_mask",
        "behaviour_logprobs",
        "ended",
    ):
        assert torch.equal(getattr(joined, name), getattr(rollout, name)), name
    assert (joined.temperature, joined.query_texts) == (0.7, rollout.query_texts)
    assert joined.response_texts is None
    # Rows of one part that belong together still do; rows of different parts never.
    part = torch.arange(rows) // cut
    together = (groups[:, None] == groups) & (part[:, None] == part)
    assert torch.equal(joined.group_ids[:, None] == joined.group_ids, together)


def test_concat_of_what_does_not_belong_together():
    rollout = Rollout.from_lists([torch.tensor([5])], [torch.tensor([1, 2])])
    with pytest.raises(ValueError, match=r"`parts` must have at least one rollout"):
        Rollout.concat([])
    with pytest.raises(ValueError, match=r"the same `texts_apart`, got \[False, True\]"):
        Rollout.concat([rollout, replace(rollout, texts_apart=True)])
    with pytest.raises(ValueError, match=r"all have `ended` or none, but parts \[0\] have none"):
        Rollout.concat([rollout, replace(rollout, ended=torch.tensor([True]))])
    with pytest.raises(ValueError, match=r"the same `temperature`"):
        Rollout.concat([rollout, replace(rollout, temperature=0.5)])
