"""Train a reward model on what people preferred.

    trl reward preferences.jsonl --model NAME
    trl train reward-arguments               (a recipe with `task: reward`)

Which rows there are is in `trl.data.preferences`, the loss in `trl.optimization.preferences`. How
it is fitted, shown and gone on with, and what the folder of the run holds, is in `supervised`. The
model is in its folder reward_model/, which `RewardModelScorer` and plain transformers load, and
report.md says how far to trust it.

In the end the rewards are given mean 0 and standard deviation 1 on reference texts (Ziegler et al.,
arXiv:1909.08593, section 2.2): the gain goes into the weights of the head, the offset into its
bias. A head without one leaves the offset to config.json, where `RewardModelScorer` finds it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trl.config.errors import refuse
from trl.config.recipe import RewardRecipe
from trl.data.preferences import Preference, Said, as_read, read_preferences
from trl.data.sources import checked_texts, read_table
from trl.evaluation.reward_model import OFFSET, RewardModelScorer
from trl.evaluation.sequence_model import token_limit
from trl.models.adapters import add_adapter
from trl.optimization.preferences import centring_loss, choice_loss, tie_strength
from trl.training.checkpoints import remove
from trl.training.classifier import model_and_tokenizer
from trl.training.fingerprints import checksum, of_model, of_tokenizer
from trl.training.folder import RunFolder
from trl.training.parts import peft_config, seeded
from trl.training.reward_report import measure, write_report
from trl.training.supervised import Example, Examples, Fit, open_folder

__all__ = ["train_reward"]

FEW_PROMPTS = 10
"""With fewer prompts than this, rows are held out in their place."""

SHARING = 200
"""Updates whose preferences are put beside others with a text in common, which is read once then,
as those of all answers to a prompt are in Ouyang et al. (arXiv:2203.02155, section 3.5)."""

NO_ATTENTION_DROPOUT = dict.fromkeys(
    ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"), 0.0
)
"""As BERT, Llama and GPT-2 call it. Its random numbers, B·heads·T² a layer, took half of an update
on a CPU."""


def train_reward(recipe: RewardRecipe, *, resume: bool = False) -> dict[str, Any]:
    """Train a reward model as the recipe says, measure it, and write the folder of the run.

    Args:
        recipe: The settings.
        resume: Go on with the run in `out`, from its last checkpoint if there is one.

    Returns:
        What stands in summary.json: what `measure` tells of the preferences held out, `mean` and
        `std` of the rewards on the reference texts before they were given 0 and 1, the strength of
        ties `nu`, and the sizes and seconds of the run. With `curve`, for each number of
        preferences `curve` has what was measured after a fit on so many.

    Raises:
        OSError: if a file or a model is not there, or `out` cannot be written or holds a run.
        ImportError: if the file or the adapter needs a package that is not installed.
        TypeError, ValueError: if preferences, model and recipe do not fit together.
        ArithmeticError: if the loss is not finite, or all rewards are the same.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    with open_folder(recipe, resume=resume) as folder:
        train, test, problems = _train_and_test(recipe)
        curve = [_point(recipe, folder, count, train, test) for count in sorted(recipe.curve)]
        return _train(recipe, folder, train, test, {"curve": curve, "problems": problems})


def _point(
    recipe: RewardRecipe,
    folder: RunFolder,
    count: int,
    train: list[Preference],
    test: list[Preference],
) -> dict[str, Any]:
    """Return what a fit on the first so many preferences gives, in a folder of its own."""
    out = folder.path / f"curve-{count}"
    if count > len(train):
        rule = f"have no number above that of the preferences to train on ({len(train)})"
        refuse("curve", rule, str(count), "leave it out")
    if (out / "summary.json").is_file():
        told = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    else:
        part = replace(recipe, out=str(out), curve=())
        with open_folder(part, resume=True) as inner:
            told = _train(part, inner, train[:count], test, {}, again=folder.path)
    remove(out / RewardFit.kind)
    return {"preferences": count, "accuracy": told["accuracy"], "interval": told["interval"]}


def _train(
    recipe: RewardRecipe,
    folder: RunFolder,
    train: list[Preference],
    test: list[Preference],
    more: dict[str, Any],
    again: Path | None = None,
) -> dict[str, Any]:
    """Train in a folder that is this run's; `again` is what --resume is to name."""
    with seeded(recipe.seed):
        model: Any
        # A classifier's problem would be refused with one label when the model is loaded again.
        head = {"num_labels": 1, "problem_type": None} | NO_ATTENTION_DROPOUT
        model, tokenizer = model_and_tokenizer(recipe, head)
        limit = token_limit(model, tokenizer, recipe.max_length)
        model.config.text_cut = {"max_length": limit, "head_share": 0.0}
        setattr(model.config, OFFSET, 0.0)
        scorer = RewardModelScorer(model, tokenizer, batch_size=recipe.batch_size)
        reference = _reference(recipe, scorer, train)
        made_of = {
            "model (its weights or its config.json)": of_model(model, model.named_parameters()),
            "tokenizer": of_tokenizer(tokenizer),
            "preference in `train` or `test`": checksum([*map(asdict, train), *map(asdict, test)]),
        }
        if recipe.lora is not None:
            config = peft_config(recipe.lora)
            config.task_type = "SEQ_CLS"
            config.modules_to_save = [_head(model)[0].partition(".")[0]]  # with what is before it
            model = add_adapter(model, config)
        rows = [_with_ties(each, recipe.ties) for each in train]
        rows = [each for each in rows if sum(each.votes)]

        def encode(rows: list[Preference], _: Any = None) -> list[Example]:
            return _examples(rows, scorer)

        examples = Examples(rows, encode, recipe, SHARING)
        fit = RewardFit(recipe, folder, model, tokenizer, examples, made_of)
        fit.scorer, fit.reference, fit.again = scorer, reference, again or folder.path
        sizes = {"train_preferences": len(rows), "test_preferences": len(test)}
        figures = fit({"": lambda: _examples(test, scorer)}, more | sizes)
        if fit.main:
            write_report(folder.path, recipe, figures)
        return figures


class RewardFit(Fit):
    """A reward model in training."""

    kind, rows_called = "reward_model", "preferences"
    recipe: RewardRecipe
    scorer: RewardModelScorer
    """Of the model in training, or of that below its adapter."""
    reference: list[list[int]]
    """Token ids of texts whose rewards are to have mean 0 and standard deviation 1."""

    def __init__(self, recipe: RewardRecipe, *others: Any) -> None:
        super().__init__(recipe, *others)
        votes, present = _padded(self.examples.rows)
        self.nu = tie_strength(votes, present)
        self.weight = votes.sum().item() / len(votes)
        """Mean number of votes of a row, by which all are divided."""

    def collate(self, examples: list[Example]) -> Any:
        """Return token ids, places of the responses in them, [B, K + 1] votes and [B] margins."""
        texts, places = _once(examples)
        votes, present = _padded([example["preference"] for example in examples])
        margins = torch.tensor([example["preference"].margin for example in examples])
        numbers = {"votes": votes, "present": present, "margins": margins, "places": places}
        return self.pad([{"input_ids": ids} for ids in texts]) | numbers

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        """Return the mean loss of a batch for a vote, and its rewards [B, K] if asked for."""
        names = ("votes", "present", "margins", "places")
        texts = {name: tensor for name, tensor in inputs.items() if name not in names}
        votes, present, margins, places = (inputs[name] for name in names)
        logits = model(**texts).logits[:, 0].float()[places]
        rewards = torch.zeros_like(votes[:, :-1]).masked_scatter(present, logits)
        margins = self.recipe.margin_scale * margins
        loss = choice_loss(rewards, votes, present, margins, nu=self.nu).mean() / self.weight
        if self.recipe.centring_coef:
            loss = loss + self.recipe.centring_coef * centring_loss(rewards, present).mean()
        if model.training and (chosen := votes[:, :-1]).any():
            best = rewards.masked_fill(~present, -torch.inf).argmax(1, keepdim=True)
            self.accuracies.append(chosen.gather(1, best).sum() / chosen.sum())
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def measure(self, test: list[Example]) -> dict[str, Any]:
        """Give the rewards their scale, and return how the model does on test preferences."""
        if self.recipe.lora is not None:
            adapted: Any = self.model
            self.model = adapted.merge_and_unload()
        # Taken apart and put together again, since texts of like length share a pass.
        texts, places = _once(test)
        rewards = self.scorer.scores_of(texts)[places]
        sizes = [len(each["sizes"]) for each in test]
        scale = _normalize(self.scorer, self.reference)
        preferences = [each["preference"] for each in test]
        groups = [each.tolist() for each in rewards.split(sizes)]
        return measure(preferences, groups) | scale | {"nu": self.nu}


# What is learnt from


def _examples(preferences: Sequence[Preference], scorer: RewardModelScorer) -> list[Example]:
    """Return an example of each preference: the token ids of all responses, one after the other."""
    said = [(each.prompt, response) for each in preferences for response in each.responses]
    token_ids = iter(_token_ids(said, scorer))
    examples = []
    for preference in preferences:
        texts = [next(token_ids) for _ in preference.responses]
        flat = [token for ids in texts for token in ids]
        sizes = [len(ids) for ids in texts]
        longest = max((len(ids), ids) for ids in texts)
        examples.append(
            {"input_ids": flat, "sizes": sizes, "longest": longest, "preference": preference}
        )
    return examples


def _token_ids(said: Sequence[tuple[Said, Said]], scorer: RewardModelScorer) -> list[list[int]]:
    """Return what the model reads of prompts and responses."""
    read = [as_read(*each) for each in said]
    return scorer.token_ids([pair for _, pair in read], [chat for chat, _ in read])


def _apart(example: Example) -> list[list[int]]:
    """Return the token ids of each response of an example."""
    flat = iter(example["input_ids"])
    return [[next(flat) for _ in range(size)] for size in example["sizes"]]


def _once(examples: Sequence[Example]) -> tuple[list[list[int]], Tensor]:
    """Return the token ids of all responses, those of one text once, and where each stands.

    Who compares many texts with each other has each of them in many pairs.
    """
    found = dict[tuple[int, ...], int]()
    texts = (tuple(ids) for example in examples for ids in _apart(example))
    places = [found.setdefault(ids, len(found)) for ids in texts]
    return list(map(list, found)), torch.tensor(places)


def _padded(preferences: Sequence[Preference]) -> tuple[Tensor, Tensor]:
    """Return votes [B, K + 1], and where there is a response [B, K]."""
    most = max(len(each.responses) for each in preferences)
    gaps = [[0.0] * (most - len(each.responses)) for each in preferences]
    votes = [[*p.votes[:-1], *gap, p.votes[-1]] for p, gap in zip(preferences, gaps, strict=True)]
    present = [[k < len(each.responses) for k in range(most)] for each in preferences]
    return torch.tensor(votes), torch.tensor(present)


def _with_ties(preference: Preference, ties: str) -> Preference:
    """Return a preference with its votes for no response counted as the recipe says."""
    *choices, tied = preference.votes
    if ties == "davidson" or not tied:
        return preference
    share = tied / len(choices) if ties == "half" else 0.0
    return replace(preference, votes=(*(votes + share for votes in choices), 0.0))


def _train_and_test(
    recipe: RewardRecipe,
) -> tuple[list[Preference], list[Preference], list[str]]:
    """Return what to train on, in random order, what to measure on, and what cannot be read."""
    train, problems = read_preferences(recipe.train, subset=recipe.subset)
    rng = random.Random(recipe.seed)
    if recipe.test is not None:
        test, more = read_preferences(recipe.test, subset=recipe.subset, name="test")
        problems += more
        known = {each.key for each in test}
        train = [each for each in train if each.key not in known]
    else:
        prompts = [json.dumps(each.prompt) for each in train]
        if len(set(prompts)) < FEW_PROMPTS:
            prompts = [each.key for each in train]
        groups = sorted(set(prompts))
        held = set(rng.sample(groups, min(len(groups), round(recipe.held_out * len(groups)) or 1)))
        test = [each for each, prompt in zip(train, prompts, strict=True) if prompt in held]
        train = [each for each, prompt in zip(train, prompts, strict=True) if prompt not in held]
    for part, rows in (("train", train), ("measure", test)):
        ties = part == "train" and recipe.ties != "ignore"
        if not any(sum(each.votes if ties else each.votes[:-1]) for each in rows):
            own = part == "measure" and recipe.test is not None
            name, source = ("test", recipe.test) if own else ("train", recipe.train)
            rule = "have preferences for a response, some to train and others to measure on"
            refuse(name, rule, f"none to {part} on in {source!r}", "add more")
    rng.shuffle(train)
    return train[: recipe.limit], test, problems


# The scale of the rewards


def _reference(
    recipe: RewardRecipe, scorer: RewardModelScorer, train: list[Preference]
) -> list[list[int]]:
    """Return the token ids of the texts whose rewards set the scale."""
    if recipe.reference is None:
        said = [(each.prompt, response) for each in train for response in each.responses]
    else:
        table = read_table(recipe.reference, name="reference")
        columns = ("prompt", "response") if "response" in table.names else ("text",)
        missing = [column for column in columns if column not in table.names]
        if missing:
            rule = "have columns prompt and response, or text"
            refuse("reference", rule, f"{recipe.reference!r} with {table.names}")
        texts = [checked_texts(table, column, "reference") for column in columns]
        said = [("".join(row[:-1]), row[-1]) for row in zip(*texts, strict=True)]
    unique = {tuple(ids): ids for ids in _token_ids(said, scorer)}
    return list(unique.values())


def _normalize(scorer: RewardModelScorer, token_ids: list[list[int]]) -> dict[str, float]:
    """Give the rewards of some texts mean 0 and standard deviation 1.

        r ← (r − mean) / std

    Returns:
        `mean` and `std` as they were.
    """
    before = scorer.scores_of(token_ids).double()
    mean, std = before.mean().item(), before.std(correction=0).item()
    if not std > 0:
        raise ArithmeticError(
            f"All {len(token_ids)} reference texts have the reward {mean:.3g}, which cannot be "
            "given a standard deviation of 1: name other texts in `reference`, or train longer."
        )
    model: Any = scorer.model
    _, head = _head(model)
    with torch.no_grad():
        head.weight.div_(std)
        if head.bias is not None:
            head.bias.sub_(mean).div_(std)
        else:
            setattr(model.config, OFFSET, -mean / std)
    return {"mean": mean, "std": std}


def _head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return name and module of the layer whose one output is the reward: the last of its kind."""
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 1
    ]
    if not layers:
        rule = "have a linear layer with one output at its end"
        refuse("model", rule, type(model).__name__, "take another family")
    return layers[-1]
