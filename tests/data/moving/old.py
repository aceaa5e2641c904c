"""Tune a language model to write positive film reviews.

python SCRIPT LANGUAGE_MODEL CLASSIFIER PROMPTS STEPS OUT
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer, pipeline

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from trl.core import LengthSampler

language_model, classifier, prompts, steps, out = sys.argv[1:]

config = PPOConfig(
    model_name=language_model,
    log_with=None,
    learning_rate=1.41e-4,
    batch_size=16,
    mini_batch_size=8,
    ppo_epochs=4,
    adap_kl_ctrl=True,
    init_kl_coef=0.2,
    target=6,
    horizon=10000,
    gamma=1,
    lam=0.95,
    score_clip=3.0,
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

model = AutoModelForCausalLMWithValueHead.from_pretrained(language_model)
ref_model = create_reference_model(model)
ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset, data_collator=collator)
sentiment = pipeline("text-classification", model=classifier)
generation_kwargs = {"length_sampler": LengthSampler(4, 16), "do_sample": True, "top_k": 0}
loader = ppo_trainer.dataloader

for step, batch in enumerate(loader):
    if step == int(steps):
        break
    query_tensors = batch["input_ids"]

    # rollout
    response_tensors = ppo_trainer.generate(query_tensors, return_prompt=False, **generation_kwargs)
    batch["response"] = [tokenizer.decode(response) for response in response_tensors]

    # evaluation
    texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
    outputs = sentiment(texts, top_k=None, function_to_apply="none", batch_size=16)
    logits = [{entry["label"]: entry["score"] for entry in output} for output in outputs]
    rewards = [torch.tensor(logit["POSITIVE"]) for logit in logits]

    # optimisation
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    print(f"step {step}: reward {sum(rewards) / len(rewards):.3f}, KL {stats['objective/kl']:.3f}")

model.save_pretrained(out)
tokenizer.save_pretrained(out)
