"""What releases 0.2 to 0.11 of TRL, and 1.x, called things, and what each of them is here."""

from __future__ import annotations

GUIDE = "docs/moving.md has the rest"
_GONE = "is not here, where PPO and its relatives are all there is: use the package that you know"

NAMES = {
    "AutoModelForCausalLMWithValueHead": "is CausalLMWithValueHead here",
    "AutoModelForSeq2SeqLMWithValueHead": "is Seq2SeqLMWithValueHead here",
    "PreTrainedModelWrapper": "is CausalLMWithValueHead or Seq2SeqLMWithValueHead here",
    "create_reference_model": "is not needed: PPOTrainer(model) makes the reference",
    "set_seed": "is PPOConfig(seed=...) and Sampler(seed=...) here, or accelerate.utils.set_seed",
    "LengthSampler": "is trl.core.LengthSampler here, or max_new_tokens=(shortest, longest)",
    "BestOfNSampler": "is Sampler(tokenizer, group_size=n) here, whose responses a scorer ranks",
    "TextEnvironment": "is a class of tools here, `environment` of trl.train: "
    "docs/howto/environments.md",
    "TextHistory": "is a row of trl.environments.Episodes here: docs/howto/environments.md",
    "RewardTrainer": "is `trl reward preferences.jsonl` here, and RewardModelScorer(folder) scores "
    "with what it wrote: docs/howto/reward-model.md",
    "RewardConfig": "is trl.config.recipe.RewardConfig here, a scorer of a recipe; that of "
    "RewardTrainer is trl.config.recipe.RewardRecipe",
    "PPOv2Trainer": "is trl.train here",
    "PPOv2Config": "is PPOConfig here",
    "GRPOTrainer": "is trl.train(..., algorithm='grpo') here: docs/howto/coming.md",
    "GRPOConfig": "is PPOConfig(algorithm='grpo', ...) here: docs/howto/coming.md",
    "RLOOTrainer": "is trl.train(..., algorithm='rloo') here: docs/howto/coming.md",
    "RLOOConfig": "is PPOConfig(algorithm='rloo', ...) here: docs/howto/coming.md",
    "ModelConfig": "is trl.config.recipe.ModelConfig here, a section of a recipe",
    "get_peft_config": "is peft.LoraConfig(...), passed as peft_config",
    **dict.fromkeys(
        [
            f"{kind}{what}"
            for kind in ("SFT", "DPO", "ORPO", "CPO", "KTO", "BCO", "OnlineDPO", "DDPO", "GKD")
            for what in ("Trainer", "Config")
        ],
        _GONE,
    ),
    **dict.fromkeys(("IterativeSFTTrainer", "AlignPropTrainer", "NashMDTrainer"), _GONE),
}
"""What `from trl import` gave."""

OF_CORE = {
    "respond_to_batch": "is trl.gpt2.respond_to_batch here, or a Sampler",
    "set_seed": NAMES["set_seed"],
    "listify_batch": "is list(batch)",
}
"""What `from trl.core import` gave."""

MODULES = {
    "trl.trainer": "import from trl itself: from trl import PPOTrainer, PPOConfig",
    "trl.extras": f"BestOfNSampler {NAMES['BestOfNSampler']}",
    "trl.environment": f"TextEnvironment {NAMES['TextEnvironment']}",
    "trl.experimental": "import from trl itself: from trl import train, PPOTrainer, PPOConfig",
}
"""Modules that there were."""

OF_TRAIN = {
    "num_generations": "sampler_kwargs={'group_size': ...}",
    "beta": "init_kl_coef=...",
    "max_completion_length": "max_new_tokens=...",
    "reward_funcs": "reward=[...]",
    "reward_weights": "reward={function: weight}",
    "train_dataset": "prompts=...",
    "eval_dataset": "held_out=...",
    "processing_class": "tokenizer=...",
    "per_device_train_batch_size": "batch_size=..., of all processes",
    "max_steps": "steps=...",
    "epsilon": "cliprange=...",
    "output_dir": "out=...",
    "system_prompt": "system=...",
    "args": "config=...",
    **{
        name: f"environment_kwargs={{{name!r}: ...}}"
        for name in ("max_turns", "max_tool_calls", "call_format", "serial")
    },
    "max_tokens": "max_new_tokens=..., of conversations environment_kwargs={'max_tokens': ...}",
    **dict.fromkeys(("lora", "peft", "lora_config"), "peft_config=peft.LoraConfig(...)"),
    "out_dir": "out=...",
    "eval_prompts": "held_out=...",
    "device": "no device: it is accelerate's, a GPU if there is one (ACCELERATE_USE_CPU=1: none)",
}
"""What parameters of GRPOTrainer and its config are in `trl.train`."""

ARGUMENTS = {
    "tokenizer": "belongs to Sampler(tokenizer), which writes the responses",
    "processing_class": "is `tokenizer` of trl.train, or belongs to Sampler(tokenizer)",
    **dict.fromkeys(
        ("dataset", "train_dataset", "eval_dataset", "data_collator", "training_data_collator"),
        "goes away: loop over a DataLoader or a list of prompts of your own, or use trl.train",
    ),
    "lr_scheduler": "goes away: step it yourself after `step`; trl.train has schedules",
    "num_shared_layers": "is unfrozen_layers=k of CausalLMWithValueHead.from_pretrained",
    "args": "is `config`, a PPOConfig",
    "reward_model": "is a scorer, RewardModelScorer(name), of trl.train; `step` gets its scores",
    "value_model": "is `critic` of CausalLMWithValueHead.from_pretrained, or its value head",
    "peft_config": "is that of trl.train, or of CausalLMWithValueHead.from_pretrained",
}
"""Of `PPOTrainer`."""

METHODS = {
    "generate": "is Sampler(tokenizer, max_new_tokens=...)(model, queries) here",
    "log_stats": "goes away: what `step` returns is a plain dict; `trl train` sends it to trackers",
    "dataloader": "goes away: use a DataLoader of your own",
    "dataset": "goes away: use a DataLoader or a list of prompts of your own",
    "tokenizer": "belongs to Sampler",
    "save_pretrained": "is model.save_pretrained(folder) here",
    "push_to_hub": "is model.push_to_hub(name) here",
    "train": "is trl.train(model, prompts, reward) here",
    "create_model_card": "goes away",
    "prepare_dataloader": "goes away: use a DataLoader of your own",
}
"""Attributes of a `PPOTrainer`."""

LOADING = {
    **dict.fromkeys(
        ("v_head_init_strategy", "v_head_initializer_range", "summary_dropout_prob"),
        "goes away: the value head starts with zero output, and nothing is dropped in training",
    ),
    **dict.fromkeys(
        ("reward_adapter", "reward_adapter_name"),
        "goes away: score with RewardModelScorer(folder), of the base with that adapter merged",
    ),
    **dict.fromkeys(
        ("load_in_8bit", "load_in_4bit"),
        "is quantization_config=transformers.BitsAndBytesConfig(...) now",
    ),
}
"""Arguments of `from_pretrained` of a model with a value head."""

FIELDS = {
    "gradient_accumulation_steps": "is forward_batch_size, rows of a pass, of any gradient",
    "kl_penalty": "is kl_estimator: 'kl' is 'k1', 'mse' is 'k2'; 'abs' and 'full' go away",
    "use_score_scaling": "is scale_scores",
    "use_score_norm": "is center_scores beside scale_scores",
    "score_clip": "is clip_scores",
    "gradient_checkpointing": "is model.gradient_checkpointing_enable(), before a step",
    "steps": "is `steps` of trl.train, or your own loop's",
    "num_mini_batches": "is minibatch_size: rows of an update, rather than how many updates",
    "response_length": "is max_new_tokens of trl.train and Sampler",
    "total_episodes": "is `steps` of trl.train, each of batch_size responses",
    "accelerator_kwargs": "is PPOTrainer(accelerator=Accelerator(...))",
    **dict.fromkeys(("bf16", "fp16"), "is precision='bf16' or 'fp16'"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "world_size"), "is batch_size, over all processes"
    ),
    **dict.fromkeys(
        ("log_with", "tracker_kwargs", "tracker_project_name", "project_kwargs", "report_to"),
        "goes away: a recipe has tracking.to",
    ),
    **dict.fromkeys(
        ("model_name", "task_name", "exp_name", "query_dataset", "reward_model", "output_dir"),
        "goes away: it set nothing of PPO",
    ),
}
"""Fields of `PPOConfig`, besides those that have another spelling."""


def told(name: str, what: str) -> str:
    """Return the sentence on something of older releases."""
    return f"`{name}` of TRL {what}; {GUIDE}."


def field_told(name: str) -> str:
    """Return ' That of …' for a field of an older `PPOConfig`, or nothing."""
    return f" That of TRL {FIELDS[name]}." if name in FIELDS else ""
