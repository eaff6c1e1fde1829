"""WaveFT: the change of a weight is the inverse wavelet transform of few numbers (arXiv:2505.12532).

Trains: n_frequency numbers per adapted linear layer; plus copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, the whole change of its weight, and the four bands that it
is put together from, as large again; with `use_idwt` false no bands.
Not modelled: embeddings; what cuDNN needs to transform.
Mirrors peft/tuners/waveft/layer.py WaveFTLinear.forward and get_delta_weight, and waverec2d.py, peft 0.21.2. The
coefficients' places are two rows of int64 per layer. One level of the transform is a transposed convolution.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import Grad, Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import builder, chosen_modules
from peftplan.methods._linears import COMMON, ended
from peftplan.methods._spectrum import Spectral
from peftplan.methods._wavelets import LENGTHS, reconstructed
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"scaling", "random_loc_seed", "init_weights", "bias"}


@final
@dataclass(frozen=True)
class Waveft(Spectral):
    """PEFT's WaveFTConfig."""

    n_frequency: int = 2592
    wavelet_family: str = "db1"
    use_idwt: bool = True
    proportional_parameters: bool = False
    title: ClassVar[str] = "WaveFT"
    prefix: ClassVar[str] = "waveft"

    def check(self) -> None:
        if self.wavelet_family not in LENGTHS:
            raise RequestError(
                f"method.wavelet_family={self.wavelet_family}: PEFT's WaveFT works with {', '.join(LENGTHS)}"
            )

    def apply(self, graph: Graph, host: Host) -> Graph:
        """With `proportional_parameters`, every weight has a share of all layers' numbers by its size."""
        if not self.proportional_parameters:
            return super().apply(graph, host)
        sizes = {}
        for chosen, _ in (every := list(chosen_modules(graph, self.planned(graph, host)))):
            sizes[chosen.path] = chosen.weight.numel
        each = len(every) * self.n_frequency / sum(c.module.weight.numel for c in every)
        shares = {re.escape(path): max(1, round(numel * each)) for path, numel in sizes.items()}
        return replace(self, proportional_parameters=False, n_frequency_pattern=shares).apply(graph, host)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        b, base = builder(module, host)
        with b.marked(module.site, "down"):
            spectrum = self.spectrum(b, module, size, host)
            delta = self._waves(b, spectrum, module) if self.use_idwt else _dense(b, spectrum, module)
            x = b.cast(module.x, delta.dtype, label="waveft_x")
            change = b.linear(x, delta, label="delta_out")
        with b.marked(module.site, "extra"):
            out = b.cast(b.add(base, change, label="sum"), module.x.dtype, label="out")
            b.hold(delta, x, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def _waves(self, b: Builder, spectrum: Tensor, module: Module) -> Tensor:
        """get_delta_weight: the numbers at their places in a padded matrix, its quarters as bands, the transform."""
        length, (out, wide) = LENGTHS[self.wavelet_family], module.weight.shape
        rows, columns = (side + length - 2 + side % 2 for side in (out, wide))
        count, dtype = spectrum.numel, spectrum.dtype
        zeros = b.plain("dense", rows, columns, dtype=dtype)
        places = b.plain("places", 2, count, dtype=DType.int64)
        bounds = tuple(b.plain(f"below_{n}", count, dtype=DType.boolean) for n in ("rows", "columns"))
        inside = b.plain("inside", count, dtype=DType.boolean, ins=bounds)
        valid = b.plain("valid_places", 2, count, dtype=DType.int64, ins=(inside,))
        full = spectrum.logical_bytes
        given = b.formula("valid", spectrum, spectrum, keeps=(inside,), grads=(Grad(spectrum, full, full),))
        placed = Tensor("", zeros.shape, dtype, base=zeros.storage)
        placed = b.formula("placed", placed, zeros, given, keeps=(valid,), grads=(Grad(given, full),))
        whole = b.scale(reconstructed(b, placed, length), label="scaled")
        for shape in ((out, whole.shape[1]), (out, wide)):
            whole = b.slice(whole, *shape, label="crop") if whole.shape != shape else whole
        b.hold(zeros, places, given)
        return whole


def _dense(b: Builder, spectrum: Tensor, module: Module) -> Tensor:
    """The numbers themselves, at their places."""
    zeros = b.plain("dense", *module.weight.shape, dtype=spectrum.dtype)
    delta = b.scale(b.put(zeros, spectrum), label="scaled")
    b.hold(zeros)
    return delta


METHOD = Waveft
EXAMPLES = (Waveft(n_frequency=100), Waveft(n_frequency=20, wavelet_family="db2", target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
