"""Pfeiffer adapters against the traced model of AdapterHub's library, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles import hub
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, WIDE, Row

NARROW: dict[str, Any] = {"method.reduction_factor": 7}
OTHER: dict[str, Any] = {
    "method.mh_adapter": True, "method.non_linearity": "gelu", "method.leave_out": [0],
    "method.reduction_factor": {"1": 3, "default": 9},
}  # fmt: skip
BARE: dict[str, Any] = {
    "method.original_ln_before": False, "method.residual_before_ln": False, "method.dropout": 0.1,
}  # fmt: skip
CHANNELS: dict[str, Any] = {"method.scaling": "channel", "method.non_linearity": "swish"}
ROWS: list[Row] = [
    (family, {"method": "seq_bn", **fields})
    for family, fields in (
        ("llama", {**PLAIN, "set": NARROW}),
        ("llama", {**WIDE, "set": OTHER}),
        ("llama", {**AGAIN, "set": NARROW}),
        ("llama", {**MIXED, "set": {**BARE, "model.use_cache": False}}),
        ("llama", {**MIXED, "dtype": "bf16", "set": NARROW}),
        ("llama_biased", {**WIDE, "attention": "eager", "set": CHANNELS}),
        ("llama", {**PLAIN, "attention": "sdpa_math", "set": {"method.scaling": "learned"}}),
        ("mistral", {**WIDE, "set": {"model.sliding_window": 9, "method.original_ln_after": False}}),
        ("qwen2", {**PLAIN, "set": NARROW}),
        ("qwen2", {**WIDE, "set": {**OTHER, "model.use_cache": False}}),
        ("qwen2", {**MIXED, "set": {**BARE, "method.mh_adapter": True}}),
        ("qwen3", {**AGAIN, "set": NARROW}),
        ("llama", {**PACKED, "set": {**NARROW, "format.prepare": False}}),
        ("qwen3", {**PLAIN, "adapter_dtype": "bf16", "set": {**OTHER, "method.leave_out": [2]}}),
    )
] + [
    ("llama", {**PLAIN, "method": "seq_bn_inv"}),
    ("llama", {**AGAIN, "method": "pfeiffer+inv"}),
    ("llama", {**MIXED, "method": "seq_bn_inv"}),
    ("qwen2", {**WIDE, "method": "seq_bn_inv", "set": {"method.inv_adapter_reduction_factor": 3}}),
    ("qwen2", {**AGAIN, "method": "seq_bn_inv"}),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=hub.key)
def test_seq_bn_is_what_adapters_does(row: Row) -> None:
    hub.assert_as_recorded("seq_bn", row)


@pytest.mark.trainers
def test_the_records_are_what_adapters_does() -> None:
    assert hub.traced(ROWS)[0] == hub.recorded("seq_bn")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"adapter_dtype": "fp32"}, "adapters' linear layers do not cast"),
        ({"set": {"method.residual_before_ln": "post_add"}}, "only from a norm after the sublayer"),
        ({"set": {"method.output_adapter": False}}, "nothing trains"),
        ({"recompute": "full", "set": {"recompute.use_reentrant": True}}, "use_reentrant=true: pfeiffer"),
        ({"set": {"method.inv_adapter": "glow"}}, "inv_adapter=glow is not modelled"),
        ({"set": {"method.inv_adapter": "nice"}}, "needs method.inv_adapter_reduction_factor"),
        ({"set": {"method.leave_out": [40]}}, "names layer 40"),
        ({"set": {"method.reduction_factor": {"3": 2}}}, "neither layer 0 nor a default"),
        ({"set": {"method.non_linearity": "mish"}}, "is not modelled; use one of"),
        ({"set": {"method.dropout": 1.0}}, r"dropout=1\.0"),
        ({"model": "phi-3-mini"}, "no interface for phi3"),
    ],
)  # fmt: skip
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(**{"model": "llama-7b", "method": "pfeiffer", **fields}))
