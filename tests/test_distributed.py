"""Processes that share a batch end with the weights of one process that has it all."""

import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object

from tests.conftest import ragged, tiny_gpt2
from tests.families import VOCABULARY, tiny_model
from tests.models.policies import lora_config
from tests.models.test_families import of_text_and_images
from tests.ranks import launch
from tests.training.runs import assert_same_run, lines, make_parts, tiny_recipe
from tests.training.test_loop import tokenizer
from trl.batch import Rollout
from trl.compute import peers
from trl.compute.precision import exit_after_gloo
from trl.config.recipe import ModelConfig, PretrainingConfig
from trl.environments import EnvironmentReward, Episodes, Turn, episode_figures
from trl.kernels.sharded import whole
from trl.models.with_value_head import load_policy
from trl.optimization.losses import token_mean
from trl.ppo import PPOTrainer
from trl.rollout import Sampler
from trl.training import loop, run
from trl.training.loop import mean_of_each

ROWS = 12
MORE_ROWS = 16
"""For four processes, with the same first 12."""
KINDS = {
    "ppo": ({}, {}),
    "grpo": ({}, {"algorithm": "grpo"}),
    "rloo": ({}, {"algorithm": "rloo"}),
    "LoRA": ({"peft_config": lora_config()}, {}),
    "the top": ({"unfrozen_layers": 1}, {}),
}
MORE = {
    "whitened rewards": ({}, {"whiten_rewards": True}),
    "early stop": ({}, {"max_approxkl": 1e-5}),
    "clipped": ({}, {"max_grad_norm": 0.5}),
    "reinforce++": ({}, {"algorithm": "reinforce++"}),
    "vapo": ({}, {"algorithm": "vapo", "value_pretraining": 0}),
    "penalties": ({}, {"algorithm": "rloo", "scale_scores": True, "missing_eos_penalty": 1.0}),
    "warm-up": ({}, {"value_warmup_steps": 1, "vf_coef": 1.0}),  # what is at rest does not decay
    "pretraining": ({}, {"pretraining_coef": 0.5}),
    "short passes": (  # as many tokens in each, so not as many passes on every process
        {},
        {"token_budget": 14, "pretraining_coef": 0.5},
    ),
    "value pretraining": ({}, {"value_pretraining": 1, "vf_coef": 1.0}),
    "token scores": ({}, {"whiten_rewards": True}),
    "computed again": ({}, {}),
    "tied embeddings": ({}, {"max_grad_norm": 0.5}),
    "values alone": ({}, {}),  # by a loss of one's own, that has no use for the language head
    "experts": ({}, {}),  # some get no token on one process
    "routers": ({}, {"forward_batch_size": 1}),  # balanced within each pass: the same passes
    "images": ({}, {}),  # no text uses the tower
    "no say": ({}, {"whiten_rewards": True, "scale_scores": True, "kl_horizon": 50}),
    "no say, groups": ({}, {"algorithm": "grpo", "policy_loss": "gspo"}),
    "a critic of its own": ({"critic": "copy", "value_head": "bins"}, {"value_warmup_steps": 1}),
    "a critic, LoRA": ({"critic": "copy", "peft_config": lora_config()}, {}),
    "a head of bins": ({"value_head": "bins"}, {}),
    "a head with a layer inside": ({"value_head": "mlp", "peft_config": lora_config()}, {}),
    "a silent process": ({}, {"algorithm": "rloo", "scale_scores": True}),
    "episodes": ({}, {"gamma": 0.9}),
}
SILENT = {
    "no say": (1, 7, 8, 9),
    "no say, groups": (2, 6, 7, 11),  # 3 and 10 are alone in their groups then
    "a silent process": (0, 1, *range(6, 12)),
}
"""Rows on which nothing has a say."""
WAYS = {
    "SGD": ("fp32", partial(torch.optim.SGD, lr=0.1, weight_decay=0.01)),
    # Little more too: where gradients are nearly 0, Adam makes shares of its rate of rounding.
    "Adam": ("fp32", partial(torch.optim.Adam, lr=2.7e-3, eps=1e-5)),
    "bf16": ("bf16", torch.optim.SGD),
}
LOW_RATES = {"ppo": 0.1, "grpo": 0.1, "rloo": 0.06, "LoRA": 0.035, "the top": 0.06}
LOW_RATES["a critic of its own"] = 0.11
"""At which the weights move by little more than they have to: bf16 rounds by how much they move."""
MOST = {"SGD": 2e-7, "Adam": 5e-6, "bf16": 5e-3}
"""By how much a weight may differ."""


def make_model(kind):
    if kind == "images":
        return of_text_and_images("llava")
    if kind == "routers":
        model = tiny_model("mixtral")
        model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
        return model
    tied = {"experts": "switch_transformers", "tied embeddings": "gpt2", "values alone": "gpt2"}
    return tiny_model(tied.get(kind, "llama"))


class OfValues(PPOTrainer):
    def loss(self, new, targets, mask, counts):
        _, stats = super().loss(new, targets, mask, counts)
        return token_mean((new.values - 3).square(), mask, counts.tokens), stats


def trained(kind, way, size=ROWS, **parts):
    """What two steps make of a policy: its weights, by how much the most has moved, the stats."""
    how, settings = (KINDS | MORE)[kind]
    mixed_precision, make_optimizer = WAYS[way]
    torch.manual_seed(0)
    policy = load_policy(make_model(kind), **how)
    if kind == "computed again":
        policy.gradient_checkpointing_enable()
    torch.nn.init.normal_((policy.critic or policy).v_head.summary.weight, std=0.1)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    names = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    before = torch.cat([weight.detach().flatten() for weight in weights])
    trainer = (OfValues if kind == "values alone" else PPOTrainer)(
        policy,
        **parts,
        optimizer=make_optimizer(weights, **{"lr": LOW_RATES[kind]} if way == "bf16" else {}),
        precision=mixed_precision,
        batch_size=size,
        minibatch_size=size,
        ppo_epochs=2,
        pretraining_rows=size // 2 if "pretraining_coef" in settings else None,
        **{"forward_batch_size": 2} | settings,
    )
    if parts:  # nothing holds them whole
        assert not any(weight.numel() for weight in weights)
    mine = share(trainer, size)
    if "pretraining_coef" in settings:
        texts = ragged([2, 6, 3, 5, 4, 2, 7, 3], vocabulary=VOCABULARY)
        texts = texts[share(trainer, size // 2)]
        trainer.pretraining = lambda rows: texts
    queries = [q for q in ragged([3, 1, 5, 2, 4, 6, 2, 1], vocabulary=VOCABULARY) for _ in range(2)]
    responses = ragged([2, 3, 1, 2, 8, 5, 1, 7, 11, 1, 4, 12, 1, 9, 3, 6], 1, VOCABULARY)
    rollout = Rollout.from_lists(
        queries[mine], responses[mine], group_ids=[row // 2 for row in range(size)][mine]
    )
    rollout = replace(rollout, ended=(torch.arange(size) % 3 > 0)[mine])
    scores = torch.tensor(
        [-1.0, 2, 0.5, 0, 1, -2, 0.3, 1.1, 0.7, -0.2, 0.1, 0.9, 1.3, -0.6, 0.2, 0.4]
    )
    scores = scores[:size][mine]
    if kind == "token scores":
        drawn = torch.randn(size, 12, generator=torch.Generator().manual_seed(5))[mine]
        scores = drawn[:, : rollout.responses.shape[1]] * rollout.response_mask
    if silent := SILENT.get(kind):
        scores = [
            None if n in silent else s.item()
            for n, s in zip(range(size)[mine], scores, strict=True)
        ]
        with pytest.warns(UserWarning, match="this step makes no update"):
            assert trainer.step(rollout, [None] * len(scores))["ppo/updates"] == 0
    figures = {}
    for _ in range(4 if kind == "early stop" else 2):  # of half the updates each
        if kind == "episodes":
            with trainer.sampling():
                rollout, scores, figures = played(policy, mine)
        stats = trainer.step(rollout, scores)
    now = dict(policy.named_parameters())  # sharded ones are others
    after = torch.cat([whole(now[name].detach()).flatten() for name in names])
    kept = {k: v for k, v in stats.items() if isinstance(v, float) and not k.startswith("time")}
    kept |= figures
    return after, float((after - before).abs().max()), kept


TURNS = [3, 1, 2, 1, 1, 4, 2, 1]
"""Of each of the groups: of three processes, the second has but one turn to write."""


class Game:
    """Lasts as many turns as its row says; what it says and gives is drawn by the group's seed."""

    def reset(self, turns, seed=None):
        self.left, self.random = turns, random.Random(seed)
        return f" w{self.random.randrange(40)}"

    def step(self, text: str) -> Turn:
        self.left -= 1
        self.drawn = self.random.random()
        said = " w5" * self.random.randrange(1, 4)
        return Turn(said, reward=4 * self.drawn - 1, done=self.left == 0)


def played(policy, mine):
    """Episodes of this process's rows, their rewards turn by turn, and figures of all processes."""
    rows = [{"prompt": f"w{n} w7", "turns": turns} for n, turns in enumerate(TURNS)]
    sampler = Sampler(tokenizer(), max_new_tokens=(1, 4), eos_token_id=None, group_size=2)
    episodes = Episodes(sampler, Game, max_tokens=24)
    rows = rows[mine.start // 2 : mine.stop // 2]
    rollout = episodes(policy, rows, seeds=range(mine.start, mine.stop))
    one, other = ([e.drawn for e in rollout.environments[first::2]] for first in (0, 1))
    assert one == other  # the two of a group have had the same game
    told = [
        [{"left": e.left, **record}]
        for e, record in zip(rollout.environments, rollout.episodes, strict=True)
    ]
    figures = mean_of_each(gather_object([episode_figures(rollout.episodes)]))
    figures["all that was said"] = float(zlib.crc32(json.dumps(gather_object(told)).encode()))
    return rollout, EnvironmentReward()(rollout), figures


def share(trainer, rows):
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    return slice(rank * rows // world, (rank + 1) * rows // world)


TABLE = [(kind, way) for kind in KINDS for way in WAYS] + [(kind, "SGD") for kind in MORE]
LISTED = ["whitened rewards", "early stop", "warm-up", "pretraining", "value pretraining"]
TABLE += [(kind, "Adam") for kind in [*LISTED, "token scores", "episodes"]]
OFTEN = ["ppo", "the top", "warm-up", "pretraining", "a critic of its own", "no say, groups"]
OFTEN += ["tied embeddings", "values alone", "experts", "routers", "episodes"]
QUICK = [*((kind, "SGD") for kind in OFTEN), ("LoRA", "Adam"), ("ppo", "bf16")]


def train_all(out, size, table=TABLE):
    results = {}
    for kind, way in table:
        results[kind, way] = trained(kind, way, size)
        AcceleratorState._reset_state()
    if os.environ.get("RANK", "0") == "0":
        torch.save(results, out)


@cache
def by_one(kind, way, size=ROWS):
    AcceleratorState._reset_state(reset_partial_state=True)
    return trained(kind, way, size)


def check_equal(result, expected, way, named):
    """Of several processes, and of one: the same weights, and the same figures."""
    (weights, _, stats), (expected, moved, expected_stats) = result, expected
    assert moved > 1e-2, named
    gap = float((weights - expected).abs().max())
    assert gap <= MOST[way], f"{named}: {gap:.1e}"
    assert stats.keys() == expected_stats.keys()
    if way != "bf16":
        for name, value in expected_stats.items():
            assert stats[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (named, name)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "size", "table"),
    [
        (2, ROWS, QUICK),
        pytest.param(2, ROWS, TABLE, marks=pytest.mark.slow),
        pytest.param(3, ROWS, TABLE, marks=pytest.mark.slow),
        pytest.param(4, MORE_ROWS, TABLE, marks=pytest.mark.slow),
    ],
)
def test_several_processes_equal_one(processes, size, table, tmp_path):
    """Every kind of policy, on rows whose lengths differ from process to process."""
    codes, said = launch(train_all, processes, tmp_path, str(tmp_path / "out.pt"), size, table)
    assert codes == [0] * processes, said
    results = torch.load(tmp_path / "out.pt")
    for (kind, way), result in results.items():
        check_equal(result, by_one(kind, way, size), way, f"{kind}, {way}")
        assert ("ppo/loss/router" in result[-1]) == (kind == "routers")


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo,cuda:nccl", "nccl", None])
def test_a_process_leaves_gloo_time_to_end(backend, monkeypatch):
    """Its threads abort a process that ends before they have let go of a tensor."""
    called, slept = [], []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: backend is not None)
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: backend)
    monkeypatch.setattr("atexit.register", called.append)
    monkeypatch.setattr("time.sleep", slept.append)
    exit_after_gloo()
    assert len(called) == (backend is not None and "gloo" in backend)
    for function in called:
        function()
    assert slept == [0.5] * len(called)


GROUPS = [
    ([[0, 0, 1, 1], [1, 1, 2, 2]], False, True),
    ([[0, 0, 1, 1], [0, 0, 1, 1]], True, False),  # as a sampler counts on each process
    ([[0, 0, 0, 0], [0, 0, 1, 1]], True, True),
    ([[0, 0, 1, 1], [2, 2, 3, 3]], False, False),
]


def step_on_groups(folder):
    """Steps of GRPO on four rows of each of two processes, all to the same query."""
    trainer = PPOTrainer(
        tiny_gpt2(0), algorithm="grpo", precision="fp32", batch_size=8, minibatch_size=8
    )
    rank, said = trainer.accelerator.process_index, []
    queries, responses = [torch.tensor([5, 6])] * 4, ragged([2, 7, 1, 8], seed=rank)
    for group_ids, recorded, _ in GROUPS:
        rollout = Rollout.from_lists(queries, responses, group_ids=group_ids[rank])
        if recorded:
            logprobs = trainer.forward_pass(trainer.policy, rollout).logprobs
            rollout = replace(rollout, behaviour_logprobs=logprobs)
        try:
            trainer.step(rollout, torch.linspace(-1, 2, 4))
            said.append("")
        except ValueError as error:
            said.append(str(error))
    (Path(folder) / f"said-{rank}.json").write_text(json.dumps(said))


@pytest.mark.distributed
def test_a_group_that_is_spread_over_processes_is_refused(tmp_path):
    codes, errors = launch(step_on_groups, 2, tmp_path, str(tmp_path))
    assert codes == [0, 0], errors
    message = (
        r"`group_ids` must keep each group on one process, got group \d \(query \[5, 6\]\) on 2"
    )
    for rank in range(2):
        said = json.loads((tmp_path / f"said-{rank}.json").read_text())
        assert [bool(re.match(message, text)) for text in said] == [r for _, _, r in GROUPS], said
        assert [bool(text) for text in said] == [refused for _, _, refused in GROUPS], said


def step_and_look_at_gradients(folder):
    """A step whose last update shows where the gradients lie that processes exchange."""
    trainer = PPOTrainer(tiny_gpt2(0), precision="fp32", batch_size=4, minibatch_size=4)
    clip, seen = trainer.updater.clip, []

    def look(most):
        memory = [w.grad.untyped_storage().data_ptr() for w in trainer.trainable]
        seen.append((len(memory), len(set(memory))))
        return clip(most)

    trainer.updater.clip = look
    trainer.step([torch.tensor([5, 6])] * 2, ragged([2, 7], seed=0), [0.0, 1.0])
    name = f"seen-{trainer.accelerator.process_index}.json"
    (Path(folder) / name).write_text(json.dumps(seen))


@pytest.mark.distributed
def test_a_gradient_lies_where_it_is_exchanged_and_nowhere_else(tmp_path):
    codes, errors = launch(step_and_look_at_gradients, 2, tmp_path, str(tmp_path))
    assert codes == [0, 0], errors
    for rank in range(2):
        for weights, places in json.loads((tmp_path / f"seen-{rank}.json").read_text())[1:]:
            assert places == 1 < weights  # one bucket


# -- a process that fails --------------------------------------------------------------------------

PATIENCE = 3
"""Seconds that a process waits for the others in these tests."""
HOST = re.escape(socket.gethostname())
slow = pytest.mark.slow


def fail(kind):
    """One of two processes fails in the third step, or answers no more."""
    short = "answers" in kind or "waits" in kind
    if short or kind == "killed":
        peers.GRACE, peers.SILENCE = 1.0, PATIENCE
    trainer = PPOTrainer(
        tiny_gpt2(0),
        tiny_gpt2(1),
        precision="fp32",
        batch_size=8,
        minibatch_size=8,
        ppo_epochs=1,
        collective_timeout=PATIENCE if short else 600,
    )
    for step in range(4 if "waits" in kind else 1000):
        scores = torch.linspace(-1, 2, 4)
        if trainer.accelerator.process_index == int("rank 0" not in kind) and step == 2:
            if kind == "scorer":
                raise OverflowError("the reward is broken")
            if kind == "Ctrl-C":
                os.kill(os.getpid(), signal.SIGINT)
            if kind == "disk":
                raise OSError(28, "No space left on device", "/full")
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "NaN":
                scores[1] = float("nan")
            if kind == "the scorer waits":
                time.sleep(2 * PATIENCE)
            if kind == "only its heart answers":
                trainer.model.transformer.register_forward_hook(lambda *_: time.sleep(60))
            if "nothing of" in kind:
                os.kill(os.getpid(), signal.SIGSTOP)
        trainer.step(ragged([3, 1, 4, 1]), ragged([2, 7, 1, 8]), scores)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("scorer", f"rank 1 on {HOST} failed: OverflowError: the reward is broken"),
        ("killed", f"rank 1 on {HOST} (was not heard of|ended without a word)"),
        pytest.param("Ctrl-C", f"rank 1 on {HOST} failed: KeyboardInterrupt", marks=slow),
        pytest.param("disk", f"rank 1 on {HOST} failed: OSError.*No space left", marks=slow),
        pytest.param("NaN", "rank 1 was given bad input: .*nan", marks=slow),
        pytest.param("only its heart answers", "Timed out waiting 3000ms", marks=slow),
        ("nothing of rank 1 answers", f"rank 0 stops, since rank 1 on {HOST} (was not|ended)"),
        ("nothing of rank 0 answers", f"rank 1 stops, since rank 0 on {HOST},? .*keeps the store"),
    ],
)
def test_a_process_that_fails_ends_the_others_with_its_reason(kind, reason, tmp_path):
    other = int("rank 0" in kind)
    codes, said = launch(fail, 2, tmp_path, kind, timeout=60, awaited=[other])
    assert codes[other] == 1, said
    assert re.search(reason, said[other]), said[other]
    if kind in ("scorer", "killed"):
        assert re.match(f"rank 0 stops, since {reason}", said[other].splitlines()[-1])
        assert ("OverflowError: the reward is broken" in said[1]) == (kind == "scorer")


def meet_one_that_is_killed():
    trainer = PPOTrainer(tiny_gpt2(0), tiny_gpt2(1), batch_size=2, minibatch_size=2)
    if trainer.accelerator.process_index == 1:
        time.sleep(2)  # it is known by then
        os.kill(os.getpid(), signal.SIGKILL)
    peers.meet()


@pytest.mark.distributed
def test_who_is_killed_on_the_same_machine_is_missed_outside_of_an_exchange_too(tmp_path):
    """Long before one that is silent counts as lost."""
    codes, said = launch(meet_one_that_is_killed, 2, tmp_path, timeout=peers.SILENCE / 2)
    assert codes == [1, -signal.SIGKILL], said
    missed = f"rank 0 stops, since rank 1 on {HOST} was not heard of for [2-9] s"
    assert re.match(missed, said[0].splitlines()[-1]), said[0]


def end_after_the_other(rank, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    PPOTrainer(tiny_gpt2(0), tiny_gpt2(1), batch_size=2, minibatch_size=2)
    peers.meet()
    if rank == 0:
        time.sleep(2 * peers.HEARD + peers.GRACE)


def start_children(port):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=end_after_the_other, args=(n, port)) for n in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_child_of_multiprocessing_that_ends_first_is_not_lost(tmp_path):
    """It runs no `atexit`, and leaves word all the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    codes, said = launch(start_children, 1, tmp_path, str(port), timeout=120)
    assert codes == [0], said


STEPS_UNDER_TORCHRUN = """
import os, time, torch
from tests.conftest import tiny_gpt2
from trl import PPOTrainer

trainer = PPOTrainer(tiny_gpt2(0), batch_size=4, minibatch_size=4, precision="fp32")
print("ready", os.getppid(), flush=True)
while True:
    tokens = [torch.tensor([5, 6, 7])] * 2
    trainer.step(tokens, [torch.tensor([1, 2])] * 2, [0.0, 1.0])
    time.sleep(0.3)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_launcher_that_is_killed_is_named(tmp_path):
    """torchrun keeps the store, and not rank 0, which tells of it."""
    (tmp_path / "steps.py").write_text(STEPS_UNDER_TORCHRUN)
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr"]
    command += ["localhost", "--nproc-per-node=2", str(tmp_path / "steps.py")]
    env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said:
        torchrun = subprocess.Popen(command, env=env, stdout=said, stderr=said)
    read = (tmp_path / "said").read_text
    until(lambda: read().count("ready") == 2, seconds=120)
    os.kill(torchrun.pid, signal.SIGKILL)
    torchrun.wait()
    until(lambda: re.search(r"rank \d stops", read()), seconds=peers.SILENCE + peers.GRACE)
    assert f"since torchrun, the launcher of rank 0 on {socket.gethostname()}, which" in read()


def until(happened, *, seconds):
    """Wait for something to have happened, so many seconds at most."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_scorer_is_waited_for_longer_than_an_exchange(tmp_path):
    codes, said = launch(fail, 2, tmp_path, "the scorer waits", timeout=120)
    assert codes == [0, 0], said


# -- runs ------------------------------------------------------------------------------------------


def run_stop_and_go_on(folder, precision="fp32", **model):
    """A run, and another that is stopped in its third step and goes on."""
    out, rank = Path(folder), int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    if rank == 0:
        make_parts(out)
    if "RANK" in os.environ:
        torch.distributed.barrier()
    changes = {"ppo": {"pretraining_coef": 0.5, "precision": precision}}
    changes["pretraining"] = PretrainingConfig(text=str(out / "prompts.txt"), tokens=4)
    changes["model"] = ModelConfig(name=str(out / "model"), **model)
    run.write_report = lambda runs, out: out
    run.run_recipe(tiny_recipe(out, out / "whole", **changes))
    calls, score = 0, loop.score

    def score_and_stop(scorer, rollout):
        nonlocal calls
        calls += 1
        if calls == 3 and rank == 0:  # one process is asked, all of them stop
            os.kill(os.getpid(), signal.SIGINT)
        return score(scorer, rollout)

    recipe = tiny_recipe(out, out / "stopped", **changes)
    loop.score = score_and_stop
    assert run.run_recipe(recipe).interrupted
    loop.score = score
    assert run.run_recipe(recipe, resume="auto").steps == 6
    if rank == 0:
        assert_same_run(out / "whole", out / "stopped")


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=slow)])
def test_a_run_of_two_processes_stops_and_goes_on(precision, tmp_path):
    written = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        codes, said = launch(run_stop_and_go_on, processes, out, str(out), precision)
        assert codes == [0] * processes, said
        rows = lines(out / "whole" / "samples.jsonl")
        written.append([(row["prompt"], row["response"]) for row in rows[:6]])
    assert written[0] == written[1]  # held-out responses of the same weights
