"""Layers of transformers whose kernels need a GPU: bytes of the real modules, and what their autograd keeps and makes
with the products written out."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.integrations import eetq, finegrained_fp8  # noqa: E402
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear  # noqa: E402

from peftplan import formats  # noqa: E402
from peftplan.formats.fp8 import Fp8  # noqa: E402
from peftplan.graph.builder import Builder, Numerics  # noqa: E402
from peftplan.graph.core import Tensor  # noqa: E402
from peftplan.graph.edit import Module  # noqa: E402
from peftplan.graph.ops import PackedLinear  # noqa: E402
from peftplan.instruments.engine import sole_owner  # noqa: E402
from peftplan.instruments.recorder import Recorder  # noqa: E402
from peftplan.units import DType  # noqa: E402
from tests.oracles.test_formats import storage_bytes  # noqa: E402

pytestmark = pytest.mark.trace

SHAPES = ((128, 256), (97, 33), (576, 2048), (130, 128))


@pytest.mark.parametrize("knobs", [{}, {"scale_fmt": "ue8m0"}, {"activation_scheme": "static"}], ids=str)
@pytest.mark.parametrize("block", [(128, 128), (64, 32), None])
def test_block_scaled_weights_take_the_bytes_predicted(block: tuple[int, int] | None, knobs: dict[str, Any]) -> None:
    fmt: Any = formats.make("fp8", {"weight_block_size": block, **knobs})
    if block is None and "scale_fmt" in knobs:
        pytest.skip("one scale is fp32")
    for rows, columns in SHAPES:
        real = finegrained_fp8.FP8Linear(columns, rows, block_size=block, **knobs)
        assert fmt.stored_bytes(rows, columns) == storage_bytes(*real.parameters())


@pytest.mark.parametrize("name", ["eetq", "fbgemm_fp8"])
def test_others_take_the_bytes_predicted(name: str) -> None:
    fmt: Any = formats.make(name, {})
    for rows, columns in SHAPES:
        made = eetq.EetqLinear(columns, rows) if name == "eetq" else FbgemmFp8Linear(columns, rows, bias=False)
        bound = list(made.buffers())
        assert fmt.stored_bytes(rows, columns) == storage_bytes(*made.parameters(), *bound)


def test_backward_of_block_scaled_weights_is_what_the_real_function_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: Any, weight: Any, scales: Any, block: Any, bias: Any, *_: Any) -> Any:
        del bias
        return x @ finegrained_fp8._dequantize_fp8_weight(weight, scales, block, x.dtype).t()

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", product)
    rows, columns, block = 96, 160, (32, 32)
    real = finegrained_fp8.FP8Linear(columns, rows, block_size=block).requires_grad_(False)
    real.weight.data = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    saved, scratch = _watched(real, columns)
    op = _op(Fp8(weight_block_size=block), rows, columns)
    need = {op.ins[0].name, op.out.name}
    (grad,) = op.backward(need)
    assert [t.name for t in op.saved(need)] == [op.ins[1].name]
    assert saved == {real.weight.untyped_storage()._cdata, real.weight_scale_inv.untyped_storage()._cdata}
    assert grad.raw_bytes + grad.scratch_bytes == scratch


def _op(fmt: Fp8, rows: int, columns: int) -> PackedLinear:
    b = Builder(Numerics(backend="cuda", capability=(8, 9)))
    with b.marked("q"):
        b.linear(
            Tensor("x", (3, 17, columns), DType.bfloat16), b.weight("q.weight", rows, columns, dtype=DType.bfloat16)
        )
    weight = b.ops[0].ins[1]
    (op,) = fmt.linear(Module(path="q", site="q", ops=tuple(b.ops), weight=weight), b.numerics)
    assert isinstance(op, PackedLinear)
    return op


def _watched(layer: Any, columns: int) -> tuple[set[int], int]:
    """The storages that the layer saves, and the most that its backward takes beside the gradient that comes in."""
    sole_owner()
    kept: set[int] = set()

    def pack(tensor: Any) -> Any:
        kept.add(tensor.untyped_storage()._cdata)
        return tensor

    x = torch.randn(3, 17, columns, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    gradient, recorder = torch.randn_like(out), Recorder()
    for tensor in (*layer.parameters(), x, out, gradient):
        recorder.add(tensor, "parameter", "")
    before = sum(recorder.alive.values())
    recorder.phase, start = "backward", len(recorder.events)
    with recorder:
        torch.autograd.grad(out, x, gradient)
    now = most = before
    for event in recorder.events[start:]:
        now += event.bytes if event.action == "alloc" else -event.bytes
        most = max(most, now)
    return kept, most - before
