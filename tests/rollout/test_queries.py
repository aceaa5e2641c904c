import pytest
import torch

from tests.conftest import tiny_gpt2
from tests.rollout.families import make
from tests.rollout.tokenizers_for_tests import CHAT_TEMPLATE, byte_level, sentence_pieces
from trl.rollout import Sampler
from trl.rollout.queries import decode_response, encode_queries

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
        ("abc", TypeError, "`queries` must be a list, got one str"),
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
    assert decode_response(query, response, tokenizer) == " films"
    assert decode_response([], response, tokenizer) == "films"
    assert decode_response(query, ids(tokenizer, "s"), tokenizer) == "s"


def test_half_a_character_at_the_border_does_not_matter():
    """The first byte of é ends the query, the second begins the response."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["Ã", "©"])  # what byte-level tokenizers call the two bytes
    query, response = ids(tokenizer, "abc Ã"), ids(tokenizer, "© abc")
    assert decode_response(query, response, tokenizer).endswith("abc")


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
