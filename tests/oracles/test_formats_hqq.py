"""hqq's packed weights: bytes of the real tensors and of a published checkpoint, and methods over them as they run."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
quantize = pytest.importorskip("hqq.core.quantize")

from peftplan import formats  # noqa: E402
from peftplan.errors import PeftplanError, RequestError  # noqa: E402
from peftplan.instruments import packers  # noqa: E402
from peftplan.instruments.trace import trace  # noqa: E402
from peftplan.pipeline import estimate  # noqa: E402
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, assert_equal, tiny_job  # noqa: E402
from tests.oracles.test_formats import storage_bytes  # noqa: E402

pytestmark = [pytest.mark.trace, pytest.mark.filterwarnings("ignore")]

SHAPES = ((48, 88), (96, 40), (8, 16), (304, 256), (97, 48))
SOME = {"dtype": "bf16", "method": "lora", "target_modules": ("q_proj", "v_proj", "down_proj"), "format": "hqq"}
SMALL = {"format.group_size": 16}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group_size", [8, 16, 64, None])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_weights_take_the_bytes_predicted(nbits: int, group_size: int | None, axis: int) -> None:
    fmt: Any = formats.make("hqq", {"nbits": nbits, "group_size": group_size, "axis": axis})
    config = quantize.BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis)
    config["weight_quant_params"]["optimize"] = False
    packed = 0
    for rows, columns in SHAPES:
        linear = torch.nn.Linear(columns, rows, dtype=torch.float16)
        try:
            found = fmt.stored_bytes(rows, columns, 2)
        except RequestError:
            with pytest.raises((AssertionError, RuntimeError)):  # some are packed, and cannot be unpacked
                quantize.HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu").dequantize()
            continue
        made = quantize.HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
        tensors = [value for name, value in packers.constants(made) if name != "bias"]
        assert found == storage_bytes(made.W_q, *tensors)
        packed += 1
    assert packed


ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "4 bits": ("llama", {**PLAIN, "set": SMALL}),
    "3 bits with biases": ("llama_biased", {**PLAIN, "set": {**SMALL, "format.nbits": 3}}),
    "8 bits in fp32": ("llama", {**WIDE, "dtype": "fp32", "set": {"format.nbits": 8, "format.group_size": None}}),
    "2 bits along the other axis": ("qwen2", {**PLAIN, "set": {**SMALL, "format.nbits": 2, "format.axis": 0}}),
    "recomputed": ("llama", {**AGAIN, "set": {**SMALL, "format.prepare": True}}),
    "under autocast": ("llama", {**MIXED, "set": SMALL}),
    "vera": ("llama", {**PLAIN, "method": "vera", "set": SMALL}),
    "oft": ("llama", {**PLAIN, "method": "oft", "set": {**SMALL, "method.oft_block_size": 8}}),
}


@pytest.mark.parametrize("row", ROWS)
def test_methods_over_it_are_what_the_real_model_does(row: str) -> None:
    family, fields = ROWS[row]
    assert_equal(family, {**SOME, **fields})


def test_dora_over_it_is_what_the_real_model_does() -> None:
    assert_equal("llama", {**SOME, **PLAIN, "set": {**SMALL, "method.use_dora": True}})


@pytest.mark.parametrize("method", ["ia3", "loha", "hira", "shira", "road"])
def test_methods_without_a_layer_for_it_are_refused_as_peft_does(method: str) -> None:
    job = tiny_job("llama", {**SOME, **PLAIN, "method": method, "target_modules": ("q_proj",), "set": SMALL})
    with pytest.raises(RequestError, match="for the layers of hqq"):
        estimate(job)
    with pytest.raises(PeftplanError):
        trace(job)


def test_peft_finds_no_linear_layers() -> None:
    job = tiny_job("llama", {**SOME, **PLAIN, "target_modules": "all-linear", "set": SMALL})
    with pytest.raises(RequestError, match="name them"):
        estimate(job)
    with pytest.raises(PeftplanError):
        trace(job)
