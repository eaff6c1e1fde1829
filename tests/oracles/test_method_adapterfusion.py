"""AdapterFusion against the traced model of AdapterHub's library, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles import hub
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row

TWICE: dict[str, Any] = {"method.num_adapters": 2, "method.mh_adapter": True, "method.reduction_factor": 7}
LATE: dict[str, Any] = {"method.query": False, "method.value_before_softmax": False}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "method": "adapterfusion"}),
    ("llama", {**AGAIN, "method": "adapter_fusion"}),
    ("llama", {**MIXED, "method": "adapterfusion", "set": TWICE}),
    ("mistral", {**WIDE, "method": "adapterfusion", "set": {"method.value": False, "method.mh_adapter": True}}),
    ("qwen2", {**WIDE, "method": "adapterfusion", "set": TWICE}),
    ("qwen2", {**AGAIN, "method": "adapterfusion"}),
    ("qwen3", {**PLAIN, "method": "adapterfusion", "set": {"method.key": False, "method.dropout_prob": 0.2}}),
    (
        "llama",
        {**WIDE, "method": "adapterfusion", "set": LATE},
    ),
    ("qwen2", {**PLAIN, "method": "adapterfusion", "set": {"method.query_before_ln": True, "method.scaling": 2.0}}),
]


@pytest.mark.parametrize("row", ROWS, ids=hub.key)
def test_adapterfusion_is_what_adapters_does(row: Row) -> None:
    hub.assert_as_recorded("adapterfusion", row)


@pytest.mark.trainers
def test_the_records_are_what_adapters_does() -> None:
    assert hub.traced(ROWS)[0] == hub.recorded("adapterfusion")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.num_adapters": 1}}, "fusion needs at least 2"),
        ({"set": {"method.query": False, "method.key": False, "method.value": False}}, "nothing trains"),
        ({"set": {"method.residual_before": True}}, "residual_before with AdapterFusion is not modelled"),
        ({"set": {"method.leave_out": [1]}}, "leave_out with AdapterFusion is not modelled"),
        ({"set": {"method.dropout_prob": 1.5}}, r"dropout_prob=1\.5"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(**{"model": "llama-7b", "method": "adapterfusion", **fields}))
