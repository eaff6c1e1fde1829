"""AdapterDrop against the traced model of AdapterHub's library, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles import hub
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row

TWO: dict[str, Any] = {"method.leave_out": [0, 1]}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "method": "adapterdrop", "set": TWO}),
    ("llama", {**AGAIN, "method": "adapterdrop", "set": {"method.leave_out": [0]}}),
    ("qwen2", {**WIDE, "method": "adapterdrop", "set": {**TWO, "method.mh_adapter": True}}),
    ("mistral", {**MIXED, "method": "adapterdrop", "set": TWO}),
]


@pytest.mark.parametrize("row", ROWS, ids=hub.key)
def test_adapterdrop_is_what_adapters_does(row: Row) -> None:
    hub.assert_as_recorded("adapterdrop", row)


@pytest.mark.trainers
def test_the_records_are_what_adapters_does() -> None:
    assert hub.traced(ROWS)[0] == hub.recorded("adapterdrop")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.leave_out": [32]}}, "names layer 32; the model has 32"),
        ({"set": {"method.leave_out": list(range(32))}}, "leave_out names every layer"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(**{"model": "llama-7b", "method": "adapterdrop", **fields}))
