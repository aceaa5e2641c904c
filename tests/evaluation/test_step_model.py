"""Process reward models, and reward models token by token."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Qwen2Config,
    Qwen2ForTokenClassification,
)

from tests.evaluation.rollouts import make_rollout
from tests.evaluation.test_classifier import make_model as make_bert
from tests.evaluation.test_classifier import make_tokenizer as make_bert_tokenizer
from tests.evaluation.test_reward_model import ids, make_model, make_tokenizer, one_by_one
from trl import RewardModelScorer, ScoringError, StepScorer
from trl.config.recipe import RewardConfig
from trl.evaluation.reward_model import _begin
from trl.training.described import reward_config
from trl.training.named import load_scorer

PAIRS = [("what is two ?", " four yes ? no ? maybe"), ("is four ?", " no"), ("what ?", " yes ? ")]
READ = [  # with "?" as what ends a step, also behind the last one
    (ids("what is two ? four yes ? no ? maybe ?"), [6, 8, 10]),
    (ids("is four ? no ?"), [4]),
    (ids("what ? yes ?"), [3]),
]


def pieces(query, response):
    """Six letters for each token."""
    return "".join(PIECES[token] for token in response)


PIECES = {10: " four y", 11: "es ", 12: "? no ", 13: "? may", 14: "be", 15: ""}


def prm(labels=2, kind=LlamaForTokenClassification):
    torch.manual_seed(1)
    model = kind(make_model(num_labels=labels).config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("score.bias"):  # new ones are 0
            torch.nn.init.normal_(weight)
    return model


def logits_at(model, rows, bos=True):
    """The logits where the scores are read, each row alone."""
    with torch.no_grad():
        return [
            model(torch.tensor([[2] * bos + row])).logits[0][[place + bos for place in places]]
            for row, places in rows
        ]


def flat(scores):
    return torch.tensor([score for row in scores for score in row])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_token_classifier_is_read_at_the_ends_of_the_separators(batch_size):
    model = prm()
    scorer = StepScorer(model, "?", make_tokenizer(chat_template=None), batch_size=batch_size)
    expected = torch.cat(logits_at(model, READ)).softmax(1)[:, 1]
    assert expected.std() > 0.01
    rollout = make_rollout(*PAIRS, lengths=[6, 2, 1])
    found = scorer.scores_of_steps(rollout)
    assert [len(row) for row in found] == [3, 1, 1]
    torch.testing.assert_close(flat(found), expected, rtol=1e-5, atol=1e-6)
    assert flat(scorer.scores_of_steps(PAIRS)).tolist() == flat(found).tolist()
    # On the tokens of the policy, which are others: "?" is complete in the third and the fourth.
    scored = scorer(replace(rollout, decode=pieces))
    (a, b, c), (d,), (e,) = found
    wide = torch.tensor([[0, 0, a, b, 0, c], [0, d, 0, 0, 0, 0], [e, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(scored.scores, wide)
    assert scored.figures["steps"].tolist() == [3, 1, 1]
    assert scored.notes["steps"][0] == f"{a:.2g} {b:.2g} {c:.2g}"
    texts = scorer(PAIRS).scores  # without tokens: the sums
    torch.testing.assert_close(texts, scored.totals)


def test_outputs_and_labels():
    model, tokenizer = prm(labels=3), make_tokenizer(chat_template=None)
    model.config.id2label = {0: "BAD", 1: "GOOD", 2: "UNSURE"}
    logits = torch.cat(logits_at(model, READ))
    for label, index in ((None, 2), ("good", 1), (0, 0)):
        for output, expected in (
            ("logit", logits[:, index]),
            ("probability", logits.softmax(1)[:, index]),
            ("log_odds", logits.softmax(1)[:, index].logit()),
        ):
            found = StepScorer(model, "?", tokenizer, label=label, output=output)
            scores = flat(found.scores_of_steps(PAIRS))
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_marker_takes_the_place_of_the_separator_in_a_chat():
    """As Qwen2.5-Math-PRM reads: a special token behind each step, in the assistant's message."""
    template = (
        "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    tokenizer, model = make_tokenizer(chat_template=template), prm()
    scorer = StepScorer(model, "?", tokenizer, marker="<end>")
    rows = [
        (
            ids("<user> what is two ? <end> <assistant> four yes <end> no <end> maybe <end>"),
            [9, 11, 13],
        ),
        (ids("<user> is four ? <end> <assistant> no <end>"), [7]),
        (ids("<user> what ? <end> <assistant> yes <end>"), [6]),
    ]
    expected = torch.cat(logits_at(model, rows, bos=False)).softmax(1)[:, 1]
    torch.testing.assert_close(flat(scorer.scores_of_steps(PAIRS)), expected)
    chats = tuple([{"role": "user", "content": query}] for query, _ in PAIRS)
    rollout = replace(make_rollout(*PAIRS), query_messages=chats)
    torch.testing.assert_close(flat(scorer.scores_of_steps(rollout)), expected)


def test_a_marker_of_several_tokens_is_read_at_its_last():
    model = prm()
    scorer = StepScorer(model, "?", make_tokenizer(chat_template=None), marker="yes ?")
    (expected,) = logits_at(model, [(ids("is four ? no yes ?"), [5])])
    (found,) = scorer.scores_of_steps(PAIRS[1:2])
    torch.testing.assert_close(torch.tensor(found), expected.softmax(1)[:, 1])


def test_what_is_too_long_loses_its_beginning_and_steps_that_are_gone_score_0():
    model = prm()
    scorer = StepScorer(model, "?", make_tokenizer(chat_template=None), max_length=4)
    (found,) = scorer.scores_of_steps(PAIRS[:1])
    (row, _) = READ[0]
    expected = torch.cat(logits_at(model, [(row[-4:], [1, 3])], bos=False)).softmax(1)[:, 1]
    torch.testing.assert_close(torch.tensor(found), torch.tensor([0.0, *expected.tolist()]))


def test_a_language_model_that_marks_steps_with_words():
    """As Math-Shepherd has them: the logits of two tokens, behind a word that ends each step."""
    model = prm(kind=LlamaForCausalLM)
    tokenizer = make_tokenizer(chat_template=None)
    scorer = StepScorer(model, "?", tokenizer, label_tokens=("no", "yes"))
    pair = [row[:, ids("no yes")] for row in logits_at(model, READ)]
    expected = torch.cat(pair).softmax(1)[:, 1]
    torch.testing.assert_close(flat(scorer.scores_of_steps(PAIRS)), expected)
    with pytest.raises(ValueError, match="`label_tokens` must be single tokens of the model, got"):
        StepScorer(model, "?", tokenizer, label_tokens=("no no", "yes"))


def test_a_causal_sequence_classifier_is_read_at_each_separator():
    model = prm(labels=1, kind=LlamaForSequenceClassification)
    scorer = StepScorer(model, "?", make_tokenizer(chat_template=None), output="logit")
    cut = [[2, *row[: place + 1]] for row, places in READ for place in places]
    expected = one_by_one(model, cut)
    torch.testing.assert_close(flat(scorer.scores_of_steps(PAIRS)), expected, rtol=1e-4, atol=1e-5)
    bert = StepScorer(make_bert(labels=["no", "yes"]), "?", make_bert_tokenizer())
    with pytest.raises(ScoringError, match="`model` must read each token: a token classifier, or"):
        bert([("a", "film")])


def saved(folder, name, change):
    """A folder as a family of process reward models has it, with the head that `change` makes."""
    config = Qwen2Config(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForTokenClassification(config).eval()
    model.save_pretrained(folder)
    make_tokenizer(chat_template=None).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    head = {key: weights.pop(key) for key in ("score.weight", "score.bias")}
    weights |= change(head)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text()) | {"architectures": [name]}
    told |= {"auto_map": {"AutoModel": "modeling_own.Own"}}  # code that is not run
    (folder / "config.json").write_text(json.dumps(told))
    return model, weights


def states(model):
    with torch.no_grad():
        found = [model.model(torch.tensor([[2, *row]])).last_hidden_state[0] for row, _ in READ]
        return torch.cat(
            [f[[p + 1 for p in places]] for f, (_, places) in zip(found, READ, strict=True)]
        )


def test_the_head_of_two_layers_of_qwen(tmp_path):
    def change(head):
        made = {"score.0.weight": torch.randn(8, 8), "score.0.bias": torch.randn(8)}
        return made | {"score.2.weight": torch.randn(2, 8), "score.2.bias": torch.randn(2)}

    model, w = saved(tmp_path, "Qwen2ForProcessRewardModel", change)
    inner = (states(model) @ w["score.0.weight"].T + w["score.0.bias"]).relu()
    expected = (inner @ w["score.2.weight"].T + w["score.2.bias"]).softmax(1)[:, 1]
    found = flat(
        StepScorer(tmp_path, "?", make_tokenizer(chat_template=None)).scores_of_steps(PAIRS)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_value_head_of_skywork(tmp_path):
    def change(head):
        return {f"v_head.summary.{k[6:]}": torch.randn_like(v[:1]) for k, v in head.items()}

    model, w = saved(tmp_path, "Qwen2ForPrmModel", change)
    values = states(model) @ w["v_head.summary.weight"].T + w["v_head.summary.bias"]
    found = flat(
        StepScorer(tmp_path, "?", make_tokenizer(chat_template=None)).scores_of_steps(PAIRS)
    )
    torch.testing.assert_close(found, values[:, 0].sigmoid(), rtol=1e-4, atol=1e-5)


def test_a_language_model_is_no_process_reward_model(tmp_path):
    saved(tmp_path, "Qwen2ForCausalLM", lambda head: {})
    with pytest.raises(
        ValueError, match=r"is not a process reward model: .* score.weight.*label_t"
    ):
        StepScorer(tmp_path, "?")


def test_in_a_recipe(tmp_path):
    saved(tmp_path, "Qwen2ForTokenClassification", lambda head: head)
    told = {"separator": "?", "marker": "yes", "output": "log_odds", "label": 0}
    settings = RewardConfig(kind="steps", name=str(tmp_path), arguments=told, title="prm")
    ((scorer, _),) = load_scorer([settings])[0].parts.values()
    again = reward_config(scorer, "prm", 1.0)
    assert again.kind == "steps"
    assert {name: again.arguments[name] for name in told} == told
    assert load_scorer([again])[0].parts["prm"][0].scores_of_steps(PAIRS) == scorer.scores_of_steps(
        PAIRS
    )
    with pytest.raises(ValueError, match="`arguments` must be separator, marker, label, .* for ki"):
        RewardConfig(kind="steps", name="prm", arguments={"allow_pickle": True})
    with pytest.raises(ValueError, match=r"`name` must be given for kind 'steps'"):
        RewardConfig(kind="steps")


# --- a reward model by token ---------------------------------------------------------------------


def prefixes(texts):
    """What the model gives of each text alone, as far as it goes."""
    return one_by_one(make_model(), [[2, *ids(text)] for text in texts])


def test_by_token_each_token_has_the_score_of_the_text_so_far():
    """The policy's tokens end inside of words; what is not whole is not there yet."""
    rollout = replace(make_rollout(PAIRS[0], PAIRS[1], lengths=[6, 2]), decode=pieces)
    tokenizer = make_tokenizer(chat_template=None)
    at_end = RewardModelScorer(make_model(), tokenizer)
    scorer = RewardModelScorer(make_model(), tokenizer, by_token="score")
    query = "what is two ?"
    expected = prefixes(
        [
            query + " four",  # " four y"
            query + " four yes",  # "es "
            query + " four yes ? no",  # "? no "
            query + " four yes ? no ?",  # "? may"
            query + " four yes ? no ? maybe",  # "be"
            query + " four yes ? no ? maybe",  # the end
        ]
    )
    found = scorer(rollout).scores
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, [5, 1]].diagonal(), at_end(rollout).scores)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("chat_template", [True, False])
def test_shaping_leaves_the_discounted_sum_as_it_is(gamma, chat_template):
    rollout = replace(make_rollout(PAIRS[0], PAIRS[1], lengths=[6, 3]), decode=pieces)
    tokenizer, how = make_tokenizer(), {"chat_template": chat_template}
    whole = RewardModelScorer(make_model(), tokenizer, **how)(rollout).scores
    by_token = {
        kind: RewardModelScorer(make_model(), tokenizer, by_token=kind, gamma=gamma, **how)(rollout)
        for kind in ("score", "shaped")
    }
    shaped, scores = by_token["shaped"].scores, by_token["score"].scores
    discounts = gamma ** torch.arange(6)
    last = torch.tensor([5, 2])
    torch.testing.assert_close((shaped * discounts).sum(1), discounts[last] * whole)
    # γ·s_t − s_{t−1}, by a loop
    for row, end in enumerate(last.tolist()):
        before = 0.0
        for t in range(end + 1):
            now = scores[row, t].item()
            expected = (now if t == end else gamma * now) - before
            assert shaped[row, t].item() == pytest.approx(expected, abs=1e-5)
            before = now
    assert (shaped[1, 3:] == 0).all()


def test_what_is_cut_off_at_the_beginning_has_no_score():
    rollout = replace(make_rollout(PAIRS[0], lengths=[6]), decode=pieces)
    scorer = RewardModelScorer(
        make_model(), make_tokenizer(chat_template=None), by_token="score", max_length=3
    )
    found = scorer(rollout).scores[0]  # <s>, "?" and "maybe" are read
    expected = one_by_one(make_model(), [ids("<s> ?"), ids("<s> ? maybe")])
    torch.testing.assert_close(found, torch.stack([*torch.zeros(3), *expected[[0, 1, 1]]]))


def test_where_a_template_puts_the_response():
    assert _begin("<a> yes\n<end>", " yes\n") == 3
    assert _begin("<a>yes<end>", " yes\n") == 2  # without its first character
    with pytest.raises(ValueError, match="`chat_template` must leave the words of a response"):
        _begin("<a> YES", "yes")


def test_a_model_that_reads_the_whole_text_at_once_has_no_score_by_token():
    with pytest.raises(ValueError, match="`by_token` must be None, unless the model is causal"):
        RewardModelScorer(make_bert(labels=["r"]), make_bert_tokenizer(), by_token="score")
