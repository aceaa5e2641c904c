import pytest
import torch
from transformers import GPT2Config

from tests.conftest import ragged, tiny_gpt2
from trl.batch import Rollout
from trl.compute import updater
from trl.compute.precision import dither, fast_bf16, make_accelerator
from trl.gpt2 import GPT2HeadWithValueModel
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


def float32(*bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def test_a_weight_goes_to_a_place_among_those_that_round_alike():
    """0x3F80 is 1 in bfloat16; of 1 + ½·2⁻⁷ and 1 + 3/2·2⁻⁷ the even one is the nearest."""
    layer = torch.nn.Linear(6, 1, bias=False)
    given = (0x3F800000, 0x3F808000, 0x3F818000, 0xBF808000 - 2**32, 0x3F808001, 0)
    layer.weight.data = float32(*given)[None]
    dither(layer, torch.bfloat16)
    found = layer.weight.detach()[0].view(torch.int32).tolist()
    assert 0x3F7F8000 < found[0] < 0x3F808000
    assert 0x3F7F8000 < found[1] < 0x3F808000
    assert 0x3F818000 < found[2] < 0x3F828000
    assert 0xBF7F8000 < found[3] + 2**32 < 0xBF808000
    assert found[4:] == list(given[4:])  # it has all its digits; and nothing is nothing
    assert len({*found}) == 6


@pytest.mark.parametrize(("low", "bits"), [(torch.bfloat16, 16), (torch.float16, 13)])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_products_see_the_same_weights_and_each_small_update(low, bits, stored):
    torch.manual_seed(0)
    coarse = torch.randn(300, 200).to(stored).float()
    model = torch.nn.ModuleList([torch.nn.Linear(200, 300), torch.nn.Embedding(300, 200)])
    model.append(torch.nn.Linear(200, 300, bias=False).requires_grad_(False))
    for part in model:
        part.weight.data = coarse.clone()
    dither(model, low)
    found = model[0].weight.detach()
    assert torch.equal(found.to(low), coarse.to(low))
    assert torch.equal(model[1].weight, coarse)  # read as it is
    assert torch.equal(model[2].weight, coarse)  # not trained
    places = (found.view(torch.int32) & (2**bits - 1)).float() / 2**bits
    assert torch.histc(places, 8, 0, 1) / 60_000 == pytest.approx([1 / 8] * 8, abs=0.01)
    distance = 2.0 ** (found.abs().log2().floor() - 23 + bits)
    update = 0.1 * distance
    seen = ((found + update).to(low).float() - found.to(low).float()) / distance
    assert seen.mean() == pytest.approx(0.1, abs=0.01)
    again = torch.nn.Linear(200, 300)
    again.weight.data = coarse.clone()
    dither(again, low)
    assert torch.equal(again.weight, found)
    whole = torch.nn.Linear(200, 300)
    before = whole.weight.detach().clone()
    dither(whole, None)
    assert torch.equal(whole.weight, before)


@pytest.mark.parametrize("dithered", [True, False])
def test_an_update_moves_a_policy_from_float16_in_bf16_as_in_fp32(monkeypatch, dithered):
    found = {}
    for precision in ("fp32", "bf16"):
        if not dithered:
            monkeypatch.setattr(updater, "dither", lambda *arguments: None)
        model = GPT2HeadWithValueModel(GPT2Config(n_layer=2, n_head=2, n_embd=128, vocab_size=97))
        with torch.no_grad():
            for seed, weight in enumerate(model.parameters()):
                stream = torch.Generator().manual_seed(seed)
                new = (
                    0.1 * torch.randn(weight.shape, generator=stream) if weight.ndim > 1 else weight
                )
                weight.copy_(new.half())
        settings = {"learning_rate": 1e-5, "batch_size": 8, "minibatch_size": 8, "ppo_epochs": 2}
        ppo = PPOTrainer(model, precision=precision, **settings)
        stats = ppo.step(ragged([3] * 8), ragged([9] * 8, seed=1), torch.arange(8.0))
        found[precision] = float(stats["ppo/policy/approxkl"])
    assert (found["bf16"] < 2 * found["fp32"]) == dithered  # else 7 times as much


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
