"""Weights that are sharded over processes are trained as whole ones are."""

import copy
import gc
import itertools
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.models.policies import lora_config
from tests.ranks import launch
from tests.test_distributed import (
    KINDS,
    MORE,
    by_one,
    check_equal,
    make_model,
    run_stop_and_go_on,
    trained,
)
from tests.training.runs import assert_same_run, last_state, make_parts, tiny_recipe
from trl.compute.precision import LOW_PRECISION, dither
from trl.compute.sharding import check_can_shard, check_plain_processes
from trl.compute.updater import OneProcess
from trl.config.recipe import ModelConfig
from trl.kernels.sharded import whole
from trl.kernels.stored import Stored
from trl.models.with_value_head import load_policy
from trl.ppo import PPOTrainer
from trl.training import run, sharded
from trl.training.checkpoints import Checkpoints
from trl.training.sharded import PARTS

REFUSED = {"a critic, LoRA"}
WHOLE = {**KINDS, **{kind: MORE[kind] for kind in MORE if kind not in REFUSED}}
TABLE = [(kind, way) for kind in KINDS for way in ("SGD", "Adam", "bf16")]
TABLE += [(kind, "SGD") for kind in WHOLE if kind not in KINDS]
TABLE += [("a critic of its own", "Adam"), ("a critic of its own", "bf16")]
QUICK = [("short passes", "SGD"), ("clipped", "Adam")]
OFFLOADED = [("a critic of its own", "bf16"), ("experts", "SGD")]


def train_sharded(out, table, offloaded):
    results = {}
    for kind, way in [*table, *offloaded]:
        offload = (kind, way) in offloaded
        results[kind, way] = trained(kind, way, shard=True, offload=offload)
        AcceleratorState._reset_state()
    if os.environ["RANK"] == "0":
        torch.save(results, out)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "table", "offloaded"),
    [
        (2, QUICK, OFFLOADED),
        pytest.param(2, TABLE, [], marks=pytest.mark.slow),
        pytest.param(3, TABLE, [], marks=pytest.mark.slow),
        pytest.param(3, [], TABLE, marks=pytest.mark.slow),
    ],
)
def test_sharded_weights_are_trained_as_whole_ones(processes, table, offloaded, tmp_path):
    """Every kind of policy, on rows whose lengths, and passes, differ from process to process."""
    out = str(tmp_path / "out.pt")
    codes, said = launch(train_sharded, processes, tmp_path, out, table, offloaded)
    assert codes == [0] * processes, said
    for (kind, way), result in torch.load(tmp_path / "out.pt").items():
        check_equal(result, by_one(kind, way), way, f"{kind}, {way}")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"distributed_type": DistributedType.FSDP}, "one with FSDP: start plain processes"),
        ({"distributed_type": DistributedType.DEEPSPEED}, "one with DeepSpeed: start plain"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "one with Megatron-LM"),
        (
            {"parallelism_config": ParallelismConfig(tp_size=2)},
            r"one with tensor parallelism: .* shard=True",
        ),
    ],
)
def test_accelerators_that_shard_in_ways_of_their_own_are_refused(settings, told):
    plain = {"distributed_type": DistributedType.MULTI_CPU, "parallelism_config": None}
    check_plain_processes(SimpleNamespace(**plain))
    with pytest.raises(ValueError, match=told):
        check_plain_processes(SimpleNamespace(**plain | settings))


@pytest.mark.parametrize(
    ("kind", "precision", "told"),
    [
        ("ppo", "fp16", "`precision` must be fp32 or bf16 with `shard`"),
        ("a critic, LoRA", "no", "`critic` must share no layers with the policy with `shard`"),
    ],
)
def test_what_cannot_be_sharded_is_refused(kind, precision, told):
    how, _ = (KINDS | MORE)[kind]
    policy, accelerator = load_policy(make_model(kind), **how), SimpleNamespace()
    accelerator.mixed_precision = precision
    with pytest.raises(ValueError, match=told):
        check_can_shard(policy, accelerator)


# -- loading ---------------------------------------------------------------------------------------

LOADED = [
    ("float32", {}, "fp32"),
    ("bfloat16", {}, "fp32"),
    ("bfloat16", {}, "bf16"),
    ("bfloat16", {"critic": "copy"}, "bf16"),
    ("bfloat16", {"unfrozen_layers": 1}, "bf16"),
    ("bfloat16", {"peft_config": lora_config()}, "bf16"),
    ("bfloat16", {"peft_config": lora_config(init_lora_weights="pissa")}, "fp32"),
]
"""The format of the file, what the policy is loaded with, and the precision."""


def load_and_shard(folder):
    for dtype, how, precision in LOADED:
        policies = []
        for shard in (False, True):
            torch.manual_seed(0)
            loaded = load_policy(f"{folder}/{dtype}", **copy.deepcopy(how), shard=shard)
            policies.append(loaded)
        expected, policy = policies
        stored = sum(isinstance(weight, Stored) for weight in policy.parameters())
        assert stored > len(list(policy.parameters())) / 4, how
        dither(expected, LOW_PRECISION.get(precision))
        PPOTrainer(policy, shard=True, precision=precision, batch_size=2, minibatch_size=2)
        weights = dict(expected.named_parameters())
        assert weights.keys() == dict(policy.named_parameters()).keys()
        for name, weight in policy.named_parameters():
            assert weight.requires_grad == weights[name].requires_grad, name
            assert torch.equal(whole(weight.detach()), weights[name]), (name, how)
        AcceleratorState._reset_state()


@pytest.mark.distributed
def test_weights_from_their_files_are_those_of_a_model_in_memory(tmp_path):
    for dtype in ("float32", "bfloat16"):
        make_model("ppo").to(getattr(torch, dtype)).save_pretrained(tmp_path / dtype)
    codes, said = launch(load_and_shard, 2, tmp_path, str(tmp_path))
    assert codes == [0, 0], said


def own_memory():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def measure_loading(folder):
    """Write the most memory of its own that a process has while it loads and shards a model."""
    gc.collect()
    before, over, seen = own_memory(), threading.Event(), [0]

    def watch():
        while not over.wait(0.001):
            seen.append(own_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    policy = load_policy(f"{folder}/model", shard=True)
    settings = {"precision": "fp32", "batch_size": 2, "minibatch_size": 2, "init_kl_coef": 0}
    PPOTrainer(policy, "none", shard=True, **settings)
    over.set()
    watching.join()
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(max(seen) - before))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
def test_no_process_has_the_whole_model_in_memory_of_its_own(dtype, tmp_path):
    config = GPT2Config(n_layer=10, n_embd=512, n_head=8, vocab_size=64, n_positions=64)
    model = GPT2LMHeadModel(config)
    size = 4 * model.num_parameters()  # 126 MB in float32
    model.to(dtype).save_pretrained(tmp_path / "model")
    codes, said = launch(measure_loading, 2, tmp_path, str(tmp_path))
    assert codes == [0, 0], said
    most = max(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert most < 0.75 * size, most / size  # its half, a matrix, and what else a process needs


def test_weights_that_stay_in_their_file_are_whole_ones_to_a_single_process(tmp_path):
    make_model("ppo").bfloat16().save_pretrained(tmp_path)
    plain, policy = (load_policy(str(tmp_path), shard=shard) for shard in (False, True))
    weight = policy.get_input_embeddings().weight
    assert isinstance(weight, Stored)
    assert weight.held.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="must not be changed or moved before .* without `shard`"):
        torch.nn.init.zeros_(weight)
    PPOTrainer(policy, batch_size=2, shard=True, precision="fp32")
    for found, expected in zip(policy.parameters(), plain.parameters(), strict=True):
        assert not isinstance(found, Stored)
        assert torch.equal(found, expected)


def test_to_offload_weights_that_are_not_sharded_is_refused():
    with pytest.raises(ValueError, match="`offload` must be False for weights that are not shard"):
        PPOTrainer(load_policy(make_model("ppo")), batch_size=2, offload=True)
    with pytest.raises(ValueError, match="`offload` must be false without `shard`, got True: set"):
        ModelConfig(offload=True)


def test_one_process_alone_holds_all_weights():
    trainer = PPOTrainer(load_policy(make_model("ppo")), batch_size=2, shard=True)
    assert type(trainer.updater) is OneProcess


# -- runs ------------------------------------------------------------------------------------------


def run_sharded(folder, critic, offload):
    run_stop_and_go_on(folder, shard=True, critic=critic, offload=offload)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("critic", "offload"), [("same", False), ("copy", False), ("copy", True)])
def test_a_sharded_run_stops_and_goes_on_and_saves_a_plain_model(critic, offload, tmp_path):
    codes, said = launch(run_sharded, 2, tmp_path, str(tmp_path), critic, offload)
    assert codes == [0, 0], said
    assert any((tmp_path / "whole" / "checkpoints" / "step-000006" / PARTS).iterdir())
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole" / "policy", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    state = last_state(tmp_path / "whole")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, state["weights"][f"pretrained_model.{name}"]), name
    if critic == "copy":
        found = load_policy(
            str(tmp_path / "whole" / "policy"), critic=str(tmp_path / "whole" / "critic")
        )
        for name, weight in found.critic.named_parameters():
            of_run = state["weights"].get(f"critic.{name}")  # the head is the policy's
            assert ("lm_head" in name) if of_run is None else torch.equal(weight, of_run), name


def run_a_recipe(folder, name, killed_at=None):
    """A sharded run, or the rest of it; at a checkpoint the second process may be killed."""
    rank, written = int(os.environ.get("RANK", 0)), itertools.count(1)
    write = sharded._write_parts

    def write_or_die(parts, checkpoint):
        if next(written) == killed_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(parts, checkpoint)

    sharded._write_parts, run.write_report = write_or_die, lambda runs, out: out
    out = Path(folder)
    model = ModelConfig(name=str(out / "model"), shard=True)
    ppo = {"batch_size": 12, "minibatch_size": 6}
    recipe = tiny_recipe(out, out / name, model=model, ppo=ppo)
    assert run.run_recipe(recipe, resume="auto").steps == 6


@pytest.mark.slow
@pytest.mark.distributed
def test_a_kill_in_a_save_falls_back_and_any_number_of_processes_goes_on(tmp_path):
    make_parts(tmp_path)
    codes, said = launch(run_a_recipe, 2, tmp_path, str(tmp_path), "whole")
    assert codes == [0, 0], said
    awaited = {"awaited": [0], "timeout": 300}
    codes, said = launch(run_a_recipe, 2, tmp_path, str(tmp_path), "killed", 2, **awaited)
    assert codes[1] == -signal.SIGKILL, said
    assert codes[0] != 0, said
    there = Checkpoints(tmp_path / "killed" / "checkpoints")
    assert [path.name for path in there.all()] == ["step-000002"]
    for processes in (1, 3):
        other = f"on {processes}"
        shutil.copytree(tmp_path / "killed", tmp_path / other)
        codes, said = launch(run_a_recipe, processes, tmp_path, str(tmp_path), other)
        assert codes == [0] * processes, said
    codes, said = launch(run_a_recipe, 2, tmp_path, str(tmp_path), "killed")
    assert codes == [0, 0], said
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
