"""A value head on any causal or encoder-decoder language model of transformers.

model = CausalLMWithValueHead.from_pretrained("Qwen/Qwen3-0.6B-Base")
model = CausalLMWithValueHead.from_pretrained("gpt2", unfrozen_layers=2)
model = CausalLMWithValueHead.from_pretrained("gpt2", peft_config=LoraConfig(r=8))
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from trl.anatomy import decoder, keep_hidden_states, language_model
from trl.config.errors import refuse, shown
from trl.models.adapters import add_adapter, save_adapter, with_adapter_like
from trl.models.checkpoint import ADAPTER_FILE, MODEL_FILE, SavedHead, fill_value_head, save_policy
from trl.models.critic import copied, fit, value_head_of
from trl.models.head import precise_head
from trl.models.loading import OF_ONE_MODEL, load_model
from trl.models.trunk import freeze_lower_layers
from trl.models.value_head import ValueHeadKind, check_head, make_value_head
from trl.models.whole import add_whole_weights

__all__ = ["CausalLMWithValueHead", "OutputWithValue", "Seq2SeqLMWithValueHead", "load_policy"]


@dataclass
class OutputWithValue(ModelOutput):
    """Output of a model with a value head: a tuple whose entries also have names.

    As in the 2020 trl the value comes last: `logits, past, value = model(input_ids)`. What else
    the model returns stands between, by the names of its family.
    """

    loss: Tensor | None = None
    """Language modelling loss; only with `labels`, else left out of the tuple."""
    logits: Tensor | None = None
    """[B, T, V]."""
    past_key_values: Any = None
    """The KV cache (left out of the tuple with use_cache=False)."""
    hidden_states: tuple[Tensor, ...] | None = None
    """Only if asked for with output_hidden_states=True."""
    attentions: tuple[Tensor, ...] | None = None
    """Only if asked for with output_attentions=True."""
    value: Tensor | None = None
    """[B, T], in float32."""

    def __iter__(self) -> Iterator[Any]:  # a plain ModelOutput would unpack to its names
        return iter(self.to_tuple())

    @classmethod
    def of(cls, output: ModelOutput, value: Tensor | None) -> OutputWithValue:
        """Add the values [B, T], if there are any, to the output of a language model."""
        known, result = cls.__dataclass_fields__, cls()
        for name, entry in sorted(output.items(), key=lambda item: item[0] not in known):
            result[name] = entry
        if value is not None:
            result["value"] = value
        return result


class _LMWithValueHead(nn.Module):
    """A language model, plain or with an adapter, and its value head `v_head`."""

    tokenizer: Any = None
    """Saved beside the model, if there is one; `trl.train` puts it here."""

    def __init__(
        self,
        pretrained_model: nn.Module,
        *,
        unfrozen_layers: int | None = None,
        value_head: ValueHeadKind | None = None,
        value_range: tuple[float, float] | None = None,
        critic: nn.Module | Literal["same", "copy"] = "same",
        saved_head: SavedHead | None = None,
    ) -> None:
        super().__init__()
        if hasattr(pretrained_model, "v_head"):
            got = type(pretrained_model).__name__
            rule, fix = "be a model without a value head", "use it as it is"
            refuse("pretrained_model", rule, got, fix, error=TypeError)
        plain = language_model(pretrained_model)
        kind = _kind_for(plain)
        if not isinstance(self, kind):
            rule, got = f"be for {type(self).__name__}", type(plain).__name__
            refuse("pretrained_model", rule, got, f"use {kind.__name__}", error=TypeError)
        if getattr(getattr(pretrained_model, "active_peft_config", 0), "is_prompt_learning", False):
            got = f"{pretrained_model.peft_type.value}, which puts virtual tokens before the text"
            fix = "use LoRA, DoRA, IA3 or another of its kind"
            refuse("peft_config", "change the model's layers", got, fix)
        decoder(plain)  # or an error that says what is missing
        self.pretrained_model = pretrained_model
        self.unfrozen_layers = unfrozen_layers
        if unfrozen_layers is not None:
            if hasattr(pretrained_model, "get_base_model"):
                fix = "an adapter already decides what is trained"
                refuse("unfrozen_layers", "be None beside an adapter", str(unfrozen_layers), fix)
            freeze_lower_layers(plain, unfrozen_layers)
        of_values = {"value_head": value_head, "value_range": value_range}
        self.v_head, self.critic = None, None
        if critic == "same":
            self._add_value_head(saved_head, **of_values)
        else:
            self.critic = self._own_critic(critic, saved_head, **of_values)
        self.train(plain.training)

    def _add_value_head(self, saved: SavedHead | None, value_head: Any, value_range: Any) -> None:
        weight = self.language_model.get_output_embeddings().weight
        weights = None if saved is None else saved.weights
        how = {"value_range": value_range, "saved": weights}
        head = make_value_head(value_head, self.config, weight.shape[1], **how)
        fill_value_head(head, saved)
        self.v_head = head.to(weight.device)

    def _own_critic(self, given: Any, saved: SavedHead | None, **of_values: Any) -> nn.Module:
        """Return the critic of its own: a copy, or what is given, with a value head."""
        if isinstance(given, type(self)):
            if given.v_head is None or of_values != dict.fromkeys(of_values):
                rule = (
                    "have a value head, and `value_head` be None beside it, if it is such a model"
                )
                refuse("critic", rule, fix="pass the language model without a head")
            fit(given, self)
            return given
        if given == "copy":
            inner, unfrozen = copied(self.pretrained_model), None  # what is frozen is so already
        elif isinstance(given, nn.Module):
            inner = with_adapter_like(given, self.pretrained_model)
            unfrozen = self.unfrozen_layers
        else:
            _refuse_critic(given)
        critic = type(self)(inner, unfrozen_layers=unfrozen, saved_head=saved, **of_values)
        fit(critic, self)
        return critic

    @property
    def language_model(self) -> nn.Module:
        """The transformers model that does the work, adapter layers included."""
        return language_model(self.pretrained_model)

    @property
    def config(self) -> PretrainedConfig:
        """The language model's configuration."""
        return self.language_model.config

    @property
    def device(self) -> torch.device:
        """Where the language model's first weights are."""
        return self.language_model.device

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's embedding of tokens."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the language head."""
        return self.language_model.get_output_embeddings()

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Return the number of weights, those of the value head included."""
        chosen = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(weight.numel() for weight in chosen)

    def forward(self, *args: Any, **kwargs: Any) -> OutputWithValue:
        """Return the language model's own output and the values [B, T] of its (decoder's) tokens.

        Takes what the language model takes. There are no values if a critic of its own gives them:
        `model.critic(...)` is asked for those.
        """
        kwargs.pop("return_dict", None)
        plain = self.language_model
        with keep_hidden_states(plain) as kept, precise_head(plain):
            output = self.pretrained_model(*args, return_dict=True, **kwargs)
        return OutputWithValue.of(output, None if self.v_head is None else self.v_head(kept.hidden))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the language model's own method."""
        return self.pretrained_model.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Let training compute the layers again going backward, rather than keep all of them."""
        self.language_model.activation_checkpointing_enable(**kwargs)
        if self.critic is not None:
            self.critic.gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Let training keep what the layers computed."""
        self.language_model.activation_checkpointing_disable()
        if self.critic is not None:
            self.critic.gradient_checkpointing_disable()

    def detach_value_head(self) -> None:
        """Stop the value loss from reaching the language model, or that of the critic."""
        value_head_of(self).detach_head = True

    # -- load and save ---------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model: str | os.PathLike[str] | nn.Module,
        *,
        peft_config: Any = None,
        is_trainable: bool = True,
        unfrozen_layers: int | None = None,
        value_head: ValueHeadKind | None = None,
        value_range: tuple[float, float] | None = None,
        critic: str | os.PathLike[str] | nn.Module = "same",
        allow_pickle: bool = False,
        shard: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load a model by hub name or from a folder, with its value head if there is one.

        A folder with an adapter (PEFT) is loaded on top of its base model. The folders of the 2020
        trl and of its releases 0.2 to 0.11 load too. Weights are float32 unless `dtype` or
        `quantization_config` says otherwise: what is trained needs float32 weights.

        Args:
            pretrained_model: Hub name, folder, or a loaded model.
            peft_config: Add a new adapter (`peft.LoraConfig` and others); only that, and the
                value head, is then trained.
            is_trainable: Whether a saved adapter goes on being trained; must be left out with a
                loaded model.
            unfrozen_layers: Train the top k layers and what comes after them (a final norm, a
                head that is not tied); the reference shares what is below.
            value_head: linear; mlp: a layer inside; bins: a distribution, trained by cross-entropy
                (see `trl.models.value_head`). None: the kind that was saved, else linear.
            value_range: Of bins, in units of returns; None: that which was saved, else -10 to 10.
            critic: What gives the values. same: the policy's own hidden states. copy: a copy of the
                policy, which shares what is frozen. Else a hub name, a folder or a loaded model: a
                language model, one with a value head, a saved `critic/`, or a reward model, whose
                head becomes the value head. It is trained as the policy is: as a whole, by an
                adapter of the same settings, or its top layers.
            allow_pickle: Also load weights from pickles (pytorch_model.bin).
            shard: Leave the weights in their files for PPOTrainer(..., shard=True), so that no
                process has all of them in memory of its own; they must not be changed before.
            **kwargs: What transformers' `from_pretrained` takes: dtype, device_map,
                attn_implementation, quantization_config, revision, ….

        Raises:
            FileNotFoundError: if the folder, or the weights in it, are missing.
            OSError: if it is a hub name and the hub cannot be reached.
            ValueError: if it is a model of another kind, or a pickle, or if the value head or the
                adapter saved with it do not belong to it.
            TypeError: if a loaded model or a configuration is of another kind than it must be.
            ImportError: if an adapter is asked for without the package peft.
        """
        check_head(value_head, value_range)
        if critic == "" or not isinstance(critic, (str, os.PathLike, nn.Module)):
            _refuse_critic(critic)
        if isinstance(pretrained_model, nn.Module):
            inner, head = pretrained_model, None
            how = kwargs if is_trainable else {"is_trainable": False, **kwargs}
            how |= {"shard": True} if shard else {}
            if how:
                raise TypeError(
                    f"{sorted(how)} must be left out with a loaded model: they say how to load."
                )
        else:
            name = os.fspath(pretrained_model)
            how = {"is_trainable": is_trainable, "allow_pickle": allow_pickle, "shard": shard}
            inner, head = load_model(name, **how, **kwargs)
        if peft_config is not None:
            inner = add_adapter(inner, peft_config)
        kind = cls if cls is not _LMWithValueHead else _kind_for(language_model(inner))
        if isinstance(critic, (str, os.PathLike)) and critic not in ("same", "copy"):
            loading = {k: v for k, v in kwargs.items() if k not in OF_ONE_MODEL}
            loading |= {"is_trainable": is_trainable, "allow_pickle": allow_pickle, "shard": shard}
            critic, head = load_model(os.fspath(critic), as_critic=True, **loading)
        how: Any = {"unfrozen_layers": unfrozen_layers, "value_head": value_head}
        how |= {"value_range": value_range, "critic": critic, "saved_head": head}
        return kind(inner, **how).eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save a folder that plain transformers (or PEFT) loads, with the value head beside it.

        Takes whatever the language model's `save_pretrained` takes (max_shard_size, …), but for
        `push_to_hub`: call `push_to_hub` afterwards. Older weights of the model in the folder are
        replaced, in one file or in several. A folder that holds an adapter does not take a whole
        model: choose another, or delete the adapter first. A critic of its own is saved likewise in
        its folder `critic`, for critic="…/critic". With sharded weights every process must call it;
        the first one gathers them on its CPU and writes.

        Raises:
            FileExistsError: if `save_directory` is a file.
            ValueError: if it holds an adapter or the adapter's own base model, or if there are
                several adapters.
        """
        if not add_whole_weights(self, kwargs):
            return
        save, file = self.pretrained_model.save_pretrained, MODEL_FILE
        if hasattr(self.pretrained_model, "get_base_model"):
            save, file = partial(save_adapter, self.pretrained_model), ADAPTER_FILE
        save_policy(self, save, save_directory, file, kwargs)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, **kwargs: Any
    ) -> Any:
        """Upload what `save_pretrained` saves to a repository of the hub, made if it is missing.

        Args:
            repo_id: "name/model".
            private: Whether a new repository is private.
            token: Token of the hub; None: that of `hf auth login`.
            **kwargs: What `huggingface_hub.upload_folder` takes: commit_message, revision, ….
        """
        from huggingface_hub import HfApi

        hub = HfApi(token=token)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)


class CausalLMWithValueHead(_LMWithValueHead):
    """A value head on a causal language model (`AutoModelForCausalLM`).

    The value head `v_head` reads the last hidden state and starts with zero output.

    Args:
        pretrained_model: A loaded model of transformers, or a `PeftModel` around one.
        unfrozen_layers: Train the top k layers and what comes after them (a final norm, a head
            that is not tied); the reference shares what is below. None: train what requires a
            gradient.
        value_head: linear, mlp or bins; None: linear. See `from_pretrained`, as for the next two.
        value_range: Of bins.
        critic: "same", "copy" or a model.
        saved_head: Weights for the value head.
    """


class Seq2SeqLMWithValueHead(_LMWithValueHead):
    """A value head on an encoder-decoder language model (`AutoModelForSeq2SeqLM`).

    The value head `v_head` reads the decoder's last hidden state and starts with zero output.

    Args:
        pretrained_model: A loaded model of transformers, or a `PeftModel` around one.
        unfrozen_layers: Must be None: encoder and decoder are not split.
        value_head: See `CausalLMWithValueHead`, as for the next three.
        value_range: Likewise.
        critic: Likewise.
        saved_head: Likewise.
    """


def load_policy(model: str | os.PathLike[str] | nn.Module, **kwargs: Any) -> nn.Module:
    """Return a policy for a hub name, a folder, or a loaded model, of whichever kind it is.

    A model that has a value head already is returned as it is.

    Args:
        model: Name, folder or model.
        **kwargs: What `from_pretrained` takes.
    """
    if isinstance(model, nn.Module) and hasattr(model, "v_head"):
        of_head = ("peft_config", "unfrozen_layers", "value_head", "value_range")
        given = [name for name in of_head if kwargs.get(name) is not None]
        given += ["critic"] if kwargs.get("critic", "same") != "same" else []
        if given:
            rule, fix = (
                "be left out for a model with a value head",
                "pass it to its from_pretrained",
            )
            refuse("` and `".join(given), rule, fix=fix)
        return model
    return _LMWithValueHead.from_pretrained(model, **kwargs)


def _refuse_critic(given: Any) -> NoReturn:
    rule, fix = "be 'same', 'copy' or a model", "from_pretrained takes a name too"
    refuse("critic", rule, shown(given), fix)


def _kind_for(plain: nn.Module) -> type[_LMWithValueHead]:
    """Return the class that is for a language model.

    Raises:
        TypeError: if it is no language model.
    """
    if not isinstance(plain, PreTrainedModel) or plain.get_output_embeddings() is None:
        fix = "pass a hub name, a folder, or a loaded model with a language head"
        rule, got = "be a language model of transformers", type(plain).__name__
        refuse("pretrained_model", rule, got, fix, error=TypeError)
    return Seq2SeqLMWithValueHead if plain.config.is_encoder_decoder else CausalLMWithValueHead
