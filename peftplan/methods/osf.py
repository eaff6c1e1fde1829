"""OSF: the smaller singular directions of each weight train, apart from the larger (arXiv:2504.07097).

Trains: (min(in, out) - effective_rank) (in + out + 1) per adapted linear layer; plus copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, twice the trained rank a token, and both factors of the
change. Beside the weights lie the factors as they began, and the larger directions of the longer side.
Not modelled: embeddings, packed bases (PEFT fails on them).
Mirrors peft/tuners/osf/layer.py Linear.forward and _attach_hooks, peft 0.21.2. Hooks take out of the
gradients of both factors, as they arrive, what lies in the larger directions; where PEFT raises half-precision adapters
to float32 it makes new parameters, and the hooks are gone. Of a float32 weight, the singular values and V are each one
storage for both their parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from re import search
from typing import ClassVar, NamedTuple, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, builder
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Family, Host
from peftplan.methods.targets import ALL_LINEAR, Names, check_pattern

HARMLESS = COMMON | {"init_weights", "target_svd_config"}
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")


class Ranks(NamedTuple):
    """Of one weight: how many directions stay, how many train, and its sides."""

    high: int
    low: int
    out: int
    wide: int


@final
@dataclass(frozen=True)
class Osf(OnLinears):
    """PEFT's OSFConfig."""

    effective_rank: int | float | None = None
    rank_pattern: Mapping[str, int | float] = field(default_factory=dict)
    family: ClassVar[Family] = "selective"
    title: ClassVar[str] = "OSF"
    reads_weight: ClassVar[bool] = True
    no_4bit: ClassVar[str] = "PEFT factors the packed integers themselves, and integers cannot train"
    no_8bit: ClassVar[str] = no_4bit
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform")
    defaults: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(
        ("llama", "mistral", "mixtral", "gemma", "qwen2", "qwen3"), SEVEN
    )

    def default_targets(self, family: str) -> Names:
        return self.defaults.get(family, ALL_LINEAR)

    def check(self) -> None:
        for pattern in self.rank_pattern:
            check_pattern("method.rank_pattern", pattern)

    def size(self, path: str) -> int:
        """Which row of `rank_pattern` sets the rank, from 1; 0 where none does."""
        return next((n for n, pattern in enumerate(self.rank_pattern, 1) if search(pattern, path)), 0)

    def _ranks(self, module: Module, size: int) -> Ranks:
        out, wide = module.weight.shape
        whole = min(out, wide)
        asked = list(self.rank_pattern.values())[size - 1] if size else self.effective_rank
        if asked is None:
            high = whole // 2
        else:
            high = int(whole * asked) if isinstance(asked, float) and 0 < asked <= 1 else int(asked)
        if not 0 < high < whole:
            raise RequestError(
                f"method.effective_rank={asked}: of {module.path}, 1 to {whole - 1} directions can be left as they are"
            )
        return Ranks(high, whole - high, out, wide)

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        ranks = [self._ranks(c.module, c.size) for c in chosen]
        kept = sum(r.low * (r.out + r.wide + 1) for r in ranks)
        high = sum(r.high * r.out for r in ranks if r.out > r.wide)
        if host.base_dtype.is_half:
            high += sum(r.high * r.wide for r in ranks if r.wide > r.out)
        return tuple(
            Tensor(f"@osf_{n}", (count,), host.new_dtype, BUFFER) for n, count in (("init", kept), ("high", high))
        )

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        b, base = builder(module, host)
        ranks = self._ranks(module, size)
        with b.marked(module.site, "down"):
            a, c = self._factors(b, ranks, host)
            x = b.cast(module.x, a.dtype, label="osf_x")
            down = b.linear(x, c, label="osf_down")
        with b.marked(module.site, "up"):
            change = b.linear(down, a, label="osf_up")
        with b.marked(module.site, "extra"):
            out = b.add(base, b.cast(change, module.x.dtype, label="change"), label="out")
            b.hold(a, c, x, down, change, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def _factors(self, b: Builder, ranks: Ranks, host: Host) -> tuple[Tensor, Tensor]:
        """[U S, -U0 S0] and [V; V0]."""
        dtype, r = host.new_dtype, ranks.low
        s, u, v = (
            b.weight(f"osf_{n}_low", *shape, dtype=dtype, kind=ADAPTER)
            for n, shape in (("S", (r,)), ("U", (ranks.out, r)), ("V", (r, ranks.wide)))
        )
        if not host.base_dtype.is_half:
            s, v = (t._replace(stored_bytes=t.nbytes // r * (ranks.high + r)) for t in (s, v))
        first = Tensor("@osf_init", (ranks.out, r), dtype, BUFFER)
        b.hold(s, u, v)
        if not host.base_dtype.is_half or dtype.is_half:
            u = _projected(b, u, ranks.high, square=ranks.out <= ranks.wide)
        now = b.mul(u, s.view(1, r), label="US")
        before = b.scale(b.mul(first, first.view(1, r), label="US_init"), label="minus_US_init")
        a = b.concat((now, before), ranks.out, 2 * r, label="osf_A")
        if not host.base_dtype.is_half or dtype.is_half:
            v = _projected(b, v, ranks.high, square=ranks.out >= ranks.wide)
        return a, b.concat((v, first.view(r, ranks.wide)), 2 * r, ranks.wide, label="osf_B")


def _projected(b: Builder, factor: Tensor, high: int, *, square: bool) -> Tensor:
    """The hook on a factor: two products with the directions that stay, taken off; or, where U or V is square, with
    those that train."""
    low = min(factor.shape)
    inner = low if square else high
    kept = low * low * factor.dtype.size if square else factor.logical_bytes
    return b.hooked(factor, flops=4 * factor.numel * inner, temporary_bytes=kept)


METHOD = Osf
EXAMPLES = (Osf(), Osf(effective_rank=0.75, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
