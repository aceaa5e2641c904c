"""Our side of every workload of `benchmarks/peers.py` runs, at a tiny shape."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "workers")]

import cells  # noqa: E402
import critic  # noqa: E402
import ours  # noqa: E402
import peers  # noqa: E402
import side  # noqa: E402
import staleness  # noqa: E402
from workloads import WORKLOADS, Workload  # noqa: E402

from tests.rows import quick  # noqa: E402

OUR_SIDES = [name for name, (whose, *_) in peers.SIDES.items() if whose == "ours"]


def tiny(name: str) -> Workload:
    """A workload with all that is its own, but few rows, short ones, and a small model."""
    workload = WORKLOADS[name]
    return replace(
        workload,
        layers=5,  # more than are trained by the side that trains the top 4
        width=16,
        heads=4,
        key_value_heads=2,
        inner=24,
        vocabulary=61,
        positions=32,
        batch_size=8,
        minibatch_size=4,
        query_length=tuple(min(8, length) for length in workload.query_length),
        response_length=tuple(min(12, length) for length in workload.response_length),
    )


def run(name: str, workload: Workload) -> dict:
    """One iteration of one of our sides, in this process."""
    _, *flags = peers.SIDES[name]
    arguments = ours.parse_arguments([*flags, "--workload", workload.to_json()])
    contender = ours.OurSide(arguments)
    measured = side.run_iteration(
        contender, workload, 0, precision=arguments.precision, matmul_size=32
    )
    return measured | {"same_tokens": contender.same_tokens}


@pytest.mark.parametrize("name", quick(WORKLOADS, "a"))
def test_our_sides_do_the_agreed_work(name):
    workload = tiny(name)
    names = ["ours-fp32", "ours-bf16-recorded"]
    names += (
        ["ours-fp32-recorded", "ours-bf16-unfrozen4", "ours-bf16-lora", "ours-bf16-lora-low"]
        if name == "b"
        else []
    )
    names += ["ours-bf16", "ours-bf16-unshared"] if name == "c" else []
    first = {side_name: run(side_name, workload) for side_name in names}

    peers.check_same_work(
        first, workload, {each: measured["same_tokens"] for each, measured in first.items()}
    )

    runs = {each: [measured, measured] for each, measured in first.items()}
    summary = peers.summarise(json.loads(json.dumps(runs)))
    assert "| ours-bf16-recorded |" in peers.as_table(summary)
    assert "| ours-fp32 |" in peers.as_table_of_speeds(summary, runs)
    assert first["ours-fp32"]["sampled_tokens"] == workload.response_tokens
    assert first["ours-fp32"]["share_of_peak"] > 0
    assert summary["times_ours-fp32"]["ours-bf16-recorded"]["step_s"]["median"] > 0


def test_other_work_is_found_out():
    workload = tiny("a")
    good = run("ours-fp32", workload)
    both = {"one": True, "other": True}
    shifted = good["stats"] | {"objective/entropy": good["stats"]["objective/entropy"] + 1}
    for bad, message in (
        (good | {"updates": workload.updates - 1}, "`updates` must be"),
        (good | {"trained_tokens": 3}, "`trained_tokens` must be"),
        (good | {"stats": good["stats"] | {"objective/kl": float("nan")}}, "must be finite"),
        (good | {"stats": shifted}, "do not train on the same thing"),
    ):
        with pytest.raises(RuntimeError, match=message):
            peers.check_same_work({"one": good, "other": bad}, workload, both)
    # Sides that go on with their own tokens are not held to the others' numbers.
    peers.check_same_work(
        {"one": good, "other": good | {"stats": shifted}}, workload, both | {"other": False}
    )


def test_what_a_side_cannot_tell_is_a_dash():
    known = dict.fromkeys(peers.MEASURED, 2.0) | {"share_of_peak_in": "optimize_s"}
    unknown = known | {"forward_s": None, "forward_tokens_per_s": None, "generate_s": None}
    runs = {"ours-bf16": [known], "peer": [unknown | {"share_of_peak_in": "step_s"}]}

    summary = peers.summarise(runs)

    assert summary["medians"]["peer"]["forward_s"] is None
    assert summary["times_ours-bf16"]["peer"]["generate_s"] is None
    assert "| peer | – | 2.00 | 2.00 | 2.00 | 1.00 (1.00–1.00) |" in peers.as_table(summary)
    assert "| peer | 2 | – | 2 | 2 | 200% (of the whole step) |" in peers.as_table_of_speeds(
        summary, runs
    )


def test_share_of_the_peak():
    # 10 body weights on 4 · (3 + 2) tokens, 100 head weights on 4 · 2, twice, 6 operations each:
    # 6 · 2 · (200 + 800) = 12,000 operations in 4 s; the machine makes 30,000 in that time, twice
    # and a half as many.
    workload = replace(
        tiny("a"), batch_size=4, ppo_epochs=2, query_length=(3, 3), response_length=(2, 2)
    )
    seconds = {"generate_s": 2.0, "step_s": 8.0, "forward_s": None, "optimize_s": 4.0}
    found = side.speeds(workload, {"body": 10, "head": 100}, seconds, gflops=7500e-9)
    assert found["share_of_peak"] == pytest.approx(0.4)
    assert found["generate_tokens_per_s"] == 4.0  # 8 tokens in 2 s
    assert found["forward_tokens_per_s"] is None
    assert found["optimize_tokens_per_s"] == 10.0  # 20 tokens, twice, in 4 s


@pytest.mark.parametrize(
    ("name", "millions", "tokens", "updates"),
    [("a", 124.4, 32 * 32, 16), ("c", 60.6, 32 * 192, 4), ("d", 5.3, 256 * 32, 4)],
)
def test_sizes_of_the_workloads(name, millions, tokens, updates):
    workload = WORKLOADS[name]
    assert side.count_parameters(workload)["all"] / 1e6 == pytest.approx(millions, abs=0.05)
    assert workload.tokens == tokens
    assert workload.updates == updates


def test_ragged_lengths_and_the_way_to_a_worker():
    workload = WORKLOADS["b"]
    assert min(workload.query_lengths) >= 4
    assert max(workload.query_lengths) <= 64
    assert min(workload.response_lengths) >= 1
    assert max(workload.response_lengths) == 64
    assert len(set(workload.response_lengths)) > 20
    assert Workload.from_json(workload.to_json()) == workload
    grouped = WORKLOADS["c"]
    queries = side.make_batch(replace(grouped, vocabulary=61), 0).queries
    assert [len({id(query) for query in queries[i : i + 4]}) for i in range(0, 32, 4)] == [1] * 8


@pytest.mark.parametrize("script", [critic, staleness])
def test_every_cell_has_a_name_and_a_row(script):
    found = list(script.grid())
    assert len({cell.name for cell in found}) == len(found)
    assert {cell.seed for cell in found} == {0, 1, 2}
    figures = {"rewards": [0.5], "final": 0.5, "steps": None, "r2": 0.4, "best_r2": 0.5}
    figures["figures"] = {name: [0.0] * staleness.LAST for name in staleness.KEPT}
    shown = script.table({cell.name: figures for cell in found})
    for cell in found:
        assert f"| {cell.variant if script is critic else cell.correction} |" in shown


def test_a_buffer_hands_on_late():
    for lag in (0, 1, 4):
        buffer = staleness.Delayed(lag)
        assert [buffer(n) for n in range(7)] == [None] * lag + list(range(7 - lag))


def test_the_toy_counts_up_to_the_first_mistake():
    right = [4, 9, 2, 95, 0, 1]  # remainders 0, 1, 2, 3, 0, 1
    responses = torch.tensor([right, [*right[:5], 2], [4, 8, *right[2:]], [1, *right[1:]]])
    assert staleness.counted_up(responses).tolist() == pytest.approx([1, 5 / 6, 1 / 6, 0])


def test_a_curve_that_has_ended_stays_at_its_final_reward():
    short, long = [0.5, 0.6, 0.7, 0.8, 0.9], [0.1] * 7
    assert staleness.mean_curve([short, long]) == pytest.approx(
        [0.3, 0.35, 0.4, 0.45, 0.5, 0.4, 0.4]
    )


def test_the_spread_of_seeds():
    assert cells.spread([0.25, 1.0, None, 0.5]) == "0.50 (0.25 to 1.00)"
    assert cells.spread([None]) == "–"


def test_the_best_regressor_finds_what_the_states_hold():
    torch.manual_seed(0)
    states = torch.randn(600, 8)
    returns = states @ torch.linspace(-1, 1, 8) + 0.1 * torch.randn(600)
    best, _ = critic.best_r2(states, returns, torch.arange(600) % 3)
    assert best > 0.95
    assert critic.best_r2(states, torch.randn(600), torch.arange(600) % 3)[0] < 0.1
