"""Everything that a run is made of, from objects or from what a recipe names."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl import evaluation, starter
from trl.anatomy import language_model
from trl.config import PPOConfig, closest
from trl.config.code import Trust
from trl.config.recipe import STARTER, LoRAConfig, Recipe
from trl.data.pretraining import PretrainingText
from trl.data.prompts import PromptSplit, columns_for_rewards, load_prompts
from trl.data.sources import MODEL
from trl.environments import Episodes
from trl.evaluation import Scorer, WeightedSum
from trl.evaluation.people.scorer import for_held_out
from trl.gguf import gguf_apart
from trl.kernels.sharded import is_sharded, part_like
from trl.models.adapters import base_weights, import_peft
from trl.models.checkpoint import ADAPTER_CONFIG, hub_arguments
from trl.models.critic import critic_of
from trl.models.loading import quiet_transformers
from trl.models.reference import ReferenceKind
from trl.models.with_value_head import load_policy
from trl.optimization.schedule import schedule_factor
from trl.optimization.state import optimizer_state
from trl.ppo import PPOTrainer
from trl.rollout.sampler import Sampler
from trl.saved import TOKENIZER, TOKENIZER_CONFIG, VOCABULARIES, damage
from trl.training import fingerprints
from trl.training.held_out import FIGURES, HeldOut
from trl.training.loop import Loop
from trl.training.named import load_environment, load_scorer, refuse_setting

OTHER = {
    "prompts": "on other prompts: the file or dataset of `data.prompts`",
    "columns": "on prompts with other columns: the file or dataset of `data.prompts`",
    "reference": "with another reference, by default the policy before its first step: load the "
    "model anew, rather than give the one that was trained",
    "model": "that began with another model: its weights or its config.json",
    "tokenizer": "with another tokenizer: its vocabulary, its template or how it cuts texts up",
    "adapter": "with an adapter of other settings",
    "critic": "with a critic that began with another model: its weights or its config.json",
    "sampling": "with other settings of the sampler",
    "environment": "with another environment: its code, its tools or its limits",
    "precision": "at another precision",
}
"""What a checkpoint is of if a fingerprint is another one."""


class Parts:
    """What a run is made of, put together.

    `trl.train` is given the objects; `Parts.of_recipe` makes them from their names.

    Args:
        model: The policy: a name, a folder, or a loaded model.
        config: Settings of PPO.
        accelerator: Of the trainer.
        recipe: Its steps and how the learning rate goes over them; its seed is that of new weights,
            and of the responses unless `sampling` has one: each process draws others.
        prompts: Called as prompts(tokenizer, policy=...), returns what to train on, and what to
            measure on, which may be nothing.
        scorer: To train with.
        judge: To measure with; None: the same.
        sampling: Settings of `Sampler`. Its temperature is that of `config`, and texts begin with
            the BOS token if there is one, unless they say otherwise.
        ref_model: See `PPOTrainer`.
        shard: Likewise.
        offload: Likewise.
        tokenizer: See `find_tokenizer`.
        model_kwargs: See `load_policy`.
        only_tokens: Prompts are token ids: without a tokenizer there is none.
        episodes: Makes of a sampler one of conversations with an environment; None: it stays one.
        **of_loop: See `Loop`.

    Attributes:
        loop: The steps.
        held_out: Measures; None without prompts for it.
        seed: That of this process.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        config: PPOConfig,
        accelerator: Accelerator,
        recipe: Recipe,
        *,
        prompts: Callable[..., PromptSplit],
        scorer: Scorer,
        judge: WeightedSum | None = None,
        sampling: Mapping[str, Any],
        ref_model: nn.Module | ReferenceKind | None = None,
        shard: bool = False,
        offload: bool = False,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        model_kwargs: Mapping[str, Any],
        only_tokens: bool = False,
        episodes: Callable[[Sampler], Sampler] | None = None,
        **of_loop: Any,
    ) -> None:
        # The prompts come first, if they can: a model takes longer, and what is wrong is told.
        found = find_tokenizer(tokenizer, model, None, model_kwargs, needed=False)
        written = recipe.data.prompts == MODEL  # by the policy
        read = None if found is None or written else prompts(found)
        # An adapter's new weights are random.
        with seeded(recipe.seed), quiet_transformers(), warnings.catch_warnings():
            # That peft turned the matrices of GPT-2 about, which it should.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            in_files = shard and not isinstance(model, nn.Module)
            loading = {"shard": True} if in_files and accelerator.num_processes > 1 else {}
            self.model = load_policy(model, **model_kwargs, **loading)
        how: Any = {"accelerator": accelerator, "shard": shard, "offload": offload}
        self.trainer = PPOTrainer(self.model, ref_model, config, **how)
        if found is None:
            needed = not only_tokens
            found = find_tokenizer(tokenizer, model, self.model, model_kwargs, needed=needed)
        self.tokenizer = found
        self.model.tokenizer = self.tokenizer  # saved beside it
        self.prompts = read or prompts(found, policy=self.model)
        is_sum = isinstance(scorer, WeightedSum)
        self.judge = judge or (scorer if is_sum else WeightedSum([(scorer, 1.0)]))
        has_bos = getattr(self.tokenizer, "bos_token_id", None) is not None
        defaults = {"temperature": config.temperature, "add_bos": has_bos, "seed": recipe.seed}
        settings = defaults | dict(sampling)
        self._sampling = {k: v for k, v in settings.items() if k != "max_rows"}  # which is free
        seed = settings.pop("seed")
        self.seed = own_seed(seed, accelerator)
        samples = episodes or (lambda sampler: sampler)
        sampler = samples(Sampler(self.tokenizer, **settings, seed=self.seed))
        total, kind = recipe.total_steps, asdict(recipe.schedule)
        of_loop["schedule"] = partial(schedule_factor, total_steps=total, **kind)
        self.loop = Loop(self.trainer, sampler, scorer, self.prompts.train_rows, **of_loop)
        if (told := getattr(sampler, "told", "")) and accelerator.is_main_process:
            print(f"trl: {told}.", file=sys.stderr)
        self.held_out = None
        if self.prompts.held_out:
            settings |= {"group_size": 1, "seed": seed + 1}
            sampler = samples(Sampler(self.tokenizer, **settings))
            held_out = self.prompts.held_out_rows
            sampler.check(self.model, held_out, name="held-out prompts")
            judge = for_held_out(self.judge)
            self.held_out = HeldOut(self.trainer, sampler, judge, held_out)
        self.parameters = sum(weight.numel() for weight in self.model.parameters())

    @classmethod
    def of_recipe(cls, recipe: Recipe, accelerator: Accelerator, trust: Trust = ()) -> Parts:
        """Make everything that a recipe names.

        Args:
            recipe: The settings.
            accelerator: Of the trainer.
            trust: Modules and packages whose functions may run.

        Raises:
            SettingsError, OSError, ValueError: for what is not there, or does not fit.
        """
        columns = partial(columns_for_rewards, recipe.data)
        scorer, judge = load_scorer(recipe.reward, trust, columns, out=recipe.out)
        episodes = recipe.environment and load_environment(recipe.environment, trust)
        _check_best(recipe.checkpoints.best, judge)
        model, seed = recipe.model, recipe.seed
        where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        parts = cls(
            model_name(model.name),
            recipe.seeded_ppo,
            accelerator,
            recipe,
            prompts=partial(load_prompts, recipe.data, seed=seed),
            scorer=scorer,
            judge=judge,
            sampling=sampling_of(recipe),
            ref_model=model.reference,
            shard=model.shard,
            offload=model.offload,
            tokenizer=model.tokenizer and model_name(model.tokenizer),
            model_kwargs={
                "peft_config": model.lora and peft_config(model.lora),
                "unfrozen_layers": model.unfrozen_layers,
                "gguf_file": model.gguf_file,
                "dtype": model.dtype,
                "critic": critic_name(model.critic),
                "value_head": model.value_head,
                "value_range": model.value_range,
                **{name: value for name, value in where.items() if value},
            },
            episodes=episodes,
            parts=recipe.sampling.parts,
            profile=recipe.profile,
        )
        if recipe.pretraining.text is not None:
            own = own_seed(seed, accelerator)
            text = PretrainingText(recipe.pretraining, parts.tokenizer, seed=own)
            parts.trainer.pretraining = text
        return parts

    # -- where they stand ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what all processes have in common, as plain values and tensors.

        Weights that are not trained are left out: they are there again when the parts are.
        """
        return {
            "fingerprints": self.fingerprints,
            "processes": self.trainer.accelerator.num_processes,
            "weights": self._weights(),
            "trainer": self.trainer.state_dict(),
            "loop": self.loop.state_dict(),
        }

    def own_state(self) -> dict[str, Any]:
        """Return what differs from process to process."""
        pretraining = self.trainer.pretraining
        return {
            "scorers": {name: part.state_dict() for name, part in self.stateful().items()},
            "pretraining": pretraining.state_dict() if pretraining else None,
        }

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Return what tells other parts from these; to be asked for before anything is trained."""
        inner, prompts = language_model(self.model), self.prompts
        base, rows = base_weights(inner), [prompts.train_rows, prompts.held_out_rows]
        adapters = getattr(getattr(self.model, "pretrained_model", None), "peft_config", {})
        scales = "lora_alpha", "lora_dropout", "use_rslora"
        known = {
            "adapter": [[getattr(a, name, None) for name in scales] for a in adapters.values()],
            "prompts": fingerprints.checksum([prompts.train, prompts.held_out]),
            "columns": fingerprints.checksum(rows),
            "reference": _reference_hash(self.trainer),
            "model": fingerprints.of_model(inner, base),
            "tokenizer": fingerprints.of_tokenizer(self.tokenizer),
            "sampling": fingerprints.fingerprint(self._sampling),
            "precision": self.trainer.precision,
        }
        if (critic := critic_of(self.model)) is not None:
            theirs = language_model(critic)
            known["critic"] = fingerprints.of_model(theirs, base_weights(theirs))
        if isinstance(sampler := self.loop.sampler, Episodes):
            limits = asdict(sampler.limits).values()
            known["environment"] = fingerprints.of_scorer([sampler.world.made_of, *limits])
        scorers = {name: scorer for name, (scorer, _) in self.judge.parts.items()}
        return known | {f"`{k}`": fingerprints.of_scorer(v) for k, v in scorers.items()}

    def others(self, state: Mapping[str, Any]) -> list[str]:
        """Return the names of the fingerprints that are others in a state."""
        # Older checkpoints know two of them.
        older = {name: state[name] for name in ("prompts", "reference") if name in state}
        there, here = state.get("fingerprints", older), self.fingerprints
        return [name for name, value in there.items() if value != here.get(name)]

    def changed(self, state: Mapping[str, Any]) -> list[str]:
        """Return in what a state is that of a run with other parts, though it can be loaded."""
        of_scorer = "with another scorer {}: its code, its weights or its settings"
        return [OTHER.get(name, of_scorer.format(name)) for name in self.others(state)]

    def misfit(self, state: Mapping[str, Any]) -> str | None:
        """Return why a state cannot be loaded, and what to do; None: it can."""
        there, here = (
            {name: weight.shape for name, weight in weights.items()}
            for weights in (state["weights"], self._weights())
        )
        if there != here:
            return (
                "has other weights than the model of the run: is its folder, or its name on the "
                "hub, another model now?"
            )
        return None

    def load_state_dict(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` and this process's `own_state()`."""
        trainer, fresh = state["trainer"], optimizer_state(self.trainer.optimizer)
        self.trainer.load_state_dict(trainer | {"optimizer": trainer["optimizer"] or fresh})
        with torch.no_grad():
            for name, weight in self._weights().items():
                weight.copy_(part_like(state["weights"][name], weight))
        self.loop.load_state_dict(state["loop"])
        for name, part in self.stateful().items():
            part.load_state_dict(own["scorers"][name])
        if self.trainer.pretraining is not None and own["pretraining"] is not None:
            self.trainer.pretraining.load_state_dict(own["pretraining"])

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weight of each scorer, by its name."""
        return {name: weight for name, (_, weight) in self.judge.parts.items()}

    @property
    def sharded(self) -> bool:
        """Whether each process has but parts of the weights."""
        return is_sharded(next(self.model.parameters()))

    def stateful(self) -> dict[str, Any]:
        """Return the scorers, or their functions, that have a state of their own."""
        found = {}
        for name, (scorer, _) in self.judge.parts.items():
            for place, part in (name, scorer), (f"{name}()", getattr(scorer, "function", None)):
                if hasattr(part, "load_state_dict") and not isinstance(part, nn.Module):
                    found[place] = part
        return found

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights that are trained, by name."""
        named = self.model.named_parameters()
        return {name: weight.detach() for name, weight in named if weight.requires_grad}


def sampling_of(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of `Sampler` in a recipe; its temperature and seed are not among them."""
    sampling, told = recipe.sampling, recipe.data.chat_template_kwargs
    return {
        "max_new_tokens": (
            sampling.shortest_limit or sampling.max_new_tokens,
            sampling.max_new_tokens,
        ),
        "eos_token_id": "tokenizer" if sampling.eos else None,
        **{k: getattr(sampling, k) for k in ("stop_strings", "group_size", "max_rows")},
        **({} if sampling.add_bos else {"add_bos": False}),
        **({"chat_template_kwargs": told} if told else {}),
    }


def own_seed(seed: int, accelerator: Accelerator) -> int:
    """Return the seed of this process, which no other has, nor the held-out prompts (seed + 1).

    What is no number is left for the sampler to refuse.
    """
    processes, index = accelerator.num_processes, accelerator.process_index
    return (seed + 1) * processes + index if isinstance(seed, int) and processes > 1 else seed


def _reference_hash(trainer: PPOTrainer) -> str | None:
    """Return a hash of a few numbers of each weight that the KL is measured against.

    Those of the policy itself, where they are its own: make the parts before it is trained.
    """
    if trainer.reference is None:
        return None
    policy = trainer.model if trainer.ref_model is None else trainer.ref_model
    model = language_model(policy)
    with_adapter = trainer.reference.kind == "adapter-at-start"
    named = model.named_parameters() if with_adapter else base_weights(model)
    return fingerprints.of_weights(named)


def _check_best(best: str | None, judge: WeightedSum) -> None:
    """Raise unless `checkpoints.best` is a figure that evaluations will have."""
    names = ["reward/mean", "reward/median", *FIGURES]
    for title, (scorer, _) in judge.parts.items():
        names.append(f"reward/{title}")
        if isinstance(scorer, evaluation.ControlScorer):
            names += ["reward/hit", *(f"reward/hit/{each.strip()}" for each in scorer.targets)]
    known = [f"held_out/{name}" for name in names]
    if best is not None and best not in known:
        hint = closest(best, known)
        refuse_setting("checkpoints.best", f"be one of {known}", repr(best), hint=hint)


def model_name(name: str) -> str:
    """Return the folder or hub name of a language model."""
    return str(starter.LANGUAGE_MODEL) if name == STARTER else os.path.expanduser(name)


def critic_name(name: str) -> str:
    """Return the folder or hub name of a critic, or the word that says what it is."""
    return name if name in ("same", "copy") else model_name(name)


def peft_config(lora: LoRAConfig) -> Any:
    """Return the configuration of an adapter in the terms of peft."""
    layers: Any = lora.target_modules
    if layers != "all-linear":
        layers = [part.strip() for part in layers.split(",")]
    return import_peft().LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=layers
    )


def find_tokenizer(
    given: PreTrainedTokenizerBase | str | None,
    model: Any,
    policy: nn.Module | None,
    model_kwargs: Mapping[str, Any],
    *,
    needed: bool = True,
) -> PreTrainedTokenizerBase | None:
    """Return the policy's tokenizer: the one given, or the one beside the model or its base.

    Args:
        given: A tokenizer, its name or folder, or None.
        model: What the policy was loaded from.
        policy: As it was loaded; None: it is not yet, and its base not known.
        model_kwargs: With what; revision, subfolder and gguf_file are those of `model` alone.
        needed: Whether it is an error that there is none beside the model.

    Raises:
        ValueError: naming the places where there is none.
    """
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return given
    # An adapter's folder may have none; the model that it was put on comes from another place.
    beside = os.path.expanduser(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else ""
    base = language_model(policy).config.name_or_path if policy is not None else ""
    names = [beside, base] if given is None else [given]
    names = [os.fspath(name) for name in dict.fromkeys(names) if name]
    trust, failed = bool(model_kwargs.get("trust_remote_code")), None
    for name in names:
        where = hub_arguments(dict(model_kwargs))
        if name != beside:
            where = {k: v for k, v in where.items() if k not in ("revision", "subfolder")}
        elif not os.path.isfile(os.path.join(beside, ADAPTER_CONFIG)):  # whose base it is of
            where["gguf_file"] = model_kwargs.get("gguf_file")
        try:
            name, where = gguf_apart(name, where)
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trust, **where)
        except Exception as error:  # a damaged file makes it raise whatever comes up
            failed = error
            folder = Path(name)
            if any((folder / file).exists() for file in (TOKENIZER_CONFIG, *VOCABULARIES)):
                raise ValueError(damage(folder, error, TOKENIZER)) from error
    if given is None and not needed:
        return None
    places = " or ".join(map(repr, names))
    raise ValueError(
        f"`tokenizer` must be given: there is none beside the model ({places})."
    ) from failed


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's random numbers follow from the seed; outside they go on as before."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
