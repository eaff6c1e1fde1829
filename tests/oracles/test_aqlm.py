"""AQLM: bytes of the library's layers, what its function keeps, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import formats
from peftplan.errors import RequestError
from peftplan.formats._prequantized import Prequantized
from peftplan.graph.core import Tensor
from peftplan.pipeline import estimate, read
from peftplan.units import DType
from tests.oracles.equal import PLAIN, tiny_job

LORA: dict[str, Any] = {"method": "lora", "format": "aqlm", "dtype": "bf16", "target_modules": ("q_proj",), **PLAIN}
KNOBS: tuple[dict[str, int], ...] = (
    {},
    {"num_codebooks": 2, "nbits_per_codebook": 8},
    {"in_group_size": 16, "nbits_per_codebook": 4},
    {"in_group_size": 4, "out_group_size": 2, "num_codebooks": 3, "nbits_per_codebook": 6},
)


@pytest.mark.trace
@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("shape", [(48, 64), (6, 16), (88, 48)])
def test_layers_hold_the_bytes_predicted(knobs: dict[str, int], shape: tuple[int, int]) -> None:
    aqlm = pytest.importorskip("aqlm")
    import torch

    given = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 16, **knobs}
    rows, columns = shape
    layer = aqlm.QuantizedLinear(columns, rows, **given, bias=False, dtype=torch.bfloat16, device="meta")
    fmt = formats.make("aqlm", knobs)
    assert isinstance(fmt, Prequantized)
    weight = Tensor("w", shape, DType.bfloat16)
    assert [p.bytes for p in fmt.pieces(weight)] == [p.nbytes for p in (layer.codebooks, layer.codes, layer.scales)]
    assert fmt.file_bytes(weight) == fmt.stored(weight).nbytes


@pytest.mark.trace
def test_it_keeps_its_input_beside_what_is_stored() -> None:
    aqlm = pytest.importorskip("aqlm")
    import torch

    layer = aqlm.QuantizedLinear(64, 48, 8, 1, 1, 4, bias=False)
    for part in (layer.codebooks, layer.scales):
        part.data.normal_()
    layer.codes.data.zero_()
    x = torch.randn(7, 64, requires_grad=True)
    kept: list[Any] = []

    def packs(t: Any) -> Any:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(packs, lambda t: t):
        layer(x)
    own = {p.data_ptr() for p in layer.parameters()}
    assert [t.data_ptr() for t in kept if t.data_ptr() not in own] == [x.data_ptr()]


def test_inputs_are_kept_once_by_who_reads_them() -> None:
    """q, k, v read one tensor, gate and up another, o and down their own: 48, 48, 48 and 88 wide, in bf16."""
    tokens = 3 * 17
    kept = {name: read(tiny_job("llama", {**LORA, "format": name, "set": knobs})).estimate.memory
            for name, knobs in (("aqlm", {}), ("nf4", {"format.prepare": False}))}  # fmt: skip
    more = kept["aqlm"].saved_for_backward_bytes - kept["nf4"].saved_for_backward_bytes
    assert 0 < more <= 3 * 2 * tokens * (48 + 48 + 48 + 88)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"set": {"format.in_group_size": 7}}, "AQLM packs groups of 1x7: self_attn.q_proj has 48x48"),
        ({"set": {"format.nbits_per_codebook": 65}}, "give 1 to 64 bits"),
        ({"dtype": "fp32", "precision": "fp32"}, "kernels take inputs of their codebooks' half precision"),
        ({"set": {"method.init_lora_weights": "orthogonal"}}, "PEFT starts it from a layer's weight"),
        ({"method": "dora"}, "PEFT has no LoRA with use_dora on the layers of aqlm"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        estimate(tiny_job("llama", {**LORA, **fields}))
