"""Tune a language model to write positive film reviews.

python SCRIPT LANGUAGE_MODEL CLASSIFIER PROMPTS STEPS OUT
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer, pipeline

from trl import CausalLMWithValueHead, PPOConfig, PPOTrainer, Sampler
from trl.core import LengthSampler

language_model, classifier, prompts, steps, out = sys.argv[1:]

config = PPOConfig(
    learning_rate=1.41e-4,
    batch_size=16,
    minibatch_size=8,
    ppo_epochs=4,
    adaptive_kl=True,
    init_kl_coef=0.2,
    kl_target=6,
    kl_horizon=10000,
    gamma=1,
    gae_lambda=0.95,
    clip_scores=3.0,
    max_grad_norm=1.0,
    seed=0,
)

tokenizer = AutoTokenizer.from_pretrained(language_model)
tokenizer.pad_token = tokenizer.eos_token


def tokenize(sample):
    sample["input_ids"] = tokenizer.encode(sample["query"])
    return sample


def collator(data):
    return {key: [row[key] for row in data] for key in data[0]}


with open(prompts, encoding="utf-8") as lines:
    dataset = Dataset.from_dict({"query": [line.strip() for line in lines]})
dataset = dataset.map(tokenize)
dataset.set_format(type="torch")

model = CausalLMWithValueHead.from_pretrained(language_model)
ppo_trainer = PPOTrainer(model, config=config)
sentiment = pipeline("text-classification", model=classifier)
sampler = Sampler(tokenizer, max_new_tokens=LengthSampler(4, 16))
loader = torch.utils.data.DataLoader(dataset, 16, shuffle=True, collate_fn=collator)

for step, batch in enumerate(loader):
    if step == int(steps):
        break
    query_tensors = batch["input_ids"]

    # rollout
    with ppo_trainer.sampling():
        rollout = sampler(model, query_tensors)
    batch["response"] = rollout.response_texts

    # evaluation
    texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
    outputs = sentiment(texts, top_k=None, function_to_apply="none", batch_size=16)
    logits = [{entry["label"]: entry["score"] for entry in output} for output in outputs]
    rewards = [torch.tensor(logit["POSITIVE"]) for logit in logits]

    # optimisation
    stats = ppo_trainer.step(rollout, rewards)
    print(f"step {step}: reward {sum(rewards) / len(rewards):.3f}, KL {stats['objective/kl']:.3f}")

model.save_pretrained(out)
tokenizer.save_pretrained(out)
