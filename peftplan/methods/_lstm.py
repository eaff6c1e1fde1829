"""torch.nn.LSTM in both directions over one sequence, as P-tuning's encoder has it.

Mirrors aten/src/ATen/native/RNN.cpp, torch 2.13: on the CPU one oneDNN layer per direction (mkldnn/RNN.cpp); on CUDA
one cuDNN call for all of it (cudnn/RNN.cpp), under autocast with half-precision copies of its weights
(autocast_mode.cpp, _cudnn_rnn_cast_reflatten).
What cuDNN asks for is not documented. It is read off what it answered on a P100 for one LSTM and one GRU of four layers
(pytorch/pytorch issue 2895, 2017-10-04: 17,730,560 and 736,000,000 bytes): its workspace holds a copy of the weights,
and six values per step and unit stay for backward, the last layer's outputs aside.
FLOPs are those of torch.utils.flop_counter, which has no formula for either: none.
Not modelled: oneDNN's workspace, the state of cuDNN's dropout (both err low).
"""

from __future__ import annotations

from dataclasses import dataclass

from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Tensor
from peftplan.graph.ops import internal
from peftplan.units import DType

FP32 = DType.float32
KEPT_BY_CUDNN = 6
"""Values per step and unit: four gates, the cell, the output."""
WORKED_BY_CUDNN = 11
"""Values per layer and unit of a sequence, beside the copy of the weights: three a gate, less one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lstm:
    """Its shape, and where its weights are."""

    path: str
    inner: int
    layers: int
    dropout: float

    def forward(self, b: Builder, x: Tensor) -> Tensor:
        """(1, T, i) -> (1, T, 2 x inner)."""
        before = tuple(b.plain(f"lstm_{n}", 2 * self.layers, 1, self.inner, dtype=FP32) for n in ("h0", "c0"))
        run = self._onednn if b.numerics.backend == "cpu" else self._cudnn
        out = run(b, x, before)
        last = [b.plain(f"lstm_{n}", 2 * self.layers, 1, self.inner, dtype=out.dtype, ins=(out,)) for n in ("hn", "cn")]
        b.hold(*before, *last)
        return out

    def _weights(self, layer: int, wide: int) -> list[tuple[Tensor, ...]]:
        """Of each direction: to the gates from the input and from the output before, and their biases."""
        rows = 4 * self.inner
        shapes = (
            ("weight_ih", (rows, wide)),
            ("weight_hh", (rows, self.inner)),
            ("bias_ih", (rows,)),
            ("bias_hh", (rows,)),
        )
        return [
            tuple(Tensor(f"@{self.path}.{name}_l{layer}{end}", shape, FP32, ADAPTER, True) for name, shape in shapes)
            for end in ("", "_reverse")
        ]

    def _onednn(self, b: Builder, x: Tensor, before: tuple[Tensor, ...]) -> Tensor:
        for layer in range(self.layers):
            ways = [self._way(b, x, weights, before) for weights in self._weights(layer, x.shape[-1])]
            x = b.concat(tuple(ways), 1, x.shape[1], 2 * self.inner, label="lstm_layer")
            if layer < self.layers - 1:
                x = b.dropout(x, self.dropout, label="lstm_dropout")
        return x

    def _way(self, b: Builder, x: Tensor, weights: tuple[Tensor, ...], before: tuple[Tensor, ...]) -> Tensor:
        """One direction of one layer; autocast casts its operands from the last to the first."""
        state = (1, 1, self.inner)
        target = b.numerics.autocast
        if target is not None:
            b.hold(*weights)  # in the order in which they are registered
            before = tuple(b.plain("lstm_state", *state, dtype=target, ins=(t,)) for t in before)
            weights = tuple(b.autocast(w) for w in weights[::-1])[::-1]
            x = b.autocast(x)
        name = b.name("lstm_way")
        ends = tuple(internal(name, label, state, x.dtype) for label in ("hy", "cy"))
        grads = [Grad(t, t.numel * FP32.size) for t in (x, *weights)]  # oneDNN makes them in fp32
        grads[-1] = grads[-1]._replace(scratch_bytes=2 * self.inner * x.dtype.size)  # those of the states
        out = Tensor("", (1, x.shape[1], self.inner), x.dtype)
        keeps = (x, *weights, *before, *ends)
        return b.formula("lstm_out", out, x, *weights, *before, keeps=keeps, keeps_out=True, grads=tuple(grads))

    def _cudnn(self, b: Builder, x: Tensor, before: tuple[Tensor, ...]) -> Tensor:
        """The weights are one buffer, and so are their gradients (_cudnn_rnn_backward_weight)."""
        widths = (x.shape[-1], *(2 * self.inner,) * (self.layers - 1))
        weights = tuple(w for i, wide in enumerate(widths) for way in self._weights(i, wide) for w in way)
        flat = b.flattened(weights, label="lstm_flat")
        kept: tuple[Tensor, ...] = ()
        target = b.numerics.autocast
        if target is not None:
            before = tuple(b.plain("lstm_state", *t.shape, dtype=target, ins=(t,)) for t in before)
            flat = b.cast(flat, target, label="lstm_half")
            x = b.cast(x, target, label="lstm_x")
            kept = (flat,)
        tokens = x.shape[1]
        units = 2 * self.inner
        reserve = internal(b.name("lstm"), "reserve", (tokens, (KEPT_BY_CUDNN * self.layers - 1) * units), x.dtype)
        matrices = sum(w.numel for w in weights if len(w.shape) > 1)
        work = (matrices + WORKED_BY_CUDNN * self.layers * units) * x.dtype.size
        out = Tensor("", (1, tokens, units), x.dtype)
        grads = tuple(Grad(t, t.logical_bytes, work) for t in (x, flat))
        keeps = (x, *kept, *before, reserve)
        return b.formula(
            "lstm_out", out, x, flat, *before, keeps=keeps, keeps_out=True, grads=grads, temporary_bytes=work
        )
