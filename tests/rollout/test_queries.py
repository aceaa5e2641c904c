import math

import pandas as pd
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from tests.conftest import tiny_gpt2
from tests.rollout.families import make
from tests.rollout.tokenizers_for_tests import CHAT_TEMPLATE, byte_level, sentence_pieces
from trl.batch import Rollout
from trl.rollout import Sampler
from trl.rollout.queries import decode_pair, encode_queries

CHATS = [
    [{"role": "user", "content": "abc"}],
    [{"role": "system", "content": "d"}, {"role": "user", "content": "cd ab"}],
]


def ids(tokenizer, text):
    return tokenizer.convert_tokens_to_ids(text.split())


def encode(queries, tokenizer, **settings):
    encoded = encode_queries(queries, tokenizer, **settings)
    return [row.tolist() for row in encoded.rows], encoded.texts


def test_texts_keep_what_the_tokenizer_adds_at_the_front():
    tokenizer = sentence_pieces()
    rows, texts = encode(["a good film", "was"], tokenizer)
    assert rows == [ids(tokenizer, "<s> ▁a ▁good ▁film"), ids(tokenizer, "<s> ▁was")]
    assert texts == ["a good film", "was"]


def test_an_eos_at_the_end_is_for_encoders():
    tokenizer = sentence_pieces(begin="")
    assert encode(["a film"], tokenizer)[0] == [ids(tokenizer, "▁a ▁film")]
    kept = encode(["a film"], tokenizer, keep_eos=True)[0]
    assert kept == [ids(tokenizer, "▁a ▁film </s>")]
    written = encode(["a film</s>"], sentence_pieces(begin="", end=""))[0]
    assert written[0][-1] == tokenizer.eos_token_id  # the user's own


def test_add_bos():
    tokenizer = byte_level()
    assert encode(["abc"], tokenizer)[0] == [ids(tokenizer, "abc")]
    assert encode(["abc"], tokenizer, add_bos=True)[0] == [ids(tokenizer, "<bos> abc")]
    assert encode([""], tokenizer, add_bos=True) == ([[tokenizer.bos_token_id]], [""])
    once = encode(["was"], sentence_pieces(), add_bos=True)[0]
    assert once == [ids(sentence_pieces(), "<s> ▁was")]
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="`add_bos` must be False for a tokenizer without a BOS"):
        encode(["abc"], tokenizer, add_bos=True)


def test_chats_go_through_the_template():
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT_TEMPLATE
    rows, texts = encode(CHATS, tokenizer, add_bos=True)
    assert texts == ["user: abc\nassistant:", "system: d\nuser: cd ab\nassistant:"]
    assert [tokenizer.decode(row) for row in rows] == texts
    assert tokenizer.bos_token_id not in rows[0]
    begins_and_ends = sentence_pieces()
    begins_and_ends.chat_template = CHAT_TEMPLATE
    assert not {0, 1} & set(encode(CHATS, begins_and_ends)[0][0])


def test_tensors_get_their_text():
    tokenizer = byte_level()
    row = torch.tensor(ids(tokenizer, "<bos> abc Ġa"))
    assert encode(row[None], None) == encode([row], tokenizer) == ([row.tolist()], None)
    assert Sampler(tokenizer)(tiny_gpt2(), [row]).query_texts == ("abc a",)


@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        ("abc", TypeError, "`queries` must be a list .*, got one str"),
        (CHATS[0], TypeError, r"`queries` must be a list of chats, .* pass \[chat\]"),
        ([], ValueError, "`queries` must have at least one row"),
        (["abc", ""], ValueError, r"`queries\[1\]` must have at least one token, got ''"),
        (["abc", CHATS[0]], TypeError, r"`queries\[1\]` must be of the same kind .* str, got list"),
        ([3], TypeError, r"`queries\[0\]` must be a text, a tensor of token ids or a list"),
        ([[1, 2]], TypeError, r"`queries\[0\]` must be a text, a tensor .* got \[1, 2\]"),
        (CHATS, ValueError, "`queries` must be texts for a tokenizer without chat template"),
        ([torch.tensor([])], TypeError, r"`queries\[0\]` must hold token ids of an integer dtype"),
    ],
)
def test_bad_queries(queries, error, message):
    with pytest.raises(error, match=message):
        encode(queries, byte_level())


def test_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"sampler without tokenizer, got str: .*Sampler\(tokeni"):
        encode(["abc"], None)


def test_a_response_keeps_the_space_before_its_first_word():
    tokenizer = sentence_pieces()
    query, response = ids(tokenizer, "<s> ▁a ▁good"), ids(tokenizer, "▁film s </s>")
    assert decode_pair(query, response, tokenizer)[1] == " films"
    assert decode_pair(query, response, tokenizer, apart=True)[1] == "films"
    assert decode_pair(query, ids(tokenizer, "s"), tokenizer)[1] == "s"


def test_half_a_character_at_the_border_does_not_matter():
    """The first byte of é ends the query, the second begins the response."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["Ã", "©"])  # what byte-level tokenizers call the two bytes
    query, response = ids(tokenizer, "abc Ã"), ids(tokenizer, "© abc")
    assert decode_pair(query, response, tokenizer)[1].endswith("abc")


def test_a_rollout_has_texts():
    tokenizer = byte_level(eos_token="z")
    sampler = Sampler(tokenizer, max_new_tokens=40, group_size=2, add_bos=True)
    model = tiny_gpt2()
    torch.nn.init.zeros_(model.transformer.wte.weight[len(tokenizer) :])
    # Ids beyond the tokenizer decode to nothing; the others are likely enough.
    rollout = sampler(model, ["abc", "cd ab"])
    rollout.check()
    assert rollout.query_texts == ("abc", "abc", "cd ab", "cd ab")
    for response, text in zip(rollout.response_lists(), rollout.response_texts, strict=True):
        assert text == tokenizer.decode(response, skip_special_tokens=True)
    assert rollout.query_lists()[0] == ids(tokenizer, "<bos> abc")
    assert rollout.ended.any()


def test_the_texts_of_an_encoder_decoder():
    """A response does not continue its query: no space belongs between them."""
    tokenizer = sentence_pieces(begin="")
    sampler = Sampler(tokenizer, max_new_tokens=6, group_size=30)
    rollout = sampler(make("t5"), ["a good film"])
    assert rollout.query_lists()[0] == ids(tokenizer, "▁a ▁good ▁film </s>")
    decoded = [tokenizer.decode(r, skip_special_tokens=True) for r in rollout.response_lists()]
    assert rollout.response_texts == tuple(decoded)
    assert {"a", "good", "film", "was"} & {text.split(" ")[0] for text in decoded}


# -- the kinds of query that are silently another text ---------------------------------------------


def separated(begin="[CLS]", end="[SEP]"):
    """BERT's kind: a special token that is no EOS behind every text."""
    tokenizer = sentence_pieces(begin="", end="")
    tokenizer.add_special_tokens({"cls_token": begin, "sep_token": end})
    ids_of = {name: tokenizer.convert_tokens_to_ids(name) for name in (begin, end)}
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=list(ids_of.items())
    )
    return tokenizer


def test_a_special_token_behind_a_text_is_for_encoders():
    tokenizer = separated()
    assert tokenizer("a film")["input_ids"][-1] == tokenizer.sep_token_id
    assert encode(["a film"], tokenizer)[0] == [ids(tokenizer, "[CLS] ▁a ▁film")]
    kept = encode(["a film"], tokenizer, keep_eos=True)[0]
    assert kept == [ids(tokenizer, "[CLS] ▁a ▁film [SEP]")]


def test_what_a_tokenizer_returns_is_read_without_its_padding():
    tokenizer = sentence_pieces(end="")
    tokenizer.pad_token = "<unk>"
    texts = ["a good film", "was"]
    expected = encode(texts, tokenizer)[0]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        assert encode(tokenizer(texts, padding=True, return_tensors="pt"), tokenizer)[0] == expected
        assert encode(tokenizer(texts, padding=True), None)[0] == expected
        arrays = tokenizer(texts, padding=True, return_tensors="np")
        assert encode(arrays, tokenizer)[0] == expected
    assert encode(tokenizer(texts[1]), tokenizer)[0] == expected[1:]  # of one text
    rollout = Sampler(tokenizer, max_new_tokens=3)(
        tiny_gpt2(), tokenizer(texts, padding=True, return_tensors="pt")
    )
    assert rollout.query_lists() == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_token_ids_are_refused(side):
    tokenizer = sentence_pieces(end="")
    tokenizer.pad_token, tokenizer.padding_side = "<unk>", side
    padded = tokenizer(["a good film", "was"], padding=True, return_tensors="pt")["input_ids"]
    rows = [{"prompt": row, "answer": 1} for row in padded]
    for given in (padded, list(padded), rows, {"input_ids": padded}):
        rule = r"`queries` must be token ids without padding, .* row 1"
        with pytest.raises(ValueError, match=rule):
            encode(given, tokenizer)
    assert encode(padded[:1], tokenizer)[0] == [padded[0].tolist()]


def test_one_token_that_looks_like_padding_may_be_meant():
    """GPT-2's way: BOS, EOS and padding are one token."""
    tokenizer = sentence_pieces(end="")
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token
    assert encode(torch.tensor([[0, 3, 4]]), tokenizer)[0] == [[0, 3, 4]]
    with pytest.raises(ValueError, match="without padding"):
        encode(torch.tensor([[0, 0, 4]]), tokenizer)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[0.5, 1.0], [1.0, 1.0]], r"`attention_mask\[0\]` of `queries` must be True and False"),
        ([[1.0, math.nan], [1.0, 1.0]], "must be True and False, or 1 and 0"),
        ([[1j, 1], [1, 1]], "must be True and False, or 1 and 0"),
        ([[1, 1], [1]], r"`attention_mask\[1\]` of .* shape \[2\] of its tokens, got \[1\]"),
    ],
)
def test_an_attention_mask_of_something_between_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        encode({"input_ids": torch.ones(2, 2).long(), "attention_mask": mask}, None)


def test_a_text_that_begins_with_bos_gets_no_second_one():
    """A chat that the user has put through the template."""
    tokenizer = sentence_pieces(end="")
    assert encode(["<s>a film"], tokenizer)[0] == encode(["a film"], tokenizer)[0]
    for row in encode(["<s>a film"], tokenizer, add_bos=True)[0]:
        assert row.count(tokenizer.bos_token_id) == 1


def test_prompts_of_pandas():
    tokenizer = byte_level()
    frame = pd.DataFrame({"prompt": ["abc", "cd"], "answer": [1, 2]}, index=[5, 1])
    assert encode(frame, tokenizer) == encode(["abc", "cd"], tokenizer)
    assert encode(frame["prompt"], tokenizer) == encode(["abc", "cd"], tokenizer)
    assert encode_queries(frame, tokenizer).others == [{"answer": 1}, {"answer": 2}]


def test_a_chat_that_its_template_refuses_is_named():
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT_TEMPLATE + "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"`queries\[0\]` must be a chat .* roles must alternate"):
        encode([CHATS[0]], tokenizer)
    begun = [*CHATS[0], {"role": "assistant", "content": None}]
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(ValueError, match=r"`queries\[1\]` must be a chat .* no \"content\""):
        encode([CHATS[0], begun], tokenizer)


def test_an_answer_that_is_begun_is_gone_on_with():
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT_TEMPLATE
    begun = [*CHATS[0], {"role": "assistant", "content": "ab"}]
    _, texts = encode([begun, CHATS[0]], tokenizer)
    assert texts == ["user: abc\nassistant: ab", "user: abc\nassistant:"]


def test_rows_of_a_data_set_have_their_prompts_in_a_column():
    tokenizer = byte_level()
    expected = encode(["abc", "cd"], tokenizer)
    rows = [{"answer": "x", "prompt": "abc"}, {"answer": "y", "prompt": "cd"}]
    assert encode(rows, tokenizer) == expected
    assert encode(Dataset.from_list(rows), tokenizer) == expected
    with pytest.raises(
        ValueError, match=r"a column of \['prompt', .*got \['answer'\]: .*row\['answer'\], \*\*row"
    ):
        encode([{"answer": "x"}], tokenizer)
    for other in ({"answer": "y"}, {"prompt": "cd"}, {**rows[1], "level": 1}, "cd"):
        rule = r"`queries\[1\]` must be a row with the columns of the first, \['answer', 'prompt'\]"
        with pytest.raises(ValueError, match=rule):
            encode([rows[0], other], tokenizer)


@pytest.mark.parametrize(
    ("rows_of", "tokenizer"),
    [(list, byte_level()), (Dataset.from_list, byte_level()), (list, None)],
)
def test_other_columns_of_rows_reach_the_rollout(rows_of, tokenizer, tmp_path):
    rows = [{"answer": i, "prompt": "ab" * (i + 1), "level": [i, -i]} for i in range(3)]
    if tokenizer is None:
        rows = [row | {"prompt": torch.tensor([1, 2])} for row in rows]
    sampler = Sampler(tokenizer, max_new_tokens=3, group_size=2)
    rollout = sampler(tiny_gpt2(), rows_of(rows))
    expected = {
        "answer": (0, 0, 1, 1, 2, 2),
        "level": tuple([i, -i] for i in range(3) for _ in "ab"),
    }
    assert rollout.columns == expected
    sampler.calls = 0
    parts = list(sampler.in_parts(tiny_gpt2(), rows_of(rows), 2))
    assert Rollout.concat(parts).columns == expected
    assert rollout.select(torch.tensor([5, 1])).columns["answer"] == (2, 0)
    rollout.save(tmp_path / "rollout")
    assert Rollout.load(tmp_path / "rollout").columns == expected
    alone = [{"prompt": row["prompt"]} for row in rows]
    assert sampler(tiny_gpt2(), alone).columns is None


def test_a_column_that_json_cannot_hold_is_named_when_it_is_saved(tmp_path):
    rows = [{"prompt": "ab", "answer": 1, "at": {1, 2}}]
    rollout = Sampler(byte_level(), max_new_tokens=2)(tiny_gpt2(), rows)
    with pytest.raises(TypeError, match=r"`columns\['at'\]` must hold what JSON can.*set"):
        rollout.save(tmp_path / "rollout")
    assert not (tmp_path / "rollout").exists()


def test_a_character_that_begins_in_the_query_is_whole_in_the_text():
    """é is two bytes, each a token: the query has one of them."""
    letters = ByteLevel.alphabet()
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(letters))}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = tokenizer("caféx")["input_ids"]
    assert len(tokens) == 6
    for cut in range(1, 6):
        pair = decode_pair(tokens[:cut], tokens[cut:], tokenizer)
        assert "".join(pair) == "caféx"
    assert decode_pair(tokens[:4], tokens[4:], tokenizer) == ("caf", "éx")


def test_special_tokens_may_be_kept_for_a_reward():
    tokenizer = byte_level(additional_special_tokens=["<answer>"])
    tag, eos = tokenizer.convert_tokens_to_ids("<answer>"), tokenizer.eos_token_id
    query, response = ids(tokenizer, "a b"), [tag, *ids(tokenizer, "c d"), eos]
    assert decode_pair(query, response, tokenizer)[1] == "cd"
    kept = decode_pair(query, response, tokenizer, keep_special_tokens=True, end_ids=[eos])
    assert kept == ("ab", "<answer>cd")


def test_a_sampler_keeps_special_tokens_on_request():
    tokenizer = byte_level(additional_special_tokens=["<answer>"])
    tag = tokenizer.convert_tokens_to_ids("<answer>")
    model = tiny_gpt2()
    settings = {"max_new_tokens": 40, "eos_token_id": None}
    rollout = Sampler(tokenizer, **settings, keep_special_tokens=True)(model, ["ab"] * 8)
    stripped = Sampler(tokenizer, **settings)(model, ["ab"] * 8)
    assert torch.equal(rollout.responses, stripped.responses)
    there = [tag in response for response in rollout.response_lists()]
    assert any(there)
    assert ["<answer>" in text for text in rollout.response_texts] == there
    assert not any("<answer>" in text for text in stripped.response_texts)
