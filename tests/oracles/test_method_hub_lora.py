"""AdapterHub's LoRA against the traced model of its library, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles import hub
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, WIDE, Row

ALL: dict[str, Any] = {
    "method.attn_matrices": ["q", "k", "v"], "method.intermediate_lora": True, "method.output_lora": True,
    "method.dropout": 0.1,
}  # fmt: skip
BELOW: dict[str, Any] = {"method.selfattn_lora": False, "method.output_lora": True}
ROWS: list[Row] = [
    (family, {"method": "hub_lora", **fields})
    for family, fields in (
        ("llama", {**PLAIN, "rank": 5}),
        ("llama", {**WIDE, "set": ALL}),
        ("llama", {**AGAIN, "set": {**ALL, "method.alpha": 3}}),
        ("llama", {**MIXED, "set": {"method.leave_out": [1]}}),
        ("llama", {**PLAIN, "set": {**ALL, "method.use_gating": True}}),
        ("llama_biased", {**MIXED, "dtype": "bf16", "set": {**BELOW, "method.use_gating": True}}),
        ("mistral", {**WIDE, "rank": 3, "set": {"model.sliding_window": 9}}),
        ("qwen2", {**PLAIN, "set": ALL}),
        ("qwen2", {**WIDE, "set": BELOW}),
        ("qwen2", {**AGAIN, "set": BELOW}),
        ("qwen3", {**MIXED, "set": {"method.intermediate_lora": True}}),
        ("llama", {**PACKED, "set": {"format.prepare": False}}),
    )
]


@pytest.mark.parametrize("row", ROWS, ids=hub.key)
def test_hub_lora_is_what_adapters_does(row: Row) -> None:
    hub.assert_as_recorded("hub_lora", row)


@pytest.mark.trainers
def test_the_records_are_what_adapters_does() -> None:
    assert hub.traced(ROWS)[0] == hub.recorded("hub_lora")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.attn_matrices": ["o"]}}, "leave nothing to train"),
        ({"set": {"method.selfattn_lora": False}}, "leave nothing to train"),
        ({"set": {"method.leave_out": [40]}}, "names layer 40"),
        ({"set": {"method.dropout": 1.0}}, r"dropout=1\.0"),
        ({"set": {"method.use_dora": True}}, "use_dora"),
        ({"model": "phi-3-mini"}, "no interface for phi3"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(**{"model": "llama-7b", "method": "hub_lora", **fields}))
