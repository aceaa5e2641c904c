"""Chat models: training, `sample`, `score`, `chat` and the samples of a run see the same messages.

The templates are worded here, after the documented forms of the model families.
"""

import io
import json
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl
from tests.conftest import REAL_MODELS
from tests.families import tiny_config
from tests.rows import quick
from trl import cli, starter
from trl.rollout.queries import SENT_AS_CHATS, encode_queries
from trl.training import parts, run
from trl.training.chat import Speaker, talk
from trl.training.tools import sample

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (  # the system message is a part of the first message
    "{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if first else messages %}{{ bos_token }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ first if loop.first }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
CHATML = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
TEMPLATES = {
    "smollm2": (None, CHATML, []),
    "llama3": (
        LLAMA_3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ["<|start_header_id|>", "<|end_header_id|>"],
    ),
    "mistral": (MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}, []),
    "gemma": (
        GEMMA,
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "phi3": (PHI_3, {}, ["<|user|>", "<|system|>", "<|assistant|>", "<|end|>"]),
    "qwen": (QWEN, CHATML | {"eos_token": "<|endoftext|>"}, ["<|im_end|>"]),
}
"""The template, the tokens that it has names for, and others."""
MARKS = ("<|", "|>", "[INST]", "_turn>", "<s>", "</s>", "<bos>", "<think>", "assistant", "model")
ASKED = ["What is rain?", "Tell me a story.", "Who are you?", "Why is it so?"]
TINY = {"batch_size": 4, "minibatch_size": 4, "ppo_epochs": 1, "max_new_tokens": 4}
TINY |= {"steps": 2, "eval_every": 2, "precision": "fp32"}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Pictures take seconds, and have tests of their own."""
    monkeypatch.setattr(run, "write_report", lambda runs, out: out / "report.html")


def chat_model(folder, family):
    """A tiny Llama with the starter's vocabulary, and the template and special tokens of others."""
    template, named, others = TEMPLATES[family]
    tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
    tokenizer.add_special_tokens(named)
    tokenizer.add_tokens(others, special_tokens=True)
    if template is None:
        file = REAL_MODELS / "smollm2" / "chat_template.jinja"
        if not file.is_file():
            pytest.skip(f"no {file}: examples/real_models/get.py gets it")
        template = file.read_text()
    tokenizer.chat_template = template
    config = tiny_config("llama")
    config.update({"vocab_size": len(tokenizer), "max_position_embeddings": 256})
    model = AutoModelForCausalLM.from_config(config)
    ends = ("<end_of_turn>", "<|end|>", "<|im_end|>", "<|eot_id|>")
    known = [token for token in ends if token in tokenizer.get_vocab()]
    ids = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(known)]
    model.generation_config.eos_token_id = ids
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), ids


@pytest.mark.parametrize("family", quick(TEMPLATES, "smollm2", "llama3", "qwen"))
def test_every_way_in_sees_the_same_messages(family, tmp_path, capsys):
    model, ends = chat_model(tmp_path / "model", family)
    system = None if family == "gemma" else "Be brief."
    before = f"{system}\n\n" if system else ""
    more = {"chat_template_kwargs": {"enable_thinking": False}} if family == "qwen" else {}
    seen, out = [], tmp_path / "run"

    def reward(texts):
        seen.extend(texts)
        return [float(len(text) % 7) for text in texts]

    given = {"system": system, "held_out": ["Hello?"], "out": out} | more | TINY
    policy, _ = trl.train(model, ASKED, reward, **given)
    assert capsys.readouterr().err.count(SENT_AS_CHATS.format("chat=False")) == 1
    starts = tuple(f"{before}{text}\n\n" for text in [*ASKED, "Hello?"])
    assert all(text.startswith(starts) for text in seen)
    assert not [text for text in seen for mark in MARKS if mark in text]
    lines = (out / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in lines} == {f"{before}Hello?"}

    messages = [{"role": "user", "content": "Who are you?"}]
    messages = [*([{"role": "system", "content": system}] if system else []), *messages]
    sampler = trl.Sampler(policy.tokenizer, max_new_tokens=9, seed=3, **more)
    rollout = sampler(policy, [messages])
    rows = sample(out, ["Who are you?"], max_new_tokens=9, seed=3)
    assert rows[0]["prompt"] == messages
    assert rows[0]["response"] == rollout.response_texts[0]
    assert sorted(sampler._stop_for(policy).token_ids) == sorted(set(ends))
    assert ("<think>\n\n</think>" in rollout.query_texts[0]) == bool(more)
    (of_run,) = sample(out, max_new_tokens=2)  # what it was measured on
    assert of_run["prompt"] == [*messages[:-1], {"role": "user", "content": "Hello?"}]

    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "Who?", "response": "I."}])))
    (tmp_path / "mine.py").write_text("def letters(texts): return [float(len(t)) for t in texts]")
    flags = ["--reward.0.name", f"{tmp_path}/mine.py:letters", "--out", "-"]
    flags += ["--trust", f"{tmp_path}/mine.py"]
    capsys.readouterr()
    assert cli.main(["score", str(file), "--recipe", str(out), *flags]) == 0
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    whole = [f"{before}Who are you?\n\n{rows[0]['response']}", f"{before}Who?\n\nI."]
    assert [row["text"] for row in scored] == whole
    assert [row["score"] for row in scored] == [len(text) for text in whole]

    told = talk(str(out), lines=["Who are you?", "", "/clear", "Who are you?"], max_new_tokens=9)
    assert [list(row) for row in told] == [["message", "before", "after"]] * 2
    one = Speaker(str(out), {"system": system, **more}, max_new_tokens=9, seed=3)
    assert one.answer("Who are you?") == rows[0]["response"]
    one.answer("And now?")
    roles = ["user", "assistant"] * 2
    assert [message["role"] for message in one.history] == roles


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("gemma", {"system": "Be."}, r"`system` must be None for .* \(System role not supported\)"),
        ("phi3", {"chat": False, "system": "Be."}, "`system` must be None where texts are sent as"),
        ("phi3", {"chat_template_kwargs": {"think": 1}}, "`chat_template_kwargs` .* 'think'"),
        (None, {"chat": True}, "`chat` must be false for a tokenizer without chat template"),
        (None, {"system": "Be."}, "`system` must be None where .*: set tokenizer.chat_template"),
    ],
)
def test_what_a_template_cannot_do_is_told_before_the_model_is_loaded(
    family, given, message, tmp_path, monkeypatch
):
    model = str(starter.LANGUAGE_MODEL)
    if family:
        model, _ = chat_model(tmp_path / "model", family)
    monkeypatch.setattr(parts, "load_policy", lambda *_, **__: pytest.fail("it is loaded"))
    with pytest.raises(ValueError, match=message):
        trl.train(model, ASKED, lambda texts: [0.0] * len(texts), **given | TINY)


def test_a_template_that_leaves_the_system_message_out_is_told(tmp_path):
    model, _ = chat_model(tmp_path / "model", "phi3")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="it leaves the message out"):
        trl.train(model, ASKED, len, tokenizer=tokenizer, system="Be brief.", **TINY)


def prompts_seen(model, prompts, **given):
    """What `trl.train` sends, as the sampler has it."""
    seen = []

    def reward(rollout):
        seen.extend(zip(rollout.query_texts, rollout.query_messages or [None] * 2, strict=True))
        return [0.0] * len(rollout)

    trl.train(model, prompts, reward, **TINY | {"steps": 1, "batch_size": 2} | given)
    return seen


def test_prompts_that_are_chats_or_have_been_through_the_template_stay(tmp_path, capsys):
    model, _ = chat_model(tmp_path / "model", "qwen")
    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = [{"role": "user", "content": "Why?"}]
    (text,) = encode_queries([chat], tokenizer).texts
    for given in (text, chat):
        assert {one for one, _ in prompts_seen(model, [given] * 2)} == {text}
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    assert prompts_seen(model, [tokens] * 2)[0] == ("user\nWhy?\nassistant\n", None)
    assert prompts_seen(model, ["Why?"] * 2, chat=False)[0] == ("Why?", None)
    own = [{"role": "system", "content": "Own."}, *chat]
    assert [each for _, each in prompts_seen(model, [own, chat], system="Be.", seed=1)] in (
        [own, [own[0] | {"content": "Be."}, *chat]],
        [[own[0] | {"content": "Be."}, *chat], own],
    )
    assert "trl.train" not in capsys.readouterr().err
    rows = [{"prompt": "Why?", "answer": "so"}] * 2
    assert prompts_seen(model, rows)[0] == (text, chat)
    assert prompts_seen(model, lambda: iter(rows * 9))[0] == (text, chat)  # a stream
    assert capsys.readouterr().err.count("trl.train: texts are sent as") == 2


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"query": "q", "response": "r"}, "qr"),
        ({"prompt": "q", "completion": "r"}, "qr"),
        ({"messages": [USER, ANSWER]}, "q\n\nr"),
        ({"prompt": [USER], "completion": [ANSWER]}, "q\n\nr"),
    ],
)
def test_score_reads_what_people_have(line, text, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps(line | {"answer": "r"}))
    (tmp_path / "mine.py").write_text(
        "def right(responses, answer):\n"
        "    return [float(r == a) for r, a in zip(responses, answer)]\n"
    )
    flags = ["--reward", f"[{{kind: function, name: '{tmp_path}/mine.py:right'}}]"]
    flags += ["--trust", f"{tmp_path}/mine.py"]
    assert cli.main(["score", str(tmp_path / "a.jsonl"), "--out", "-", *flags]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["text"], row["score"]) == (text, 1.0)


def test_a_reward_that_reads_prompts_says_that_there_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"a": 1}\n'))
    flags = ["--recipe", "json-object", "--out", "-"]
    assert cli.main(["score", "-", *flags]) == 0
    assert "TEXTS has none: give columns prompt and response" in capsys.readouterr().err


def test_chat_goes_through_a_pipe_and_a_model_without_template_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("This film was\n\nI saw\n"))
    given = ["--max-new-tokens", "3", "--before", "starter"]
    assert cli.main(["chat", "starter", *given]) == 0
    captured = capsys.readouterr()
    assert [line.split(":")[0] for line in captured.out.splitlines()] == ["before", "after"] * 2
    assert "each line is gone on with as plain text" in captured.err


def test_a_talk_with_a_model_of_few_positions_has_room(capsys):
    """The starter reads 256 tokens in all: half are for the answer. A run keeps its own limit."""
    (row,) = talk("starter", lines=["This film"])
    assert row["answer"]
    speaker = Speaker("starter", {"chat": None})
    assert speaker.most == 128
