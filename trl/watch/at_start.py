"""Symptoms that can be known before the first step, written as those of `trl.watch.symptoms`."""

from __future__ import annotations

from typing import Any

from trl.watch.history import History, Seen, before_start

CUTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("top_p", "typical_p", "repetition_penalty"), (None, 1.0)),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size", "min_length", "min_new_tokens"), (None, 0)),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff"), (None, 0.0)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"), (None, [])),
}
"""Settings of a `generation_config` that change what `generate` draws from, and where they do not.
"""


@before_start(
    "The sampler draws from a cut distribution ({cuts}), training scores the model's whole one.",
    "The settings of generation for users were taken over for training.",
    fix="Leave top_k, top_p and min_new_tokens of the Sampler at their defaults to train. The KL "
    "that is measured can be driven negative otherwise.",
)
def sampler_cuts(run: History) -> Seen:
    """The sampler says itself what it cuts."""
    cuts = getattr(run.sampler, "cuts", ())
    return {"cuts": ", ".join(cuts)} if cuts else None


@before_start(
    "The policy's generation_config has {named}. Sampler does not use them: it draws from the "
    "model's whole distribution, which is the one that is trained. `generate` uses them.",
    "They came with the model, for the text that users see.",
    fix="Judge the run by its own samples. To see the same with `generate`, pass do_sample=True, "
    "top_k=0, top_p=1.0 and the temperature of `ppo.temperature`. If you train on what `generate` "
    "wrote, pass them there too, or the KL goes negative.",
)
def generation_config_cuts(run: History) -> Seen:
    """Those of the settings that are not where they change nothing."""
    values = {name: getattr(run.generation_config, name, None) for name in CUTS}
    named = [f"{name}={value}" for name, value in values.items() if value not in CUTS[name]]
    return {"named": ", ".join(named)} if named else None


@before_start(
    "Responses are to end by themselves, but there is no EOS token and no stop string to end one.",
    "The tokenizer has no EOS token.",
    "`sampling.eos` is off.",
    fix="Set `sampling.eos: true` and the tokenizer's eos_token, or set `sampling.stop_strings`.",
)
def no_end(run: History) -> Seen:
    """A response may end at an EOS token or at a stop string; a sampler knows of both."""
    sources = (run.tokenizer, run.generation_config)
    can_end = any(getattr(source, "eos_token_id", None) is not None for source in sources)
    if run.sampler is not None:
        can_end = bool(run.sampler.stop)
    must_end = run.config.missing_eos_penalty is not None
    return {} if must_end and not can_end else None


@before_start(
    "`ppo.adaptive_kl` is on and `ppo.init_kl_coef` is 0: the controller multiplies, so the "
    "coefficient stays 0 and `ppo.kl_target` does nothing.",
    "The KL penalty was switched off by its coefficient alone.",
    fix="Set `ppo.adaptive_kl: false` to say so, or an `ppo.init_kl_coef` of 0.01 for it to move.",
)
def kl_coef_stays_0(run: History) -> Seen:
    """The settings tell."""
    return {} if run.config.adaptive_kl and run.config.init_kl_coef == 0 else None
