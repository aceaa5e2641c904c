"""Everything that a run is made of, from objects or from what a recipe names."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl import starter
from trl.anatomy import language_model
from trl.config import SettingsError, closest
from trl.config.folder import recipe_folder
from trl.config.recipe import STARTER, ModelConfig, Recipe, RewardConfig
from trl.data.pretraining import PretrainingText
from trl.data.prompts import PromptSplit, load_prompts
from trl.evaluation.classifier import ClassifierScorer
from trl.evaluation.control import ControlScorer
from trl.evaluation.endpoint import EndpointScorer
from trl.evaluation.function import FunctionScorer
from trl.evaluation.reward_model import RewardModelScorer
from trl.evaluation.scores import Scorer
from trl.evaluation.weighted_sum import WeightedSum
from trl.models.adapters import base_weights
from trl.models.with_value_head import load_policy
from trl.optimization.schedule import schedule_factor
from trl.ppo import PPOTrainer
from trl.rollout.sampler import Sampler
from trl.training.held_out import FIGURES, HeldOut
from trl.training.loop import Loop

TAKEN = ("mean", "median", "std")
"""Names under `reward/` that no scorer may have."""


class Parts:
    """What a run is made of, put together.

    `trl.train` is given the objects; `Parts.of_recipe` makes them from their names.

    Args:
        trainer: Of the policy.
        tokenizer: The policy's. None: prompts are token ids.
        prompts: To train on, and to measure on, which may be none.
        scorer: To train with.
        judge: To measure with; None: the same.
        sampling: Settings of `Sampler` but for its seed.
        seed: Of the responses; each process draws others.
        **of_loop: See `Loop`.

    Attributes:
        loop: The steps.
        held_out: Measures; None without prompts for it.
        seed: That of this process.
    """

    def __init__(
        self,
        trainer: PPOTrainer,
        tokenizer: PreTrainedTokenizerBase | None,
        prompts: PromptSplit,
        *,
        scorer: Scorer,
        judge: WeightedSum | None = None,
        sampling: Mapping[str, Any],
        seed: int,
        **of_loop: Any,
    ) -> None:
        self.trainer, self.model, self.tokenizer = trainer, trainer.model, tokenizer
        self.prompts = prompts
        is_sum = isinstance(scorer, WeightedSum)
        self.judge = judge or (scorer if is_sum else WeightedSum([(scorer, 1.0)]))
        self.seed = own_seed(seed, trainer.accelerator)
        sampler = Sampler(tokenizer, **sampling, seed=self.seed)
        self.loop = Loop(trainer, sampler, scorer, prompts.train, **of_loop)
        self.held_out = None
        if prompts.held_out:
            sampler = Sampler(tokenizer, **{**sampling, "group_size": 1}, seed=seed + 1)
            sampler.check(self.model, prompts.held_out, name="held-out prompts")
            self.held_out = HeldOut(trainer, sampler, self.judge, prompts.held_out)
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        self._reference = _reference_hash(trainer)

    @classmethod
    def of_recipe(cls, recipe: Recipe, accelerator: Accelerator) -> Parts:
        """Make everything that a recipe names.

        Raises:
            SettingsError, OSError, ValueError: for what is not there, or does not fit.
        """
        scorer, judge = load_scorer(recipe.reward)
        _check_best(recipe.checkpoints.best, judge)
        tokenizer = load_tokenizer(recipe.model)
        with seeded(recipe.seed):  # an adapter's new weights are random
            model = load_model(recipe.model)
        trainer = PPOTrainer(
            model, recipe.model.reference, recipe.seeded_ppo, accelerator=accelerator
        )
        if recipe.pretraining.text is not None:
            seed = own_seed(recipe.seed, accelerator)
            trainer.pretraining = PretrainingText(recipe.pretraining, tokenizer, seed=seed)
        return cls(
            trainer,
            tokenizer,
            load_prompts(recipe.data, tokenizer, seed=recipe.seed, policy=model),
            scorer=scorer,
            judge=judge,
            sampling=_sampling(recipe, tokenizer),
            seed=recipe.seed,
            schedule=partial(
                schedule_factor, total_steps=recipe.total_steps, **asdict(recipe.schedule)
            ),
            parts=recipe.sampling.parts,
            profile=recipe.profile,
        )

    # -- where they stand ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what all processes have in common, as plain values and tensors.

        Weights that are not trained are left out: they are there again when the parts are.
        """
        return {
            "prompts": self._checksum(),
            "reference": self._reference,
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

    def misfit(self, state: Mapping[str, Any]) -> str | None:
        """Return why a state is that of other parts, and what to do; None: it is of these."""
        if state["prompts"] != self._checksum():
            return (
                "is of a run on other prompts: the file or dataset of `data.prompts` has changed "
                "since. Bring it back, or start another run with --out."
            )
        processes = self.trainer.accelerator.num_processes
        if state["processes"] != processes:
            return f"is of a run on {state['processes']} processes, got {processes}: start as many."
        if {name: weight.shape for name, weight in self._weights().items()} != {
            name: weight.shape for name, weight in state["weights"].items()
        }:
            return (
                "has other weights than the model of the run: is its folder, or its name on the "
                "hub, another model now?"
            )
        if state.get("reference", self._reference) != self._reference:
            return (
                "is of a run with another reference, by default the policy before its first step: "
                "load the model anew, rather than give the one that was trained."
            )
        return None

    def load_state_dict(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` and this process's `own_state()`."""
        self.trainer.load_state_dict(state["trainer"])
        with torch.no_grad():
            for name, weight in self._weights().items():
                weight.copy_(state["weights"][name])
        self.loop.load_state_dict(state["loop"])
        for name, part in self.stateful().items():
            part.load_state_dict(own["scorers"][name])
        if self.trainer.pretraining is not None:
            self.trainer.pretraining.load_state_dict(own["pretraining"])

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

    def _checksum(self) -> int:
        """Return what tells other prompts from these."""
        everything = [self.prompts.train, self.prompts.held_out]
        return zlib.crc32(json.dumps(everything, default=_as_json).encode())


def _as_json(prompt: Any) -> Any:
    """Return token ids, or a message that is no dict, as JSON has them."""
    return prompt.tolist() if isinstance(prompt, Tensor) else dict(prompt)


def own_seed(seed: int, accelerator: Accelerator) -> int:
    """Return the seed of this process; what is no number is left for the sampler to refuse."""
    own = accelerator.num_processes, accelerator.process_index
    return seed * own[0] + own[1] if isinstance(seed, int) else seed


def _reference_hash(trainer: PPOTrainer) -> str | None:
    """Return a hash of a few numbers of each weight that the KL is measured against.

    Those of the policy itself, where they are its own: make the parts before it is trained.
    """
    if trainer.reference is None:
        return None
    digest = hashlib.sha256()
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    for name, weight in base_weights(language_model(model)):
        few = weight.detach().flatten()[:: max(1, weight.numel() // 16)][:16]
        digest.update(f"{name}{few.tolist()}".encode())
    return digest.hexdigest()[:32]


def _check_best(best: str | None, judge: WeightedSum) -> None:
    """Raise unless `checkpoints.best` is a figure that evaluations will have."""
    names = [*judge.parts]
    for scorer, _ in judge.parts.values():
        if isinstance(scorer, ControlScorer):
            names += ["hit", *(f"hit/{prefix.strip()}" for prefix in scorer.targets)]
    known = [f"held_out/{name}" for name in ("reward/mean", "reward/median", *FIGURES)]
    known += [f"held_out/reward/{name}" for name in names]
    if best is not None and best not in known:
        _refuse(f"`checkpoints.best` must be one of {known}, got {best!r}.{closest(best, known)}")


def _refuse(problem: str) -> NoReturn:
    raise SettingsError("Recipe", [problem])


# -- the policy ----------------------------------------------------------------------------------


def model_name(name: str) -> str:
    """Return the folder or hub name of a language model."""
    return str(starter.LANGUAGE_MODEL) if name == STARTER else os.path.expanduser(name)


def load_tokenizer(settings: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the policy's tokenizer."""
    where = {"revision": settings.revision} if settings.tokenizer is None else {}
    return AutoTokenizer.from_pretrained(
        model_name(settings.tokenizer or settings.name),
        trust_remote_code=settings.trust_remote_code,
        **where,
    )


def load_model(settings: ModelConfig) -> nn.Module:
    """Return the policy, with a value head; its new weights come from torch's random numbers."""
    where = {name: getattr(settings, name) for name in ("revision", "trust_remote_code")}
    with warnings.catch_warnings():
        # That peft turned the matrices of GPT-2 about, which it should.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        return load_policy(
            model_name(settings.name),
            peft_config=_lora(settings),
            unfrozen_layers=settings.unfrozen_layers,
            **{name: value for name, value in where.items() if value},
        )


def _lora(settings: ModelConfig) -> Any:
    """Return the adapter's configuration in the terms of peft; None: no adapter."""
    lora = settings.lora
    if lora is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise ImportError("`model.lora` needs the package peft: pip install peft.") from None
    layers: str | list[str] = lora.target_modules
    if layers != "all-linear":
        layers = [part.strip() for part in lora.target_modules.split(",")]
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=layers
    )


def _sampling(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the settings of `Sampler` but for its seed."""
    settings = recipe.sampling
    longest = settings.max_new_tokens
    shortest = longest if settings.shortest_limit is None else settings.shortest_limit
    return {
        "max_new_tokens": (shortest, longest),
        "temperature": recipe.ppo.temperature,
        "eos_token_id": "tokenizer" if settings.eos else None,
        "stop_strings": settings.stop_strings,
        "group_size": settings.group_size,
        "max_rows": settings.max_rows,
        "add_bos": settings.add_bos and tokenizer.bos_token_id is not None,
    }


# -- scorers -------------------------------------------------------------------------------------


def load_scorer(rewards: Sequence[RewardConfig]) -> tuple[WeightedSum, WeightedSum]:
    """Return the scorer to train with, and that of the evaluation, which measures more.

    Raises:
        SettingsError: for a function that is not there, naming its place in the recipe.
        OSError, ValueError: for a model that cannot be loaded, or has no such label.
    """
    loaded: dict[str, ClassifierScorer] = {}
    modules: dict[str, ModuleType] = {}
    parts = []
    for index, settings in enumerate(rewards):
        scorer = _scorer(settings, f"reward[{index}]", loaded, modules)
        scorer.name = settings.title or _title(settings)
        if scorer.name in TAKEN:
            _refuse(
                f"`reward[{index}].title` must not be one of {list(TAKEN)}, which are figures of "
                f"the whole reward, got {scorer.name!r}: set another title."
            )
        parts.append((scorer, settings.weight))
    return WeightedSum([part for part in parts if part[1] != 0]), WeightedSum(parts)


def _scorer(
    settings: RewardConfig,
    path: str,
    loaded: dict[str, ClassifierScorer],
    modules: dict[str, ModuleType],
) -> Any:
    if settings.kind == "function":
        return FunctionScorer(load_function(settings.name, f"{path}.name", modules))
    if settings.kind == "endpoint":
        return EndpointScorer(settings.name)
    if settings.kind == "reward_model":
        return RewardModelScorer(os.path.expanduser(settings.name))
    starts = settings.name == STARTER
    name = str(starter.CLASSIFIER) if starts else os.path.expanduser(settings.name)
    label = int(settings.label) if settings.label.isdecimal() else settings.label
    first = loaded.get(name)  # a classifier that is named twice is loaded once
    model, tokenizer = (first.model, first.tokenizer) if first else (name, None)
    loaded[name] = scorer = ClassifierScorer(model, tokenizer, label=label, output=settings.output)
    if settings.kind == "classifier":
        return scorer
    return ControlScorer(scorer, settings.targets, weights=settings.target_weights)


def _title(settings: RewardConfig) -> str:
    if settings.kind == "classifier":
        return f"{settings.label.lower()}_{settings.output}"
    if settings.kind == "function":
        return settings.name.rpartition(":")[2]
    return settings.kind


def load_function(
    name: str, path: str, modules: dict[str, ModuleType] | None = None
) -> Callable[[list[str]], Any]:
    """Return the function `package.module:function`, or `file.py:function`.

    Args:
        name: Where it is.
        path: The setting's place in the recipe, for errors.
        modules: Files that were executed already; this one is added.

    Raises:
        SettingsError: if it is not there, or is no function.
    """
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        module = _module_of_file(Path(place), path, {} if modules is None else modules)
    else:
        module = _module(place, path)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        _refuse(
            f"`{path}` must name a function of {place}, which has no function "
            f"{attribute!r}.{closest(attribute, known)}"
        )
    return function


def _module_of_file(given: Path, path: str, modules: dict[str, ModuleType]) -> ModuleType:
    file = given.expanduser()
    if not file.is_file():
        file = recipe_folder() / file  # where the functions of the recipes that ship lie
    if not file.is_file():
        _refuse(
            f"`{path}` must name a file that is there, got {str(given)!r}, looked for in "
            f"{Path.cwd()}: mend the path."
        )
    file = file.resolve()
    name = f"trl_recipe_{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    if name in modules:  # two functions of one recipe share what their file keeps
        return modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _look_in(file.parent)  # it may import its neighbours
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    modules[name] = module
    return module


def _look_in(folder: Path) -> None:
    """Let imports find the modules of a folder, after all others."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _module(name: str, path: str) -> ModuleType:
    _look_in(Path.cwd())  # `trl` is a script: unlike `python`, it does not look here
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        _refuse(f"`{path}` must name a module that can be imported, got {name!r} ({error}).")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's random numbers follow from the seed; outside they go on as before."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
