"""`benchmarks/scale.py` by numbers worked by hand, and its tables in `docs/scale.md`."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scale  # noqa: E402

SMALL = scale.Shape(
    layers=2,
    width=10,
    inner=20,
    heads=4,
    key_value_heads=2,
    head_size=5,
    vocabulary=100,
    tied=False,
)
# A layer: 2·10·5·(4 + 2) + 3·10·20 = 600 + 600 = 1,200. Two: 2,400. Head: 100·10 = 1,000; with the
# embedding 2,000. N = 4,400. Keys and values of a token: 2·2·2·2·5 = 80 bytes.
WORK = scale.Work(rows=8, query=3, response=2, minibatch=4, epochs=3, pass_rows=2)
PLAIN = scale.Machine(peak=2e6, use=0.5, bandwidth=4e6, bandwidth_use=0.25, call=1e-3)
# F = 1e6 operations a second, B = 1e6 bytes a second.


def test_the_weights_of_published_models():
    """Those of their model cards, but for norms: 66 thousand of the 8 billion."""
    assert (SMALL.matrices, SMALL.head, SMALL.weights, SMALL.cache) == (2400, 1000, 4400, 80)
    assert SMALL.gathered == 2 * 2400 + 4 * 2000
    published = {"1B": 1_235_814_400, "8B": 8_030_261_248, "70B": 70_553_706_496}
    for name, number in published.items():
        assert scale.MODELS[name].weights == pytest.approx(number, rel=1e-4)
    assert scale.MODELS["8B"].cache == 131_072  # 2 · 2 bytes · 32 layers · 8 heads · 128
    assert scale.HERE["GPT-2 124M"].weights == pytest.approx(124_439_808, rel=1e-3)
    assert scale.HERE["SmolLM2-135M"].weights == pytest.approx(134_515_008, rel=1e-3)


def test_the_updates_of_a_step():
    assert WORK.updates == 3 * 2
    assert scale.passes_of(4, WORK) == 2
    tokens = WORK.tokens(2)  # of 4 that are read of each row, the second sees 2, and so on
    assert (tokens.read, tokens.predicted, tokens.pairs) == (8, 4, 2 * (1 + 2 + 3 + 4))


def test_sampling_reads_the_weights_for_each_token():
    # 8 rows. Queries: 2·2,400·24 + 2·1,000·8 + 4·40·(8·6) = 138,880 operations, 0.13888 s.
    # A token: 2·3,400·8 = 54,400 operations, 0.0544 s; 2·3,400 + 8·80·(3 + 0.5) = 9,040 bytes,
    # 0.00904 s; asked for in 2·0.001 s. The longest twice: 0.1088.
    assert scale.sampling_seconds(SMALL, WORK, PLAIN) == pytest.approx(0.13888 + 0.1088)
    # On eight a row each: 0.01736, and twice the longest of 0.0068, 0.00708 and 0.002 ...
    assert scale.sampling_seconds(SMALL, WORK, PLAIN, 8) == pytest.approx(0.01736 + 0.01416)
    # ... or of a Python that takes 10 ms a layer: 0.02 for the queries too.
    slow = replace(PLAIN, call=0.01)
    assert scale.sampling_seconds(SMALL, WORK, slow, 8) == pytest.approx(0.02 + 0.04)
    after = replace(slow, asks_ahead=False)
    assert scale.sampling_seconds(SMALL, WORK, after, 8) == pytest.approx(
        0.01736 + 0.02 + 2 * (0.00708 + 0.02)
    )


CLUSTER = replace(PLAIN, link=10e6, network=1e6, link_use=0.5, hop=1e-5, node=8)


@pytest.mark.parametrize(
    ("gpus", "pieces", "seconds"),
    [
        (1, 1, 0.0),
        (4, 1, 0.75 * 4e6 / 5e6 + 3e-5),  # within a node: 10e6 · 0.5
        (16, 1, 15 / 16 * 4e6 / 4e6 + 15e-5),  # eight cards of 1e6 · 0.5
        (16, 5, 15 / 16 * 4e6 / 4e6 + 5 * 15e-5),
    ],
)
def test_a_ring_sends_all_but_its_own_part(gpus, pieces, seconds):
    assert scale.collective_seconds(4e6, CLUSTER, gpus, pieces) == pytest.approx(seconds)


def test_an_update_waits_for_the_slowest():
    # 4 rows, 16 tokens, 8 predicted, 40 pairs. Forward: 2·2,400·16 + 2·1,000·8 + 4·40·40 = 99,200.
    # Twice, and twice backward: 396,800 operations, 0.3968 s. Calls: 2 passes · 4 · 2 · 0.001 s.
    # Adam: 28·4,400 = 123,200 bytes, 0.1232 s.
    alone = scale.update_seconds(SMALL, WORK, PLAIN)
    expected = {"products": 0.3968, "calls": 0.016, "exchange": 0, "adam": 0.1232, "whole": 0.52}
    assert alone == pytest.approx(expected)
    kept = replace(WORK, recomputed=False)
    assert scale.update_seconds(SMALL, kept, PLAIN)["products"] == pytest.approx(0.2976)

    # On 4, a row each, one pass. A sum of 17,600 bytes: 2 · (0.75·17,600/5e6 + 3e-5) = 0.00534 s.
    whole = scale.update_seconds(SMALL, WORK, CLUSTER, 4)
    assert whole["exchange"] == pytest.approx(0.00534)
    assert whole["adam"] == pytest.approx(0.1232)
    # Sharded: 12,800 bytes gathered twice, in 5 pieces, 2 · (0.00192 + 15e-5); 0.00264 + 15e-5.
    sharded = scale.update_seconds(SMALL, WORK, CLUSTER, 4, sharded=True)
    assert sharded["exchange"] == pytest.approx(0.00414 + 0.00279)
    assert sharded["adam"] == pytest.approx(0.0308)
    assert sharded["whole"] == pytest.approx(0.0992 + 0.0308)
    # A network a hundredth as fast is what it waits for.
    slow = scale.update_seconds(SMALL, WORK, replace(CLUSTER, link=1e5), 4, sharded=True)
    assert slow["whole"] == pytest.approx(0.384 + 0.264 + 3 * 15e-5 + 0.0308)


def test_a_step_is_its_parts():
    # Reference on 4: two rows, 49,600 operations, one pass; gathered in 0.00207 s beside it.
    seconds = scale.step_seconds(SMALL, WORK, CLUSTER, 4, sharded=True)
    assert seconds["reference"] == pytest.approx(0.0496)
    assert seconds["gather"] == pytest.approx(0.00207)
    assert seconds["updates"] == pytest.approx(6 * 0.13)
    assert seconds["step"] == pytest.approx(sum(seconds.values()) / 2)
    slow = replace(CLUSTER, link=1e4)
    waits = scale.reference_seconds(SMALL, WORK, slow, 4, sharded=True)
    assert waits == pytest.approx(0.75 * 12_800 / 5e3 + 15e-5)


def test_the_tokens_that_hide_the_exchange():
    # 4·1e6 / (3·5e6) of a token; the exchange then takes as long as 6·N operations for each.
    assert scale.tokens_to_hide(CLUSTER, 4) == pytest.approx(4 / 15)
    assert scale.tokens_to_hide(scale.H100, 512) == pytest.approx(4 * 395.6e12 / (3 * 320e9))


def test_bytes_of_weights_and_of_what_goes_with_them():
    # 12·4,400 + 2·2,400 + 4·2,000 = 65,600.
    assert scale.held_bytes(SMALL) == 65_600
    assert scale.held_bytes(SMALL, 4, sharded=True) == 16_400
    # Two rows of 4 tokens. A layer: 200 + 4·6·5 + 160 = 480 bytes for each; recomputed 40 of two
    # layers, and a whole one.
    assert scale.kept_bytes(SMALL, replace(WORK, recomputed=False), 2) == 8 * 960
    assert scale.kept_bytes(SMALL, WORK, 2) == 8 * (80 + 480)
    logits = 3 * 2**26
    alone = scale.step_bytes(SMALL, WORK)
    # Copies: 2·(2,400 + 1,000). Keys and values of 8 rows of 5 tokens: 3,200. Gradients: 17,600.
    assert alone["sampling"] == 65_600 + 6_800 + 3_200
    assert alone["update"] == 65_600 + 17_600 + 6_800 + 4_480 + logits
    low = scale.step_bytes(SMALL, WORK, low_gradients=True)
    assert alone["update"] - low["update"] == 2 * 2400
    # Four: a row of each in an update, gradients twice.
    whole = scale.step_bytes(SMALL, WORK, 4)
    assert whole["update"] == 65_600 + 35_200 + 6_800 + 2_240 + logits
    # Sharded: gathered while sampling 12,800 and the head's copy 2,000, two rows' keys and values;
    # in an update two layers of two bytes, the embeddings of four, the head's copy.
    parts = scale.step_bytes(SMALL, WORK, 4, sharded=True)
    assert parts["sampling"] == 16_400 + 12_800 + 2_000 + 800
    assert parts["update"] == 16_400 + 4_400 + (4_800 + 8_000 + 2_000) + 2_240 + logits


def test_the_share_of_a_machine_is_that_at_which_a_step_takes_so_long():
    shape = scale.HERE["GPT-2 124M"]
    known = replace(PLAIN, peak=1e11, bandwidth=1e10, use=0.3, bandwidth_use=0.3)
    for what in ("sampling s", "step s"):
        seconds = scale.predicted(shape, scale.WORK_HERE, known, known)[what]
        found = scale.share(what, seconds, shape, scale.WORK_HERE, replace(known, use=1.0))
        assert found.use == found.bandwidth_use == pytest.approx(0.3)


def test_the_page_has_what_the_script_says():
    page = (ROOT / "docs" / "scale.md").read_text()
    assert scale.time_table() in page
    assert scale.memory_table() in page
    assert scale.check_table(json.loads(scale.RESULTS.read_text())) in page
