"""Which kernel attention runs on, what each keeps, and the math kernel against the real one."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import RequestError
from peftplan.graph.core import Op
from peftplan.graph.ops import FusedAttention, Softmax
from peftplan.job import make_job
from peftplan.pipeline import Reading, read


def config(*, kv_heads: int = 2, use_cache: bool = False) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "use_cache": use_cache,
    }


def reading(*, kv_heads: int = 2, **fields: Any) -> Reading:
    job = {
        "model": "tiny",
        "config": config(kv_heads=kv_heads),
        "method": "lora",
        "rank": 2,
        "micro_batch": 2,
    }
    return read(make_job(**{**job, "seq_len": 40, "dtype": "bfloat16", "batching": "exact", **fields}))


def layer(found: Reading) -> list[Op]:
    return [op for region in found.graph.regions if region.name == "layers" for op in region.ops]


def kernel(found: Reading) -> FusedAttention | None:
    return next((op for op in layer(found) if isinstance(op, FusedAttention)), None)


def extras(found: Reading) -> dict[str, tuple[int, ...]]:
    fused = kernel(found)
    return {} if fused is None else {t.name.rsplit(".", 1)[1]: t.shape for t in fused.extras}


def test_flash_is_taken_without_a_mask_on_ampere_and_newer() -> None:
    found = reading(gpu="a100-80gb")
    assert extras(found) == {"lse": (2, 4, 40), "rng_state": (2,), "unused": ()}
    assert not any("repeat" in op.name for op in layer(found))


def test_a_mask_takes_the_efficient_kernel_with_a_padded_bias_and_repeated_heads() -> None:
    found = reading(batching="padded", seq_len=42)
    assert extras(found) == {"lse": (2, 4, 64), "bias": (2, 1, 42, 48)}
    assert sum("repeat" in op.name for op in layer(found)) == 2


def test_before_ampere_the_efficient_kernel_takes_fp16_and_math_bf16() -> None:
    assert extras(reading(gpu="t4", dtype="float16", kv_heads=4)) == {"lse": (2, 4, 64)}
    assert kernel(reading(gpu="t4", kv_heads=4)) is None
    assert any(isinstance(op, Softmax) for op in layer(reading(gpu="t4", kv_heads=4)))


def test_grouped_heads_that_no_kernel_takes_go_to_math() -> None:
    assert kernel(reading(gpu="t4", dtype="float16")) is None


def test_the_flash_package_needs_half_precision() -> None:
    with pytest.raises(RequestError, match="fp16 or bf16 only"):
        reading(attention="flash_attention_2", dtype="float32")
    assert kernel(reading(attention="flash_attention_2", dtype="float32", precision="bf16-mixed")) is not None


def test_packed_batches_are_one_row_without_mask_under_flash_and_with_one_under_sdpa() -> None:
    flash = reading(attention="flash_attention_2", batching="packed")
    assert extras(flash) == {"lse": (1, 4, 80), "rng_state": (2,)}
    exact = reading(attention="flash_attention_2")
    assert flash.estimate.flops.forward == exact.estimate.flops.forward
    assert extras(reading(batching="packed"))["bias"] == (1, 1, 80, 80)


def test_eager_on_cuda_fuses_the_cast_into_the_softmax() -> None:
    softmax = next(op for op in layer(reading(attention="eager")) if isinstance(op, Softmax))
    assert (softmax.ins[0].dtype.label, softmax.out.dtype.label) == ("bfloat16", "float32")
    assert softmax.backward({softmax.ins[0].name})[0].scratch_bytes == softmax.out.nbytes


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(("batching", "dtype"), [("exact", "bfloat16"), ("padded", "float32")])
def test_math_equals_the_trace(kv_heads: int, use_cache: bool, batching: str, dtype: str) -> None:
    attention = pytest.importorskip("torch.nn.attention")
    from peftplan.instruments.trace import trace

    job: dict[str, Any] = {
        "model": "tiny",
        "config": config(kv_heads=kv_heads, use_cache=use_cache),
        "method": "lora",
        "rank": 2,
        "micro_batch": 2,
        "seq_len": 96,
        "dtype": dtype,
        "precision": {"bfloat16": "bf16", "float32": "fp32"}[dtype],
        "batching": batching,
        "backend": "cpu",
    }
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        traced = trace(make_job(**job, attention="sdpa"))
    memory = read(make_job(**job, attention="sdpa_math")).estimate.memory
    assert memory.saved_for_backward_bytes == traced.saved_for_backward_bytes
    assert memory.peak_bytes == traced.peak_bytes
