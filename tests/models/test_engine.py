"""The quick paths of a pass give the numbers of the plain ones."""

import threading

import pytest
import torch
import torch.nn.utils.prune
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.families import CAUSAL, SEQ2SEQ, VOCABULARY, tiny_config, tiny_model
from tests.models.policies import leave_to_autograd, lora_config
from tests.models.test_families import policy_of, ragged_rollout
from tests.test_core import Allocations
from trl.compute.gradients import kept_gradients
from trl.compute.piecewise_adam import update_in_pieces
from trl.compute.updater import OneProcess
from trl.compute.working_weights import WorkingWeights
from trl.core import logprobs_and_entropy
from trl.kernels import attention
from trl.kernels.packed import can_pack
from trl.models import head as head_module
from trl.models import quick_kernels
from trl.models.head import LanguageHead, centred_weight, constant_weights
from trl.models.response import ResponseModel
from trl.models.with_value_head import CausalLMWithValueHead, load_policy
from trl.ppo import PPOTrainer


def lora(family, **settings):
    config = LoraConfig(
        r=2, lora_alpha=4, init_lora_weights=False, target_modules="all-linear", **settings
    )
    model = CausalLMWithValueHead.from_pretrained(tiny_model(family), peft_config=config)
    nn.init.normal_(model.v_head.summary.weight, std=0.1)
    return model


def trainer_of(model, *, quick, precision="bf16", **settings):
    """A trainer; one that is not quick leaves all to autocast and autograd."""
    torch.manual_seed(0)
    trainer = PPOTrainer(
        model,
        batch_size=6,
        minibatch_size=6,
        ppo_epochs=1,
        precision=precision,
        max_grad_norm=None,
        **settings,
    )
    if not quick:
        leave_to_autograd(trainer)
    return trainer


def gradients_of_a_step(trainer, rollout=None, scores=(1.0, -1.0, 0.5)):
    """The gradients of the one update of a step."""
    seen = {}
    step = trainer.optimizer.step

    def record():
        seen.update({id(w): w.grad.clone() for w in trainer.trainable if w.grad is not None})
        if isinstance(trainer.updater, OneProcess):
            seen.update({id(weight): low.float() for weight, low in trainer.updater.gradients.low})
        step()

    trainer.optimizer.step = record
    trainer.step(rollout or ragged_rollout(), torch.as_tensor(scores))
    return [seen.get(id(weight)) for weight in trainer.trainable]


POLICIES = {family: lambda family=family: policy_of(family) for family in [*CAUSAL, *SEQ2SEQ]}
POLICIES |= {
    "llama with LoRA": lambda: lora("llama"),
    "gpt2 with LoRA": lambda: lora("gpt2", fan_in_fan_out=True),
    "llama with DoRA": lambda: lora("llama", use_dora=True),
    "llama with trained head": lambda: lora("llama", modules_to_save=["lm_head"]),
}


SEVERAL_PASSES = ("gpt2", "bloom", "mixtral", "bart", "llama with LoRA", "llama with trained head")


@pytest.mark.parametrize(
    ("name", "rows"), [(name, 3) for name in POLICIES] + [(name, 1) for name in SEVERAL_PASSES]
)
def test_gradients_are_those_of_autocast_and_autograd(name, rows):
    torch.manual_seed(0)
    plain = POLICIES[name]()
    quick = POLICIES[name]()
    quick.load_state_dict(plain.state_dict())
    expected = gradients_of_a_step(trainer_of(plain, quick=False, forward_batch_size=rows))
    found = gradients_of_a_step(trainer_of(quick, quick=True, forward_batch_size=rows))
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in expected)
    for mine, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "gptj"])
def test_in_float32_too(family):
    torch.manual_seed(0)
    plain, quick = policy_of(family), policy_of(family)
    quick.load_state_dict(plain.state_dict())
    expected = gradients_of_a_step(trainer_of(plain, quick=False, precision="fp32"))
    found = gradients_of_a_step(trainer_of(quick, quick=True, precision="fp32"))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


# --- the copies ---------------------------------------------------------------------------------


def test_copies_stand_in_follow_an_update_and_go():
    model = policy_of("gpt2")
    working = WorkingWeights(model, torch.bfloat16)
    layer = model.language_model.transformer.h[0].mlp.c_fc
    own = layer.weight
    assert any(weight is own for weight in working.weights)
    head = model.language_model.lm_head.weight
    with working.in_use():
        centred = centred_weight(head, torch.bfloat16)
        before = centred.clone()
        with torch.no_grad():
            head[0] += 1
        assert layer.weight is not own
        assert layer.weight.dtype == torch.bfloat16
        with torch.no_grad():
            own.mul_(2)
        assert not torch.equal(layer.weight, own.bfloat16())
        working.refresh()
        assert torch.equal(layer.weight, own.bfloat16())
        assert centred_weight(head, torch.bfloat16) is centred
        assert (centred[0] - before[0] > 0.9).all()
        copy = layer.weight
        with working.in_use():  # once more, as in a step while sampling
            assert layer.weight is copy
        assert layer.weight is copy
    assert layer.weight is own


def test_copies_go_after_an_error():
    model = policy_of("llama")
    before = dict(model.named_parameters())
    with pytest.raises(KeyboardInterrupt), WorkingWeights(model, torch.bfloat16).in_use():
        raise KeyboardInterrupt
    assert all(weight is before[name] for name, weight in model.named_parameters())


def test_heads_and_weights_with_another_use_are_not_copied():
    model = policy_of("gpt2")
    copied = {id(weight) for weight in WorkingWeights(model, torch.bfloat16).weights}
    assert id(model.language_model.lm_head.weight) not in copied
    assert id(model.v_head.summary.weight) not in copied
    shared = policy_of("llama")
    layer = shared.language_model.model.layers[0].mlp
    layer.reader = nn.Bilinear(1, 1, 1)
    layer.reader.weight = layer.up_proj.weight
    copied = {id(weight) for weight in WorkingWeights(shared, torch.bfloat16).weights}
    assert id(layer.up_proj.weight) not in copied
    assert id(layer.down_proj.weight) in copied


def test_the_frozen_copy_of_the_reference_keeps_low_precision_matrices_only():
    trainer = trainer_of(policy_of("gpt2"), quick=True)
    layer = trainer.ref_model.language_model.transformer.h[0]
    assert layer.mlp.c_fc.weight.dtype == torch.bfloat16
    assert layer.ln_1.weight.dtype == torch.float32
    stats = trainer.step(ragged_rollout(), torch.tensor([1.0, -1.0, 0.5]))
    assert stats["objective/kl"] == 0.0  # to the bit


# --- the gradients ------------------------------------------------------------------------------


def test_gradients_of_embeddings_are_kept_and_begin_at_zero():
    model = policy_of("llama")
    embedding = model.get_input_embeddings()
    with kept_gradients(model, list(model.parameters()), []) as gradients:
        places = set()
        for _ in range(2):
            gradients.start()
            embedding(torch.tensor([3, 3, 5])).sum().backward()
            places.add(embedding.weight.grad.data_ptr())
            gradients.finish()
            counts = embedding.weight.grad[:, 0]
            assert counts[3] == 2
            assert counts[5] == 1
            assert counts.sum() == 3
        assert len(places) == 1
    assert embedding.weight.grad is None
    assert not embedding.sparse


def test_a_weight_that_an_update_does_not_use_keeps_no_gradient_of_the_one_before():
    layer = policy_of("llama")
    weight = layer.language_model.model.layers[0].mlp.up_proj.weight
    with kept_gradients(layer, [weight], [weight]) as gradients:
        gradients.start()
        gradients.receive(weight, torch.ones_like(weight))
        gradients.receive(weight, torch.ones_like(weight))
        gradients.finish()
        assert (weight.grad == 2).all()
        gradients.start()
        gradients.finish()
        assert not weight.grad.any()


@pytest.mark.parametrize("rows", [3, 1])
@pytest.mark.parametrize("most", [None, 0.05])
def test_low_gradients_make_the_update_of_float32_ones(rows, most, monkeypatch):
    torch.manual_seed(0)
    own, other = policy_of("gpt2"), policy_of("gpt2")
    other.load_state_dict(own.state_dict())
    settings = {"ppo_epochs": 3, "minibatch_size": 3, "learning_rate": 1e-3, "max_grad_norm": most}
    settings |= {"batch_size": 3, "precision": "bf16", "forward_batch_size": rows}
    norms, in_pieces = [], []

    def spied(optimizer, gradients, factor):
        in_pieces.append(len(gradients))
        update_in_pieces(optimizer, gradients, factor)

    monkeypatch.setattr("trl.compute.updater.update_in_pieces", spied)
    for model in (own, other):
        trainer = PPOTrainer(model, **settings)
        if model is other:  # whoever looks on sees whole gradients
            trainer.optimizer.optimizer.register_step_pre_hook(lambda *_: None)
        stats = trainer.step(ragged_rollout(), torch.tensor([1.0, -1.0, 0.5]))
        assert not trainer.updater.gradients.low  # none are left behind
        norms.append(stats["ppo/grad_norm"])
    # Four matrices in each of two layers; a second pass adds up in float32.
    assert in_pieces == [8 if rows == 3 else 0] * 3 + [0] * 3
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    if most is not None:
        assert norms[0] > most
    for mine, theirs in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_who_looks_at_gradients_before_a_step_sees_all_of_them():
    trainer = trainer_of(policy_of("gpt2"), quick=True)
    seen = []

    def look(optimizer, *_):
        seen.extend(weight.grad for group in optimizer.param_groups for weight in group["params"])

    trainer.optimizer.optimizer.register_step_pre_hook(look)
    trainer.step(ragged_rollout(), torch.tensor([1.0, -1.0, 0.5]))
    assert all(gradient is not None for gradient in seen)
    assert len(seen) == len(trainer.trainable)


# --- head and softmax in one --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("family", ["gpt2", "phi", "cohere", "granite", "t5", "bart"])
def test_head_and_softmax_in_one(family, blocks, dtype, monkeypatch):
    """Log-probs, entropies and all gradients, with biases, scales, and a temperature."""
    plain = tiny_model(family)
    head = LanguageHead(plain)
    if head.module.bias is not None:
        nn.init.normal_(head.module.bias)
    if head.bias is not None:
        head.bias.normal_()
    labels = torch.arange(20)
    start = torch.randn(20, head.module.weight.shape[1])
    weights = torch.randn(2, 20)
    if blocks == "many":
        monkeypatch.setattr(head_module, "_LOGIT_BYTES", 61 * 4 * 3)
        monkeypatch.setattr(head_module, "_BLOCK_ROWS", 7)

    def run(in_one):
        plain.zero_grad()
        hidden = start.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            if in_one:
                outputs = head.logprobs(hidden, labels, 0.7)
            else:
                outputs = logprobs_and_entropy(head(hidden), labels, temperature=0.7)
        (weights[0] * outputs[0] + weights[1] * outputs[1]).sum().backward()
        grads = [hidden.grad, head.module.weight.grad]
        if head.module.bias is not None:
            grads.append(head.module.bias.grad)
        return [*outputs, *grads]

    rounding = 1e-5 if dtype is None else 2e-2
    for mine, theirs in zip(run(True), run(False), strict=True):
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(mine, theirs, rtol=rounding, atol=rounding * scale)


def test_logits_exist_for_a_block_of_rows_only(monkeypatch):
    head = LanguageHead(tiny_model("llama"))
    monkeypatch.setattr(head_module, "_LOGIT_BYTES", 61 * 4 * 4)
    hidden = torch.randn(40, 32, requires_grad=True)
    with Allocations() as made:
        logprobs, _ = head.logprobs(hidden, torch.arange(40), 1.0)
        logprobs.sum().backward()
    assert max(numel for numel, _ in made.made) <= max(61 * 32, 40 * 32, 4 * 61)


def test_a_graph_that_was_used_up_says_so():
    head = LanguageHead(tiny_model("llama"))
    hidden = torch.randn(4, 32, requires_grad=True)
    logprobs, _ = head.logprobs(hidden, torch.arange(4), 1.0)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        logprobs.sum().backward()


def test_a_refreshed_head_follows_its_weight():
    weight = nn.Parameter(torch.randn(61, 8) + 5)
    with constant_weights() as kept:
        centred = kept.get(weight, torch.bfloat16)
        mean = weight.detach().mean(0)
        with torch.no_grad():
            weight.add_(torch.randn(61, 8))
        kept.refresh()
        assert kept.get(weight, torch.bfloat16) is centred
        torch.testing.assert_close(centred.float(), weight.detach() - mean, rtol=1e-2, atol=1e-2)


# --- kernels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in CAUSAL if name != "mamba"])
def test_quick_kernels_give_the_same_numbers(family):
    policy = POLICIES[family]()
    responder = ResponseModel(policy)
    config = responder.quick._config
    own = config._attn_implementation
    quick = responder(ragged_rollout())
    assert config._attn_implementation == own
    responder.quick._attention, responder.quick._gelus = False, []
    for mine, theirs in zip(quick, responder(ragged_rollout()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_quick_kernels_are_found():
    responder = ResponseModel(policy_of("gpt2"))
    assert responder.quick._attention
    assert len(responder.quick._gelus) == 2


# --- sampling -----------------------------------------------------------------------------------

packs = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16),
    reason="torch or the CPU has no fast products in bf16",
)


def test_a_step_inside_of_sampling_is_refused():
    trainer = trainer_of(policy_of("gpt2"), quick=True)
    with trainer.sampling(), pytest.raises(RuntimeError, match="outside of `sampling"):
        trainer.step(ragged_rollout(), torch.zeros(3))
    trainer.step(ragged_rollout(), torch.tensor([1.0, 0.0, 2.0]))


@packs
@pytest.mark.parametrize("family", ["gpt2", "llama", "phi", "t5"])
@torch.no_grad()
def test_packed_products_are_those_of_autocast(family):
    """Bit for bit: the weights in another layout, the same sums."""
    policy = policy_of(family)
    for name, weight in policy.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    working = WorkingWeights(policy, torch.bfloat16)
    inputs = {"input_ids": torch.arange(3, 11).view(2, 4)}
    if policy.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.arange(8).view(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with constant_weights():
            expected = policy(**inputs).logits
        with working.packed():
            found = policy(**inputs).logits
            layer = working._places[0]
            assert "forward" in vars(layer)
    assert "forward" not in vars(layer)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["bool", "added", "none"])
@pytest.mark.parametrize("length", [31, 32, 33])
def test_attention_takes_in_unseen_columns_behind_a_cache(kind, length):
    """The products are of 32 or 64 columns, the result is that of as many as there are."""
    query = torch.randn(2, 4, 1, 8).bfloat16()
    layers = [torch.randn(2, 2, 80, 8).bfloat16() for _ in range(2)]
    key, value = (layer[:, :, :length] for layer in layers)
    mask = None
    if kind != "none":
        mask = torch.rand(2, 1, 1, length) < 0.7
        mask[..., 0] = True
    if kind == "added":
        mask = torch.zeros(mask.shape).bfloat16().masked_fill(~mask, -1e9)
    longer, _, _ = attention._in_grains(key, value, mask)
    assert longer.shape[2] == -(-length // 32) * 32
    found, _ = quick_kernels.short_attention(nn.Identity(), query, key, value, mask)
    alone, _ = quick_kernels.short_attention(
        nn.Identity(), query, key.contiguous(), value.contiguous(), mask
    )
    torch.testing.assert_close(found, alone, rtol=1e-2, atol=1e-2)
    cropped = layers[0][:, :, 80 - length :]  # nothing of its own is behind it
    assert attention._in_grains(cropped, cropped, mask)[0] is cropped


def attention_written_out(query, key, value, mask):
    """softmax(q·kᵀ/√d + mask)·v under autocast, the softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    products = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    products = products.masked_fill(~mask, torch.finfo(products.dtype).min)
    weights = products.softmax(-1, dtype=torch.float32)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("columns", [1, 40])
def test_attention_under_autocast_is_that_of_float32_softmax(columns):
    """Bit for bit; also of queries and keys that rotary positions have made float32."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, heads, 40, 8, generator=generator) for heads in (4, 2, 2)]
    states[0] = states[0][:, :, -columns:]
    states[2] = states[2].bfloat16()
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None, -columns:]
    mask = mask & (torch.rand(2, 1, 1, 40, generator=generator) < 0.8)
    mask[..., 0] = True
    results = []
    for compute in (
        lambda *inputs: quick_kernels.short_attention(nn.Identity(), *inputs)[0],
        attention_written_out,
    ):
        inputs = [part.clone().requires_grad_() for part in states]
        with torch.autocast("cpu", torch.bfloat16):
            output = compute(*inputs, mask)
        output.float().square().sum().backward()
        results.append([output, *(part.grad for part in inputs)])
    (found, *gradients), (expected, *own) = results
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    for mine, theirs in zip(gradients, own, strict=True):
        gap = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert gap < 1e-2  # going backward the weights are the rounded ones


@packs
def test_a_gradient_through_packed_weights_is_refused():
    first, second = (trainer_of(policy, quick=True) for policy in [policy_of("llama")] * 2)
    with first.sampling():
        with first.sampling():
            pass
        with pytest.raises(RuntimeError, match="outside of `sampling"):
            first.step(ragged_rollout(), torch.zeros(3))
        with pytest.raises(RuntimeError, match="no gradient: train outside"):
            second.step(ragged_rollout(), torch.tensor([1.0, 0.0, 2.0]))


# --- what a user does to the weights ------------------------------------------------------------


def changes_of_a_step(trainer):
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.step(ragged_rollout(), torch.tensor([1.0, -1.0, 0.5]))
    return {
        name: float((weight.detach() - before[name]).abs().max())
        for name, weight in trainer.model.named_parameters()
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.wpe.weight"]
)
def test_hooks_on_gradients_work(name, precision):
    policy = policy_of("gpt2")
    policy.language_model.get_parameter(name).register_hook(torch.zeros_like)
    changes = changes_of_a_step(trainer_of(policy, quick=True, precision=precision))
    assert changes[f"pretrained_model.{name}"] == 0
    assert sum(change > 0 for change in changes.values()) >= 10


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_frozen_and_unfrozen_between_steps(precision):
    policy = policy_of("llama")
    plain = policy.language_model
    layer, embedding = plain.model.layers[0].mlp.up_proj.weight, plain.model.embed_tokens.weight
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    layer.requires_grad_(False)
    trainer = trainer_of(policy, quick=True, precision=precision, optimizer=optimizer)
    changes = changes_of_a_step(trainer)
    name = "pretrained_model.model.{}.weight"
    assert changes[name.format("layers.0.mlp.up_proj")] == 0
    assert changes[name.format("embed_tokens")] > 0
    layer.requires_grad_(True)
    embedding.requires_grad_(False)
    changes = changes_of_a_step(trainer)
    assert changes[name.format("layers.0.mlp.up_proj")] > 0
    assert changes[name.format("embed_tokens")] == 0


def test_a_merged_adapter_is_refused():
    policy = lora("llama")
    trainer = trainer_of(policy, quick=True)
    policy.pretrained_model.merge_adapter()
    with pytest.raises(ValueError, match="merged: call model.pretrained_model.unmerge_adapter"):
        trainer.step(ragged_rollout(), torch.zeros(3))


def test_pruned_weights_are_left_alone():
    policy = policy_of("llama")
    layer = policy.language_model.model.layers[0].mlp.up_proj
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    changes_of_a_step(trainer_of(policy, quick=True))
    assert layer.weight.dtype == torch.float32


def test_gradients_are_handed_over_in_any_thread():
    """As on a GPU, where autograd runs in a thread of its own."""
    trainer = trainer_of(policy_of("llama"), quick=True)
    backward = trainer.accelerator.backward

    def elsewhere(loss):
        thread = threading.Thread(target=backward, args=(loss,))
        thread.start()
        thread.join()

    trainer.accelerator.backward = elsewhere
    assert changes_of_a_step(trainer)["pretrained_model.model.layers.0.mlp.up_proj.weight"] > 0


@pytest.mark.parametrize("settings", [{"value_warmup_steps": 1}, {"algorithm": "reinforce++"}])
def test_what_rests_in_a_step_stays_as_it_is(settings):
    """One process asks for no gradient of it; many wait for one, and drop it."""
    torch.manual_seed(0)
    plain, quick = policy_of("gpt2"), policy_of("gpt2")
    quick.load_state_dict(plain.state_dict())
    changes = []
    for policy, is_quick in ((plain, False), (quick, True)):
        trainer = trainer_of(policy, quick=is_quick, precision="fp32", **settings)
        changes.append(changes_of_a_step(trainer))
        assert all(weight.requires_grad for weight in policy.parameters())
    heads_move = "value_warmup_steps" in settings
    for found in changes:
        for name, change in found.items():
            assert (change > 0) == (name.startswith("v_head") == heads_move), name
    assert changes[0] == pytest.approx(changes[1], rel=1e-3, abs=1e-6)


# --- layers that are computed again -------------------------------------------------------------


def deep_llama(**how):
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.num_hidden_layers = 8
    policy = load_policy(AutoModelForCausalLM.from_config(config).eval(), **how)
    nn.init.normal_(policy.v_head.summary.weight, std=0.1)
    return policy


CHECKPOINTED = {
    "all": deep_llama,
    "LoRA": lambda: deep_llama(peft_config=lora_config()),
    "the top": lambda: deep_llama(unfrozen_layers=6),
    "GPT-2": lambda: policy_of("gpt2"),
    "an encoder-decoder": lambda: policy_of("t5"),
    "a mixture of experts": lambda: policy_of("mixtral"),
}


@pytest.mark.parametrize(
    ("kind", "precision", "processes"),
    [(kind, precision, "one") for kind in CHECKPOINTED for precision in ("fp32", "bf16")]
    + [("all", "fp32", "many"), ("LoRA", "bf16", "many")],
)
def test_layers_that_are_computed_again_give_the_same_numbers_in_less_memory(
    kind, precision, processes
):
    seen = []
    for again in (False, True):
        torch.manual_seed(0)
        policy = CHECKPOINTED[kind]()
        if again:
            policy.gradient_checkpointing_enable()
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        trainer = trainer_of(policy, quick=processes == "one", precision=precision)
        own = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            gradients = gradients_of_a_step(trainer)
        size = sum(size for place, size in kept.items() if place not in own)
        if again:  # what goes into a layer, [3, 11, 32], is kept as an argument
            layers = sum(isinstance(m, GradientCheckpointingLayer) for m in policy.modules())
            size += 4 * 3 * 11 * 32 * layers
        seen.append((gradients, size))
        assert not any(module.training for module in policy.modules())
        assert all("forward" not in vars(module) for module in policy.modules())
    (expected, much), (found, little) = seen
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert little < (0.5 if kind in ("all", "LoRA", "the top") else 0.9) * much


def test_a_model_that_checkpoints_in_its_own_way_is_refused():
    trainer = trainer_of(policy_of("llama"), quick=True)
    trainer.model.language_model.model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient checkpointing can compute again, got Llama"):
        trainer.step(ragged_rollout(), torch.zeros(3))


@pytest.mark.parametrize("kind", ["tied", "untied", "a new head", "bf16", "a layer less"])
def test_weights_that_are_replaced_after_the_trainer_was_made_are_refused(kind):
    policy = policy_of("gpt2" if kind == "tied" else "llama")
    trainer = trainer_of(policy, quick=True)
    before = trainer.step(ragged_rollout(), torch.tensor([1.0, -1.0, 0.5]))
    if kind == "a new head":
        policy.v_head = type(policy.v_head)(policy.config)
    elif kind == "bf16":
        policy.bfloat16()
    elif kind == "a layer less":
        del policy.language_model.model.layers[-1]
    else:
        policy.language_model.resize_token_embeddings(VOCABULARY + 3)
    got = r"\d+ in place of \d+" if kind == "a layer less" else "another `.*weight`"
    with pytest.raises(ValueError, match=f"keep the weights .* made with, got {got}"):
        trainer.step(ragged_rollout(), torch.tensor([1.0, -1.0, 0.5]))
    assert trainer.steps_done == 1
    assert before["ppo/updates"] == 1
