"""Bytes of real bitsandbytes weights and of real optimizers' states, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")

from peftplan import formats, optimizers  # noqa: E402
from peftplan.optimizers.base import Trained  # noqa: E402
from peftplan.pipeline import read  # noqa: E402
from peftplan.units import DType  # noqa: E402
from tests.conformance import zoo  # noqa: E402

pytestmark = pytest.mark.trace

SHAPES = ((48, 88), (97, 33), (1, 7), (3, 5), (64, 64), (301, 257), (20, 48))
TYPES = {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16, DType.float16: torch.float16}


def storage_bytes(*tensors: Any) -> int:
    """Bytes of the distinct storages of some tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def constants(state: Any) -> Iterator[Any]:
    """The tensors of a bitsandbytes QuantState."""
    yield from (state.absmax, state.code)
    if state.nested:
        yield from (state.offset, state.state2.absmax, state.state2.code)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 512, 4096])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bit_weights_take_the_bytes_predicted(name: str, blocksize: int, *, double: bool) -> None:
    fmt: Any = formats.make(name, {"blocksize": blocksize, "double_quant": double})
    found, real = [], []
    for rows, columns in SHAPES:
        packed, state = bnb.functional.quantize_4bit(
            torch.randn(rows, columns), blocksize=blocksize, compress_statistics=double, quant_type=name
        )
        real.append(storage_bytes(packed, *constants(state)))
        found.append(fmt.stored_bytes(rows * columns))
    assert found == real


def test_no_constants_are_shared_between_weights() -> None:
    states = [
        bnb.functional.quantize_4bit(torch.randn(48, 88), compress_statistics=True, quant_type="nf4")[1] for _ in "ab"
    ]
    both = [tensor for state in states for tensor in constants(state)]
    assert storage_bytes(*both) == 2 * storage_bytes(*constants(states[0]))


def test_eight_bit_weights_take_the_bytes_predicted() -> None:
    job = zoo.job("grouped", {"method": "lora", "target_modules": ("o_proj",), "format": "int8"})
    packed = [weight for weight, _ in read(job).graph.params() if weight.stored_bytes is not None]
    assert len(packed) == 7
    for weight in packed:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(torch.randn(weight.shape, dtype=torch.float16))
        assert weight.nbytes == storage_bytes(codes, scales)


def stepped(optimizer: Any, weights: list[Any]) -> int:
    """Bytes of the states after one step."""
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return storage_bytes(*tensors)


def predicted(name: str, knobs: dict[str, Any], weights: list[Any]) -> int:
    """Bytes of the states as the model counts them."""
    kinds = {real: kind for kind, real in TYPES.items()}
    given = [Trained(tuple(weight.shape), kinds[weight.dtype]) for weight in weights]
    return sum(state.bytes * state.copies for state in optimizers.make(name, knobs).states(given, "cpu"))


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.label)
@pytest.mark.parametrize("impl", ["auto", "for-loop", "foreach", "fused"])
def test_adamw_keeps_the_bytes_predicted(impl: str, dtype: DType) -> None:
    switches = {"for-loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    weights = [torch.nn.Parameter(torch.randn(shape, dtype=TYPES[dtype])) for shape in SHAPES]
    optimizer = torch.optim.AdamW(weights, **switches.get(impl, {}))
    assert predicted("adamw", {"impl": impl}, weights) == stepped(optimizer, weights)


@pytest.mark.parametrize("bits", [8, 32])
def test_bitsandbytes_adamw_keeps_the_bytes_predicted(bits: int) -> None:
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = bnb.optim.AdamW(weights, optim_bits=bits)
    assert predicted("adamw_8bit", {"optim_bits": bits}, weights) == stepped(optimizer, weights)
