"""What the folder of `trl.train` says of a reward and an adapter that were given as objects."""

import pytest
from peft import LoraConfig

from tests.families import tiny_model
from tests.training.test_one_call import train_small
from trl import starter
from trl.config.recipe import LoRAConfig, RewardConfig
from trl.evaluation import (
    ClassifierScorer,
    ControlScorer,
    EndpointScorer,
    FormatScorer,
    FunctionScorer,
    JsonScorer,
    LengthPenalty,
    MathScorer,
    RegexScorer,
    RepetitionPenalty,
)
from trl.report import read_runs
from trl.training.described import reward_config
from trl.training.named import load_scorer

SCHEMA = {"type": "object", "required": ("name",)}


@pytest.mark.parametrize(
    ("scorer", "kind", "arguments"),
    [
        (JsonScorer(SCHEMA), "json", {"schema": SCHEMA}),
        (JsonScorer(key="right", seconds=1.0), "json", {"key": "right", "seconds": 1.0}),
        (RegexScorer("[0-9]+", "answer"), "regex", {"pattern": "[0-9]+", "key": "answer"}),
        (FormatScorer(["think"]), "format", {"tags": ("think",)}),
        (MathScorer("answer", marked=True), "math", {"marked": True}),
        (LengthPenalty(48, 16), "length", {"max_tokens": 48, "soft_tokens": 16}),
        (RepetitionPenalty(), "repetition", {}),
    ],
)
def test_a_check_is_told_by_its_settings_which_make_it_again(scorer, kind, arguments):
    told = reward_config(scorer, "mine", 0.5)
    assert (told.kind, told.arguments, told.weight) == (kind, arguments, 0.5)
    (again, _) = load_scorer([told])[0].parts["mine"]
    scorer.name = "mine"
    assert vars(again) == vars(scorer)


def test_models_servers_and_functions_are_told_by_their_names():
    classifier = ClassifierScorer(starter.CLASSIFIER, label="NEGATIVE", output="probability")
    assert reward_config(classifier, "c", 1.0) == RewardConfig(
        kind="classifier", name="starter", label="NEGATIVE", output="probability", title="c"
    )
    classifier.model.name_or_path = ""  # made in Python
    place = "trl.evaluation.classifier:ClassifierScorer"
    told = RewardConfig(kind="function", name=place, title="c")
    assert reward_config(classifier, "c", 1.0) == told
    server = EndpointScorer("http://localhost:1/score?api_key=hunter2secret")
    told = reward_config(server, "s", 1.0)
    assert told.kind == "endpoint"
    assert told.name.startswith("http://localhost:1/score?")
    assert "hunter2secret" not in repr(told)
    control = ControlScorer(classifier, {"[good] ": (0.5, 1.0)})
    assert reward_config(control, "c", 1.0).name == "trl.evaluation.control:ControlScorer"
    assert reward_config(FunctionScorer(len), "f", 1.0).name == "builtins:len"


@pytest.mark.usefixtures("no_pictures")
def test_the_folder_of_a_run_names_the_reward_and_the_adapter(tmp_path):
    adapter = {"peft_config": LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj", "q_proj"])}
    short = {"steps": 1, "held_out": None}
    train_small(tmp_path / "run", JsonScorer(SCHEMA), **adapter, **short)
    (read,) = read_runs([tmp_path / "run"])
    told = {name: value for name, value in read.recipe.items() if name.startswith("reward.0")}
    assert told["reward.0.kind"] == "json"
    assert told["reward.0.arguments.schema.type"] == "object"
    assert {name: read.recipe[f"model.lora.{name}"] for name in ("rank", "alpha")} == {
        "rank": 3,
        "alpha": 6.0,
    }
    assert read.recipe["model.lora.target_modules"] == "q_proj,v_proj"


def test_an_adapter_that_no_recipe_can_name_is_not_told_as_another():
    from trl import CausalLMWithValueHead
    from trl.training.described import lora_config

    plain = CausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    assert lora_config(plain) is None
    scaled = LoraConfig(r=4, use_rslora=True, target_modules="all-linear")
    for config, told in (
        (scaled, None),
        (LoraConfig(r=4, target_modules=["q_proj"]), LoRAConfig(4, 8.0, 0.0, "q_proj")),
    ):
        model = CausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config=config)
        assert lora_config(model) == told
