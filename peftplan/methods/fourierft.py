"""FourierFT: the change of a weight is the inverse Fourier transform of few numbers (Gao 2024, arXiv:2405.03003).

Trains: n_frequency numbers per adapted linear layer; plus `bias` and copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype and the whole change of its weight.
Not modelled: embeddings.
Mirrors peft/tuners/fourierft/layer.py FourierFTLinear.forward and get_delta_weight, peft 0.21.2. The coefficients'
places are two rows of int64 per layer; the transforms are complex64, eight bytes an element of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.graph.builder import Builder
from peftplan.graph.core import Grad, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import builder
from peftplan.methods._linears import COMMON, ended
from peftplan.methods._spectrum import Spectral
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"scaling", "random_loc_seed", "init_weights"}
FP32, COMPLEX = DType.float32, DType.complex64


@final
@dataclass(frozen=True)
class Fourierft(Spectral):
    """PEFT's FourierFTConfig."""

    bias: Literal["none", "all", "fourier_only"] = "none"
    title: ClassVar[str] = "FourierFT"
    prefix: ClassVar[str] = "fourierft"
    returns_input: ClassVar[bool] = True

    def trained_biases(self) -> str:
        return self.bias

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        b, base = builder(module, host)
        with b.marked(module.site, "down"):
            spectrum = self.spectrum(b, module, size, host)
            delta = _delta(b, spectrum, module.out_features, module.in_features)
            x = b.cast(module.x, delta.dtype, label="fourierft_x")
            change = b.linear(x, delta, label="delta_out")
        with b.marked(module.site, "extra"):
            out = b.cast(b.add(base, change, label="sum"), module.x.dtype, label="out")
            b.hold(delta, x, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))


def _delta(b: Builder, spectrum: Tensor, rows: int, columns: int) -> Tensor:
    """get_delta_weight: ifft2 of the coefficients at their places, its real part. Their gradient stays complex until
    it is read at their places again."""
    given = b.cast(spectrum, FP32, label="spectrum32")
    zeros = b.plain("dense", rows, columns, dtype=FP32)
    dense = Tensor("", zeros.shape, COMPLEX, base=zeros.storage)
    dense = b.formula("placed", dense, zeros, given, grads=(Grad(given, given.logical_bytes),))
    wide = b.formula("complex", Tensor("", zeros.shape, COMPLEX), dense, grads=(Grad(dense, 0),))
    turned = b.formula("ifft2", wide, wide, grads=(Grad(wide, wide.nbytes),))
    real = Tensor("", zeros.shape, FP32, base=turned.storage)
    real = b.formula("real", real, turned, grads=(Grad(turned, turned.nbytes),))
    delta = b.scale(real, label="delta")
    b.hold(zeros)
    return b.cast(delta, spectrum.dtype, label="delta_cast")


METHOD = Fourierft
EXAMPLES = (Fourierft(n_frequency=100), Fourierft(n_frequency=20, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
