"""A loop of your own: `Episodes` makes of a sampler one of conversations, and all else is as ever.

    python examples/environments/own_loop.py

A tiny model, with random weights at first, learns to say a word when it is told to, and again after
it was spoken to. The environment rewards the first turn; a scorer checks the last one.
"""

import argparse

from tiny import tiny

from trl import CausalLMWithValueHead, PPOTrainer, Sampler, WeightedSum
from trl.environments import EnvironmentReward, Episodes, Turn
from trl.evaluation import RegexScorer

WORDS = ["red", "green", "blue"]


class Echo:
    """Asks for a word twice."""

    def reset(self, word):
        """Begin: `word` is a column of the data."""
        self.word = word
        return f" {word} :"

    def step(self, text: str) -> Turn:
        """Reward a turn that says the word, and ask for it again."""
        return Turn("again :", reward=float(text.strip() == self.word))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps

    model, tokenizer = tiny("say again : red green blue")
    policy = CausalLMWithValueHead.from_pretrained(model)
    episodes = Episodes(Sampler(tokenizer, max_new_tokens=1), Echo, max_turns=2)
    reward = WeightedSum([(EnvironmentReward(), 0.5), (RegexScorer(r"\w+$", key="word"), 1.0)])
    trainer = PPOTrainer(
        policy,
        "none",  # random weights are nothing to stay close to
        batch_size=48,
        minibatch_size=12,
        ppo_epochs=2,
        learning_rate=3e-3,
        init_kl_coef=0,
        adaptive_kl=False,
    )

    rows = [{"prompt": "say", "word": word} for word in WORDS] * 16
    rewards = []
    for step in range(steps):
        with trainer.sampling():
            rollout = episodes(policy, rows)
        scored = reward(rollout)
        trainer.step(rollout, scored.scores)
        rewards.append(scored.totals.mean().item())
        print(f"step {step + 1}: reward {rewards[-1]:.2f}")

    for turn in rollout.episodes[0]["messages"]:  # what was said, turn by turn
        print(f"    {turn['role']}: {turn['content']}")
    # What the policy wrote is trained; "again :" in between is a hole.
    assert rollout.response_mask[0].tolist() == [True, False, False, True]
    assert rewards[-1] > rewards[0], rewards


if __name__ == "__main__":
    main()
