"""A recipe: everything that a training run is made of, as frozen dataclasses.

A recipe is written as a YAML file, and every field of it is a flag of `trl train`:

    model: {name: gpt2}
    reward: [{kind: classifier, name: lvwerra/distilbert-imdb}]
    ppo: {learning_rate: 1.41e-5}
    steps: 100

    trl train recipe.yaml --ppo.learning-rate 2e-5

The text under a field is its only documentation. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trl.config.ppo import (
    PPOConfig,
    Problems,
    is_not_negative,
    is_positive,
    is_share,
    reject_unknown_fields,
)

STARTER = "starter"
"""Names the models and prompts that ship with trl."""


def recipe_folder() -> Path:
    """Return the folder of the recipes that ship with trl."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """A low-rank adapter (Hu et al., arXiv:2106.09685), trained in place of the model's weights."""

    rank: int = 16
    """Rank of the update of each matrix."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input; trl switches it off, as all dropout, while it trains."""
    target_modules: str = "all-linear"
    """Which layers get one: all-linear, or the ends of their names, with commas between."""

    def __post_init__(self) -> None:
        problems = Problems("LoRAConfig")
        problems.number("rank", self.rank, "> 0", is_positive, whole=True)
        problems.number("alpha", self.alpha, "> 0", is_positive)
        problems.number("dropout", self.dropout, "between 0 and 1", is_share)
        problems.text("target_modules", self.target_modules)
        problems.report()


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The policy, and what it is held against."""

    name: str = STARTER
    """A folder or hub name of a causal or encoder-decoder model; starter: the GPT-2 of five
    million parameters that ships with trl."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    tokenizer: str | None = None
    """A folder or hub name; None: the one beside the model."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    unfrozen_layers: int | None = None
    """Train the last so many layers only; the others are shared with the reference."""
    lora: LoRAConfig | None = None
    """Train a low-rank adapter only; the reference is the model without it."""
    reference: Literal["copy", "adapters-off", "shared-trunk", "none"] | None = None
    """What the KL is measured against. None: what suits the model."""

    def __post_init__(self) -> None:
        problems = Problems("ModelConfig")
        problems.text("name", self.name)
        for name in ("revision", "tokenizer"):
            problems.text(name, getattr(self, name), optional=True)
        problems.flag("trust_remote_code", self.trust_remote_code)
        problems.number(
            "unfrozen_layers", self.unfrozen_layers, "> 0", is_positive, whole=True, optional=True
        )
        problems.section("lora", self.lora, LoRAConfig, optional=True)
        if self.reference is not None:
            problems.choice(
                "reference", self.reference, ("copy", "adapters-off", "shared-trunk", "none")
            )
        if self.lora is not None and self.unfrozen_layers is not None:
            problems.add(
                "`unfrozen_layers` must be None beside `lora`, which trains its adapter only, got "
                f"{self.unfrozen_layers}: keep one of the two."
            )
        if self.reference == "adapters-off" and self.lora is None:
            problems.add("`reference` must not be 'adapters-off' without `lora`: set `lora`.")
        if self.reference == "shared-trunk" and self.unfrozen_layers is None:
            problems.add(
                "`reference` must not be 'shared-trunk' without `unfrozen_layers`: set it."
            )
        problems.report()


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the prompts come from."""

    prompts: str = STARTER
    """starter: openings of film reviews; model: the policy writes them, from its BOS token; a file
    (jsonl, json, csv, tsv, parquet, or txt with one prompt a line); or a dataset on the hub."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    column: str | None = None
    """Column with the prompts. None: the only one, or prompt, query, text or messages."""
    template: str | None = None
    """A prompt made of columns, as "Review: {text}"; None: the column as it is."""
    chat: bool = False
    """Make each text the user's message of a chat."""
    system: str | None = None
    """System message of such a chat."""
    prefixes: tuple[str, ...] = ()
    """Control prefixes: every prompt comes with each of them in turn."""
    cut_tokens: tuple[int, int] | None = None
    """Keep the first n tokens of each text, n drawn between these two."""
    min_tokens: int | None = None
    """Leave out prompts of fewer tokens."""
    max_tokens: int | None = None
    """Leave out prompts of more tokens."""
    limit: int | None = None
    """Use at most so many prompts."""
    held_out: int = 256
    """Prompts held out for evaluation (at least 128 make a fair mean)."""
    held_out_prompts: str | None = None
    """A file or dataset of its own for them; None: they are split off the prompts."""
    deduplicate: bool = True
    """Use equal prompts once, so that no held-out prompt is trained on."""
    shuffle: bool = True
    """Shuffle the prompts before they are split."""
    model_prompts: int = 1024
    """Prompts to sample if the model writes them."""
    model_prompt_tokens: tuple[int, int] = (2, 8)
    """Their tokens: at least and at most."""

    def __post_init__(self) -> None:
        problems = Problems("DataConfig")
        for name in ("prompts", "split"):
            problems.text(name, getattr(self, name))
        for name in ("subset", "column", "template", "system", "held_out_prompts"):
            problems.text(name, getattr(self, name), optional=True)
        for name in ("chat", "deduplicate", "shuffle"):
            problems.flag(name, getattr(self, name))
        for name in ("min_tokens", "max_tokens", "limit"):
            value = getattr(self, name)
            problems.number(name, value, "> 0", is_positive, whole=True, optional=True)
        problems.number("held_out", self.held_out, ">= 0", is_not_negative, whole=True)
        problems.number("model_prompts", self.model_prompts, "> 0", is_positive, whole=True)
        problems.texts("prefixes", self.prefixes)
        problems.whole_range("cut_tokens", self.cut_tokens, optional=True)
        problems.whole_range("model_prompt_tokens", self.model_prompt_tokens)
        if not problems.found:
            least, most = self.min_tokens, self.max_tokens
            if least is not None and most is not None and least > most:
                problems.add(f"`min_tokens` must be <= max_tokens ({most}), got {least}: lower it.")
            if self.prompts != "model" and self.model_prompts != 1024:
                problems.add(
                    "`model_prompts` must be left out unless prompts is 'model', got "
                    f"{self.model_prompts}."
                )
            if self.system is not None and not self.chat:
                problems.add("`system` must be None unless `chat` is true: set chat: true.")
            if len(set(self.prefixes)) < len(self.prefixes):
                problems.add(f"`prefixes` must differ from each other, got {list(self.prefixes)}.")
            if self.chat and self.prefixes:
                problems.add(
                    "`prefixes` must be empty for chats, got "
                    f"{list(self.prefixes)}: write them into the template."
                )
        problems.report()


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How responses are written. Their temperature is `ppo.temperature`."""

    max_new_tokens: int = 24
    """Most tokens of a response."""
    shortest_limit: int | None = None
    """Draw the limit of each response between this and `max_new_tokens`; None: it is fixed."""
    group_size: int = 1
    """Responses to each prompt. RLOO and GRPO compare the responses of a group."""
    eos: bool = True
    """Let the EOS token end a response."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response too."""
    add_bos: bool = True
    """Begin prompts with the BOS token, if there is one and the tokenizer does not do it itself."""
    max_rows: int | None = None
    """Most responses written at once; None: all."""
    parts: int = 1
    """Write each batch in so many parts, and score one while the next is written: for a reward that
    waits for a server. It must not compare the responses of a whole batch."""

    def __post_init__(self) -> None:
        problems = Problems("SamplingConfig")
        for name in ("max_new_tokens", "group_size", "parts"):
            problems.number(name, getattr(self, name), "> 0", is_positive, whole=True)
        for name in ("shortest_limit", "max_rows"):
            value = getattr(self, name)
            problems.number(name, value, "> 0", is_positive, whole=True, optional=True)
        for name in ("eos", "add_bos"):
            problems.flag(name, getattr(self, name))
        problems.texts("stop_strings", self.stop_strings)
        if (
            not problems.found
            and self.shortest_limit is not None
            and self.shortest_limit > self.max_new_tokens
        ):
            problems.add(
                f"`shortest_limit` must be <= max_new_tokens ({self.max_new_tokens}), got "
                f"{self.shortest_limit}: lower it."
            )
        problems.report()


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class RewardConfig:
    """One scorer; the rewards of a recipe are added up with their weights."""

    kind: Literal["classifier", "reward_model", "function", "endpoint", "control"] = "classifier"
    """classifier: a class of a sequence classifier. reward_model: a sequence model with one output.
    function: a Python function from texts to numbers. endpoint: a server. control: a classifier,
    and for each control prefix the range that its probability is to be in."""
    name: str = STARTER
    """A folder or hub name; starter: the sentiment classifier that ships with trl. Of a function:
    package.module:function, or file.py:function. Of an endpoint: its URL."""
    label: str = "POSITIVE"
    """Class of the classifier that counts, by name or index."""
    output: Literal["logit", "probability", "log_odds"] = "logit"
    """What counts of it."""
    weight: float = 1.0
    """Factor on this reward; negative to punish. 0: only measured, on the held-out prompts."""
    title: str | None = None
    """What figures call it; None: made from the rest."""
    targets: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of a control: the wanted range of the probability for each prefix of `data.prefixes`."""
    target_weights: Mapping[str, float] = field(default_factory=dict)
    """Of a control: factors on the reward of some prefixes, for targets that are harder to hit."""

    def __post_init__(self) -> None:
        problems = Problems("RewardConfig")
        kinds = ("classifier", "reward_model", "function", "endpoint", "control")
        problems.choice("kind", self.kind, kinds)
        problems.text("name", self.name)
        problems.text("label", self.label)
        problems.choice("output", self.output, ("logit", "probability", "log_odds"))
        problems.number("weight", self.weight, "", lambda value: True)
        problems.text("title", self.title, optional=True)
        if not isinstance(self.targets, Mapping):
            problems.add(
                f"`targets` must be a mapping of prefix: [low, high], got {self.targets!r}."
            )
        else:
            for prefix, limits in self.targets.items():
                problems.share_range(f"targets.{prefix}", limits)
        if not isinstance(self.target_weights, Mapping):
            problems.add(
                f"`target_weights` must be a mapping of numbers, got {self.target_weights!r}."
            )
        else:
            for prefix, weight in self.target_weights.items():
                problems.number(f"target_weights.{prefix}", weight, "> 0", is_positive)
        if not problems.found:
            if self.kind == "control" and not self.targets:
                problems.add("`targets` must name a range for each prefix of a control, got none.")
            if self.kind != "control" and self.targets:
                problems.add(
                    f"`targets` must be empty for kind {self.kind!r}: set kind: control, or "
                    "leave them out."
                )
            unknown = [prefix for prefix in self.target_weights if prefix not in self.targets]
            if unknown:
                problems.add(
                    f"`target_weights` must name prefixes of targets, {list(self.targets)}, got "
                    f"{unknown}."
                )
            if self.kind == "function" and ":" not in self.name:
                problems.add(
                    "`name` must be package.module:function or file.py:function for kind "
                    f"'function', got {self.name!r}."
                )
            of_classifier = self.kind == "classifier"
            if not of_classifier and self.output != "logit":
                problems.add(
                    f"`output` must be left out for kind {self.kind!r}, got {self.output!r}."
                )
            if not of_classifier and self.kind != "control" and self.label != "POSITIVE":
                problems.add(
                    f"`label` must be left out for kind {self.kind!r}, got {self.label!r}."
                )
            if self.kind in ("reward_model", "endpoint") and self.name == STARTER:
                problems.add(
                    f"`name` must be given for kind {self.kind!r}: trl ships a classifier only."
                )
        problems.report()


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """How the learning rate goes."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up: down to `final` in a line or along a cosine, or as it is."""
    warmup_steps: int = 0
    """Steps over which it rises from 0 at first."""
    final: float = 0.0
    """Share of the learning rate that is left at the end."""

    def __post_init__(self) -> None:
        problems = Problems("ScheduleConfig")
        problems.choice("kind", self.kind, ("linear", "cosine", "constant"))
        problems.number("warmup_steps", self.warmup_steps, ">= 0", is_not_negative, whole=True)
        problems.number("final", self.final, "between 0 and 1", is_share)
        if self.kind == "constant" and self.final != 0:
            problems.add(
                f"`final` must be left out for kind 'constant', got {self.final}: set kind: linear."
            )
        problems.report()


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """What is kept to go on from."""

    every: int = 50
    """Write one every so many steps (one more at the end)."""
    keep: int = 2
    """Keep the last so many."""
    best: str | None = "held_out/reward/mean"
    """Keep the policy that is best by this figure of an evaluation in best/; None: do not."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less of that figure is better."""

    def __post_init__(self) -> None:
        problems = Problems("CheckpointConfig")
        for name in ("every", "keep"):
            problems.number(name, getattr(self, name), "> 0", is_positive, whole=True)
        problems.text("best", self.best, optional=True)
        problems.choice("mode", self.mode, ("max", "min"))
        if not problems.found and self.best is not None and not self.best.startswith("held_out/"):
            problems.add(
                f"`best` must be a figure of the evaluation, held_out/…, got {self.best!r}."
            )
        problems.report()


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class StopConfig:
    """When to stop before the last step."""

    kl: float | None = None
    """Stop once the KL of a batch to the reference exceeds this, in nats per response."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a new best (by `checkpoints.best`)."""
    min_gain: float = 0.0
    """By how much an evaluation must be better to be a new best."""

    def __post_init__(self) -> None:
        problems = Problems("StopConfig")
        problems.number("kl", self.kl, "> 0", is_positive, optional=True)
        problems.number("patience", self.patience, "> 0", is_positive, whole=True, optional=True)
        problems.number("min_gain", self.min_gain, ">= 0", is_not_negative)
        problems.report()


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class PretrainingConfig:
    """Text for a mixed pretraining loss (InstructGPT, arXiv:2203.02155, equation 2); its weight is
    `ppo.pretraining_coef`.
    """

    text: str | None = None
    """A file or hub dataset, as for prompts; None: no such loss."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    column: str | None = None
    """Column with the text."""
    tokens: int = 64
    """Tokens of each row."""

    def __post_init__(self) -> None:
        problems = Problems("PretrainingConfig")
        for name in ("text", "subset", "column"):
            problems.text(name, getattr(self, name), optional=True)
        problems.text("split", self.split)
        problems.number("tokens", self.tokens, "> 1", lambda value: value > 1, whole=True)
        if not problems.found and self.text is None and self.tokens != 64:
            problems.add(f"`tokens` must be left out without `text`, got {self.tokens}.")
        problems.report()


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class TrackingConfig:
    """Where figures go besides metrics.jsonl."""

    to: tuple[str, ...] = ()
    """Any of tensorboard, wandb, trackio, mlflow."""
    project: str = "trl"
    """Project there."""
    name: str | None = None
    """Name of the run there; None: that of its folder."""

    def __post_init__(self) -> None:
        problems = Problems("TrackingConfig")
        problems.texts("to", self.to)
        if not problems.found:
            for name in self.to:
                problems.choice("to", name, TRACKERS)
        problems.text("project", self.project)
        problems.text("name", self.name, optional=True)
        problems.report()


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of `trl train`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: tuple[RewardConfig, ...] = (RewardConfig(),)
    """The scorers."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    steps: int | None = None
    """Steps, each on `ppo.batch_size` responses. None: as `episodes` says, else 100."""
    episodes: int | None = None
    """Responses in all, in place of `steps`."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval_every: int = 25
    """Measure on the held-out prompts every so many steps, at the start and at the end."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0
    """Seed of everything that is random: prompts, sampling, shuffling, new weights."""
    out: str = "runs/run"
    """Folder of the run."""
    profile: str | None = None
    """Folder for where the time went: a table, and traces of two steps; None: not looked at."""
    quiet: bool = False
    """Show nothing but errors."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        if self.episodes is not None:
            return max(1, self.episodes // self.ppo.batch_size)
        return 100 if self.steps is None else self.steps

    def __post_init__(self) -> None:
        problems = Problems("Recipe")
        for name, cls in SECTIONS.items():
            problems.section(name, getattr(self, name), cls)
        rewards_fit = isinstance(self.reward, tuple) and all(
            isinstance(entry, RewardConfig) for entry in self.reward
        )
        if not rewards_fit or not self.reward:
            problems.add(f"`reward` must be a list of at least one scorer, got {self.reward!r}.")
        elif all(entry.weight == 0 for entry in self.reward):
            problems.add("`reward` must have a scorer with a weight other than 0, got none.")
        for name in ("steps", "episodes"):
            value = getattr(self, name)
            problems.number(name, value, "> 0", is_positive, whole=True, optional=True)
        problems.number("eval_every", self.eval_every, "> 0", is_positive, whole=True)
        problems.number("seed", self.seed, ">= 0", is_not_negative, whole=True)
        problems.text("out", self.out)
        problems.text("profile", self.profile, optional=True)
        problems.flag("quiet", self.quiet)
        if not problems.found:
            self._check_together(problems)
        problems.report()

    def _check_together(self, problems: Problems) -> None:
        """Find settings that are good by themselves and contradict each other."""
        ppo, data, sampling = self.ppo, self.data, self.sampling
        if self.steps is not None and self.episodes is not None:
            problems.add(
                f"`episodes` must be None beside `steps`, got {self.episodes} and {self.steps}: "
                "keep one of the two."
            )
        if self.episodes is not None and self.episodes < ppo.batch_size:
            problems.add(
                f"`episodes` must be >= ppo.batch_size ({ppo.batch_size}), got {self.episodes}."
            )
        if ppo.batch_size % sampling.group_size:
            problems.add(
                f"`ppo.batch_size` must be a multiple of sampling.group_size "
                f"({sampling.group_size}), got {ppo.batch_size}."
            )
        prompts = ppo.batch_size // sampling.group_size
        if sampling.parts > prompts > 0:
            problems.add(
                "`sampling.parts` must be <= the prompts of a step (ppo.batch_size / "
                f"sampling.group_size = {prompts}), got {sampling.parts}: lower it."
            )
        if ppo.algorithm in ("rloo", "grpo", "dr_grpo") and sampling.group_size < 2:
            problems.add(
                f"`sampling.group_size` must be > 1 for ppo.algorithm {ppo.algorithm!r}, which "
                f"compares the responses to one prompt, got {sampling.group_size}: set 4, say."
            )
        if self.model.reference == "none" and self.stop.kl is not None:
            problems.add(
                f"`stop.kl` must be None with model.reference 'none', which measures no KL, got "
                f"{self.stop.kl}."
            )
        if self.model.reference == "none" and ppo.init_kl_coef != 0:
            problems.add(
                f"`ppo.init_kl_coef` must be 0 with model.reference 'none', got {ppo.init_kl_coef}."
            )
        controls = {i: entry for i, entry in enumerate(self.reward) if entry.kind == "control"}
        for index, entry in controls.items():
            if set(entry.targets) != set(data.prefixes):
                problems.add(
                    f"`reward[{index}].targets` must have a range for each of data.prefixes "
                    f"{list(data.prefixes)} and no other, got {list(entry.targets)}."
                )
        if data.prefixes and not controls and data.prompts == STARTER:
            problems.add(
                "`data.prefixes` must be empty unless a reward is of kind 'control': nothing else "
                f"tells them apart, got {list(data.prefixes)}."
            )
        if data.held_out == 0 and self.stop.patience is not None:
            problems.add("`data.held_out` must be > 0 with stop.patience: it compares evaluations.")
        if self.stop.patience is not None and self.checkpoints.best is None:
            problems.add("`checkpoints.best` must name a figure with stop.patience, got None.")
        if (self.pretraining.text is None) != (ppo.pretraining_coef == 0):
            problems.add(
                "`pretraining.text` and `ppo.pretraining_coef` must be set together, got "
                f"{self.pretraining.text!r} and {ppo.pretraining_coef}."
            )
        if self.schedule.warmup_steps >= self.total_steps:
            problems.add(
                "`schedule.warmup_steps` must be < the steps of the run "
                f"({self.total_steps}, by `steps` or `episodes`), got "
                f"{self.schedule.warmup_steps}: lower it."
            )
        if ppo.missing_eos_penalty is not None and not (sampling.eos or sampling.stop_strings):
            problems.add(
                "`ppo.missing_eos_penalty` must be None if nothing can end a response: set "
                "sampling.eos: true, or stop_strings."
            )
        if ppo.seed not in (0, self.seed):
            problems.add(
                f"`ppo.seed` must be left out, got {ppo.seed}: `seed` is that of the whole run."
            )


SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "sampling": SamplingConfig,
    "ppo": PPOConfig,
    "schedule": ScheduleConfig,
    "checkpoints": CheckpointConfig,
    "stop": StopConfig,
    "pretraining": PretrainingConfig,
    "tracking": TrackingConfig,
}
"""The sections of a recipe, but for the list of rewards."""


@reject_unknown_fields
@dataclass(frozen=True, slots=True)
class ClassifierRecipe:
    """Settings of `trl train` for a sentiment classifier, or any other, to score texts with."""

    task: Literal["classifier"] = "classifier"
    """What tells this recipe from one of reinforcement learning."""
    model: str = STARTER
    """A folder or hub name to start from; starter: a new small BERT of the starter's size, with the
    tokenizer of the classifier that ships with trl."""
    train: str = "stanfordnlp/imdb"
    """Labelled texts: a file (jsonl, json, csv, tsv, parquet), or a dataset on the hub, of which
    name:split is another split than train."""
    test: str | None = None
    """Labelled texts to measure on. None: the split test of the hub dataset in `train`."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    text_column: str = "text"
    """Column with the text."""
    label_column: str = "label"
    """Column with the label: a whole number from 0, or a name as in `labels`."""
    labels: tuple[str, ...] = ("NEGATIVE", "POSITIVE")
    """Names of the labels, in order."""
    epochs: float = 1.0
    """Passes over the training texts."""
    batch_size: int = 64
    """Texts of an update."""
    learning_rate: float = 5e-5
    """Highest learning rate of AdamW; it rises for a tenth of the run and falls to 0."""
    weight_decay: float = 0.01
    """Weight decay of the matrices."""
    dropout: float | None = None
    """Dropout while it trains; None: as the model has it (starter: none)."""
    max_length: int = 256
    """Cut texts to so many tokens."""
    crop_words: tuple[int, int] | None = None
    """Train on random pieces of so many words of a text, at least and at most; None: on whole
    texts. Pieces teach it to judge short texts, as a language model writes them."""
    limit: int | None = None
    """Use at most so many training texts, drawn at random."""
    test_limit: int | None = None
    """Measure on at most so many test texts, drawn at random."""
    opening_words: int = 25
    """Measure on the first so many words of each test text too."""
    log_every: int = 50
    """Write the mean loss and accuracy of every so many updates."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the matrix products."""
    seed: int = 0
    """Seed of shuffling, crops and new weights."""
    out: str = "runs/classifier"
    """Folder of the run."""
    quiet: bool = False
    """Show nothing but errors."""

    def __post_init__(self) -> None:
        problems = Problems("ClassifierRecipe")
        problems.choice("task", self.task, ("classifier",))
        for name in ("model", "train", "text_column", "label_column", "out"):
            problems.text(name, getattr(self, name))
        for name in ("test", "subset"):
            problems.text(name, getattr(self, name), optional=True)
        problems.texts("labels", self.labels)
        for name in ("epochs", "learning_rate"):
            problems.number(name, getattr(self, name), "> 0", is_positive)
        problems.number("weight_decay", self.weight_decay, ">= 0", is_not_negative)
        for name in ("batch_size", "max_length", "opening_words", "log_every"):
            problems.number(name, getattr(self, name), "> 0", is_positive, whole=True)
        problems.whole_range("crop_words", self.crop_words, optional=True)
        for name in ("limit", "test_limit"):
            value = getattr(self, name)
            problems.number(name, value, "> 0", is_positive, whole=True, optional=True)
        problems.number("seed", self.seed, ">= 0", is_not_negative, whole=True)
        if self.dropout is not None:
            problems.number("dropout", self.dropout, ">= 0 and < 1", lambda value: 0 <= value < 1)
        problems.choice("precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        problems.flag("quiet", self.quiet)
        if not problems.found:
            if len(self.labels) < 2:
                problems.add(f"`labels` must name at least two labels, got {list(self.labels)}.")
            if len({name.lower() for name in self.labels}) < len(self.labels):
                problems.add(
                    "`labels` must differ from each other in more than capital letters, got "
                    f"{list(self.labels)}."
                )
        problems.report()
