"""optimum-quanto's packed weights: bytes of the real tensors, and LoRA over them as the real model runs."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
quanto = pytest.importorskip("optimum.quanto")

from peftplan import formats  # noqa: E402
from peftplan.instruments import packers  # noqa: E402
from peftplan.instruments.recorder import parts  # noqa: E402
from tests.oracles.equal import AGAIN, PLAIN, WIDE, assert_equal  # noqa: E402
from tests.oracles.test_formats import storage_bytes  # noqa: E402

pytestmark = [pytest.mark.trace, pytest.mark.filterwarnings("ignore")]

SHAPES = ((48, 88), (97, 48), (7, 160), (301, 256), (50, 288), (16, 130))
TYPES = {"int8": "qint8", "float8": "qfloat8", "int4": "qint4", "int2": "qint2"}
EVERY = {"method": "lora", "target_modules": "all-linear", "format": "quanto"}


@pytest.mark.parametrize("weights", TYPES)
def test_weights_take_the_bytes_predicted(weights: str) -> None:
    fmt: Any = formats.make("quanto", {"weights": weights})
    for rows, columns in SHAPES:
        linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.float16)
        made: Any = quanto.QLinear.from_module(linear, weights=vars(quanto)[TYPES[weights]])
        made.freeze()
        scales = [value.float() for _, value in packers.constants(made)]
        assert fmt.stored_bytes(rows, columns, 2) == storage_bytes(*parts(made.weight), *scales)


@pytest.mark.parametrize("columns", [128, 256, 384])
def test_tinygemm_takes_the_bytes_predicted(columns: int) -> None:
    fmt: Any = formats.make("quanto", {"weights": "int4"})
    linear = torch.nn.Linear(columns, 64, bias=False, dtype=torch.bfloat16)
    made: Any = quanto.QLinear.from_module(linear, weights=quanto.qint4)
    made.freeze()
    assert fmt.stored_bytes(64, columns, 2) == storage_bytes(*parts(made.weight)) + 8


ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("llama", {**WIDE, "dtype": "fp32"}),
    "float8 with biases": ("llama_biased", {**PLAIN, "dtype": "bf16", "set": {"format.weights": "float8"}}),
    "int4": ("llama", {**PLAIN, "dtype": "bf16", "set": {"format.weights": "int4"}}),
    "int4, recomputed": ("qwen2", {**AGAIN, "dtype": "bf16", "set": {"format.weights": "int4"}}),
    "int2": ("llama", {**PLAIN, "dtype": "bf16", "set": {"format.weights": "int2"}}),
    "vera": ("llama", {**PLAIN, "dtype": "bf16", "method": "vera", "set": {"format.weights": "int4"}}),
}


@pytest.mark.parametrize("row", ROWS)
def test_methods_over_it_are_what_the_real_model_does(row: str) -> None:
    family, fields = ROWS[row]
    assert_equal(family, {**EVERY, **fields})
