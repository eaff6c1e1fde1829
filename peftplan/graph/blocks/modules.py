"""The modules that blocks are made of: norms and linear layers."""

from __future__ import annotations

from peftplan.arch.core import Arch
from peftplan.graph.blocks.setup import Setup, WeightTypes
from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor
from peftplan.graph.spread import entering, summed


def rms_norm(b: Builder, arch: Arch, setup: Setup, x: Tensor, label: str) -> Tensor:
    """An RMSNorm over the last dimension, of the hidden state or of a head."""
    weight = b.weight(f"{label}.weight", x.shape[-1], dtype=setup.types.norm)
    with b.scope(label), b.marked("norm"):
        return setup.kernels.norm(b, arch, x, weight)


def project(
    b: Builder, x: Tensor, width: int, *, label: str, site: str, types: WeightTypes, biased: bool = False
) -> Tensor:
    """One nn.Linear of the block."""
    weight = b.weight(f"{label}.weight", width, x.shape[-1], dtype=types.linear)
    bias = b.weight(f"{label}.bias", width, dtype=types.bias) if biased else None
    with b.marked(site):
        y = b.linear(entering(b, x, site), weight, bias, label=label, autocast=not types.opaque)
        y = summed(b, y, site)
        wide = weight.name.removesuffix(".weight") in types.widened
        return b.cast(y, x.dtype, label=f"{label}_widened") if wide else y
