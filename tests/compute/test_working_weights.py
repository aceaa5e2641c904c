"""Several processes multiply by copies too, and exchange what they do without them."""

from functools import partial
from itertools import product

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import ragged
from tests.families import VOCABULARY, tiny_model
from tests.models.policies import lora_config
from tests.ranks import launch
from trl.compute.working_weights import WorkingWeights
from trl.models.with_value_head import load_policy
from trl.ppo import PPOTrainer

HOW = {
    "all": {},
    "LoRA": {"peft_config": lora_config()},
    "the top": {"unfrozen_layers": 1},
    "computed again": {},
    "experts": {},  # processes look for the weights that a pass has left out
}
EPOCHS, PASSES = 2, 3


class Casts(TorchDispatchMode):
    """Counts how often each of some weights is cast, or copied into what was."""

    def __init__(self, weights):
        super().__init__()
        self.made = {weight.data_ptr(): 0 for weight in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        source = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}
        if function in source and (place := args[source[function]].data_ptr()) in self.made:
            self.made[place] += 1
        return function(*args, **kwargs or {})


def seen_in_a_step(kind, *, copies):
    """What a step does on one of several processes: see the test."""
    torch.manual_seed(0)
    model = tiny_model("switch_transformers" if kind == "experts" else "llama")
    policy = load_policy(model, **HOW[kind])
    if kind == "computed again":
        policy.gradient_checkpointing_enable()
    torch.nn.init.normal_(policy.v_head.summary.weight, std=0.1)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    rows = 2 * 2 * PASSES
    trainer = PPOTrainer(
        policy,
        optimizer=torch.optim.SGD(trained, lr=0.03),
        precision="bf16",
        batch_size=rows,
        minibatch_size=rows,
        forward_batch_size=2,
        ppo_epochs=EPOCHS,
    )
    updater, rank = trainer.updater, trainer.accelerator.process_index
    matrices, modules = updater._working.weights, updater._working._places
    if not copies:
        updater._working = WorkingWeights(policy, None)
    exchanges, gradients, dtypes = [], [], set()

    def exchange(group, bucket):
        exchanges.append(bucket.is_last())
        return allreduce_hook(group, bucket)

    def look(module, _):
        if torch.is_grad_enabled() and module.weight.requires_grad:
            dtypes.add(module.weight.dtype)

    trainer.policy.register_comm_hook(None, exchange)
    for module in modules:
        module.register_forward_pre_hook(look)
    trainer.optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([w.grad.clone() for w in trained if w.grad is not None])
    )
    with Casts(matrices) as casts:
        trainer.step(
            ragged([3, 1, 5, 2, 4, 6], seed=rank, vocabulary=VOCABULARY),
            ragged([2, 3, 1, 2, 8, 5], seed=2 + rank, vocabulary=VOCABULARY),
            torch.linspace(-1, 2, 6) * (1 + rank),
        )
    assert all(weight.dtype == torch.float32 for weight in policy.parameters())
    trains = [weight.requires_grad for weight in matrices]
    made = [casts.made[weight.data_ptr()] for weight in matrices]
    return {
        "exchanges": sum(exchanges),
        "dtypes": dtypes,
        "gradients": gradients[0],
        "weights": torch.cat([weight.detach().flatten() for weight in trained]),
        "casts of trained": {n for n, own in zip(made, trains, strict=True) if own},
        "casts of frozen": {n for n, own in zip(made, trains, strict=True) if not own},
    }


def steps(folder, kinds):
    for kind in kinds:
        for copies in (True, False):
            found = seen_in_a_step(kind, copies=copies)
            rank = torch.distributed.get_rank()
            torch.save(found, f"{folder}/{kind}-{copies}-{rank}.pt")
            AcceleratorState._reset_state()


@pytest.mark.distributed
@pytest.mark.parametrize("kinds", [["LoRA"], pytest.param([*HOW], marks=pytest.mark.slow)])
def test_two_processes_use_copies_and_exchange_once_for_each_update(kinds, tmp_path):
    codes, said = launch(steps, 2, tmp_path, str(tmp_path), kinds)
    assert codes == [0, 0], said
    for kind, rank in product(kinds, range(2)):
        read = partial("{}/{}-{}-{}.pt".format, tmp_path, kind)
        quick, plain = (torch.load(read(copies, rank)) for copies in (True, False))
        assert quick["exchanges"] == plain["exchanges"] == EPOCHS, kind
        assert quick["dtypes"] == {torch.bfloat16}, kind
        assert plain["dtypes"] == {torch.float32}, kind
        switched = kind in ("LoRA", "the top")  # to be the reference, and back
        assert quick["casts of trained"] == {1 + EPOCHS + switched}, kind
        assert quick["casts of frozen"] <= {1}, kind
        assert max(plain["casts of trained"]) >= EPOCHS * PASSES, kind
        for mine, other in zip(quick["gradients"], plain["gradients"], strict=True):
            assert torch.equal(mine, other), kind
        torch.testing.assert_close(quick["weights"], plain["weights"], rtol=0, atol=1e-3)
        of_other = torch.load(read(True, 1 - rank))
        assert torch.equal(quick["weights"], of_other["weights"]), kind
