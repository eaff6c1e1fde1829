"""The modules that blocks are made of: norms and linear layers."""

from __future__ import annotations

from peftplan.arch.core import Arch
from peftplan.graph.blocks.setup import WeightTypes
from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor
from peftplan.units import DType

FP32 = DType.float32


def rms_norm(b: Builder, arch: Arch, x: Tensor, dtype: DType, label: str) -> Tensor:
    """LlamaRMSNorm.forward / GemmaRMSNorm.forward: computed in fp32 whatever x is."""
    weight = b.weight(f"{label}.weight", x.shape[-1], dtype=dtype)
    with b.scope(label), b.marked("norm"):
        x32 = b.cast(x, FP32, label="x32")
        mean = b.mean_last(b.square(x32))
        inverse = b.rsqrt(b.add_const(mean))
        normed = b.mul(x32, inverse, label="normed")
        if arch.norm == "rms_plus_one":
            gain = b.add_const(b.cast(weight, FP32, label="w32"), label="gain")
            scaled = b.mul(normed, gain, label="scaled")
            out = b.cast(scaled, x.dtype, label="out")
            b.hold(scaled)
            return out
        out = b.mul(weight, b.cast(normed, x.dtype, label="xhat"), label="out")
        b.hold(normed, mean)
        return out


def project(
    b: Builder, x: Tensor, width: int, *, label: str, site: str, types: WeightTypes, biased: bool = False
) -> Tensor:
    """One nn.Linear of the block."""
    weight = b.weight(f"{label}.weight", width, x.shape[-1], dtype=types.linear)
    bias = b.weight(f"{label}.bias", width, dtype=types.bias) if biased else None
    with b.marked(site):
        y = b.linear(x, weight, bias, label=label, autocast=not types.opaque)
        wide = weight.name.removesuffix(".weight") in types.widened
        return b.cast(y, x.dtype, label=f"{label}_widened") if wide else y
