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

from collections.abc import Iterator
from dataclasses import field, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from trl.config.algorithms import FACTS
from trl.config.errors import hidden
from trl.config.ppo import (
    PPOConfig,
    group_size,
    learning_defaults,
    sampling_contradictions,
)
from trl.config.section import Contradiction, section
from trl.config.types import (
    Count,
    CountRange,
    Interval,
    NotNegative,
    Positive,
    RangeOfEach,
    Share,
    Sources,
    Text,
    Texts,
    Values,
    WeightOfEach,
    Whole,
)

STARTER = "starter"
"""Names the models and prompts that ship with trl."""
ENVIRONMENT = "environment"
"""Names prompts that an environment makes up, and its rewards."""
HUMAN = "human"
"""Names the reward that people give, on a page."""

Check = Literal["math", "code", "json", "regex", "format", "repetition", "length"]
CHECKS = get_args(Check)
"""Rewards that no model gives."""
READING = "chat_template", "batch_size", "max_length"
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "function": ("separator",),
    "reward_model": ("by_token", "gamma", *READING),
    "steps": ("separator", "marker", "label", "label_tokens", "output", *READING),
}
"""What a recipe may say of other rewards: nothing that opens a file or moves a model."""
Kind = Literal[
    "classifier",
    "reward_model",
    "steps",
    "function",
    "endpoint",
    "control",
    "environment",
    "human",
    Check,
]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
TRACKERS = get_args(Tracker)


@section
class LoRAConfig:
    """A low-rank adapter (Hu et al., arXiv:2106.09685), trained in place of the model's weights."""

    rank: Count = 16
    """Rank of the update of each matrix."""
    alpha: Positive = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Share = 0.0
    """Dropout on the adapter's input; trl switches it off, as all dropout, while it trains."""
    target_modules: Text = "all-linear"
    """Which layers get one: all-linear, or the ends of their names, with commas between."""


@section
class ModelConfig:
    """The policy, and what it is held against."""

    name: Text = STARTER
    """A folder or hub name of a causal or encoder-decoder model; starter: the GPT-2 of five
    million parameters that ships with trl."""
    revision: Text | None = None
    """Branch, tag or commit of a model on the hub."""
    gguf_file: Text | None = None
    """Read the model, and its tokenizer, from this GGUF file of the folder or repository; `name`
    may also be the path of the file."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """What the weights are kept in; auto: what they were saved in. What is trained must be float32:
    bfloat16 is for what is frozen, below a LoRA adapter or the top layers."""
    tokenizer: Text | None = None
    """A folder or hub name; None: the one beside the model."""
    trust_remote_code: bool = False
    """Run code that comes with the model. A recipe alone cannot say so: it takes the flag too."""
    unfrozen_layers: Count | None = None
    """Train the last so many layers only; the others are shared with the reference."""
    lora: LoRAConfig | None = None
    """Train a low-rank adapter only; the reference is the model without it."""
    reference: (
        Literal["copy", "adapters-off", "adapter-at-start", "shared-trunk", "none"] | None
    ) = None
    """What the KL is measured against. None: what suits the model."""
    critic: Text = "same"
    """What gives the values. same: the policy's own hidden states. copy: a copy of the policy, with
    an adapter of its own if `lora` is set. Else a folder or hub name of a model with the policy's
    vocabulary: a language model, the `critic` of another run, or a reward model, whose head becomes
    the value head."""
    value_head: Literal["linear", "mlp", "bins"] | None = None
    """How values are made of hidden states. mlp: with a layer inside. bins: as the mean of a
    distribution, which is trained by cross-entropy. None: as in the head saved with the model, or
    else linear."""
    value_range: Interval | None = None
    """Lowest and highest value of bins, in units of returns; None: as saved, else [-10, 10]."""
    shard: bool = False
    """Let each process hold its part of the weights, of their gradients and of what the optimiser
    keeps, the reference's too, for models that do not fit one; a single process holds all."""
    offload: bool = False
    """Keep these parts in the CPU's memory, so that a GPU has gathered layers only: slower, for
    models whose parts do not fit. The optimiser's step is the CPU's then. Needs `shard`."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong with settings that each are in order."""
        if self.lora is not None and self.unfrozen_layers is not None:
            yield "unfrozen_layers", "be None beside `lora`", "keep one of the two"
        if self.gguf_file is not None and self.name == STARTER:
            yield "gguf_file", "be None for the model that ships with trl", "set `name`"
        if self.dtype == "bfloat16" and self.lora is None and self.unfrozen_layers is None:
            fix = "set `lora` or `unfrozen_layers`, or ppo.precision: bf16 alone"
            yield "dtype", "be float32 where all weights are trained", fix
        if str(self.reference).startswith("adapter") and self.lora is None:
            yield "reference", f"not be {self.reference} without `lora`", "set `lora`"
        if self.reference == "shared-trunk" and self.unfrozen_layers is None:
            yield "reference", "not be shared-trunk without `unfrozen_layers`", "set it"
        if self.value_range is not None and self.value_head != "bins":
            yield "value_range", "be None without value_head: bins", "set that"
        if self.offload and not self.shard:
            yield "offload", "be false without `shard`", "set that"
        if self.shard and self.critic != "same" and (self.lora or self.unfrozen_layers) is not None:
            rule = "be false beside a `critic` of its own that has the policy's frozen weights"
            yield "shard", rule, "set critic: same"


@section
class DataConfig:
    """Where the prompts come from."""

    prompts: Sources = STARTER
    """starter: openings of film reviews; model: the policy writes them, from its BOS token;
    environment: the environment makes up its tasks, `limit` of them or 1,024; a file
    (jsonl, json, csv, tsv, parquet, or txt with one prompt a line), beside the recipe or from where
    the command runs; or a dataset on the hub. With `shuffle_buffer` also several files: a list, or
    a name with * in it."""
    shuffle_buffer: Count | None = None
    """Read the prompts as they are used, for data larger than memory, and draw each from the next
    so many; the first of all are held out. None: read all of them first."""
    subset: Text | None = None
    """Configuration of a hub dataset."""
    split: Text = "train"
    """Split of a hub dataset."""
    column: Text | None = None
    """Column with the prompts. None: the only one, or prompt, query, text or messages."""
    template: Text | None = None
    """A prompt made of columns, as "Review: {text}"; None: the column as it is."""
    chat: bool | None = None
    """Make each text the user's message of a chat. None: if the model has a chat template, which
    has not written the texts already, and they are no openings to go on from: those of starter and
    model, and what has `prefixes` or `cut_tokens`. Prompts that are chats stay chats."""
    system: Text | None = None
    """System message of each chat."""
    chat_template_kwargs: Values | None = None
    """What the chat template is told besides the messages, as {enable_thinking: false}."""
    prefixes: Texts = ()
    """Control prefixes: every prompt comes with each of them in turn."""
    cut_tokens: CountRange | None = None
    """Keep the first n tokens of each text, n drawn between these two."""
    min_tokens: Count | None = None
    """Leave out prompts of fewer tokens."""
    max_tokens: Count | None = None
    """Leave out prompts of more tokens."""
    limit: Count | None = None
    """Use at most so many prompts."""
    held_out: Annotated[Whole, "an integer >= 0 (a file of them is held_out_prompts)"] = 256
    """Prompts held out for evaluation (at least 128 make a fair mean)."""
    held_out_prompts: Text | None = None
    """A file or dataset of its own for them; None: they are split off the prompts."""
    deduplicate: bool = True
    """Use equal prompts once, so that no held-out prompt is trained on."""
    shuffle: bool = True
    """Shuffle the prompts before they are split."""
    model_prompts: Count = 1024
    """Prompts to sample if the model writes them."""
    model_prompt_tokens: CountRange = (2, 8)
    """Their tokens: at least and at most."""

    @property
    def sends_chats(self) -> bool | None:
        """Whether texts are sent as chats; None: if the model has a chat template."""
        openings = self.prompts in (STARTER, "model") or self.prefixes or self.cut_tokens
        return False if self.chat is None and openings else self.chat

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong with settings that each are in order."""
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            yield "min_tokens", f"be <= max_tokens ({self.max_tokens})", "lower it"
        if self.held_out == 0 and self.held_out_prompts is not None:
            yield "held_out_prompts", "be None with held_out 0", "set it to null, or held_out > 0"
        if self.system is not None and self.sends_chats is False:
            yield "system", "be None where texts are sent as they are", "set chat: true"
        if len(set(self.prefixes)) < len(self.prefixes):
            yield "prefixes", "differ from each other"
        if not all(prefix.strip() for prefix in self.prefixes):
            yield "prefixes", "be more than blanks"
        if self.chat and self.prefixes:
            yield "prefixes", "be empty for chats", "write them into the template"
        if self.shuffle_buffer is None:
            if not isinstance(self.prompts, str) or "*" in self.prompts:
                yield "prompts", "be one file without `shuffle_buffer`", "set shuffle_buffer: 1000"
        elif self.prompts in (STARTER, "model"):
            yield "shuffle_buffer", f"be None for the prompts of {self.prompts!r}"
        elif not self.shuffle:
            yield "shuffle", "be true with `shuffle_buffer`", "or set shuffle_buffer: 1"


@section
class SamplingConfig:
    """How responses are written. Their temperature is `ppo.temperature`."""

    max_new_tokens: Count = 24
    """Most tokens of a response."""
    shortest_limit: Count | None = None
    """Draw the limit of each response between this and `max_new_tokens`; None: it is fixed."""
    group_size: Count = 1
    """Responses to each prompt. RLOO and GRPO compare the responses of a group."""
    eos: bool = True
    """Let the EOS token end a response."""
    stop_strings: Texts = ()
    """Texts that end a response too."""
    add_bos: bool = True
    """Begin prompts with the BOS token, if there is one and the tokenizer does not do it itself."""
    max_rows: Count | None = None
    """Most responses written at once; None: all."""
    parts: Count = 1
    """Write each batch in so many parts, and score one while the next is written: for a reward that
    waits for a server. It must not compare the responses of a whole batch."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong with settings that each are in order."""
        if self.shortest_limit is not None and self.shortest_limit > self.max_new_tokens:
            yield "shortest_limit", f"be <= max_new_tokens ({self.max_new_tokens})", "lower it"


@section
class RewardConfig:
    """One scorer; the rewards of a recipe are added up with their weights."""

    kind: Kind = "classifier"
    """classifier: a class of a sequence classifier. reward_model: a sequence model with one output.
    steps: a process reward model. function: a Python function from texts to numbers. endpoint: a
    server. control: a classifier, and for each control prefix the range that its probability is to
    be in. math: whether the final answer is right. code: whether its tests are passed. json, regex,
    format: whether a response is as it must be. repetition, length: penalties. environment: what
    the environment gave. human: people judge, and the training waits for them."""
    name: Text = STARTER
    """A folder or hub name; starter: the sentiment classifier that ships with trl. Of a function:
    file.py:function, beside the recipe, or package.module:function, which runs after --trust. Of an
    endpoint: its URL, with secrets as ${NAME} of the environment. Of human: the file of items and
    answers; starter: human.votes.sqlite in the folder of the run."""
    label: Text = "POSITIVE"
    """Class of the classifier that counts, by name or index."""
    output: Literal["logit", "probability", "log_odds"] = "logit"
    """What counts of it."""
    weight: float = 1.0
    """Factor on this reward; negative to punish. 0: only measured, on the held-out prompts."""
    title: Text | None = None
    """What figures call it; None: made from the rest."""
    targets: RangeOfEach = field(default_factory=dict)
    """Of a control: the wanted range of the probability for each prefix of `data.prefixes`."""
    target_weights: WeightOfEach = field(default_factory=dict)
    """Of a control: factors on the reward of some prefixes, for targets that are harder to hit."""
    arguments: Values = field(default_factory=dict)
    """Of math, code, json, regex, format, repetition and length: those of their scorer, MathScorer
    and so on, as {key: answer}. Of steps: separator, marker, label, label_tokens, output,
    chat_template, batch_size, max_length. Of a reward_model: by_token, gamma, and the last three.
    Of a function with a parameter `response_steps`: separator. Of human: those of HumanScorer, as
    {question: rating, timeout: 600}; its fallback is the title of another reward."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong with settings that each are in order."""
        of_kind = f"for kind {self.kind!r}"
        if self.kind == "control" and not self.targets:
            yield "targets", "name a range for each prefix of a control"
        if not set(self.target_weights) <= set(self.targets):
            yield "target_weights", f"name prefixes of targets, {list(self.targets)}"
        if self.kind == "function" and ":" not in self.name:
            yield "name", f"be file.py:function or package.module:function {of_kind}"
        if self.kind != "control" and self.targets:
            yield "targets", f"be left out {of_kind}", "or set kind: control"
        if self.kind != "classifier" and self.output != "logit":
            yield "output", f"be left out {of_kind}"
        if self.kind not in ("classifier", "control") and self.label != "POSITIVE":
            yield "label", f"be left out {of_kind}"
        if self.kind in (*CHECKS, ENVIRONMENT) and self.name != STARTER:
            yield "name", f"be left out {of_kind}", "what it needs stands in `arguments`"
        if self.kind not in (HUMAN, *CHECKS) and set(self.arguments) - set(
            allowed := ARGUMENTS.get(self.kind, ())
        ):
            yield "arguments", f"be {', '.join(allowed) or 'left out'} {of_kind}"
        if self.kind == "endpoint" and hidden(self.name) != self.name:
            fix = "write ${NAME} in their place, and set NAME in the environment"
            yield "name", "hold no key, no user and no password, which others would read", fix
        if self.kind in ("reward_model", "steps", "endpoint") and self.name == STARTER:
            yield "name", f"be given {of_kind}", "trl ships a classifier only"


@section
class EnvironmentConfig:
    """What the policy talks with, turn by turn: see docs/howto/environments.md."""

    name: Text | None = None
    """A class, as file.py:Maze beside the recipe, or package.module:Maze, which runs after --trust.
    In a file also `class`. None: tools alone."""
    tools: Texts = ()
    """Functions that the policy may call, named likewise."""
    max_turns: Count = 8
    """Most turns of the policy, each of at most `sampling.max_new_tokens`."""
    max_tokens: Count = 1024
    """Most tokens of all turns and replies together."""
    max_tool_calls: Count | None = None
    """Most calls of tools in an episode; None: no such limit."""
    call_format: Text | None = None
    """How a call is written; None: as the chat template has it. See `ChatTurns`."""
    seconds: Positive = 10.0
    """Most time for a tool or a step; what takes longer is told to the policy as an error."""

    @property
    def code(self) -> tuple[RewardConfig, ...]:
        """What of it is code, named as functions are."""
        names = filter(None, (self.name, *self.tools))
        return tuple(RewardConfig(kind="function", name=name) for name in names)

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong with settings that each are in order."""
        if self.name is None and not self.tools:
            yield "name", "be given, or `tools`", "file.py:Maze"
        for path, name in (
            ("name", self.name),
            *((f"tools[{i}]", t) for i, t in enumerate(self.tools)),
        ):
            if name is not None and ":" not in name:
                yield path, "be file.py:name or package.module:name"


@section
class ScheduleConfig:
    """How the learning rate goes."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up: down to `final` in a line or along a cosine, or as it is."""
    warmup_steps: Whole = 0
    """Steps over which it rises from 0 at first."""
    final: Share = 0.0
    """Share of the learning rate that is left at the end."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong with settings that each are in order."""
        if self.kind == "constant" and self.final != 0:
            yield "final", "be left out for kind 'constant'", "or set kind: linear"


@section
class CheckpointConfig:
    """What is kept to go on from."""

    every: Count = 50
    """Write one every so many steps (one more at the end)."""
    keep: Count = 2
    """Keep the last so many."""
    keep_optimizer: bool = True
    """Keep them as they are when the last step is made, to make more steps one day; false: keep one
    then, without the optimiser's state, which is two thirds of it."""
    best: Text | None = "held_out/reward/mean"
    """Keep the policy that is best by this figure of an evaluation in best/; None: do not."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less of that figure is better."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong with settings that each are in order."""
        if self.best is not None and not self.best.startswith("held_out/"):
            yield "best", "be a figure of the evaluation, held_out/…"


@section
class StopConfig:
    """When to stop before the last step."""

    kl: Positive | None = None
    """Stop once the KL of a batch to the reference exceeds this, in nats per response."""
    patience: Count | None = None
    """Stop after so many evaluations in a row without a new best (by `checkpoints.best`)."""
    min_gain: NotNegative = 0.0
    """By how much an evaluation must be better to be a new best."""


@section
class PretrainingConfig:
    """Text for a mixed pretraining loss (InstructGPT, arXiv:2203.02155, equation 2); its weight is
    `ppo.pretraining_coef`.
    """

    text: Text | None = None
    """A file or hub dataset, as for prompts; None: no such loss."""
    subset: Text | None = None
    """Configuration of a hub dataset."""
    split: Text = "train"
    """Split of a hub dataset."""
    column: Text | None = None
    """Column with the text."""
    tokens: Annotated[int, Field(gt=1)] = 64
    """Tokens of each row."""


@section
class TrackingConfig:
    """Where figures go besides metrics.jsonl."""

    to: Annotated[tuple[Tracker, ...], f"a list of {', '.join(TRACKERS)}"] = ()
    """Any of tensorboard, wandb, trackio, mlflow."""
    project: Text = "trl"
    """Project there."""
    name: Text | None = None
    """Name of the run there; None: that of its folder."""


Scorers = Annotated[tuple[RewardConfig, ...], "a list of scorers, [{kind: …}]"]


@section
class Scoring:
    """The part of a recipe that scores, for `trl score`."""

    reward: Scorers = (RewardConfig(),)
    """The scorers."""


@section
class Recipe:
    """Settings of `trl train`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    environment: EnvironmentConfig | None = None
    """A class of tools or of a game, or functions, that responses are conversations with."""
    reward: Scorers = (RewardConfig(),)
    """The scorers."""
    ppo: PPOConfig = field(default_factory=PPOConfig.that_learns)
    steps: Count | None = None
    """Steps, each on `ppo.batch_size` responses. None: as `episodes` says, else 100."""
    episodes: Count | None = None
    """Responses in all, in place of `steps`."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval_every: Count = 25
    """Measure on the held-out prompts every so many steps, at the start and at the end."""
    keep_rollouts: Whole = 4
    """Write the first so many responses of each step, with their scores, to rollouts.jsonl."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: Whole = 0
    """Seed of everything that is random: prompts, sampling, shuffling, new weights."""
    out: Text = "runs/run"
    """Folder of the run."""
    profile: Text | None = None
    """Folder for where the time went: a table, and traces of two steps; None: not looked at."""
    quiet: bool = False
    """Show nothing but errors."""

    @classmethod
    def completed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """Return what a file and flags say, with what learns for settings that they leave open."""
        ppo, sampling, model = (tree.get(name, {}) for name in ("ppo", "sampling", "model"))
        if not isinstance(ppo, dict) or not isinstance(sampling, dict):
            return tree  # which is refused
        reference = not isinstance(model, dict) or model.get("reference") != "none"
        ppo = learning_defaults(ppo, reference=reference) | ppo
        size = group_size(str(ppo.get("algorithm", "ppo")))
        return _with_environment(tree | {"ppo": ppo, "sampling": {"group_size": size} | sampling})

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        if self.episodes is not None:
            return max(1, self.episodes // self.ppo.batch_size)
        return 100 if self.steps is None else self.steps

    @property
    def seeded_ppo(self) -> PPOConfig:
        """The settings of PPO, with the seed of the run if they have none of their own."""
        return replace(self.ppo, seed=self.ppo.seed or self.seed)

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what sections that each are in order ask of each other."""
        places = {"batch_size": "ppo", "group_size": "sampling", "parts": "sampling"}
        sampling, patience = self.sampling, self.stop.patience
        for name, *more in sampling_contradictions(self.ppo, sampling.group_size, sampling.parts):
            yield f"{places[name]}.{name}", *more
        if self.steps is not None and self.episodes is not None:
            yield "episodes", f"be None beside `steps` ({self.steps})", "keep one of the two"
        if self.episodes is not None and self.episodes < self.ppo.batch_size:
            yield "episodes", f"be >= ppo.batch_size ({self.ppo.batch_size})"
        if self.schedule.warmup_steps >= self.total_steps:
            rule = f"be < the steps of the run ({self.total_steps}, by `steps` or `episodes`)"
            yield "schedule.warmup_steps", rule, "lower it"
        if patience is not None and self.data.held_out == 0:
            yield "data.held_out", "be > 0 with stop.patience", "it compares evaluations"
        if patience is not None and self.checkpoints.best is None:
            yield "checkpoints.best", "name a figure with stop.patience"
        if self.model.reference == "none" and self.stop.kl is not None:
            yield "stop.kl", "be None with model.reference 'none', which measures no KL"
        if self.model.reference == "none" and self.ppo.init_kl_coef != 0:
            yield "ppo.init_kl_coef", "be 0 with model.reference 'none'"
        if self.model.critic != "same" and not FACTS[self.ppo.algorithm].critic:
            yield "model.critic", f"be same with ppo.algorithm {self.ppo.algorithm!r}"
        if (self.pretraining.text is None) != (self.ppo.pretraining_coef == 0):
            rule = f"be set together with ppo.pretraining_coef ({self.ppo.pretraining_coef})"
            yield "pretraining.text", rule
        ends = sampling.eos or sampling.stop_strings
        if self.ppo.missing_eos_penalty is not None and not ends:
            rule = "be None if nothing ends a response"
            yield "ppo.missing_eos_penalty", rule, "set sampling.eos"
        prefixes, kinds = list(self.data.prefixes), {reward.kind for reward in self.reward}
        if self.environment is None and ENVIRONMENT in kinds:
            yield "reward", "have no kind environment without `environment`"
        if self.environment is None and self.data.prompts == ENVIRONMENT:
            yield "data.prompts", "not be environment without `environment`"
        if all(reward.weight == 0 for reward in self.reward):
            yield "reward", "have a scorer with a weight other than 0"
        for index, reward in enumerate(self.reward):
            most = {"pair": 2, "best": 4}.get(str(reward.arguments.get("question")))
            if reward.kind == HUMAN and most and not 2 <= sampling.group_size <= most:
                yield "sampling.group_size", f"be 2 to {most} for people who compare responses"
            if reward.kind == "control" and set(reward.targets) != set(prefixes):
                yield f"reward[{index}].targets", f"be for each of data.prefixes {prefixes} alone"
        if prefixes and "control" not in kinds and self.data.prompts == STARTER:
            yield "data.prefixes", "be empty unless a reward of kind 'control' tells them apart"


def _with_environment(tree: dict[str, Any]) -> dict[str, Any]:
    """Return settings with `class` as the name of the environment, and its rewards if no others."""
    section = tree.get("environment")
    if not isinstance(section, dict):
        return tree
    section = {{"class": "name"}.get(name, name): value for name, value in section.items()}
    return {"reward": [{"kind": ENVIRONMENT}]} | tree | {"environment": section}


@section
class SupervisedRecipe:
    """Settings that all fits of transformers' `Trainer` share."""

    task: Literal["classifier", "reward"] = "classifier"
    """What tells this recipe from one of reinforcement learning."""
    model: Text = STARTER
    """A folder or hub name to start from."""
    train: Text = "train.jsonl"
    """What to learn from."""
    test: Text | None = None
    """What to measure on."""
    subset: Text | None = None
    """Configuration of a hub dataset."""
    epochs: Positive = 1.0
    """Passes over what is learnt from."""
    batch_size: Count = 64
    """Texts of an update."""
    learning_rate: Positive = 5e-5
    """Highest learning rate of AdamW; it rises for a tenth of the run and falls to 0."""
    weight_decay: NotNegative = 0.01
    """Weight decay of the matrices."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout while it trains; None: as the model has it (starter: none)."""
    limit: Count | None = None
    """Use at most so many rows of `train`, drawn at random."""
    log_every: Count = 50
    """Write the mean loss and accuracy of every so many updates."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the matrix products."""
    seed: Whole = 0
    """Seed of shuffling, crops and new weights."""
    out: Text = "runs/fit"
    """Folder of the run."""
    quiet: bool = False
    """Show nothing but errors."""


@section
class ClassifierRecipe(SupervisedRecipe):
    """Settings of `trl train` for a sentiment classifier, or any other, to score texts with."""

    task: Annotated[Literal["classifier"], "classifier or reward, or left out for PPO"] = (
        "classifier"
    )
    """What tells this recipe from one of reinforcement learning."""
    model: Text = STARTER
    """A folder or hub name to start from; starter: a new small BERT of the starter's size, with the
    tokenizer of the classifier that ships with trl."""
    train: Text = "stanfordnlp/imdb"
    """Labelled texts: a file (jsonl, json, csv, tsv, parquet), or a dataset on the hub, of which
    name:split is another split than train."""
    test: Text | None = None
    """Labelled texts to measure on. None: the split test of the hub dataset in `train`."""
    text_column: Text = "text"
    """Column with the text."""
    label_column: Text = "label"
    """Column with the label: a whole number from 0, or a name as in `labels`."""
    labels: Texts = ("NEGATIVE", "POSITIVE")
    """Names of the labels, in order."""
    max_length: Count = 256
    """Cut texts to so many tokens."""
    head_share: Share = 1.0
    """Share of `max_length` that is kept from the start of a longer text; the rest is kept from its
    end. A film review gives its verdict there: 0.25 reads a quarter from the start."""
    crop_words: CountRange | None = None
    """Train on random pieces of so many words of a text, at least and at most; None: on whole
    texts. Pieces teach it to judge short texts, as a language model writes them."""
    test_limit: Count | None = None
    """Measure on at most so many test texts, drawn at random."""
    opening_words: Count = 25
    """Measure on the first so many words of each test text too."""
    out: Text = "runs/classifier"
    """Folder of the run."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong with settings that each are in order."""
        if len(self.labels) < 2:
            yield "labels", "name at least two labels"
        if len({name.lower() for name in self.labels}) < len(self.labels):
            yield "labels", "differ from each other in more than capital letters"


@section
class RewardRecipe(SupervisedRecipe):
    """Settings of `trl reward`: a reward model from what people preferred."""

    task: Annotated[Literal["reward"], "classifier or reward, or left out for PPO"] = "reward"
    """What tells this recipe from one of reinforcement learning."""
    model: Text = STARTER
    """A folder or hub name of a sequence classifier, an encoder or a causal model, to start from;
    its head is new unless it has one output. starter: the small BERT that ships with trl."""
    train: Text = "preferences.jsonl"
    """Preferences: a file (jsonl, json, csv, tsv, parquet) or a dataset on the hub. Rows have
    prompt, chosen and rejected, texts or messages, and maybe margin and weight; or prompt,
    responses and votes, as `trl label --export` writes them."""
    test: Text | None = None
    """Preferences to measure on. None: those of some prompts of `train`, see `held_out`."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts of `train` that is measured on, if there is no `test`; of the rows where
    there are fewer than ten prompts."""
    reference: Text | None = None
    """Texts on which rewards are to have mean 0 and standard deviation 1: a table with columns
    prompt and response, or text, such as `trl sample --out` writes of the model to tune. None: all
    responses of `train`."""
    lora: LoRAConfig | None = None
    """Train a low-rank adapter and the head only; it is merged into the model that is saved."""
    epochs: Positive = 2.0
    """Passes over the preferences."""
    batch_size: Count = 16
    """Preferences of an update."""
    max_length: Count | None = None
    """Cut texts, at their beginning, to so many tokens; None: to what the model can take."""
    ties: Literal["davidson", "half", "ignore"] = "davidson"
    """What a vote for no response says: davidson: that rewards are alike, with a likelihood of its
    own; half: it counts for each response in equal parts; ignore: nothing."""
    margin_scale: NotNegative = 1.0
    """Factor on the margins of the rows; 0: they are not looked at."""
    centring_coef: NotNegative = 0.0
    """Weight of the squared sum of the rewards of a prompt, which keeps them near 0."""
    curve: Annotated[tuple[Count, ...], "a list of integers > 0"] = ()
    """Also train on the first so many preferences each, for a curve over their number."""
    out: Text = "runs/reward"
    """Folder of the run."""


@section
class SimulatedConfig:
    """Choices in place of people's, to try a loop out, by a reward that the loop does not see."""

    reward: Scorers = (RewardConfig(),)
    """The hidden reward."""
    noise: Share = 0.1
    """Share of the choices that are made blindly."""
    temperature: NotNegative = 0.0
    """The others are drawn by the softmax of the reward over this; 0: the best response."""


@section
class PeopleConfig:
    """Who chooses, how often and among what."""

    choices: Count = 1000
    """Choices in all, each of the best of some responses to a prompt."""
    first: Count | None = None
    """Of them before the first step; None: a quarter."""
    rounds: Count = 4
    """Reward models, each trained anew on all choices so far; 1: all are made before the first
    step, of what the model wrote untuned."""
    responses: Annotated[int, Field(ge=2, le=4)] = 4
    """Responses to choose among."""
    per_item: Count = 1
    """People who choose among the same responses; each counts as a choice."""
    minutes: Positive | None = None
    """Most minutes that it waits for choices, in all; then it goes on with those that there are."""
    pick: Literal["random", "disagreement"] = "random"
    """What is asked: prompts as they come; or those of `candidates` times as many on which the
    reward models of the ensemble disagree most about the choice."""
    candidates: Count = 4
    """Prompts that are answered for each that is asked, by disagreement."""
    ensemble: Count = 1
    """Reward models of a round, whose mean is the reward; each takes its time to train and to
    score."""
    gold: Text | None = None
    """A file of items with the right answer, `gold`, which are strewn among the others; who is no
    better at them than chance is named."""
    guidelines: Text | None = None
    """A file in Markdown on how to choose, shown on the page."""
    annotators: Texts = ("me",)
    """Who chooses; each gets a link."""
    port: Whole = 8321
    """Of the page, on this machine; 0: any that is free."""
    simulated: SimulatedConfig | None = None
    """Let a hidden reward choose in place of people."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong with settings that each are in order."""
        if self.pick == "disagreement" and self.ensemble < 2:
            yield "ensemble", "be >= 2 for pick 'disagreement'", "set ensemble: 3"
        if (self.first or 0) > self.choices:
            yield "first", f"be <= choices ({self.choices})", "lower it"
        if self.choices // self.per_item < self.rounds:
            yield "rounds", f"be <= the items asked, {self.choices // self.per_item}", "lower it"
        if self.per_item > len(self.annotators):
            yield "annotators", f"name as many people as judge each item ({self.per_item})"


@section
class PreferencesRecipe(Recipe):
    """Settings of a loop of choices, reward models and PPO, as Ziegler et al. have it
    (arXiv:1909.08593).
    """

    task: Annotated[Literal["preferences"], "preferences"] = "preferences"
    """What tells this recipe from one of a reward that is there already."""
    people: PeopleConfig = field(default_factory=PeopleConfig)
    reward_model: Values = field(default_factory=dict)
    """Settings of `trl reward`, as {epochs: 2}; its model is by default the one that is tuned."""
    reward: Scorers = ()
    """Scorers besides, whose rewards are added; with weight 0 they are measured only."""
    out: Text = "runs/preferences"
    """Folder of the loop."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yield what is wrong with settings that each are in order."""
        yield from (told for told in Recipe.contradictions(self) if told[0] != "reward")
        if self.environment is not None:
            yield "environment", "be None where people choose among responses"
        if self.data.shuffle_buffer is not None:
            yield "data.shuffle_buffer", "be None where people choose among responses"
        if self.people.rounds > self.total_steps:
            yield "people.rounds", f"be <= the steps ({self.total_steps})", "lower it"
        own = {"train", "test", "out", "seed", "quiet", "task"} & set(self.reward_model)
        if own:
            yield "reward_model", f"not have {', '.join(sorted(own))}, which follow from the loop"


TASKS: dict[str, type[Any]] = {
    "classifier": ClassifierRecipe,
    "reward": RewardRecipe,
    "preferences": PreferencesRecipe,
}
"""The recipes of other tasks than reinforcement learning by a reward that is there."""
