"""UniPELT against the traced model of AdapterHub's library, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles import hub
from tests.oracles.equal import PLAIN, Row

SMALL: dict[str, Any] = {
    "method.prefix_tuning": {"prefix_length": 5, "bottleneck_size": 13}, "method.adapter": {"reduction_factor": 5},
    "method.lora": {"r": 3, "attn_matrices": ["q", "k", "v"]},
}  # fmt: skip
OTHER: dict[str, Any] = {
    "method.prefix_tuning": {"flat": True, "prefix_length": 4, "shared_gating": False},
    "method.adapter": {"mh_adapter": True, "reduction_factor": 7, "dropout": 0.1},
    "method.lora": {"intermediate_lora": True, "output_lora": True, "dropout": 0.1},
}
ROWS = hub.union_rows("unipelt", SMALL, OTHER, plain=PLAIN)


@pytest.mark.parametrize("row", ROWS, ids=hub.key)
def test_unipelt_is_what_adapters_does(row: Row) -> None:
    hub.assert_as_recorded("unipelt", row)


@pytest.mark.trainers
def test_the_records_are_what_adapters_does() -> None:
    assert hub.traced(ROWS)[0] == hub.recorded("unipelt")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "qwen2.5-7b"}, "no prefix tuning for qwen2"),
        ({"set": {"method.adapter": {"reduction_factor": 0}}}, "must be above 0"),
        ({"set": {"method.adapter": {"reduction": 3}}}, "reduction"),
        ({"set": {"method.lora": {"use_gating": False}}}, "sets use_gating itself"),
        ({"set": {"method.lora": {"r": 0}}}, "rank"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(**{"model": "llama-7b", "method": "unipelt", **fields}))
