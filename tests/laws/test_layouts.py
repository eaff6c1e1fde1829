"""What must hold for every data-parallel layout."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.job import make_job
from peftplan.pipeline import Reading, read

CONFIG: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 88, "vocab_size": 96, "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}  # fmt: skip
SHARDED = ("fsdp1", "fsdp2", "zero3")
EVERY = ("ddp", "zero1", "zero2", *SHARDED)


def _read(**fields: Any) -> Reading:
    asked = {"model": "tiny", "config": CONFIG, "method": "full", "micro_batch": 2, "seq_len": 16, "backend": "cpu"}
    return read(make_job(**{**asked, **fields}))


@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_layout_of_one_is_no_layout(layout: str, method: str) -> None:
    alone, one = _read(method=method), _read(method=method, layout=layout, gpus=1)
    assert one.estimate.memory == alone.estimate.memory
    assert one.estimate.flops == alone.estimate.flops


@pytest.mark.parametrize("layout", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_more_ranks_never_hold_more(layout: str, method: str) -> None:
    """Where every side divides by the ranks: padding can make more of less."""
    rank = {"rank": 16} if method == "lora" else {}
    each = [_read(method=method, **rank, layout=layout, gpus=ranks) for ranks in (2, 4, 8, 16)]
    statics = [reading.estimate.memory.static_bytes for reading in each]
    peaks = [reading.estimate.memory.peak_bytes for reading in each]
    assert statics == sorted(statics, reverse=True)
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_stage_of_zero_holds_less(method: str) -> None:
    """Buckets aside, which are of a size of their own."""

    def held(layout: str) -> int:
        small: dict[str, Any] = {} if layout == "ddp" else {"layout.reduce_bucket_size": 1}
        if layout == "zero3":
            small["layout.param_persistence_threshold"] = 0
        static = _read(method=method, layout=layout, gpus=8, precision="bf16-mixed", set=small).static
        return static["weight"] + static["adapter"] + static["state"] + static["bucket"]

    three, two, one, whole = map(held, ("zero3", "zero2", "zero1", "ddp"))
    assert three <= two <= one <= whole


@pytest.mark.parametrize("layout", ["fsdp1", "fsdp2"])
def test_shards_sum_to_the_whole(layout: str) -> None:
    """Where every side divides by the ranks, nothing is padded."""
    alone, two = _read(), _read(layout=layout, gpus=2)
    assert 2 * two.static["weight"] == alone.static["weight"]


@pytest.mark.parametrize("layout", EVERY)
def test_parameters_and_flops_are_the_models(layout: str) -> None:
    alone, many = _read().estimate, _read(layout=layout, gpus=8).estimate
    assert many.parameters == alone.parameters
    assert many.flops == alone.flops
