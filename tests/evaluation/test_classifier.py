import math
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    FNetConfig,
    FNetForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tests.evaluation.rollouts import make_rollout, without_texts
from trl.evaluation import ClassifierScorer, ScoringError, score
from trl.evaluation.sequence_model import tokenize

WORDS = ["a", "bad", "film", "good", "great", "story", "the", "was", "with"]
TEXTS = ["a good film", "bad", "the story was great with a good film", "the film", ""]


def make_tokenizer(**settings):
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate(specials + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | settings,
    )


def make_model(labels=("NEGATIVE", "POSITIVE"), **settings):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        id2label=dict(enumerate(labels)),
        initializer_range=0.5,
        **settings,
    )
    return BertForSequenceClassification(config)


def with_logits(logits, **settings):
    """A classifier that gives every text the same logits."""
    model = make_model(labels=[f"label_{i}" for i in range(len(logits))], **settings)
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor(logits)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_scores_are_those_of_the_texts_one_by_one():
    model, tokenizer = make_model(), make_tokenizer()
    scores = ClassifierScorer(model, tokenizer, batch_size=2)(TEXTS)
    model.eval()
    for text, found in zip(TEXTS, scores, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits
        torch.testing.assert_close(found, logits[0, 1], rtol=1e-5, atol=1e-6)
    assert scores.std() > 0.01


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_neither_order_nor_batch_size_changes_a_score(batch_size):
    scorer = ClassifierScorer(make_model(), make_tokenizer(), batch_size=batch_size)
    expected = ClassifierScorer(make_model(), make_tokenizer())(TEXTS)
    torch.testing.assert_close(scorer(TEXTS[::-1]).flip(0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "label", "logit", "probability", "log_odds"),
    [
        # softmax over two: p = 3 / (1 + 3); log-odds = ln 3 − 0
        ([0.0, math.log(3)], 1, math.log(3), 0.75, math.log(3)),
        # softmax over three: p = 2 / (1 + 1 + 2) = ½, whose log-odds are 0
        ([0.0, 0.0, math.log(2)], 2, math.log(2), 0.5, 0.0),
        # one output: p = sigmoid(−ln 4) = 1 / (1 + 4)
        ([-math.log(4)], 0, -math.log(4), 0.2, -math.log(4)),
    ],
)
def test_outputs_by_hand(logits, label, logit, probability, log_odds):
    for output, expected in (
        ("logit", logit),
        ("probability", probability),
        ("log_odds", log_odds),
    ):
        scorer = ClassifierScorer(with_logits(logits), make_tokenizer(), label=label, output=output)
        torch.testing.assert_close(scorer(["a film"]), torch.tensor([expected]), atol=1e-6, rtol=0)


def test_multi_label_head_has_independent_logits():
    model = with_logits([5.0, 0.0, 5.0], problem_type="multi_label_classification")
    scorer = ClassifierScorer(model, make_tokenizer(), label=1, output="probability")
    assert scorer(["film"]).item() == pytest.approx(0.5)


def test_log_odds_stay_finite_where_the_probability_is_1():
    scorer = ClassifierScorer(
        with_logits([0.0, 200.0]), make_tokenizer(), label=1, output="log_odds"
    )
    assert scorer(["film"]).item() == pytest.approx(200.0)


def test_regression_head_gives_its_number_and_has_no_probability():
    model = with_logits([1.5], problem_type="regression")
    assert ClassifierScorer(model, make_tokenizer())(["film"]).item() == 1.5
    with pytest.raises(ValueError, match=r'`output` must be "logit" for a regression head'):
        ClassifierScorer(model, make_tokenizer(), output="probability")


@pytest.mark.parametrize("label", ["POSITIVE", "positive", "Positive", 1])
def test_label_by_name_or_index(label):
    assert ClassifierScorer(make_model(), make_tokenizer(), label=label).label == 1


def test_unknown_label_lists_the_labels():
    with pytest.raises(ValueError, match=r"0 = 'NEGATIVE', 1 = 'POSITIVE'.*got 'POSITIV'.*mean"):
        ClassifierScorer(make_model(), make_tokenizer(), label="POSITIV")
    with pytest.raises(ValueError, match=r"`label` must be a label .*got 2"):
        ClassifierScorer(make_model(), make_tokenizer(), label=2)


def test_long_texts_are_cut_to_what_the_model_can_take():
    scorer = ClassifierScorer(make_model(), make_tokenizer())
    assert scorer.max_length == 12  # positions; the tokenizer names no limit
    assert scorer(["good " * 500]).isfinite().all()
    # [CLS] and [SEP] count, so 10 words fit
    torch.testing.assert_close(scorer(["good " * 10]), scorer(["good " * 10 + "bad bad"]))
    assert ClassifierScorer(make_model(), make_tokenizer(model_max_length=8)).max_length == 8
    with pytest.raises(ValueError, match=r"`max_length` must be at most 12.*got 13"):
        ClassifierScorer(make_model(), make_tokenizer(), max_length=13)


def test_a_rollout_is_scored_by_its_texts_whatever_its_tokens():
    scorer = ClassifierScorer(make_model(), make_tokenizer())
    rollout = make_rollout(("a ", "good film"), ("the story ", "was bad"))
    scores = score(scorer, rollout).scores
    assert torch.equal(scores, scorer(["a good film", "the story was bad"]))
    with pytest.raises(ScoringError, match="the rollout must have texts"):
        scorer(without_texts(rollout))


def test_weights_that_are_nan_stop_the_step_and_name_the_texts():
    scorer = ClassifierScorer(with_logits([0.0, math.nan]), make_tokenizer(), label=1)
    with pytest.raises(ScoringError, match=r"^ClassifierScorer must give finite .*0: 'a film'"):
        scorer(make_rollout(("a ", "film")))


def test_the_padding_side_of_the_tokenizer_changes_no_score():
    expected = ClassifierScorer(make_model(), make_tokenizer())(TEXTS)
    scorer = ClassifierScorer(make_model(), make_tokenizer(padding_side="left"))
    torch.testing.assert_close(scorer(TEXTS), expected)


def test_no_texts_give_no_scores():
    scores = ClassifierScorer(make_model(), make_tokenizer())([])
    assert scores.shape == (0,)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a film", r"got 'a film': pass \[text\]"),
        (torch.tensor([[1, 2]]), r"got tensor\(.*decode token ids"),
        (["a film", [1, 2]], r"got \['a film', \[1, 2\]\]"),
        ([None], r"got \[None\]"),
    ],
)
def test_wrong_types_say_what_to_pass(texts, message):
    with pytest.raises(TypeError, match=message):
        ClassifierScorer(make_model(), make_tokenizer())(texts)


def test_scores_can_be_used_in_a_graph_and_dropout_is_off():
    model = make_model(hidden_dropout_prob=0.9).train()
    scorer = ClassifierScorer(model, make_tokenizer())
    scores = scorer(TEXTS)
    assert torch.equal(scores, scorer(TEXTS))
    weight = torch.ones((), requires_grad=True)
    (weight * scores).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("as_type", [str, Path])
def test_loads_model_and_tokenizer_from_a_folder(folder, as_type):
    scores = ClassifierScorer(as_type(folder))(TEXTS)
    expected = ClassifierScorer(make_model(), make_tokenizer())(TEXTS)
    torch.testing.assert_close(scores, expected)


def test_half_precision_weights_compute_in_float32(tmp_path):
    make_model().half().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert ClassifierScorer(tmp_path).model.dtype == torch.float32


def test_a_loaded_model_needs_its_tokenizer():
    with pytest.raises(ValueError, match="`tokenizer` must be given with a loaded model"):
        ClassifierScorer(make_model())


def test_a_model_without_classification_head_is_refused(tmp_path):
    BertModel(make_model().config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not a sequence classifier.*classifier\.weight"):
        ClassifierScorer(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for source in (tmp_path / "none", "./none"):
        with pytest.raises(FileNotFoundError, match=r"none` does not exist: pass a folder"):
            ClassifierScorer(source)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer_config\.json"):
        ClassifierScorer(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    make_model().config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold weights \(model\.safetensors\), found"):
        ClassifierScorer(tmp_path)


def test_a_hub_name_without_network_says_how_to_use_a_folder(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"neither a local folder.*Without network, pass the path"):
        ClassifierScorer("nobody/no-such-classifier")


def test_a_missing_padding_token_is_named():
    with pytest.raises(ValueError, match=r"`tokenizer.pad_token_id` is None"):
        ClassifierScorer(make_model(), make_tokenizer(pad_token=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "logits"}, "`output` must be one of"),
        ({"batch_size": 0}, "`batch_size` must be an integer > 0, got 0"),
        ({"batch_size": 1.5}, "`batch_size` must be an integer > 0, got 1.5"),
        ({"batch_size": None}, "`batch_size` must be an integer > 0, got None"),
        ({"max_length": True}, "`max_length` must be an integer > 0 or None, got True"),
        ({"max_length": 0}, "`max_length` must be an integer > 0 or None, got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassifierScorer(make_model(), make_tokenizer(), **settings)


REAL = Path(__file__).parents[3] / "shared/models/imdb-bert-1.5m"


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared models are not here")
def test_a_real_classifier_tells_praise_from_blame():
    texts = ["A wonderful film, I loved it.", "The worst film ever made, a boring mess."]
    praise, blame = ClassifierScorer(os.fspath(REAL), output="probability")(texts)
    assert praise > 0.7
    assert blame < 0.3


# --- what each family needs ----------------------------------------------------------------------


def test_a_long_rollout_loses_its_beginning_and_keeps_its_response():
    scorer = ClassifierScorer(make_model(), make_tokenizer())
    rollout = make_rollout(("good " * 9, "bad story with a film"))
    kept = ["good " * 5 + "bad story with a film"]  # 10 words and the two special tokens
    torch.testing.assert_close(scorer(rollout).scores, scorer(kept), rtol=0, atol=0)
    assert scorer.tokenizer.truncation_side == "right"
    # Plain texts keep the side of the tokenizer.
    whole = ["good " * 9 + "bad story with a film"]
    torch.testing.assert_close(scorer(whole), scorer(["good " * 9 + "bad"]), rtol=0, atol=0)


LONG = "a bad film good great story the was with"
"""The words with token ids 4 to 12."""


@pytest.mark.parametrize(
    ("text", "settings", "kept"),
    [
        ("a bad film", {}, [2, 4, 5, 6, 3]),
        ("a bad film good great story", {}, [2, 4, 5, 6, 7, 8, 9, 3]),  # 8 tokens: just fits
        ("a bad film good great story the", {}, [2, 4, 6, 7, 8, 9, 10, 3]),
        (LONG, {}, [2, 4, 8, 9, 10, 11, 12, 3]),
        (LONG, {"head_share": 0.5}, [2, 4, 5, 6, 10, 11, 12, 3]),
        (LONG, {"head_share": 0.9}, [2, 4, 5, 6, 7, 8, 9, 3]),
        (LONG, {"head_share": 0.01}, [2, 7, 8, 9, 10, 11, 12, 3]),
        (LONG, {"head_share": 1.0}, [2, 4, 5, 6, 7, 8, 9, 3]),
        (LONG, {"head_share": 0.0}, [2, 7, 8, 9, 10, 11, 12, 3]),
        (LONG, {"head_share": None}, [2, 4, 5, 6, 7, 8, 9, 3]),
        (LONG, {"add_special_tokens": False}, [4, 5, 7, 8, 9, 10, 11, 12]),
        (LONG, {"max_length": None}, [2, *range(4, 13), 3]),
    ],
)
def test_a_long_text_keeps_its_start_and_its_end(text, settings, kept):
    tokenizer = make_tokenizer()
    settings = {"max_length": 8, "head_share": 0.25} | settings
    short = [2, 4, 3] if settings.get("add_special_tokens", True) else [4]
    assert tokenize(tokenizer, [text, "a"], **settings) == [kept, short]
    assert tokenizer.truncation_side == "right"


def test_a_text_that_begins_with_the_bos_gets_no_second():
    scorer = ClassifierScorer(make_model(), make_tokenizer(bos_token="[CLS]"))
    torch.testing.assert_close(scorer(["[CLS] a film"]), scorer(["a film"]), rtol=0, atol=0)


def test_the_positions_of_roberta_begin_behind_the_padding():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(
        **sizes,
        vocab_size=4 + len(WORDS),
        intermediate_size=32,
        max_position_embeddings=12,
        pad_token_id=1,
        label2id={"POSITIVE": 0},
    )
    model = RobertaForSequenceClassification(config)
    scorer = ClassifierScorer(model, make_tokenizer(), label=0)
    assert scorer.max_length == 10
    assert scorer(["good " * 50]).isfinite().all()
    with pytest.raises(ValueError, match="`max_length` must be at most 10"):
        ClassifierScorer(model, make_tokenizer(), label=0, max_length=11)


def test_a_model_that_sees_padding_gets_none():
    torch.manual_seed(0)
    config = FNetConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=32,
        max_position_embeddings=12,
        tpu_short_seq_length=12,
        pad_token_id=0,
        initializer_range=0.5,
    )
    model = FNetForSequenceClassification(config)
    texts = ["a good film", "bad", "the film was good", "a bad film", "good"]
    one_by_one = ClassifierScorer(model, make_tokenizer(), label=1, batch_size=1)(texts)
    widths = []
    scorer = ClassifierScorer(model, make_tokenizer(), label=1)
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: widths.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    torch.testing.assert_close(scorer(texts), one_by_one, rtol=1e-5, atol=1e-6)
    assert sorted(widths) == [(1, 6), (2, 3), (2, 5)]
    hook.remove()


def test_the_mode_of_the_callers_model_stays():
    model = make_model().train()
    ClassifierScorer(model, make_tokenizer())(TEXTS)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": True}, "`label` must be the name of a label or its index, got True"),
        ({"label": None}, "`label` must be the name of a label or its index, got None"),
        ({"label": 1.0}, "`label` must be the name of a label or its index, got 1.0"),
    ],
)
def test_a_label_of_another_type(settings, message):
    with pytest.raises(TypeError, match=message):
        ClassifierScorer(make_model(), make_tokenizer(), **settings)
