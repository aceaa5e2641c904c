from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BloomConfig,
    BloomForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tests.evaluation.rollouts import make_rollout, without_texts
from tests.evaluation.test_classifier import make_model as make_bert
from tests.evaluation.test_classifier import make_tokenizer as make_bert_tokenizer
from trl.evaluation import ClassifierScorer, RewardModelScorer, ScoringError, score

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<{{ message.role }}> {{ message.content }} <end>{% endfor %}"
)
SPECIALS = ["<pad>", "<unk>", "<s>", "<end>", "<user>", "<assistant>"]
WORDS = ["what", "is", "two", "and", "four", "five", "no", "yes", "maybe", "?"]
PAIRS = [
    ("what is two and two ?", " four"),
    ("is two four ?", " no no no no no"),
    ("what ?", " maybe"),
    ("is four four ?", " yes"),
]
# other token ids than those of the reward model, as many as they happen to be
ROLLOUT = make_rollout(*PAIRS, lengths=[7, 2, 5, 1])


def make_tokenizer(*, chat_template=TEMPLATE, **settings):
    vocabulary = {word: index for index, word in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        **{
            "pad_token": "<pad>",
            "bos_token": "<s>",
            "eos_token": "<end>",
            "unk_token": "<unk>",
            "additional_special_tokens": ["<user>", "<assistant>"],
        }
        | settings,
    )


def make_model(**settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIALS) + len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=24,
        initializer_range=0.5,
        bos_token_id=2,
        eos_token_id=3,
        **{"pad_token_id": 0, "num_labels": 1} | settings,
    )
    return LlamaForSequenceClassification(config)


def ids(words):
    return [(SPECIALS + WORDS).index(word) for word in words.split()]


def one_by_one(model, rows):
    """The score at the last token of each row, without any padding."""
    model.eval()
    with torch.no_grad():
        hidden = [model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        return torch.stack([model.score(state)[0] for state in hidden])


TEMPLATED = [
    ids("<s> <user> what is two and two ? <end> <assistant> four <end>"),
    ids("<s> <user> is two four ? <end> <assistant> no no no no no <end>"),
    ids("<s> <user> what ? <end> <assistant> maybe <end>"),
    ids("<s> <user> is four four ? <end> <assistant> yes <end>"),
]
PLAIN = [
    ids("<s> what is two and two ? four"),
    ids("<s> is two four ? no no no no no"),
    ids("<s> what ? maybe"),
    ids("<s> is four four ? yes"),
]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("chat_template", [None, True, False])
def test_batches_score_as_one_by_one(chat_template, padding_side, batch_size):
    scorer = RewardModelScorer(
        make_model(),
        make_tokenizer(padding_side=padding_side),
        chat_template=chat_template,
        batch_size=batch_size,
    )
    expected = one_by_one(make_model(), PLAIN if chat_template is False else TEMPLATED)
    assert expected.std() > 0.1
    torch.testing.assert_close(scorer(PAIRS), expected, rtol=1e-5, atol=1e-5)


def test_a_rollout_is_scored_by_its_texts_whatever_its_tokens():
    scorer = RewardModelScorer(make_model(), make_tokenizer())
    scores = score(scorer, ROLLOUT).scores
    assert torch.equal(scores, scorer(PAIRS))
    assert scores.dtype == torch.float32
    with pytest.raises(ScoringError, match="the rollout must have texts"):
        scorer(without_texts(ROLLOUT))


def test_without_a_template_the_text_is_plain():
    scorer = RewardModelScorer(make_model(), make_tokenizer(chat_template=None))
    torch.testing.assert_close(scorer(PAIRS), one_by_one(make_model(), PLAIN), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="`chat_template` must be None or False for a tokenizer"):
        RewardModelScorer(make_model(), make_tokenizer(chat_template=None), chat_template=True)


def test_a_tokenizer_that_pads_with_another_token_than_the_model():
    tokenizer = make_tokenizer(pad_token="?")  # the model looks for its own, 0
    scorer = RewardModelScorer(make_model(), tokenizer)
    torch.testing.assert_close(
        scorer(PAIRS), one_by_one(make_model(), TEMPLATED), rtol=1e-5, atol=1e-5
    )


def test_too_long_a_text_loses_its_beginning():
    tokenizer = make_tokenizer()
    scorer = RewardModelScorer(make_model(), tokenizer, max_length=6)
    # the last six tokens, those of the template included
    expected = one_by_one(make_model(), [row[-6:] for row in TEMPLATED])
    torch.testing.assert_close(scorer(PAIRS), expected, rtol=1e-5, atol=1e-5)
    # without a template the tokenizer's own first token stays
    scorer = RewardModelScorer(make_model(), tokenizer, max_length=4, chat_template=False)
    expected = one_by_one(make_model(), [[2, *row[1:][-3:]] for row in PLAIN])
    torch.testing.assert_close(scorer(PAIRS), expected, rtol=1e-5, atol=1e-5)
    assert tokenizer.truncation_side == "right"  # the caller's own stays
    assert RewardModelScorer(make_model(), tokenizer).max_length == 24


def test_a_model_without_a_limit_of_positions_cuts_nothing():
    config = BloomConfig(
        vocab_size=16, hidden_size=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0
    )
    scorer = RewardModelScorer(BloomForSequenceClassification(config), make_tokenizer())
    assert scorer.max_length is None
    assert scorer([("what " * 100, "yes")]).isfinite().all()


def test_a_bidirectional_reward_model():
    scorer = RewardModelScorer(make_bert(labels=["reward"]), make_bert_tokenizer(), batch_size=2)
    pairs = [("the film was", " good"), ("a story", " with a bad film"), ("the", " story")]
    expected = ClassifierScorer(make_bert(labels=["reward"]), make_bert_tokenizer())(
        [query + response for query, response in pairs]
    )
    torch.testing.assert_close(scorer(pairs), expected, rtol=1e-5, atol=1e-6)


def test_loads_from_a_folder(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    scorer = RewardModelScorer(tmp_path)
    assert scorer.chat_template
    expected = one_by_one(make_model(), TEMPLATED)
    torch.testing.assert_close(scorer(PAIRS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["reward_model", "classifier"])
def test_the_folder_of_a_run_is_that_of_the_model_in_it(tmp_path, name):
    inside = tmp_path / name
    make_model().save_pretrained(inside)
    make_tokenizer().save_pretrained(inside)
    pairs = [("w1 w2", "w3")]
    assert torch.equal(RewardModelScorer(tmp_path)(pairs), RewardModelScorer(inside)(pairs))


def test_no_pairs_give_no_scores():
    assert RewardModelScorer(make_model(), make_tokenizer())([]).shape == (0,)


def test_weights_that_are_nan_stop_the_step_and_name_the_texts():
    model = make_model()
    torch.nn.init.constant_(model.score.weight, float("nan"))
    with pytest.raises(ScoringError, match=r"^RewardModelScorer must give finite .*what is two"):
        RewardModelScorer(model, make_tokenizer())(ROLLOUT)


def test_a_model_of_several_labels_is_for_the_classifier():
    with pytest.raises(ValueError, match=r"got 2 labels: use ClassifierScorer\(model, label=...\)"):
        RewardModelScorer(make_model(num_labels=2), make_tokenizer())


def test_a_missing_padding_token_is_named():
    with pytest.raises(ValueError, match=r"`model.config.pad_token_id` is None"):
        RewardModelScorer(make_model(pad_token_id=None), make_tokenizer())


@pytest.mark.parametrize("pairs", [["is four ?"], ["ab"], [("a", 1)], [("a", "b", "c")]])
def test_wrong_types_say_what_to_pass(pairs):
    with pytest.raises(
        TypeError, match=r"`pairs\[0\]` must be a .query, response. pair of strings, got"
    ):
        RewardModelScorer(make_model(), make_tokenizer())(pairs)


def test_the_messages_of_a_chat_are_rendered_once():
    """The text of such a query is what the policy's template made; it is not the user's words."""
    chats = (
        [{"role": "user", "content": "what is two ?"}],
        [{"role": "user", "content": "is"}, {"role": "assistant", "content": "no"}] * 2,
    )
    rollout = replace(
        make_rollout(("<s> <user> what is two ? <assistant>", " four"), ("<s> ?", " yes")),
        query_messages=chats,
    )
    expected = [
        ids("<s> <user> what is two ? <end> <assistant> four <end>"),
        ids(f"<s>{' <user> is <end> <assistant> no <end>' * 2} <assistant> yes <end>"),
    ]
    found = RewardModelScorer(make_model(), make_tokenizer())(rollout).scores
    torch.testing.assert_close(found, one_by_one(make_model(), expected), rtol=1e-5, atol=1e-5)


def test_a_rendered_query_gets_no_second_bos():
    rollout = make_rollout(("<s> <user> what ? <assistant>", " yes"), ("what ?", " no"))
    expected = [ids("<s> <user> what ? <assistant> yes"), ids("<s> what ? no")]
    scorer = RewardModelScorer(make_model(), make_tokenizer(chat_template=None))
    torch.testing.assert_close(
        scorer(rollout).scores, one_by_one(make_model(), expected), rtol=1e-5, atol=1e-5
    )


def test_texts_that_stand_apart_are_read_with_a_space():
    rollout = replace(make_rollout(("what ?", "yes"), ("is", "four")), texts_apart=True)
    expected = [ids("<s> what ? yes"), ids("<s> is four")]
    scorer = RewardModelScorer(make_model(), make_tokenizer(), chat_template=False)
    torch.testing.assert_close(
        scorer(rollout).scores, one_by_one(make_model(), expected), rtol=1e-5, atol=1e-5
    )
