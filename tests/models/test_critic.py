"""What gives the values: heads of several kinds, and critics of their own."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    PretrainedConfig,
)

from tests.conftest import ragged
from tests.families import VOCABULARY, tiny_config, tiny_model
from tests.models.policies import leave_to_autograd, lora_config, ragged_rollout, step, trainer_of
from tests.training.test_classifier_training import tiny_bert
from trl import train
from trl.anatomy import decoder, language_model
from trl.batch import Rollout
from trl.compute.passes import with_trunk_states, with_values
from trl.config.recipe import LoRAConfig, ModelConfig
from trl.evaluation.reward_model import OFFSET
from trl.models.critic import shares_trunk, value_head_of, value_weights
from trl.models.response import ResponseModel
from trl.models.value_head import BinsValueHead, MLPValueHead, make_value_head
from trl.models.with_value_head import CausalLMWithValueHead, load_policy
from trl.optimization.bins import two_hot_loss
from trl.rollout.sampling import sample
from trl.saved import SCORE_OFFSET

HOW = {
    "full": {},
    "LoRA": {"peft_config": lora_config(init_lora_weights=True)},
    "the top": {"unfrozen_layers": 1},
}
KINDS = ("linear", "mlp", "bins")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(base):
    """A reward model on another trunk, with an offset for its head, which has no bias."""
    config = tiny_config("llama")
    config.num_labels, config.score_offset = 1, 0.5
    assert SCORE_OFFSET == OFFSET == "score_offset"
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(base.parent / "rm")
    return base.parent / "rm"


def policy_of(base, **how):
    """A policy whose values are not zero."""
    torch.manual_seed(0)
    policy = CausalLMWithValueHead.from_pretrained(base, **how)
    nn.init.normal_(value_head_of(policy).summary.weight, std=0.1)
    return policy


def grouped():
    """Responses that share a prompt, so that it is read once."""
    queries = [query for query in ragged([6, 9], vocabulary=VOCABULARY) for _ in range(3)]
    responses = ragged([2, 5, 3, 1, 4, 2], 1, VOCABULARY)
    return Rollout.from_lists(queries, responses, group_ids=[0, 0, 0, 1, 1, 1])


def passes_of(model, run):
    """How many passes the decoder of a model makes."""
    seen = []
    with decoder(language_model(model)).register_forward_hook(lambda *_: seen.append(1)):
        run()
    return len(seen)


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_starts_at_zero_and_learns(base, kind):
    torch.manual_seed(0)
    policy = CausalLMWithValueHead.from_pretrained(base, value_head=kind)
    assert policy(torch.arange(5)[None]).value.abs().max() < 1e-6
    settings = {"value_warmup_steps": 8, "gae_lambda": 1.0, "init_kl_coef": 0.0}
    settings |= {"value_learning_rate": 0.05, "cliprange_value": 10.0}
    trainer = trainer_of(policy, **settings)
    errors = [step(trainer)["ppo/val/error"] for _ in range(8)]
    assert errors[-1] < 0.3 * errors[0]


def test_the_layer_inside_a_head_by_hand():
    head = MLPValueHead(PretrainedConfig(), 2)
    with torch.no_grad():
        head.inner[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        head.inner[0].bias.copy_(torch.tensor([0.0, 1.0]))
        head.summary.weight.copy_(torch.tensor([[2.0, 3.0]]))
    # h = (1, 3): before GELU 1 and −2; GELU(x) = x·Φ(x)
    phi = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in (1, -2)]
    expected = 2 * 1 * phi[0] + 3 * -2 * phi[1]
    assert head(torch.tensor([1.0, 3.0])).item() == pytest.approx(expected, rel=1e-5)


def test_bins_are_those_of_the_range(base):
    policy = CausalLMWithValueHead.from_pretrained(base, value_head="bins", value_range=(-2, 6))
    head = policy.v_head
    assert head.centres[[0, 50, 100]].tolist() == [-2.0, 2.0, 6.0]
    logits = torch.full((101,), -1e4)
    logits[[0, 100]] = torch.tensor([0.25, 0.75]).log()
    assert head.values(logits).item() == pytest.approx(0.25 * -2 + 0.75 * 6)
    with torch.autocast("cpu", torch.bfloat16):  # in float32 all the same
        assert head.values(logits).item() == pytest.approx(4.0, abs=1e-5)


def test_the_loss_of_bins_is_cross_entropy(base):
    """That of equal logits is the logarithm of their number, whatever the returns."""
    policy = CausalLMWithValueHead.from_pretrained(base, value_head="bins")
    logits = policy.v_head.computed(torch.randn(policy.v_head.summary.in_features))
    probs = logits.softmax(-1)  # at first the normal distribution N(0, 1)
    assert (probs * policy.v_head.centres).sum().item() == pytest.approx(0, abs=1e-6)
    assert (probs * policy.v_head.centres.square()).sum().item() == pytest.approx(1, abs=1e-5)
    torch.nn.init.zeros_(policy.v_head.summary.bias)
    stats = step(trainer_of(policy, ppo_epochs=1, minibatch_size=3))
    assert stats["ppo/loss/value"] == pytest.approx(torch.tensor(101.0).log().item(), rel=1e-5)
    assert stats["ppo/val/clipfrac"] == 0
    stats = step(trainer_of(policy_of(base, value_head="bins"), cliprange_value=1e-6))
    assert stats["ppo/val/clipfrac"] == 0


def test_a_logit_of_bins_moves_by_as_much_as_its_signal_lacks():
    """1/√p: 0.2 is the distance of the bins, and the density of N(0, 1) at 0 is 1/√(2π)."""
    config = GPT2Config(n_embd=4)
    for bins, distance in ((101, 0.2), (201, 0.1)):
        head = BinsValueHead(config, bins=bins).eval()
        assert head.factor == pytest.approx((distance / math.sqrt(2 * math.pi)) ** -0.5, rel=1e-6)
        before = head.computed(torch.ones(4))
        with torch.no_grad():
            head.summary.weight[3] += 0.1  # for each of four hidden units
        moved = head.computed(torch.ones(4)) - before
        assert moved[3].item() == pytest.approx(0.4 * head.factor, rel=1e-5)
        assert moved.count_nonzero() == 1


def test_bins_learn_as_fast_as_a_linear_head():
    """Noisy returns, R = h_0 + ε, for 300 updates of Adam at 1e-3: what both explain of h_0."""
    torch.manual_seed(0)
    hidden = torch.randn(2048, 8)
    returns = hidden[:, 0] + torch.randn(2048)
    explained = {}
    for kind in ("linear", "bins"):
        head = make_value_head(kind, GPT2Config(n_embd=8), 8).eval()
        adam = torch.optim.Adam(head.parameters(), lr=1e-3)
        for update in range(300):
            rows = torch.arange(32) + 32 * (update % 64)
            found = head.computed(hidden[rows])
            if kind == "linear":
                loss = (head.values(found) - returns[rows]).square().mean() / 2
            else:
                loss = two_hot_loss(found, returns[rows], head.centres).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        error = (hidden[:, 0] - head(hidden)).var() / hidden[:, 0].var()
        explained[kind] = 1 - error.item()
    assert explained["bins"] > 0.9 * explained["linear"] > 0.2, explained


# -- a critic of its own ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_what_is_frozen_is_shared_and_the_rest_is_its_own(base, how):
    policy = policy_of(base, critic="copy", **HOW[how])
    critic = policy.critic
    own = value_weights(policy)
    assert all(weight.requires_grad for weight in own)
    of_policy = set(policy.pretrained_model.parameters())
    frozen = {weight for weight in critic.parameters() if not weight.requires_grad}
    assert frozen <= of_policy
    assert bool(frozen) == (how != "full")
    trained = [n for n, w in policy.pretrained_model.named_parameters() if w.requires_grad]
    there = {n for n, w in critic.pretrained_model.named_parameters() if w in own}
    assert there == {name for name in trained if "lm_head" not in name}  # it makes no logits
    assert shares_trunk(policy)


@pytest.mark.parametrize("how", HOW)
def test_it_gives_the_values_and_the_policy_the_rest(base, how):
    policy, rollout = policy_of(base, critic="copy", **HOW[how]), ragged_rollout()
    alone = policy_of(base, **HOW[how])
    with torch.no_grad():  # now it reads otherwise
        for weight in value_weights(policy):
            weight.add_(0.05 * torch.randn_like(weight))
        found, expected = ResponseModel(policy)(rollout), ResponseModel(alone)(rollout)
        values = ResponseModel(policy.critic)(rollout).values
    assert torch.equal(found.logprobs, expected.logprobs)
    assert torch.equal(found.entropy, expected.entropy)
    torch.testing.assert_close(found.values, values)
    assert (found.values - expected.values).abs().max() > 1e-2
    assert policy(torch.arange(4)[None]).value is None


def test_shared_prompts_and_frozen_layers_are_read_once(base):
    policy, rollout = policy_of(base, critic="copy"), grouped()
    model, alone = ResponseModel(policy), replace(rollout, group_ids=None)
    with torch.no_grad():
        torch.testing.assert_close(model(rollout).values, model(alone).values, rtol=0, atol=1e-4)
    assert model.critic.packs
    trainer = trainer_of(policy_of(base, critic="copy", unfrozen_layers=1), batch_size=6)
    responder = trainer.updater.responder
    kept = with_trunk_states(trainer.updater, rollout, trainer.config)
    layers = language_model(responder.model.critic).model.layers
    assert passes_of(responder.model.critic, lambda: responder(kept)) == 1
    seen = []
    with layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1)), torch.no_grad():
        found = responder(kept).values
        assert not seen
        expected = responder(alone).values
        assert seen
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_no_pass_is_made_in_vain(base):
    policy = policy_of(base, critic="copy")
    queries = torch.arange(3, 9).view(2, 3)
    rollout = sample(policy, queries, max_new_tokens=4)
    assert rollout.values is None
    trainer = trainer_of(policy, batch_size=2, minibatch_size=2)

    def before():
        return trainer.before_update(with_values(trainer.updater, rollout, trainer.config))

    assert passes_of(policy, before) == 0
    assert passes_of(policy.critic, before) == 1
    old = before()
    assert old.values.abs().max() > 0
    reference = partial(trainer.reference_logprobs, rollout, old)
    assert passes_of(policy.critic, reference) == 0
    assert "critic" not in {name.partition(".")[0] for name, _ in trainer.ref_model.named_modules()}
    sizes = {"batch_size": 2, "minibatch_size": 2}
    adapted = trainer_of(policy_of(base, critic="copy", **HOW["LoRA"]), **sizes)
    reference = partial(adapted.reference_logprobs, rollout, old)
    assert passes_of(adapted.model.critic, reference) == 0
    assert passes_of(adapted.model, reference) == 1


@pytest.mark.parametrize(
    ("how", "precision"), [("full", "bf16"), ("LoRA", "fp32"), ("the top", "bf16")]
)
def test_a_warm_up_trains_all_of_it_and_nothing_else(base, how, precision):
    """As with many processes, whose gradients autograd makes."""
    after = []
    for quick in (True, False):
        policy = policy_of(base, critic="copy", value_head="mlp", **HOW[how])
        optimizer = torch.optim.SGD([w for w in policy.parameters() if w.requires_grad], lr=0.1)
        settings = {"value_warmup_steps": 1, "max_grad_norm": None, "optimizer": optimizer}
        trainer = trainer_of(policy, precision=precision, **settings)
        if not quick:
            leave_to_autograd(trainer)
        start = {name: w.detach().clone() for name, w in policy.named_parameters()}
        step(trainer)
        own = value_weights(policy)
        for name, weight in policy.named_parameters():
            assert torch.equal(weight, start[name]) == (weight not in own), name
        step(trainer)
        trained = [n for n, w in policy.named_parameters() if w.requires_grad and w not in own]
        weights = dict(policy.named_parameters())
        assert any(not torch.equal(weights[name], start[name]) for name in trained)
        after.append(torch.cat([w.detach().flatten() for w in weights.values()]))
    torch.testing.assert_close(*after, rtol=1e-3, atol=1e-3 if precision == "bf16" else 1e-5)


def test_the_policy_learns_as_without_values(base):
    """The value loss does not reach it, nor is anything else another."""
    weights = []
    for how, vf_coef in (({"critic": "copy"}, 0.1), ({}, 0.0)):
        torch.manual_seed(0)
        policy = CausalLMWithValueHead.from_pretrained(base, **how)
        step(trainer_of(policy, vf_coef=vf_coef, max_grad_norm=None, ppo_epochs=1))
        weights.append([w.detach() for w in policy.pretrained_model.parameters()])
    for mine, theirs in zip(*weights, strict=True):
        assert torch.equal(mine, theirs)


def test_a_rate_of_its_own_is_that_of_its_head(base):
    trainer = trainer_of(policy_of(base, critic="copy"), value_learning_rate=0.5)
    policy, head = trainer.optimizer.param_groups
    assert set(head["params"]) == set(trainer.model.critic.v_head.parameters())
    assert head["lr"] == 0.5
    assert policy["lr"] == 1e-2
    assert value_weights(trainer.model) <= {*policy["params"], *head["params"]}


# -- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "kind"), [("full", "mlp"), ("LoRA", "bins"), ("the top", "linear"), ("LoRA", "mlp")]
)
def test_it_is_saved_beside_a_plain_policy_and_loaded_again(base, tmp_path, how, kind):
    policy, rollout = policy_of(base, critic="copy", value_head=kind, **HOW[how]), ragged_rollout()
    step(trainer_of(policy))
    policy.save_pretrained(tmp_path)
    assert not (tmp_path / "value_head").exists()
    files = {path.name for path in tmp_path.iterdir()} - {"README.md", "critic"}
    alone = policy_of(base, value_head=kind, **HOW[how])
    alone.save_pretrained(tmp_path / "alone")
    assert files == {p.name for p in (tmp_path / "alone").iterdir()} - {"README.md", "value_head"}
    unfrozen = HOW[how].get("unfrozen_layers")
    loaded = load_policy(tmp_path, critic=str(tmp_path / "critic"), unfrozen_layers=unfrozen)
    assert type(loaded.critic.v_head) is type(policy.critic.v_head)
    assert loaded.num_parameters() == policy.num_parameters()  # the base is there once
    assert shares_trunk(loaded)
    with torch.no_grad():
        found, expected = ResponseModel(loaded)(rollout), ResponseModel(policy)(rollout)
    assert torch.equal(found.logprobs, expected.logprobs)
    assert torch.equal(found.values, expected.values)
    if how != "LoRA":
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_whole_among_gathered_weights(base, tmp_path, monkeypatch, kind, how):
    """As sharded ones are saved: the centres of bins are no weights."""
    policy = policy_of(base, value_head=kind, **HOW[how])
    monkeypatch.setattr("trl.models.whole.is_sharded", lambda weight: True)
    monkeypatch.setattr("trl.models.whole.whole", lambda weight: weight)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    policy.save_pretrained(tmp_path)
    tokens = torch.arange(6)[None]
    assert torch.equal(load_policy(tmp_path)(tokens).value, policy(tokens).value)


def test_weights_that_are_given_are_saved_without_those_of_the_critic(base, tmp_path):
    policy = policy_of(base, critic="copy")
    policy.save_pretrained(tmp_path, state_dict=policy.state_dict())
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys"))
    assert torch.equal(plain.lm_head.weight, policy.language_model.lm_head.weight)
    assert (tmp_path / "critic" / "value_head").is_dir()


def test_what_is_asked_of_a_policy_goes_for_its_critic(base):
    policy = policy_of(base, critic="copy")
    policy.detach_value_head()
    policy.critic(torch.arange(4)[None]).value.sum().backward()
    touched = {n for n, w in policy.named_parameters() if w.grad is not None and w.grad.any()}
    assert touched == {"critic.v_head.summary.weight", "critic.v_head.summary.bias"}
    for on in (True, False):
        (policy.gradient_checkpointing_enable if on else policy.gradient_checkpointing_disable)()
        for model in (policy, policy.critic):
            layers = decoder(language_model(model)).layers
            assert all(layer.gradient_checkpointing is on for layer in layers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_any_kind_is_found_again(base, tmp_path, kind):
    policy = policy_of(base, value_head=kind)
    policy.save_pretrained(tmp_path)
    loaded = CausalLMWithValueHead.from_pretrained(tmp_path)
    tokens = torch.arange(6)[None]
    assert torch.equal(loaded(tokens).value, policy(tokens).value)
    other = KINDS[kind == "linear"]
    with pytest.raises(
        ValueError, match=f"`value_head` must be that saved with the model, '{kind}'"
    ):
        CausalLMWithValueHead.from_pretrained(tmp_path, value_head=other)


@pytest.mark.parametrize("how", HOW)
def test_the_head_of_a_reward_model_becomes_the_value_head(base, reward_model, how):
    policy = CausalLMWithValueHead.from_pretrained(base, critic=reward_model, **HOW[how])
    assert shares_trunk(policy) == (how == "full")  # below, its weights are others
    scores = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1)
    scores.config.pad_token_id = None
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = scores.eval()(tokens).logits[:, 0] + 0.5
        torch.testing.assert_close(policy.critic(tokens).value[:, -1], expected)
    stats = step(trainer_of(policy))
    assert stats["ppo/val/clipfrac"] >= 0
    trained = sum(w.numel() for w in value_weights(policy) if w.requires_grad)
    whole = sum(w.numel() for w in policy.critic.parameters())
    assert (trained < 0.7 * whole) == (how != "full")


# -- what is refused -------------------------------------------------------------------------------


def test_what_is_no_critic_is_refused(base, reward_model, tmp_path):
    load = partial(CausalLMWithValueHead.from_pretrained, base)
    config = tiny_config("llama")
    config.vocab_size = 50
    other = AutoModelForCausalLM.from_config(config)
    plain = tiny_model("llama")
    config = tiny_config("llama")
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "three")
    tiny_bert(tmp_path / "bert")
    for critic, message in (
        (other, "`critic` must know the tokens of the policy, got 50 tokens"),
        ("nowhere/at/all", "nowhere"),
        (tmp_path / "three", "`critic` must have one output if it is a classifier, got 3"),
        (tmp_path / "bert", "must hold the weights of a BertLMHeadModel"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            load(critic=critic)
    with pytest.raises(ValueError, match="`critic` must be another model than the policy"):
        CausalLMWithValueHead(plain, critic=plain)
    with pytest.raises(ValueError, match="`value_range` must be None without value_head='bins'"):
        load(value_range=(0, 1))
    saved = load(value_head="bins", value_range=[-0.1, 0.3])
    saved.save_pretrained(tmp_path / "bins")
    CausalLMWithValueHead.from_pretrained(
        tmp_path / "bins", value_head="bins", value_range=(-0.1, 0.3)
    )
    with pytest.raises(ValueError, match="`value_range` must be that of the saved bins"):
        CausalLMWithValueHead.from_pretrained(
            tmp_path / "bins", value_head="bins", value_range=(0, 1)
        )
    with pytest.raises(ValueError, match=r"`value_range` .*two numbers, \[lowest, highest\]"):
        load(value_head="bins", value_range=(1, 1))
    with pytest.raises(ValueError, match="`value_range` must have room for 101 different float32"):
        load(value_head="bins", value_range=(1.0, 1.0 + 1e-6))  # the loss would divide by 0
    with pytest.raises(ValueError, match="`critic` must be left out for a model with a value head"):
        load_policy(load(), critic="copy")
    with pytest.raises(ValueError, match="`critic` must be 'same' with algorithm='grpo'"):
        trainer_of(load(critic="copy"), algorithm="grpo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value_head": "tree"}, "`value_head` .*one of linear, mlp, bins"),
        (
            {"value_head": "mlp", "model_kwargs": {"value_range": (0, 1)}},
            "`value_range` must be No",
        ),
        ({"critic": ""}, "`critic` must be 'same', 'copy' or a model, got ''"),
        ({"critic": None}, "`critic` must be 'same', 'copy' or a model, got None"),
        ({"critic": "copy", "algorithm": "grpo"}, "`critic` must be 'same' with algorithm='grpo'"),
    ],
)
def test_what_is_no_critic_is_refused_before_a_model_is_looked_for(arguments, message):
    with pytest.raises(ValueError, match=message):
        train("./nowhere", ["a"], len, **arguments)


@pytest.mark.parametrize("frozen", [{"unfrozen_layers": 1}, {"lora": LoRAConfig()}])
def test_a_recipe_cannot_cut_a_critic_that_has_the_layers_of_the_policy(frozen):
    assert ModelConfig(critic="copy", shard=True).shard
    with pytest.raises(ValueError, match="`shard` must be false beside a `critic` of its own that"):
        ModelConfig(critic="copy", shard=True, **frozen)
