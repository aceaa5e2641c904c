"""A low-rank adapter in place of all weights; the reference is the same model without it.

    pip install -c constraints.txt '.[peft]'
    python examples/lora.py

One model in memory, and what is saved is the adapter: PEFT loads it on top of the base model.
"""

import argparse
import tempfile

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoTokenizer

from trl import CausalLMWithValueHead, ClassifierScorer, PPOConfig, PPOTrainer, Sampler, starter


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps

    torch.manual_seed(0)  # a new adapter is random
    adapter = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=True,  # GPT-2 keeps its matrices that way; leave it out for others
    )
    model = CausalLMWithValueHead.from_pretrained(starter.LANGUAGE_MODEL, peft_config=adapter)
    tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
    sampler = Sampler(tokenizer, max_new_tokens=12, add_bos=True)
    scorer = ClassifierScorer(starter.CLASSIFIER, label="POSITIVE")
    config = PPOConfig(
        batch_size=64, learning_rate=2e-3, init_kl_coef=0.05, adaptive_kl=False, ppo_epochs=2
    )
    trainer = PPOTrainer(model, config=config)
    trained, every = model.num_parameters(only_trainable=True), model.num_parameters()
    print(f"{trained:,} of {every:,} weights are trained; reference: {trainer.reference.kind}")

    def base():
        frozen = (w for name, w in model.named_parameters() if not w.requires_grad)
        return torch.cat([weight.detach().flatten() for weight in frozen]).clone()

    base_before, rewards = base(), []
    prompts = starter.prompts("train")
    for step in range(steps):
        with trainer.sampling():
            rollout = sampler(model, prompts[64 * step : 64 * (step + 1)])
        scores = scorer(rollout).scores
        stats = trainer.step(rollout, scores)
        rewards.append(scores.mean().item())
        print(f"step {step + 1}: reward {rewards[-1]:+.2f}, KL {stats['objective/kl']:.1f} nats")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = AutoPeftModelForCausalLM.from_pretrained(folder)  # PEFT alone, no trl
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        ours, theirs = model.eval()(tokens).logits, again.eval()(tokens).logits
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-3, atol=1e-5)
    assert torch.equal(base(), base_before)
    assert max(rewards[-3:]) > rewards[0] + 0.1, rewards


if __name__ == "__main__":
    main()
