"""Compacter: Houlsby adapters whose projections are sums of Kronecker products (Mahabadi 2021, arXiv:2106.04647).

Trains: phm_dim^3 shared by all layers, and per projection phm_rank (in + out) and a bias; compacter++ after the
feed-forward alone.
Keeps for backward: as Houlsby adapters; per projection its weight, the factors' product, and nothing of the phm_dim
products that it is the sum of, which are as many whole weights for a moment.
Not modelled: new layer norms, families without an interface in adapters.
Mirrors adapters/methods/modeling.py PHMLayer and kronecker_product, adapters 1.3.0, which trains the shared matrices
whatever `learn_phm` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Tensor
from peftplan.methods._adapterhub import COMMON
from peftplan.methods._bottleneck import Bottleneck, Factor
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"phm_layer", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity"}
_ONLY_BELOW: dict[str, Any] = {"mh_adapter": False, "original_ln_before": True}
VARIANTS: dict[str, dict[str, Any]] = {"compacter++": _ONLY_BELOW, "compacter_plus_plus": _ONLY_BELOW}


@final
@dataclass(frozen=True)
class Compacter(Bottleneck):
    """adapters' CompacterConfig and CompacterPlusPlusConfig."""

    mh_adapter: bool = True
    reduction_factor: Factor = 32
    non_linearity: str = "gelu"
    phm_dim: int = 4
    phm_rank: int = 1
    phm_bias: bool = True
    factorized_phm_W: bool = True  # noqa: N815
    shared_W_phm: bool = False  # noqa: N815
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    base_config: ClassVar[str] = "compacter"

    def check(self, host: Host) -> None:
        super().check(host)
        if self.phm_dim < 1 or self.phm_rank < 1:
            raise RequestError(f"method.phm_dim={self.phm_dim}, phm_rank={self.phm_rank}: both must be at least 1")
        if self.shared_W_phm and (isinstance(self.reduction_factor, dict) or not self.factorized_phm_W):
            raise RequestError(
                "method.shared_W_phm=true: adapters shares only factors, of one width; leave "
                "factorized_phm_W=false and a reduction_factor per layer out"
            )

    def width(self, hidden: int, index: int) -> int:
        width = super().width(hidden, index)
        for size in (hidden, width):
            if size % self.phm_dim:
                raise RequestError(
                    f"method.phm_dim={self.phm_dim} divides {hidden} and {width} not both: change reduction_factor; "
                    f"a bottleneck of a multiple of {self.phm_dim} fits"
                )
        return width

    def project(self, b: Builder, x: Tensor, width: int, label: str, dtype: DType) -> Tensor:
        """PHMLayer.forward."""
        wide = x.shape[-1]
        with b.scope(label):
            product = self._weight(b, wide, width, label, dtype)
            rule = self._rule(b, dtype)
            whole = b.kron(rule, product, self.phm_dim, wide, width)
            total = Tensor("", (width, wide), whole.dtype)
            weight = b.formula("sum", total, whole, grads=(Grad(whole, 0),))
            y = b.linear(x, weight, label="product")
            if self.phm_bias:
                y = b.add_into(y, b.weight("b", width, dtype=dtype, kind=ADAPTER))
            b.hold(product, weight, rule)
        return y

    def _rule(self, b: Builder, dtype: DType) -> Tensor:
        n = self.phm_dim
        at = "@phm_rule" if self.shared_phm_rule else "phm_rule"
        if not self.factorized_phm_rule:
            return self._own_or_shared(b, at, (n, n, n), dtype)
        left = self._own_or_shared(b, f"{at}_left", (n, n, 1), dtype)
        right = self._own_or_shared(b, f"{at}_right", (n, 1, n), dtype)
        return b.matmul(left, right, n, n, n, inner=1, label="rule")

    def _weight(self, b: Builder, wide: int, width: int, label: str, dtype: DType) -> Tensor:
        n, rank = self.phm_dim, self.phm_rank
        at = f"@W_{'down' if label.startswith('adapter_down') else 'up'}" if self.shared_W_phm else "W"
        if not self.factorized_phm_W:
            return self._own_or_shared(b, at, (n, wide // n, width // n), dtype)
        left = self._own_or_shared(b, f"{at}_left", (n, wide // n, rank), dtype)
        right = self._own_or_shared(b, f"{at}_right", (n, rank, width // n), dtype)
        return b.matmul(left, right, n, wide // n, width // n, inner=rank, label="W")

    @staticmethod
    def _own_or_shared(b: Builder, label: str, shape: tuple[int, ...], dtype: DType) -> Tensor:
        own = b.weight(label, *shape, dtype=dtype, kind=ADAPTER)
        return own._replace(name=label) if label.startswith("@") else own


METHOD = Compacter
EXAMPLES = (
    Compacter(reduction_factor=4),
    Compacter(reduction_factor=2, phm_dim=2, phm_rank=3, factorized_phm_rule=True),
)
UNVERIFIED: dict[str, str] = {}
