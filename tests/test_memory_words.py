"""An error of memory says what takes less of it, and stays the error that it was."""

import pytest
import torch

from tests.conftest import ragged, tiny_gpt2
from trl import cli
from trl.ppo import PPOTrainer
from trl.rollout import Sampler

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)."),
    MemoryError(),
]
SETTINGS = ("forward_batch_size", "token_budget", "max_rows", "lora", "unfrozen_layers")


def failing(model, error, *, in_update=False):
    """Let the policy's own layers run out of memory, those of an update alone or all."""

    def fail(*_):
        if torch.is_grad_enabled() or not in_update:
            raise error

    model.transformer.h[0].register_forward_pre_hook(fail)


def caught(error, call):
    with pytest.raises(type(error)) as found:
        call()
    assert found.value is error
    return getattr(error, "__notes__", [])


def step_of(trainer):
    return lambda: trainer.step(ragged([3, 4]), ragged([2, 5], 1), torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["step", "update", "sampling"])
def test_what_takes_less_is_told_once(error, where):
    error = type(error)(*error.args)
    model = tiny_gpt2()
    trainer = PPOTrainer(model, batch_size=2, minibatch_size=2)
    failing(model, error, in_update=where == "update")
    if where == "sampling":
        sampler = Sampler(max_new_tokens=2, add_bos=False)
        (note,) = caught(error, lambda: sampler(model, ragged([3, 4])))
    else:
        (note,) = caught(error, step_of(trainer))
    assert all(f"`{setting}`" in note for setting in SETTINGS)
    assert "gradient_checkpointing_enable()" in note
    doing = {
        "step": "scoring responses with a model",
        "update": "taking a step of PPO",
        "sampling": "sampling",
    }[where]
    assert note.startswith(f"Out of memory while {doing}.")


def test_other_errors_are_left_alone():
    model, error = tiny_gpt2(), RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    trainer = PPOTrainer(model, batch_size=2, minibatch_size=2)
    failing(model, error)
    assert caught(error, step_of(trainer)) == []


def test_the_command_line_tells_it_too(monkeypatch, capsys):
    error = ValueError("DefaultCPUAllocator: can't allocate memory")
    error.add_note("What takes less: …")

    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.setattr(cli, "is_explained", lambda error: True)
    assert cli.main([]) != 0
    assert "What takes less: …" in capsys.readouterr().err
