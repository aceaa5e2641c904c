"""RLOO: no value head is trained; responses to one prompt are compared with each other.

    python examples/rloo.py

What changes against PPO is one word of the settings, and `group_size` of the sampler. A prompt is
computed once for its group, while sampling and in training.
"""

import argparse

import torch
from transformers import AutoTokenizer

from trl import CausalLMWithValueHead, ClassifierScorer, PPOConfig, PPOTrainer, Sampler, starter

PROMPTS, GROUP = 16, 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps

    model = CausalLMWithValueHead.from_pretrained(starter.LANGUAGE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
    sampler = Sampler(tokenizer, max_new_tokens=12, add_bos=True, group_size=GROUP)
    scorer = ClassifierScorer(starter.CLASSIFIER, label="POSITIVE")
    config = PPOConfig(
        algorithm="rloo",
        batch_size=PROMPTS * GROUP,
        minibatch_size=PROMPTS * GROUP,
        ppo_epochs=1,  # with one update for each batch this is the gradient of the paper
        learning_rate=3e-4,
        init_kl_coef=0.05,
        adaptive_kl=False,
    )
    trainer = PPOTrainer(model, config=config)
    value_head = [weight.detach().clone() for weight in model.v_head.parameters()]

    rewards = []
    prompts = starter.prompts("train")
    for step in range(steps):
        with trainer.sampling():
            rollout = sampler(model, prompts[PROMPTS * step : PROMPTS * (step + 1)])
        scores = scorer(rollout).scores
        stats = trainer.step(rollout, scores)
        rewards.append(scores.mean().item())
        best = scores.view(PROMPTS, GROUP).argmax(1)[0].item()  # groups stand side by side
        print(f"step {step + 1}: reward {rewards[-1]:+.2f}, KL {stats['objective/kl']:.1f} nats")
        print(f"    best of a group: {rollout.texts[best]!r}")

    assert rollout.group_ids.tolist() == [row // GROUP for row in range(PROMPTS * GROUP)]
    assert not any(name.startswith("ppo/val") for name in stats)  # figures of a critic
    for weight, before in zip(model.v_head.parameters(), value_head, strict=True):
        assert torch.equal(weight, before)
    assert max(rewards[-3:]) > rewards[0] + 0.1, rewards


if __name__ == "__main__":
    main()
