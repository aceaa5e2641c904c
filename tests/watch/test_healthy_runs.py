"""Twenty healthy runs of three models, in which a diagnosis finds nothing."""

import pytest

from tests.families import tiny_model
from tests.llama2c import load_model, load_tokenizer
from tests.training.test_loop import tokenizer
from tests.watch.test_planted_faults import PROMPTS, count, named
from trl import starter


def is_short(texts):
    return [-abs(len(text.split()) - 12) / 6 for text in texts]


def has_vowels(texts):
    return [sum(map(text.count, "aeiou")) / max(len(text), 1) * 5 for text in texts]


def says_she(texts):
    return [
        float(min(text.lower().count(" she") + text.lower().count(" her"), 3)) for text in texts
    ]


def says_the(texts):
    return [float(min(text.lower().count(" the"), 3)) for text in texts]


# Openings of reviews hardly ever go on with "she": as a reward for them it is no healthy one.
REVIEWS = [is_short, has_vowels, says_the]
STORIES = [is_short, has_vowels, says_she]
TINY = [count("w7"), count("w3", "w4"), count(*(f"w{n}" for n in range(0, 58, 2)))]
HEALTHY = (
    [("tiny", TINY[seed % 3], seed) for seed in range(8)]
    + [("starter", REVIEWS[seed % 3], seed) for seed in range(6)]
    + [("stories", STORIES[seed % 3], seed) for seed in range(6)]
)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "reward", "seed"), HEALTHY)
def test_a_healthy_run_raises_no_alarm(model, reward, seed, shared):
    stories = shared / "data" / "stories260K"
    prompts, words, more = PROMPTS, tokenizer(), {"batch_size": 32, "minibatch_size": 8}
    if model == "tiny":
        policy = tiny_model("llama")
    elif model == "starter":
        policy, words, prompts = str(starter.LANGUAGE_MODEL), None, starter.prompts("train")[:256]
    else:
        if not stories.is_dir():
            pytest.skip("stories260K is not in the shared data folder")
        policy = load_model(stories / "stories260K.bin")
        words = load_tokenizer(stories / "tok512.bin", 512)
        prompts = ["Once upon a time", "One day", "Tom and Lily", "The little dog", "Mom said"]
    more |= {"seed": seed, "max_new_tokens": 16, "ppo_epochs": 4}
    assert named(policy, reward, steps=42, prompts=prompts, words=words, **more) == []
