import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import tiny_gpt2
from tests.rollout.tokenizers_for_tests import byte_level
from trl.rollout import Sampler
from trl.rollout.stop import StopRule


def uniform(vocabulary):
    """A model for which each of the first tokens is as likely as any other, and no other comes."""
    model = tiny_gpt2()
    torch.nn.init.zeros_(model.transformer.wte.weight)
    # The final layer norm gives 1 in the first place, whatever came before.
    torch.nn.init.zeros_(model.transformer.ln_f.weight)
    model.transformer.ln_f.bias.data = torch.eye(32)[0]
    model.transformer.wte.weight.data[vocabulary:, 0] = -1e4
    return model


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("abc", False),
        ("x.", False),
        ("x..", True),  # one token
        ("ab.", False),
        ("ab . .", True),  # two
        ("b. .", True),  # "b." and ".": the border lies elsewhere
        (". x .", False),
        (".. x", False),  # asked after every token: it was seen when it came
    ],
)
def test_a_stop_string_is_found_across_tokens(text, ends):
    tokenizer = byte_level()
    tokens = [t for word in text.split() for t in tokenizer.encode(word)]
    rule = StopRule(strings=[".."], tokenizer=tokenizer)
    assert rule(torch.tensor([tokens])).tolist() == [ends]
    assert rule(torch.tensor([tokens[-rule.window :]])).tolist() == [ends]


def test_responses_end_with_the_token_that_completes_a_stop_string():
    tokenizer = byte_level()
    stops = ["ab", "d.", "\n"]
    sampler = Sampler(
        tokenizer, max_new_tokens=30, stop_strings=stops, eos_token_id=None, group_size=200
    )
    # The query holds a stop string, and half of one at its end: neither counts.
    rollout = sampler(uniform(len(tokenizer)), ["xaby d"])
    assert 0.3 < rollout.ended.float().mean() < 0.99
    endings = set()
    for tokens, ended in zip(rollout.response_lists(), rollout.ended.tolist(), strict=True):
        text = tokenizer.decode(tokens)
        before = tokenizer.decode(tokens[:-1])
        assert not any(stop in before for stop in stops)
        assert ended == any(stop in text for stop in stops)
        assert ended or len(tokens) == 30
        endings |= {tokens[-1]} if ended else set()
    names = set(tokenizer.convert_ids_to_tokens(list(endings)))
    assert {"ab", "abc", "Ċ", "b"} <= names


def test_stop_strings_and_eos_together():
    tokenizer = byte_level()
    sampler = Sampler(tokenizer, max_new_tokens=60, stop_strings=["."], group_size=100)
    rollout = sampler(uniform(len(tokenizer)), ["a"])
    last = {tokens[-1] for tokens in rollout.response_lists()}
    names = set(tokenizer.convert_ids_to_tokens(list(last)))
    assert {"<eos>", ".", ".."} <= names
    eos = tokenizer.eos_token_id
    assert all(eos not in tokens[:-1] for tokens in rollout.response_lists())


def test_min_new_tokens_holds_for_stop_strings():
    tokenizer = byte_level()
    with pytest.warns(UserWarning, match="min_new_tokens=3"):
        sampler = Sampler(
            tokenizer, max_new_tokens=40, stop_strings=["."], min_new_tokens=3, group_size=200
        )
    assert sampler(uniform(len(tokenizer)), ["a"]).response_mask.sum(1).min() == 4


def test_an_empty_rule_is_false():
    assert not StopRule()
    assert StopRule([3])
    assert StopRule(strings=["a"], tokenizer=byte_level())


def words(decoder=None):
    """A tokenizer of words, which cannot spell what transformers' own search begins with."""
    names = ["<unk>", "w1", "w2", "end", "##ing"]
    bare = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("w1 w2", False),
        ("w1 end", True),
        ("end w1", False),  # it was seen when it came
        ("w1 end ##ing", False),
        ("w2 w2", False),
        ("w1 w2 w1", True),  # across tokens, with the space between them
    ],
)
def test_stop_strings_of_vocabularies_that_cannot_spell(text, ends):
    tokenizer = words(decoders.WordPiece())
    rule = StopRule(strings=["end", "w2 w1"], tokenizer=tokenizer)
    tokens = tokenizer.convert_tokens_to_ids(text.split())
    assert rule(torch.tensor([tokens])).tolist() == [ends]
    assert rule(torch.tensor([tokens[-rule.window :]])).tolist() == [ends]
