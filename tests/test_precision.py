import pytest
import torch

from tests.conftest import ragged, tiny_gpt2
from trl.batch import Rollout
from trl.compute.precision import fast_bf16, make_accelerator
from trl.ppo import PPOTrainer


@pytest.mark.parametrize(("has", "expected"), [("avx512_bf16", "bf16"), ("avx2", "no")])
def test_auto_follows_the_hardware(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    assert make_accelerator("auto").mixed_precision == expected


def test_auto_leaves_an_accelerator_that_exists_alone(monkeypatch):
    from accelerate import Accelerator

    theirs = Accelerator(mixed_precision="no")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert make_accelerator("auto").mixed_precision == "no"
    assert theirs.mixed_precision == "no"


def test_auto_follows_accelerate_launch(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert make_accelerator("auto").mixed_precision == "no"


def test_precision_may_change_between_trainers():
    for precision, name in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        assert make_accelerator(precision).mixed_precision == name


def test_other_devices_use_fp32_unless_asked():
    assert not fast_bf16(torch.device("mps"))


def test_master_weights_and_optimiser_state_stay_float32():
    ppo = PPOTrainer(tiny_gpt2(0), tiny_gpt2(1), precision="bf16", batch_size=4)
    ppo.step(ragged([3] * 4), ragged([5] * 4, seed=1), torch.arange(4.0))
    assert {weight.dtype for weight in ppo.model.parameters()} == {torch.float32}
    state = [
        value
        for entry in ppo.optimizer.state_dict()["state"].values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    ]
    assert state
    assert {value.dtype for value in state} == {torch.float32}


@pytest.mark.parametrize("offset", [0.0, -100.0])
def test_logprobs_in_bf16_are_near_those_in_fp32(offset):
    """A common offset of all logits, as GPT-2 has, costs no precision."""
    rollout = Rollout.from_lists(ragged([3, 5, 8, 2]), ragged([9, 4, 6, 12], seed=1))
    logprobs = {}
    for precision in ("fp32", "bf16"):
        model = tiny_gpt2(0)
        with torch.no_grad():  # h·u = 1 for every h: adding offset·u to each row shifts all logits
            model.transformer.ln_f.weight[0] = 0.0
            model.transformer.ln_f.bias[0] = 1.0
            model.transformer.wte.weight[:, 0] = 0.0
            head = torch.nn.Linear(32, 97, bias=False)
            head.weight.copy_(model.transformer.wte.weight)
            head.weight[:, 0] = offset
            model.lm_head = head
        ppo = PPOTrainer(model, tiny_gpt2(1), precision=precision, batch_size=4)
        logprobs[precision] = ppo.forward_pass(ppo.policy, rollout).logprobs
    gap = (logprobs["fp32"] - logprobs["bf16"]).abs()
    assert gap.mean() < 0.02
    assert gap.max() < 0.1


def test_learning_in_bf16_follows_fp32():
    losses = {}
    for precision in ("fp32", "bf16"):
        ppo = PPOTrainer(
            tiny_gpt2(0), tiny_gpt2(1), precision=precision, batch_size=8, learning_rate=1e-3
        )
        for _ in range(3):
            stats = ppo.step(ragged([4] * 8), ragged([6] * 8, seed=1), torch.linspace(-1, 1, 8))
        losses[precision] = stats["ppo/loss/total"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.03)


def test_the_starter_model_in_bf16():
    """|log p_bf16 − log p_fp32| on a trained model, centred and not."""
    from transformers import AutoTokenizer

    from trl import starter
    from trl.gpt2 import GPT2HeadWithValueModel
    from trl.models.response import ResponseModel

    model = GPT2HeadWithValueModel.from_pretrained(starter.LANGUAGE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
    text = "This film was one of the best that I have seen in years, and the actors were wonderful."
    tokens = torch.tensor(tokenizer.encode(text))
    rollout = Rollout.from_lists([tokens[:3]] * 4, [tokens[3 : 8 + row] for row in range(4)])
    with torch.no_grad():
        exact = ResponseModel(model)(rollout).logprobs
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = ResponseModel(model)(rollout).logprobs
    gap = (exact - rounded).abs()[rollout.response_mask]
    assert 0 < gap.mean() < 0.02
    assert gap.max() < 0.1
