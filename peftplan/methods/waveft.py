"""WaveFT: the change of a weight is the inverse wavelet transform of few numbers (arXiv:2505.12532).

Trains: n_frequency numbers per adapted linear layer; plus copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, the whole change of its weight, and the four bands that it
is put together from, as large again; with `use_idwt` false no bands.
Not modelled: embeddings, packed bases (PEFT has none); what cuDNN needs to transform.
Mirrors peft/tuners/waveft/layer.py WaveFTLinear.forward and get_delta_weight, and waverec2d.py, peft 0.21.2. The
coefficients' places are two rows of int64 per layer. One level of the transform is a transposed convolution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Grad, Graph, Need, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, builder, by_pattern, chosen_modules
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"scaling", "random_loc_seed", "init_weights", "bias"}
LENGTHS = {
    **{f"db{n}": 2 * n for n in range(1, 11)},
    **{f"sym{n}": 2 * n for n in range(2, 11)},
    **{f"coif{n}": 6 * n for n in range(1, 5)},
}
"""Length of each wavelet's filter (wavelet.py); constants.py names more, for which there is no filter or, coif5, a
wrong reduction: their forward fails."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruct(Op):
    """conv_transpose2d with stride 2: ins = (bands, filter); keeps both, the filter is frozen."""

    def flops(self) -> int:
        bands, kernel = self.ins
        return 2 * bands.numel * kernel.shape[-1] ** 2

    def grad_flops(self, need: Need) -> int:
        return self.flops() if self.ins[0].name in need else 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return self.ins if self.ins[0].name in need else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        bands = self.ins[0]
        return (Grad(bands, bands.logical_bytes),) if bands.name in need else ()


@final
@dataclass(frozen=True)
class Waveft(OnLinears):
    """PEFT's WaveFTConfig."""

    n_frequency: int = 2592
    wavelet_family: str = "db1"
    use_idwt: bool = True
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    proportional_parameters: bool = False
    title: ClassVar[str] = "WaveFT"

    def check(self) -> None:
        if self.wavelet_family not in LENGTHS:
            raise RequestError(
                f"method.wavelet_family={self.wavelet_family}: PEFT's WaveFT works with {', '.join(LENGTHS)}"
            )

    def size(self, path: str) -> int:
        return by_pattern(path, self.n_frequency, self.n_frequency_pattern)

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

    def buffers(self, chosen: list[Chosen], host: Host) -> tuple[Tensor, ...]:
        del host
        return (Tensor("@waveft_indices", (2, sum(c.size for c in chosen)), DType.int64, BUFFER),)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        if not 0 < size <= module.weight.numel:
            raise RequestError(
                f"method.n_frequency={size}: {module.path} has room for 1 to {module.weight.numel} of them"
            )
        b, base = builder(module, host)
        with b.marked(module.site, "down"):
            spectrum = b.weight("waveft_spectrum", size, dtype=host.new_dtype, kind=ADAPTER)
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
        placed = _put(b, zeros, given, keeps=(valid,))
        whole = b.scale(_reconstructed(b, placed, length), label="scaled")
        for shape in ((out, whole.shape[1]), (out, wide)):
            whole = b.slice(whole, *shape, label="crop") if whole.shape != shape else whole
        b.hold(zeros, places, given)
        return whole


def _dense(b: Builder, spectrum: Tensor, module: Module) -> Tensor:
    """The numbers themselves, at their places."""
    zeros = b.plain("dense", *module.weight.shape, dtype=spectrum.dtype)
    delta = b.scale(_put(b, zeros, spectrum), label="scaled")
    b.hold(zeros)
    return delta


def _put(b: Builder, zeros: Tensor, values: Tensor, keeps: tuple[Tensor, ...] = ()) -> Tensor:
    placed = Tensor("", zeros.shape, zeros.dtype, base=zeros.storage)
    return b.formula("placed", placed, zeros, values, keeps=keeps, grads=(Grad(values, values.logical_bytes),))


def _reconstructed(b: Builder, placed: Tensor, length: int) -> Tensor:
    """waverec2d of one level, less the filter's overhang."""
    (rows, columns), dtype = placed.shape, placed.dtype
    taps = b.plain("taps", 3, length, dtype=dtype)
    outer = b.plain("outer", 4, length, length, dtype=dtype)
    kernel = b.plain("filter", 4, 1, length, length, dtype=dtype, ins=(outer,))
    half, quarter = (rows // 2, columns), (rows // 2, columns // 2)
    bands = tuple(b.slice(b.slice(placed, *half, label="half"), *quarter, label="band") for _ in range(4))
    stacked = b.concat(bands, 1, 4, *quarter, label="bands")
    kernel32, given = b.autocast(kernel), b.autocast(stacked)
    name = b.name("reconstructed")
    whole = Tensor(name, (rows + length - 2, columns + length - 2), given.dtype)
    b.ops.append(Reconstruct(name=name, ins=(given, kernel32), out=whole, part="down"))
    b.hold(taps, kernel, stacked)
    over = length - 2
    for down, right in ((1, 0), (2, 0), (2, 1), (2, 2)) if over else ():
        shape = (rows + over * (1 - down), columns + over * (1 - right))
        whole = b.slice(whole, *shape, label="inner")
    return whole


METHOD = Waveft
EXAMPLES = (Waveft(n_frequency=100), Waveft(n_frequency=20, wavelet_family="db2", target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
