"""torchao's packed weights: bytes of the real tensors, and LoRA and others over them as the real model runs."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("torchao")

from peftplan import formats  # noqa: E402
from peftplan.errors import PeftplanError, RequestError  # noqa: E402
from peftplan.graph.core import Tensor  # noqa: E402
from peftplan.instruments import packers  # noqa: E402
from peftplan.instruments.recorder import parts  # noqa: E402
from peftplan.instruments.trace import trace  # noqa: E402
from peftplan.pipeline import estimate  # noqa: E402
from peftplan.units import DType  # noqa: E402
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, assert_equal, tiny_job  # noqa: E402
from tests.oracles.test_formats import storage_bytes  # noqa: E402

pytestmark = [pytest.mark.trace, pytest.mark.filterwarnings("ignore")]

SHAPES = ((48, 88), (97, 48), (8, 16), (301, 256))
EVERY = {"dtype": "bf16", "method": "lora", "target_modules": "all-linear"}
NF4 = {"format.block_size": 8, "format.scaler_block_size": 4}
DYNAMIC = {"format.activations": "dynamic"}


@pytest.mark.parametrize("name", ["torchao_int8", "torchao_float8"])
@pytest.mark.parametrize("knobs", [{}, {"granularity": "tensor"}, {"group_size": 8}], ids=str)
def test_eight_bits_take_the_bytes_predicted(name: str, knobs: dict[str, Any]) -> None:
    fmt: Any = formats.make(name, knobs)
    config = (packers._int8 if name == "torchao_int8" else packers._float8)(fmt)
    from torchao.quantization import quantize_

    for rows, columns in SHAPES:
        linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
        quantize_(linear, config)
        assert fmt.stored_bytes(rows, columns) == storage_bytes(*parts(linear.weight))


@pytest.mark.parametrize("dtype", [DType.bfloat16, DType.float32], ids=lambda dtype: dtype.label)
@pytest.mark.parametrize("sizes", [(8, 2), (16, 1), (64, 256)])
def test_nf4_takes_the_bytes_predicted(sizes: tuple[int, int], dtype: DType) -> None:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    fmt: Any = formats.make("torchao_nf4", {"block_size": sizes[0], "scaler_block_size": sizes[1]})
    for rows, columns in ((48, 88), (16, 48), (128, 256), (96, 40)):
        weight = torch.randn(rows, columns, dtype={4: torch.float32, 2: torch.bfloat16}[dtype.size])
        try:
            found = fmt.stored_bytes(Tensor("weight", (rows, columns), dtype))
        except RequestError:
            with pytest.raises((AssertionError, RuntimeError)):
                to_nf4(weight, *sizes)
        else:
            assert found == storage_bytes(*parts(to_nf4(weight, *sizes)))


ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("llama", {**PLAIN, "format": "torchao_int8"}),
    "int8, fp32 and padded": ("llama", {**WIDE, "format": "torchao_int8", "dtype": "fp32"}),
    "int8, recomputed": ("llama", {**AGAIN, "format": "torchao_int8", "set": {"format.prepare": True}}),
    "int8 under autocast": ("llama", {**MIXED, "format": "torchao_int8"}),
    "int8 of fp32 under autocast": ("llama", {**MIXED, "format": "torchao_int8", "dtype": "fp32"}),
    "float8 under autocast": ("llama", {**MIXED, "format": "torchao_float8", "dtype": "fp32"}),
    "nf4 under autocast": ("llama", {**MIXED, "format": "torchao_nf4", "set": NF4}),
    "int8 in groups": ("llama", {**PLAIN, "format": "torchao_int8", "set": {"format.group_size": 8}}),
    "int8 with biases": ("llama_biased", {**PLAIN, "format": "torchao_int8"}),
    "int8, activations too": ("llama", {**PLAIN, "format": "torchao_int8", "set": DYNAMIC}),
    "float8": ("qwen2", {**PLAIN, "format": "torchao_float8"}),
    "float8, recomputed": ("llama", {**AGAIN, "format": "torchao_float8", "set": {"format.granularity": "tensor"}}),
    "nf4": ("llama", {**PLAIN, "format": "torchao_nf4", "set": NF4}),
    "nf4 with biases, bf16 adapters": (
        "llama_biased", {**PLAIN, "format": "torchao_nf4", "adapter_dtype": "bf16", "set": NF4}
    ),
    "nf4, recomputed": ("llama", {**AGAIN, "format": "torchao_nf4", "set": NF4}),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_lora_over_it_is_what_the_real_model_does(row: str) -> None:
    family, fields = ROWS[row]
    assert_equal(family, {**EVERY, **fields})


@pytest.mark.parametrize("fmt", ["torchao_int8", "torchao_float8"])
def test_dora_over_it_is_what_the_real_model_does(fmt: str) -> None:
    knobs = {"method.r": 4, "method.use_dora": True}
    assert_equal("llama", {**EVERY, **PLAIN, "format": fmt, "target_modules": ("q_proj", "down_proj"), "set": knobs})


def test_without_gradients_through_its_layers_the_real_model_fails_too() -> None:
    job = tiny_job("llama", {**EVERY, **PLAIN, "format": "torchao_int8", "target_modules": ("q_proj",), "set": DYNAMIC})
    with pytest.raises(RequestError, match="hand no gradient on"):
        estimate(job)
    with pytest.raises(PeftplanError, match="does not require grad"):
        trace(job)


@pytest.mark.parametrize("method", ["delora", "glora", "hira", "osf", "tinylora"])
def test_what_reads_the_weight_is_refused_by_torchao_too(method: str) -> None:
    fields = {**EVERY, **PLAIN, "format": "torchao_int8", "method": method, "target_modules": ("q_proj",)}
    with pytest.raises(RequestError, match="computes with the weight"):
        estimate(tiny_job("llama", fields))
    with pytest.raises(PeftplanError):
        trace(tiny_job("llama", fields))
