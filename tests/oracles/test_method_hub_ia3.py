"""AdapterHub's IA3 against the traced model of its library, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles import hub
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, WIDE, Row

ALL: dict[str, Any] = {"method.attn_matrices": ["q", "k", "v"], "method.output_lora": True}
ROWS: list[Row] = [
    (family, {"method": "hub_ia3", **fields})
    for family, fields in (
        ("llama", {**PLAIN}),
        ("llama", {**WIDE, "set": ALL}),
        ("llama", {**AGAIN, "set": {"method.leave_out": [0]}}),
        ("llama", {**PLAIN, "set": {**ALL, "method.use_gating": True}}),
        ("llama", {**MIXED, "adapter_dtype": "bf16", "dtype": "bf16"}),
        ("mistral", {**WIDE, "set": {"method.alpha": 2}}),
        ("qwen2", {**PLAIN, "set": ALL}),
        ("qwen3", {**WIDE}),
        ("qwen3", {**AGAIN}),
        ("llama", {**PACKED, "set": {"format.prepare": False}}),
    )
]


@pytest.mark.parametrize("row", ROWS, ids=hub.key)
def test_hub_ia3_is_what_adapters_does(row: Row) -> None:
    hub.assert_as_recorded("hub_ia3", row)


@pytest.mark.trainers
def test_the_records_are_what_adapters_does() -> None:
    assert hub.traced(ROWS)[0] == hub.recorded("hub_ia3")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.selfattn_lora": False, "method.intermediate_lora": False}}, "leave nothing to train"),
        ({"dtype": "bf16", "precision": "bf16-mixed"}, "under autocast, which is not modelled"),
        ({"rank": 4}, "--rank means nothing"),
        ({"set": {"method.leave_out": [32]}}, "names layer 32"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(**{"model": "llama-7b", "method": "hub_ia3", **fields}))
