"""GPTQ: 2, 3, 4 or 8 bits a weight, scale and zero by group of inputs (Frantar 2022, arXiv:2210.17323).

Storage (gptqmodel 7.7.0, nn_modules/qlinear/__init__.py, _register_gptq_buffers; auto-gptq 0.7.1's QuantLinear is the
same): `qweight` and `qzeros` in words of 32 bits, an fp16 scale for every group and output, an int32 group for every
input whether desc_act orders them or not, and an fp16 bias. A layer of gptqmodel has a small table of shifts beside.
Compute, by `kernel`:
- `torch`, what gptqmodel trains with (qlinear/torch.py, TorchLinear; tritonv2.py, TritonV2Linear.forward hands over to
  it while it trains): the weight is unpacked by operators of torch and multiplied by torch.matmul, so autograd keeps
  the unpacked copy of every layer until its backward, unless that is recomputed. On a GPU torch.compile fuses the
  unpacking; its temporaries are left out (errs low by no more than 4 bytes a weight of one layer).
- `triton_v2`, AutoGPTQ's and fms-acceleration's (triton_utils/dequant.py, QuantLinearFunction): forward and backward
  unpack the weight to fp16 and drop it; autograd keeps nothing but what is stored.
peft 0.21.2, utils/other.py, prepare_model_for_kbit_training casts nothing of a GPTQ model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.errors import RequestError, Unsupported
from peftplan.formats._packing import biases, pack
from peftplan.formats._prequantized import Prequantized, unpacked_linear
from peftplan.formats.base import Piece
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import PackedLinear
from peftplan.units import DType, ceil_div

BITS = (2, 3, 4, 8)
GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
LAYER = "gptq"
FORWARD_ONLY = ("marlin", "machete", "exllama_v2", "exllama_v1", "bitblas", "swordfish")
"""gptqmodel's kernels without SUPPORTS_TRAINING."""


@final
@dataclass(frozen=True)
class Gptq(Prequantized):
    """Knobs of transformers' GPTQConfig, and which kernel trains."""

    bits: int = 4
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    kernel: str = "torch"
    prepare: bool = True
    """Whether peft.prepare_model_for_kbit_training runs before the adapter is put on: it turns checkpointing on."""

    @property
    def prepares(self) -> bool:
        return self.prepare

    def bias_dtype(self, compute: DType, rest: DType) -> DType:
        del compute, rest
        return DType.float16

    def pieces(self, weight: Tensor) -> tuple[Piece, ...]:
        """In the order of their names, as checkpoints have them; the table of shifts comes last (post_init)."""
        rows, columns = weight.shape
        groups = ceil_div(columns, columns if self.group_size == -1 else self.group_size)
        order, codes = 4 * columns, 4 * ceil_div(columns * self.bits, 32) * rows
        zeros, scales = 4 * groups * ceil_div(rows * self.bits, 32), 2 * groups * rows
        return tuple(map(Piece, (order, codes, zeros, scales, *self._shifts())))

    def storage(self, compute: DType) -> DType | None:
        """fms-acceleration (fms_acceleration_peft, autogptq_utils.py) makes parameters of `qweight` and `qzeros`, seen
        as fp16, for FSDP to shard; gptqmodel's stay buffers, which it does not."""
        del compute
        return DType.float16 if self.kernel == "triton_v2" else None

    def sharded_bytes(self, weight: Tensor) -> int:
        _, codes, zeros, *_ = self.pieces(weight)
        return codes.bytes + zeros.bytes

    def file_bytes(self, weight: Tensor) -> int:
        """What a checkpoint holds of a weight."""
        return sum(piece.bytes for piece in self.pieces(weight)[:4])

    def _shifts(self) -> tuple[int, ...]:
        if self.kernel != "torch":
            return ()
        size = 4 * (36 if self.bits == 3 else 32 // self.bits)
        return (size,)

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        self._check(compute)

        def stand_in(module: Module) -> tuple[Op, ...]:
            self._check_sides(module)
            if self.kernel == "torch":
                return self._by_torch(module, numerics)
            return self._by_triton(module, numerics)

        return pack(graph, stand_in)

    def _by_torch(self, module: Module, numerics: Numerics) -> tuple[Op, ...]:
        rows, columns = module.weight.shape
        on_cpu = numerics.backend == "cpu"
        zeros = rows * ceil_div(columns, columns if self.group_size == -1 else self.group_size)
        code = 4 if self.bits == 3 else 2 if self.bits == 8 else 1
        made = DType.float16
        return unpacked_linear(
            module,
            numerics,
            weight=self.stored(module.weight),
            made=made,
            temporary_bytes=(rows * columns * (2 * code + 2) + zeros * code) if on_cpu else 0,
            layer=LAYER,
        )

    def _by_triton(self, module: Module, numerics: Numerics) -> tuple[Op, ...]:
        b = Builder(numerics, f"{module.path}.packed.")
        weight = self.stored(module.weight)
        with b.marked(module.site):
            x = b.autocast(module.x)
            name = b.name("quant_linear")
            b.ops.append(
                PackedLinear(
                    name=name,
                    ins=(x, weight),
                    out=module.out._replace(name=name, dtype=DType.float16),
                    site=module.site,
                    layer=LAYER,
                    saves=("weight",),
                    forward_workspace_bytes=2 * weight.numel,
                    backward_workspace_bytes=2 * weight.numel,
                )
            )
            out = b.ops[-1].out
            for bias in biases(module):
                out = b.add(out, bias, label="biased")
        return writing(b.ops, out, module.out)

    def _check(self, compute: DType) -> None:
        if self.bits not in BITS:
            raise RequestError(f"format.bits={self.bits}: use one of {', '.join(map(str, BITS))}")
        if self.group_size not in GROUPS:
            raise RequestError(f"format.group_size={self.group_size}: use one of {', '.join(map(str, GROUPS))}")
        if self.kernel in FORWARD_ONLY:
            raise Unsupported(
                f"format.kernel={self.kernel}: gptqmodel's kernel has no backward and refuses to train; use torch"
            )

        if self.kernel not in ("torch", "triton_v2"):
            raise RequestError(f"format.kernel={self.kernel!r}: use torch (gptqmodel's) or triton_v2 (AutoGPTQ's)")
        if self.kernel == "triton_v2" and compute is not DType.float16:
            raise RequestError(
                "format.kernel=triton_v2: AutoGPTQ unpacks to float16 and returns it, the model computes in "
                f"{compute.label}; use --dtype fp16 or --precision fp16-mixed"
            )

    def _check_sides(self, module: Module) -> None:
        """AutoGPTQ's triton kernel, and words that hold 3 bits each across their borders, take multiples of 32."""
        odd = [n for n in module.weight.shape if n % 32]
        if odd and (self.kernel != "torch" or self.bits == 3):
            what = "format.bits=3" if self.bits == 3 else f"format.kernel={self.kernel}"
            raise RequestError(f"{what}: {module.path} has a side of {odd[0]}, which 32 does not divide; use 4 bits of "
                               "kernel torch")  # fmt: skip


FORMAT = Gptq
EXAMPLES = (Gptq(), Gptq(bits=8, group_size=32, desc_act=True), Gptq(bits=2, group_size=-1, prepare=False))
UNVERIFIED: dict[str, str] = {}
