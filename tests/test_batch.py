import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tests.conftest import ragged
from trl.axes import ONE_FOR_ALL, QUERY_TOKENS, RESPONSE_TOKENS, ROWS, TUPLE, TUPLES, Axes
from trl.batch import Rollout, axes_of, pad_rows

DATA = Path(__file__).parent / "data"


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


# --- every field -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Longer(Rollout):
    """A rollout with another field of each kind: each is one line."""

    of_queries: Annotated[torch.Tensor | None, QUERY_TOKENS] = None
    of_responses: Annotated[torch.Tensor | None, RESPONSE_TOKENS] = None
    of_rows: Annotated[torch.Tensor | None, ROWS] = None
    names: Annotated[tuple[str, ...] | None, TUPLE] = None
    table: Annotated[dict[str, tuple] | None, TUPLES] = None
    unit: Annotated[str | None, ONE_FOR_ALL] = None


def joined(query, response):
    """Texts of tokens."""
    return " ".join(map(str, response))


def full() -> Longer:
    """Three ragged rows with a value in every field; each row's value names its row."""
    base = recorded()
    values = {entry.name: getattr(base, entry.name) for entry in fields(Rollout)}
    columns = base.input_ids.shape[1]
    values |= {
        "temperature": 0.7,
        "texts_apart": True,
        "query_messages": tuple([{"role": "user", "content": text}] for text in "abc"),
        "columns": {"answer": (1, [2, "two"], None), "level": ("easy", "hard", "easy")},
        "turn_rewards": torch.rand(3, 5) * base.response_mask,
        "episodes": tuple({"messages": [], "turns": n, "stop": "done"} for n in range(3)),
        "environments": ("x", "y", "z"),
        "decode": joined,
        "trunk_states": torch.arange(3.0 * (columns - 1) * 2).view(3, columns - 1, 2),
        "of_queries": base.queries * 2,
        "of_responses": base.responses * 2.0,
        "of_rows": torch.tensor([7, 8, 9]),
        "names": ("x", "y", "z"),
        "table": {"left": (1, 2, 3)},
        "unit": "nats",
    }
    return Longer(**values)


EVERY = [entry.name for entry in fields(Longer)]


def plain(value):
    return value.tolist() if isinstance(value, torch.Tensor) else value


def row_of(value, row, axes):
    """What a field says of one row."""
    if not axes.names:
        return value
    if isinstance(value, dict):
        return {name: column[row] for name, column in value.items()}
    return plain(value[row])


def test_every_field_says_what_it_is_and_the_full_rollout_has_it():
    assert all(isinstance(axes_of(Longer)[name], Axes) for name in EVERY)
    whole = full()
    whole.check()
    assert not [name for name in EVERY if getattr(whole, name) is None]


@pytest.mark.parametrize("name", EVERY)
def test_a_field_survives_select(name):
    whole, axes = full(), axes_of(Longer)[name]
    # All rows: the widths stay.
    part = whole.select(torch.tensor([2, 0, 1]))
    part.check()
    for place, row in enumerate((2, 0, 1)):
        assert row_of(getattr(part, name), place, axes) == row_of(getattr(whole, name), row, axes)
    # The last row alone has two tokens in its query, and two in its response.
    alone = getattr(whole.select(torch.tensor([2])), name)
    both = slice(1, whole.queries.shape[1] + 2 - 1)
    window = {"Q": slice(1, None), "R": slice(2), "T−1": both}
    expected = getattr(whole, name)
    if isinstance(expected, torch.Tensor):
        expected = expected[2:]
        if len(axes.names) > 1:
            expected = expected[:, window[axes.names[1]]]
        assert torch.equal(alone, expected)
    else:
        assert row_of(alone, 0, axes) == row_of(expected, 2, axes)


@pytest.mark.parametrize("name", EVERY)
def test_a_field_survives_concat(name):
    whole = full()
    joined = Longer.concat([whole.select(torch.tensor([row])) for row in range(3)])
    joined.check()
    if name == "trunk_states":  # of columns that are other columns now
        assert joined.trunk_states is None
    elif name == "group_ids":  # groups of different parts stay apart
        assert joined.group_ids.tolist() == [0, 1, 2]
    else:
        assert plain(getattr(joined, name)) == plain(getattr(whole, name))


@pytest.mark.parametrize("name", EVERY)
def test_a_field_moves_to_another_device(name):
    whole = full()
    moved, before = getattr(whole.to("meta"), name), getattr(whole, name)
    if isinstance(before, torch.Tensor):
        assert moved.device.type == "meta"
        assert moved.shape == before.shape
    else:
        assert moved == before


@pytest.mark.parametrize("name", EVERY)
def test_a_field_survives_save_and_load(name, tmp_path):
    whole = full()
    whole.save(tmp_path / "rollout")
    loaded, before = getattr(Longer.load(tmp_path / "rollout"), name), getattr(whole, name)
    if name in ("environments", "decode"):  # which live, and are not saved
        before = None
    assert type(loaded) is type(before)
    assert plain(loaded) == plain(before)
    if isinstance(before, torch.Tensor):
        assert loaded.dtype == before.dtype


@pytest.mark.parametrize("name", [name for name in EVERY if axes_of(Longer)[name].names])
def test_a_field_of_another_size_is_named(name):
    whole = full()
    value = getattr(whole, name)
    if isinstance(value, dict):
        value = {column: entries[:2] for column, entries in value.items()}
    else:
        value = value[:2]
    # Of tokens that do not fit their mask, the mask is named.
    named = {"queries": "query_mask", "responses": "response_mask"}.get(name, name)
    with pytest.raises(ValueError, match=f"^`{named}` must "):
        replace(whole, **{name: value}).check()


IDS = torch.tensor([[3, 4], [5, 6]])


@pytest.mark.parametrize(
    ("name", "value", "error", "rule"),
    [
        ("ended", [True, False, True], TypeError, "be a tensor, got list"),
        ("ended", torch.ones(3), ValueError, "be bool, got torch.float32"),
        ("group_ids", torch.ones(3), ValueError, "be one whole number for each"),
        ("values", [[0.0] * 5] * 3, TypeError, "be a tensor, got list"),
        ("values", torch.zeros(3, 5).long(), ValueError, "be floating-point numbers"),
        ("values", torch.full((3, 5), math.nan), ValueError, "be finite .*, got nan"),
        ("behaviour_logprobs", torch.full((3, 5), -math.inf), ValueError, "be finite .*, got -inf"),
        ("behaviour_logprobs", torch.full((3, 5), 0.5), ValueError, ".*at most 0, got 0.5"),
        ("queries", IDS.to(torch.uint8), ValueError, "be integers .*, int64, got torch.uint8"),
        ("temperature", "1.0", ValueError, "be a number > 0, got '1.0'"),
        ("temperature", math.nan, ValueError, "be a number > 0, got nan"),
        ("response_texts", "abc", ValueError, "be a list of texts, got 'abc'"),
        ("query_texts", (b"a", b"b", b"c"), ValueError, "be a list of texts, got"),
        ("columns", ["a", "b", "c"], ValueError, "be values for each row by their names"),
    ],
)
def test_what_was_recorded_is_looked_at(name, value, error, rule):
    """A list raised once weights had changed; NaN was blamed on the learning rate."""
    with pytest.raises(error, match=f"^`{name}` must {rule}"):
        replace(full(), **{name: value}).check()


def test_what_stands_outside_of_the_mask_may_be_anything():
    whole = full()
    mask = whole.response_mask
    assert not mask.all()
    replace(whole, behaviour_logprobs=torch.where(mask, -1.0, math.nan)).check()


def test_columns_of_other_names_are_not_joined():
    one = replace(full(), columns={"answer": (1, 2, 3)})
    with pytest.raises(ValueError, match=r"the same `columns`, got \[\['answer'\], \['level'\]\]"):
        Longer.concat([one, replace(one, columns={"level": (1, 2, 3)})])


def test_a_file_of_an_older_version_has_the_log_probs_by_their_name_of_today():
    """It was written when `behaviour_logprobs` was `logprobs`."""
    rollout = Rollout.load(DATA / "rollout-0.1.safetensors")
    rollout.check()
    assert rollout.queries.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert rollout.responses.tolist() == [[1, 2], [3, 0]]
    assert rollout.behaviour_logprobs.tolist() == [[-1.5, -0.25], [-2.0, 0.0]]
    assert rollout.values.tolist() == [[0.5, 1.0], [-1.0, 0.0]]
    assert rollout.group_ids.tolist() == [0, 0]
    assert rollout.ended.tolist() == [True, False]
    assert rollout.temperature == 0.7
    assert rollout.texts == ("ae f", "b c dg")
    assert rollout.query_messages[0] == [{"role": "user", "content": "a"}]
    assert rollout.columns is None


def test_a_file_that_is_no_rollout_or_a_damaged_one_is_one_sentence(tmp_path):
    path = tmp_path / "rollout"
    full().save(path)
    good = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        texts = file.metadata()["texts"]
    loaded = Rollout.load(path)  # whose tensors stay, whatever happens to the file
    tensors = loaded.tensors()
    longer = torch.zeros(3, 9, dtype=torch.long)

    def changed(metadata=texts, **changes):
        kept = {k: v for k, v in (tensors | changes).items() if v is not None}
        save_file(kept, path, metadata={"texts": metadata})

    cases = [
        (lambda: path.write_bytes(b""), "header too small"),
        (lambda: path.write_bytes(good[: len(good) // 2]), "invalid header length|incomplete"),
        (lambda: path.write_bytes(good[:9] + b"\xff" + good[10:]), "invalid UTF-8 in header"),
        (lambda: path.write_bytes(b"PK a zip file of something"), "header too large"),
        (lambda: save_file({"weight": longer}, path), "a file without queries, query_mask, resp"),
        (lambda: changed(responses=None), "a file without responses"),
        (
            lambda: changed(responses=longer),
            r"`response_mask` must be bool and of the shape \[3, 9",
        ),
        (lambda: changed(responses=tensors["responses"].float()), "`responses` must be integers"),
        (lambda: changed("{not json"), "Expecting property name"),
        (lambda: changed("[1, 2]"), "cannot convert"),
        (lambda: changed("[" * 100_000), "recursion"),
        (lambda: changed('{"columns": [1, 2, 3]}'), "`columns` must be values"),
    ]
    for harm, words in cases:
        harm()
        with pytest.raises(ValueError, match=words) as caught:
            Rollout.load(path)
        assert str(caught.value).startswith(f"`{path}` must hold a Rollout that is whole (")
        assert "copy it anew, or write it again with Rollout.save." in str(caught.value)
    assert torch.equal(loaded.responses, full().responses)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"rollout"):
        Rollout.load(path)
    os.mkfifo(path)
    for other in (path, tmp_path):
        with pytest.raises(ValueError, match="must be a file that Rollout.save has written"):
            Rollout.load(other)


# --- what is done with it ------------------------------------------------------------------------


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
            r"`behaviour_logprobs` .* \[3, 5\] .*, got \[3, 4\]",
        ),
        ({"group_ids": torch.zeros(2)}, r"`group_ids` .* \[3\] .*, got \[2\]"),
        ({"response_texts": ("a",)}, r"`response_texts` .* 3 rows .*, got 1"),
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
        ([torch.ones(2), torch.ones(2) * 1j], r"response_masks\[1\].* True and False"),
    ],
)
def test_bad_response_masks_are_named(masks, message):
    with pytest.raises(ValueError, match=message):
        Rollout.from_lists(ragged([1, 2]), ragged([2, 2]), response_masks=masks)


def test_any_of_several_ends_ends_a_response():
    queries = [torch.tensor([1]), torch.tensor([1])]
    responses = [torch.tensor([3, 9, 4, 8]), torch.tensor([8, 9, 9])]
    rollout = Rollout.from_lists(queries, responses, eos_token_id=[9, 8])
    assert rollout.response_lists() == [[3, 9], [8]]
    assert Rollout.from_lists(queries, responses, eos_token_id=()).response_mask.sum() == 7


@pytest.mark.parametrize("eos", ["</s>", 9.0, True, [9, None], -1, 2**70])
def test_an_end_that_is_no_token_is_refused(eos):
    error = (TypeError, ValueError)
    with pytest.raises(error, match="`eos_token_id` must be a token id, a list of .* got"):
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
    with pytest.raises(
        ValueError, match=r"a mask of the shape \[3\] of them, got torch.bool \[2\]"
    ):
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
    with pytest.raises(ValueError, match="`query_messages` .* one entry for each of the 3 rows"):
        replace(whole, query_messages=chats[:2]).check()


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    tokens, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    rollout = Rollout(tokens, mask, tokens, mask)
    rollout.save(tmp_path / "rollout")
    assert torch.equal(Rollout.load(tmp_path / "rollout").responses, tokens)


def test_a_rollout_without_rows_is_named():
    tokens, mask = torch.ones(0, 3, dtype=torch.long), torch.ones(0, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="`queries` must have at least one row, got none"):
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


@pytest.mark.parametrize("bad", [0.5, math.nan, 2.0])
def test_a_mask_of_something_between_is_refused(bad):
    mask = [torch.tensor([1.0, bad])]
    with pytest.raises(ValueError, match=r"`response_masks\[0\]` must be True and False, or 1 and"):
        Rollout.from_lists(torch.ones(1, 1).long(), torch.ones(1, 2).long(), response_masks=mask)


# --- tensors that hold no plain numbers ---------------------------------------------------------

ODD = {
    "sparse": IDS.to_sparse,
    "csr": IDS.to_sparse_csr,
    "meta": lambda: IDS.to("meta"),
    "nested": lambda: torch.nested.nested_tensor([IDS[0], IDS[1]]),
    "jagged": lambda: torch.nested.nested_tensor([IDS[0], IDS[1]], layout=torch.jagged),
    "a list": IDS.tolist,
}


@pytest.mark.filterwarnings("ignore")  # of torch: they may change
@pytest.mark.parametrize("kind", ODD)
def test_tensors_whose_numbers_are_not_there_are_refused_by_name(kind):
    odd = ODD[kind]()
    with pytest.raises(TypeError, match=r"`query(\[0\])?` must be a "):
        Rollout.from_lists(odd, IDS)
    with pytest.raises(TypeError, match=r"`response(\[0\])?` must be a "):
        Rollout.from_lists(IDS, odd)
    base = Rollout.from_lists(IDS, IDS)
    for name in ("queries", "responses", "response_mask", "behaviour_logprobs", "group_ids"):
        with pytest.raises(TypeError, match=f"`{name}` must be a tensor"):
            replace(base, **{name: odd}).check()
    if kind != "a list":
        with pytest.raises(TypeError, match=r"`response_masks\[0\]` must be a tensor"):
            Rollout.from_lists(IDS, IDS, response_masks=[odd, odd])


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float32])
def test_ids_are_whole_numbers(dtype):
    base = Rollout.from_lists(IDS, IDS)
    for name in ("queries", "responses"):
        with pytest.raises(ValueError, match=f"`{name}` must be integers"):
            replace(base, **{name: IDS.to(dtype)}).check()
    with pytest.raises(TypeError, match=r"`query\[0\]` must hold token ids of an integer dtype"):
        Rollout.from_lists(IDS.to(dtype), IDS)
    with pytest.raises(ValueError, match="`group_ids` must be one whole number"):
        Rollout.from_lists(IDS, IDS, group_ids=torch.ones(2).to(dtype))


@pytest.mark.parametrize("rows", [None, 3, torch.tensor(1)])
def test_what_has_no_rows_is_named(rows):
    with pytest.raises((TypeError, ValueError), match="^`query` must be a tensor"):
        Rollout.from_lists(rows, IDS)
    if rows is not None:
        with pytest.raises(TypeError, match="^`response_masks` must be a list of masks"):
            Rollout.from_lists(IDS, IDS, response_masks=rows)


@pytest.mark.parametrize("group_ids", [["a", "b"], [2**70, 0], [[0], [1]], [0, 1, 2]])
def test_group_ids_that_are_no_numbers_are_refused(group_ids):
    with pytest.raises(ValueError, match="`group_ids` must be one whole number"):
        Rollout.from_lists(IDS, IDS, group_ids=group_ids)


def test_a_row_whose_mask_begins_behind_its_eos_counts_nothing_and_is_refused():
    masks = [torch.tensor([1, 1]), torch.tensor([0, 1])]
    with pytest.raises(ValueError, match="`response_masks` must count a token up to .* in row 1"):
        Rollout.from_lists(IDS, IDS, eos_token_id=5, response_masks=masks)
    assert Rollout.from_lists(IDS, IDS, eos_token_id=6, response_masks=masks).response_mask[1, 1]


def test_rows_are_chosen_by_lists_too():
    rollout = full()
    chosen = rollout.select(torch.tensor([2, 0]))
    for rows in ([2, 0], (2, 0), [-1, -3], range(2, -1, -2)):
        assert rollout.select(rows).columns == chosen.columns
        assert torch.equal(rollout.select(rows).responses, chosen.responses)
    assert torch.equal(rollout.select([True, False, True]).values, rollout.select([0, 2]).values)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "choose at least one row"),
        ([False] * 3, "choose at least one row"),
        ([True, False], r"a mask of the shape \[3\] of them, got torch.bool \[2\]"),
        ([0, 3], "indices of the 3 rows, .* got 0 to 3"),
        ([-4], "got -4 to -4"),
        ([0.0], r"got torch.float32 \[1\]"),
        (1, r"got torch.int64 \[\]"),
        (["a"], r"got \['a'\]"),
        (None, "got None"),
    ],
)
def test_rows_that_are_none_are_refused(rows, message):
    with pytest.raises(ValueError, match=f"`rows` must .*{message}"):
        full().select(rows)
