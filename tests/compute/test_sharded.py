"""Weights that are sharded over processes are trained as whole ones are."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.ranks import launch
from tests.test_distributed import KINDS, MORE, by_one, check_equal, trained

WHOLE = {**KINDS, **{kind: MORE[kind] for kind in MORE if "critic" not in kind}}
TABLE = [(kind, way) for kind in KINDS for way in ("SGD", "Adam", "bf16")]
TABLE += [(kind, "SGD") for kind in WHOLE if kind not in KINDS]
QUICK = [("ppo", "SGD"), ("the top", "SGD")]


def train_sharded(out, table):
    results = {}
    for kind, way in table:
        results[kind, way] = trained(kind, way, shard=True)
        AcceleratorState._reset_state()
    if os.environ["RANK"] == "0":
        torch.save(results, out)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "table"),
    [
        (2, QUICK),
        pytest.param(2, TABLE, marks=pytest.mark.slow),
        pytest.param(3, TABLE, marks=pytest.mark.slow),
    ],
)
def test_sharded_weights_are_trained_as_whole_ones(processes, table, tmp_path):
    """Every kind of policy, on rows whose lengths, and passes, differ from process to process."""
    codes, said = launch(train_sharded, processes, tmp_path, str(tmp_path / "out.pt"), table)
    assert codes == [0] * processes, said
    for (kind, way), result in torch.load(tmp_path / "out.pt").items():
        check_equal(result, by_one(kind, way), way, f"{kind}, {way}")
