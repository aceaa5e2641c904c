"""What a sampler says of policies, queries and settings that do not fit, before it samples."""

import pytest
import torch

from tests.conftest import VOCABULARY, ragged, tiny_gpt2
from tests.rollout.families import make
from tests.rollout.tokenizers_for_tests import CHAT_TEMPLATE, byte_level, sentence_pieces
from trl.rollout import Sampler
from trl.rollout.sampling import sample

QUERIES = ragged([3, 5])


@pytest.mark.parametrize("policy", [None, "gpt2", torch.nn.Linear(2, 2)])
def test_a_policy_that_is_no_language_model_is_named(policy):
    with pytest.raises(TypeError, match="`policy` must be a language model of transformers"):
        Sampler()(policy, QUERIES)
    with pytest.raises(TypeError, match="`model` must be a language model of transformers"):
        sample(policy, torch.ones(1, 2, dtype=torch.long), max_new_tokens=1)


def test_a_compiled_model_samples_as_it_did_before():
    model, queries = make("gpt2").language_model, ragged([3, 5], vocabulary=60)
    expected = Sampler(max_new_tokens=4)(model, queries)

    class Compiled(torch.nn.Module):  # what torch.compile gives, without the seconds it takes
        def __init__(self):
            super().__init__()
            self._orig_mod = model

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "_orig_mod" else getattr(model, name)

    rollout = Sampler(max_new_tokens=4)(Compiled(), queries)
    assert torch.equal(rollout.responses, expected.responses)


def test_all_queries_are_checked_by_the_callers_name_and_index():
    sampler, model = Sampler(byte_level(), max_new_tokens=4), tiny_gpt2()
    sampler.check(model, ["abc"] * 3)
    assert sampler.calls == 0
    with pytest.raises(ValueError, match=r"`prompts\[2\]` must have at least one token, got ''"):
        sampler.check(model, ["ab", "c", ""], name="prompts")
    with pytest.raises(ValueError, match=r"got 61 \+ 4 tokens in row 1 of `prompts`"):
        sampler.check(model, ragged([3, 61]), name="prompts")
    with pytest.raises(ValueError, match=r"`prompts\[1\]` must hold token ids .* got 97 to 98"):
        sampler.check(model, [torch.tensor([1]), torch.tensor([97, 98])], name="prompts")
    with pytest.raises(
        TypeError, match=r"`prompts` must be a list .*, got one str: pass \[prompt\]"
    ):
        sampler.check(model, "ab", name="prompts")
    with pytest.raises(TypeError, match=r"`queries` must be a list of texts, .* got one NoneType"):
        sampler.check(model, None)


def test_a_function_of_lengths_is_not_asked_by_a_check():
    Sampler(max_new_tokens=iter(()).__next__).check(tiny_gpt2(), QUERIES)


def test_the_messages_of_a_chat_stay_in_the_rollout():
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT_TEMPLATE
    chats = [[{"role": "user", "content": text}] for text in ("abc", "d")]
    rollout = Sampler(tokenizer, max_new_tokens=2, group_size=2)(tiny_gpt2(), chats)
    assert rollout.query_messages == (chats[0], chats[0], chats[1], chats[1])
    assert not rollout.texts_apart
    assert Sampler(tokenizer, max_new_tokens=2)(tiny_gpt2(), ["abc"]).query_messages is None


# --- ends ----------------------------------------------------------------------------------------


def test_an_end_that_the_model_does_not_know_is_named():
    with pytest.raises(ValueError, match=f"`eos_token_id` must hold ids .* {VOCABULARY - 1}, .*97"):
        Sampler(eos_token_id=[3, VOCABULARY])(tiny_gpt2(), QUERIES)
    with pytest.raises(ValueError, match="`eos_token_id` must hold ids"):
        sample(tiny_gpt2(), QUERIES[0][None], max_new_tokens=2, eos_token_id=VOCABULARY)


def last_tokens(policy, **settings):
    sampler = Sampler(byte_level(), max_new_tokens=60, group_size=60, **settings)
    rollout = sampler(policy, ["a"])
    ends = rollout.response_mask.sum(1) - 1
    return set(rollout.responses[torch.arange(60), ends][rollout.ended].tolist())


def test_responses_end_with_the_ends_of_tokenizer_and_policy():
    policy = tiny_gpt2()
    torch.nn.init.zeros_(policy.transformer.wte.weight)  # all tokens equally likely
    eos = byte_level().eos_token_id
    # One that the model does not know is of no use, but no fault of the user's either.
    policy.generation_config.eos_token_id = [7, 11, 50_256]
    assert last_tokens(policy) == {eos, 7, 11}
    policy.generation_config.eos_token_id = 7
    assert last_tokens(policy) == {eos, 7}
    assert last_tokens(policy, eos_token_id=[9]) == {9}
    assert last_tokens(policy, eos_token_id=None) == set()


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": None}, "`temperature` must be a finite number"),
        ({"temperature": float("nan")}, "`temperature` must be a finite number"),
        ({"top_k": 2.5}, "`top_k` must be an integer"),
        ({"top_p": "1"}, "`top_p` must be a finite number"),
        ({"min_new_tokens": 1.5}, "`min_new_tokens` must be an integer"),
        ({"max_new_tokens": 2.5}, "`max_new_tokens` must be .* got 2.5"),
        ({"max_new_tokens": True}, "`max_new_tokens` must be .* got True"),
        ({"max_new_tokens": None}, "`max_new_tokens` must be .* got None"),
        ({"max_new_tokens": (1, 2.0)}, r"`max_new_tokens` must be .* got \(1, 2.0\)"),
        ({"max_new_tokens": (1, 2, 3)}, r"`max_new_tokens` must be .* got \(1, 2, 3\)"),
        ({"group_size": 2.0}, "`group_size` must be an integer"),
        ({"group_size": None}, "`group_size` must be an integer"),
        ({"max_rows": True}, "`max_rows` must be an integer > 0 or None, got True"),
        ({"seed": None}, "`seed` must be an integer"),
        ({"seed": 0.5}, "`seed` must be an integer"),
        ({"add_bos": 1}, "`add_bos` must be True or False, got 1"),
        ({"eos_token_id": 1.0}, "`eos_token_id` must hold token ids"),
        ({"stop_strings": None}, "`stop_strings` must be a list"),
        ({"group_size": 0, "seed": -1}, "`group_size` must .* `seed` must"),
    ],
)
def test_settings_of_another_type_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)


def test_a_tokenizer_by_name_is_refused():
    with pytest.raises(TypeError, match="`tokenizer` must be a tokenizer .* got 'gpt2'"):
        Sampler("gpt2")


def test_the_text_of_an_encoder_decoder_reads_as_two():
    rollout = Sampler(sentence_pieces(begin=""), max_new_tokens=3)(make("t5"), ["a good film"] * 9)
    assert rollout.texts_apart
    for text, response in zip(rollout.texts, rollout.response_texts, strict=True):
        assert text == f"a good film {response}" if response else "a good film"
