"""AdapterFusion: attention over several frozen adapters in each layer (Pfeiffer 2021, arXiv:2005.00247, section 3.2).

Trains: per place of adapters a query, a key and a value matrix as wide as the hidden states; the adapters, Pfeiffer's,
stay as they were trained before.
Keeps for backward: what every adapter gives, twice over, for keys and values; queries, keys, values and weights.
Not modelled: `residual_before`, parallel adapters, layers left out, dropout in the adapters; the penalty on the value
matrices, which AdapterTrainer takes through a backward of its own once the step's is done, when there is room.
Mirrors adapters/methods/bottleneck.py compose_fuse and adapters/methods/modeling.py BertFusion, adapters 1.3.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Tensor
from peftplan.methods._adapterhub import COMMON, hooked
from peftplan.methods._bottleneck import Bottleneck, Inside
from peftplan.methods._branches import check_share
from peftplan.methods.base import Host

HARMLESS = COMMON | {"regularization", "temperature", "value_initialized"}
VARIANTS: dict[str, dict[str, Any]] = {"adapter_fusion": {}, "fusion": {}}


@final
@dataclass(frozen=True)
class AdapterFusion(Bottleneck):
    """adapters' DynamicAdapterFusionConfig over `num_adapters` adapters of SeqBnConfig."""

    num_adapters: int = 3
    query: bool = True
    key: bool = True
    value: bool = True
    query_before_ln: bool = False
    residual_before: bool = False
    value_before_softmax: bool = True
    dropout_prob: float = 0.0
    original_ln_before: bool = True
    base_config: ClassVar[str] = "seq_bn"
    adapters_train: ClassVar[bool] = False
    fused: ClassVar[tuple[str, ...]] = (
        "query", "key", "value", "query_before_ln", "residual_before", "value_before_softmax", "dropout_prob",
        *sorted(HARMLESS - COMMON),
    )  # fmt: skip

    def check(self, host: Host) -> None:
        super().check(host)
        check_share("dropout_prob", self.dropout_prob)
        if self.num_adapters < 2:
            raise RequestError(f"method.num_adapters={self.num_adapters}: fusion needs at least 2")
        if not (self.query or self.key or self.value):
            raise RequestError("method.query, key and value are all false: nothing trains; leave one of them in")
        for knob in ("residual_before", "is_parallel", "leave_out", "dropout", "use_gating"):
            if self.knob(knob):
                raise Unsupported(f"method.{knob} with AdapterFusion is not modelled; leave it out")

    def run(self, b: Builder, hidden: Tensor, before: Tensor, inside: Inside) -> Tensor:
        x, residual = self.entered(b, hidden, before)
        query = hidden if self.query_before_ln else x
        pairs = [self.adapter(b, x, residual, inside, name=str(i)) for i in range(self.num_adapters)]
        ups = tuple(up for up, _ in pairs)
        values = b.concat(ups, self.num_adapters, *x.shape, label="stacked")
        with b.scope("adapter_fusion_layer"):
            mixed = self._attended(b, query, values, inside)
            out = _add_into_view(b, mixed, residual)
        b.hold(x, query, values, residual, *ups, *(total for _, total in pairs))
        result = out if hooked(inside.host) or not self.original_ln_after else b.add(out, before, label="sum")
        b.hold(hidden, before, out)
        return result

    def _attended(self, b: Builder, query: Tensor, stacked: Tensor, inside: Inside) -> Tensor:
        """BertFusion.forward up to the residual: every token's query over what the adapters give for it."""
        size, seq, wide = query.shape
        each = (size, seq, self.num_adapters)
        q = self._matrix(b, query, "query", inside, biased=True) if self.query else query
        k = self._matrix(b, self._by_token(b, stacked), "key", inside, biased=True) if self.key else stacked
        before = self.value and self.value_before_softmax
        v = self._matrix(b, self._by_token(b, stacked), "value", inside) if before else stacked
        scores = b.dropout(b.matmul(q, k, *each, inner=wide, label="scores"), self.dropout_prob)
        weights = b.softmax(b.scale(scores), scores.dtype, label="weights")
        mixed = b.matmul(weights, v, size, seq, wide, inner=self.num_adapters, label="mixed")
        context = self._matrix(b, mixed, "value", inside) if self.value and not before else mixed
        b.hold(q, k, v, scores, weights)
        return context

    def _by_token(self, b: Builder, stacked: Tensor) -> Tensor:
        """What the adapters give, token by token: a product with a matrix copies it in that order."""
        count, *rest, wide = stacked.shape
        return b.copy(stacked, *rest, count, wide, label="by_token")

    @staticmethod
    def _matrix(b: Builder, x: Tensor, label: str, inside: Inside, *, biased: bool = False) -> Tensor:
        wide = x.shape[-1]
        weight = b.weight(f"{label}.weight", wide, wide, dtype=inside.dtype, kind=ADAPTER)
        bias = b.weight(f"{label}.bias", wide, dtype=inside.dtype, kind=ADAPTER) if biased else None
        if len(x.shape) == 3 or bias is None:
            return b.linear(x, weight, bias, label=label)
        bias = b.autocast(bias)
        return b.add_into(b.linear(x, weight, label=label), bias, label=f"{label}_biased")


def _add_into_view(b: Builder, context: Tensor, residual: Tensor) -> Tensor:
    """`context += residual` on a view: both gradients are copies (torch/csrc/autograd/functions/tensor.cpp,
    CopySlices::apply)."""
    grads = (Grad(context, context.nbytes), Grad(residual, context.nbytes))
    return b.formula("fused", context._replace(base=context.storage), context, residual, grads=grads)


METHOD = AdapterFusion
EXAMPLES = (AdapterFusion(), AdapterFusion(num_adapters=2, mh_adapter=True, value=False, reduction_factor=6))
UNVERIFIED: dict[str, str] = {}
