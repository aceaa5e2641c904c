"""What ships: two models that load in silence, prompts, and the cards that say what they are."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import starter
from trl.evaluation import ClassifierScorer


def test_prompts_to_train_on_and_to_measure_on_are_different():
    train, held_out = starter.prompts("train"), starter.prompts("held-out")
    assert len(train) >= 1000
    assert len(held_out) >= 256
    assert len(set(train) | set(held_out)) == len(train) + len(held_out)
    assert all(text.strip() for text in train + held_out)
    assert starter.prompts() == train


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match='`split` must be "train" or "held-out", got \'test\''):
        starter.prompts("test")


def test_missing_prompts_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(starter, "_HERE", tmp_path)
    with pytest.raises(FileNotFoundError, match="install trl again"):
        starter.prompts("train")


def test_the_language_model_continues_a_review():
    model = AutoModelForCausalLM.from_pretrained(starter.LANGUAGE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
    text = "This is one of the best movies I have ever seen."
    ids = tokenizer.encode(text, return_tensors="pt")
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert loss < 5.0  # nats per token; ln 8192 = 9.0 for a model that knows nothing


def test_the_classifier_tells_praise_from_blame():
    scorer = ClassifierScorer(starter.CLASSIFIER, label="POSITIVE", output="probability")
    praise, blame = scorer(["I loved this wonderful film.", "The worst film ever, a boring mess."])
    assert praise > 0.8
    assert blame < 0.2


@pytest.mark.parametrize("folder", [starter.LANGUAGE_MODEL, starter.CLASSIFIER])
def test_each_model_has_a_card(folder):
    card = (folder / "README.md").read_text()
    for heading in ("## Data", "## Training", "## Figures", "limits"):
        assert heading in card
    assert "@" not in card  # a figure that was never filled in
