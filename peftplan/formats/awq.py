"""AWQ: 4 bits a weight, scale and zero by group of inputs, salient channels scaled up (Lin 2023, arXiv:2306.00978).

Storage of the `gemm` version (gptqmodel 7.6.0, qlinear/__init__.py, AWQuantLinear; AutoAWQ's WQLinear_GEMM is the
same): `qweight` and `qzeros` in words of 32 bits along the outputs, a scale of 2 bytes for every group and output.
Compute: a layer's input is cast to half precision (fp16, unless it is bf16 already), its output back. By `kernel`:
- `gemm` (gemm_awq.py, AwqGemmFn): more than 1,024 rows are multiplied by an unpacked copy of the weight, fewer by the
  packed one in 8 parts that are summed; backward unpacks the weight again; autograd keeps what is stored alone.
- `torch` (torch_awq.py, AwqTorchLinear): operators of torch unpack by way of 64-bit integers, and autograd keeps the
  unpacked weight of every layer until its backward, unless that is recomputed.
transformers loads for inference where backend is not `auto_trainable`, or one of these. peft 0.21.2, utils/other.py,
prepare_model_for_kbit_training casts the rest of an AWQ model to fp32 and turns no checkpointing on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.errors import RequestError, Unsupported
from peftplan.formats._packing import biases, pack
from peftplan.formats._prequantized import Prequantized
from peftplan.formats.base import Piece
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import PackedLinear, Unpack
from peftplan.units import DType, ceil_div

LAYER = "awq"
GROUPS = (-1, 16, 32, 64, 128)
FEW_ROWS = 1024
_PARTS = 8
_FORWARD_ONLY = ("marlin", "machete", "exllama_v2", "exllama_v1", "gemv", "gemv_fast", "swordfish", "bitblas")
"""gptqmodel's kernels that refuse to train, or whose operators have no backward."""


@final
@dataclass(frozen=True)
class Awq(Prequantized):
    """Knobs of transformers' AwqConfig, and which kernel trains."""

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    version: str = "gemm"
    kernel: str = "gemm"
    prepare: bool = True
    """Whether peft.prepare_model_for_kbit_training runs before the adapter is put on."""

    @property
    def upcasts_rest(self) -> bool:
        return self.prepare

    @property
    def prepares(self) -> bool:
        return False

    def opaque(self, numerics: Numerics) -> bool:
        del numerics
        return True

    def bias_dtype(self, compute: DType, rest: DType) -> DType:
        """The layer casts it to what it computes in, for good."""
        return _half(rest if self.prepare else compute)

    def pieces(self, weight: Tensor) -> tuple[Piece, ...]:
        rows, columns = weight.shape
        groups = columns // self._group(columns)
        words = 4 * ceil_div(rows * self.bits, 32)
        return Piece(columns * words), Piece(groups * words), Piece(2 * groups * rows)

    def _group(self, columns: int) -> int:
        return columns if self.group_size == -1 else self.group_size

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        del compute
        self._check()

        def stand_in(module: Module) -> tuple[Op, ...]:
            self._check_sides(module)
            return self._linear(module, numerics)

        return pack(graph, stand_in)

    def _linear(self, module: Module, numerics: Numerics) -> tuple[Op, ...]:
        b = Builder(numerics, f"{module.path}.packed.")
        given = module.x
        with b.marked(module.site):
            x = b.cast(given, _half(given.dtype), label="compute_x")
            y = self._by_torch(b, x, module) if self.kernel == "torch" else self._by_gemm(b, x, module)
            for bias in biases(module):
                y = b.add(y, bias._replace(dtype=x.dtype), label="biased")
            out = b.cast(y, given.dtype, label="out")
            b.hold(x, given)
        return writing(b.ops, out, module.out)

    def _by_torch(self, b: Builder, x: Tensor, module: Module) -> Tensor:
        """dequantize_gemm: at its end the codes, the repeated zeros and their difference are there in 64 bits, and the
        repeated scales."""
        name, weight = b.name("unpacked"), self.stored(module.weight)
        out = Tensor(name, weight.shape, x.dtype)
        b.ops.append(
            Unpack(
                name=name,
                ins=(weight,),
                out=out,
                layer=LAYER,
                site=module.site,
                temporary_bytes=(3 * 8 + 2) * weight.numel,
            )
        )
        return b.linear(x, out, label="matmul")

    def _by_gemm(self, b: Builder, x: Tensor, module: Module) -> Tensor:
        weight = self.stored(module.weight)
        inner = b.numerics.autocast or x.dtype
        tokens = x.numel // x.shape[-1]
        copies = 2 * weight.numel if inner is x.dtype else 4 * weight.numel + 2 * x.numel
        few = tokens <= FEW_ROWS
        name = b.name("gemm")
        out = Tensor(name, (*x.shape[:-1], weight.shape[0]), x.dtype if few else inner)
        b.ops.append(
            PackedLinear(
                name=name,
                ins=(x, weight),
                out=out,
                layer=LAYER,
                site=module.site,
                forward_workspace_bytes=_PARTS * 4 * tokens * weight.shape[0] if few else copies,
                backward_workspace_bytes=copies,
            )
        )
        return out

    def _check(self) -> None:
        if self.bits != 4:
            raise RequestError(f"format.bits={self.bits}: gptqmodel trains AWQ layers of 4 bits only")
        if self.group_size not in GROUPS:
            raise RequestError(f"format.group_size={self.group_size}: use one of {', '.join(map(str, GROUPS))}")
        if self.version != "gemm" or self.kernel in _FORWARD_ONLY:
            asked = f"version={self.version}" if self.version != "gemm" else f"kernel={self.kernel}"
            raise Unsupported(f"format.{asked}: gptqmodel's kernel has no backward; use version gemm and kernel gemm")
        if self.kernel not in ("gemm", "torch"):
            raise RequestError(f"format.kernel={self.kernel!r}: use gemm or torch")

    def _check_sides(self, module: Module) -> None:
        """qweight packs 8 outputs a word; there is a scale for whole groups only."""
        rows, columns = module.weight.shape
        if columns % self._group(columns) or rows % 8:
            raise RequestError(
                f"AWQ packs groups of {self.group_size} inputs and words of 8 outputs: {module.path} has "
                f"{rows}x{columns}; use another format.group_size, or an unquantized --format"
            )


def _half(dtype: DType) -> DType:
    return dtype if dtype.is_half else DType.float16


FORMAT = Awq
EXAMPLES = (Awq(group_size=-1), Awq(), Awq(group_size=32, kernel="torch", prepare=False))
UNVERIFIED: dict[str, str] = {}
