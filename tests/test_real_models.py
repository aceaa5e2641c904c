"""Real pretrained models, where examples/real_models/get.py has put them: they write and learn."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl import CausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.evaluation import ClassifierScorer
from trl.models.with_value_head import load_policy
from trl.rollout import Sampler

pytestmark = pytest.mark.real

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def answer_of(policy, tokenizer):
    """What the policy finds most likely to say: the same on any machine, unlike a sample."""
    asked = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt")
    tokens = asked["input_ids"]
    written = policy.generate(tokens, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)


def test_a_chat_model_answers_learns_and_stays_readable(real_model):
    folder = real_model("smollm2")
    policy, tokenizer = (
        load_policy(folder, unfrozen_layers=2),
        AutoTokenizer.from_pretrained(folder),
    )
    assert isinstance(policy, CausalLMWithValueHead)
    assert "Paris" in answer_of(policy, tokenizer)
    config = PPOConfig.that_learns(batch_size=2, minibatch_size=2, ppo_epochs=2)
    trainer = PPOTrainer(policy, config=config)
    with trainer.sampling():
        rollout = Sampler(tokenizer, max_new_tokens=8, group_size=2)(policy, [CHAT])
    assert len(rollout.response_texts) == 2
    stats = trainer.step(rollout, torch.tensor([0.0, 1.0]))
    assert 0 < stats["ppo/policy/approxkl"] < 0.2
    assert stats["ppo/skipped_updates"] == 0
    answer = answer_of(policy, tokenizer)
    assert len(answer.split()) >= 2, answer
    assert all(letter.isalnum() or letter in " .,:;'!?-\n" for letter in answer), answer


def test_a_sentence_encoder_takes_a_head_of_two_labels(real_model):
    folder = real_model("minilm")
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, id2label={0: "NEGATIVE", 1: "POSITIVE"}
    )
    scores = ClassifierScorer(model, folder)(["A joy to see.", "A waste of time."])
    assert scores.shape == (2,)
    assert scores.isfinite().all()
    assert scores[0] != scores[1]
