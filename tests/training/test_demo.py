"""The demo on the starter models, shortened; `make demo` runs it in full."""

import json
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import starter
from trl.config import DemoConfig, PPOConfig
from trl.gpt2 import GPT2HeadWithValueModel
from trl.training.demo import DemoRun, run_demo


@pytest.fixture
def short(tmp_path):
    return DemoConfig(
        steps=2,
        held_out=12,
        max_new_tokens=6,
        eval_every=1,
        out=str(tmp_path / "run"),
        ppo=PPOConfig(
            batch_size=8,
            minibatch_size=4,
            ppo_epochs=2,
            learning_rate=1e-4,
            adaptive_kl=False,
            precision="fp32",
        ),
    )


def test_a_run_leaves_all_its_files(short, tmp_path, capsys):
    summary = run_demo(short)
    out = tmp_path / "run"
    assert json.loads((out / "config.json").read_text())["ppo"]["batch_size"] == 8
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert "held_out/reward/mean" in rows[0]
    assert {"reward/mean", "objective/kl", "tokens_per_second", "held_out/kl"} <= set(rows[1])
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in samples] == starter.prompts("held-out")[:12]
    assert samples[0].keys() == {"prompt", "before", "score_before", "after", "score_after"}
    assert "| prompt |" in (out / "samples.md").read_text()
    assert (out / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((out / "summary.json").read_text())
    assert saved["positive"] == list(summary["positive"])
    assert saved["seconds"] > 0

    plain = AutoModelForCausalLM.from_pretrained(out / "policy")
    ours = GPT2HeadWithValueModel.from_pretrained(out / "policy")
    assert ours.v_head.summary.weight.abs().sum() > 0
    assert plain.config.architectures == ["GPT2LMHeadModel"]
    assert AutoTokenizer.from_pretrained(out / "policy").decode([5, 6])
    text = capsys.readouterr().out
    assert "step 1/2" in text
    assert "nats" in text
    assert "tokens/s" in text
    assert "s left" in text
    assert "mean P(positive)" in text


def test_the_summary_is_that_of_the_samples(short):
    summary = run_demo(short)
    rows = [json.loads(line) for line in open_text(short, "samples.jsonl")]
    before = [row["score_before"] for row in rows]
    assert summary["reward/mean"][0] == pytest.approx(sum(before) / len(before))
    assert summary["kl"][0] == pytest.approx(0, abs=1e-5)
    assert summary["kl"][1] > 0


def open_text(config, name):
    from pathlib import Path

    return (Path(config.out) / name).read_text().splitlines()


def test_same_seed_same_run(short, tmp_path):
    first = run_demo(short)
    again = run_demo(replace(short, out=str(tmp_path / "again")))
    other = run_demo(replace(short, out=str(tmp_path / "other"), seed=5))
    assert first == again
    assert first["reward/mean"] != other["reward/mean"]


def test_held_out_prompts_are_never_trained_on(short):
    assert not set(starter.prompts("train")) & set(starter.prompts("held-out"))
    run = DemoRun.load(short)
    seen = {prompt for _ in range(600) for prompt in run.loop._next_prompts()}
    assert seen == set(run.train_prompts)
    assert not seen & set(run.held_out_prompts)


def test_prompts_from_a_file(short, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"The {n} film\n\nThe {n} film\n" for n in range(20)))
    run = DemoRun.load(replace(short, prompts=str(file)))
    assert len(run.train_prompts) == 8
    assert run.held_out_prompts == [f"The {n} film" for n in range(8, 20)]
    file.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"than are held out \(12\), got 2: add prompts"):
        run_demo(replace(short, prompts=str(file)))
    with pytest.raises(FileNotFoundError):
        run_demo(replace(short, prompts=str(tmp_path / "none.txt")))


def test_an_unusable_folder_is_found_before_anything_slow(short, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run_demo(replace(short, out=str(tmp_path / "file" / "run")))
