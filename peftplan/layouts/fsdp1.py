"""FSDP1 (torch.distributed.fsdp.FullyShardedDataParallel; Zhao 2023, arXiv:2304.11277): the parameters of a unit are
one flat tensor, of which a rank holds its part.

Mirrors torch 2.13, torch/distributed/fsdp/_flat_param.py and _runtime_utils.py, with `use_orig_params` as accelerate
sets it. A flat parameter is padded so that every parameter starts at 16 bytes and the ranks' parts are equal. Gathering
casts the part to `param_dtype`, gathers straight into the whole flat tensor, and drops the cast; in backward the unit
that ran before is gathered ahead, whole (BACKWARD_PRE). The root stays gathered from before its forward to the end of
backward. The gradients of a unit's parameters meet in one flat tensor (the backward of torch.split), for which all of
them are there; the whole parameters go, it is cast to `reduce_dtype`, padded, reduced to a part, and goes at once.

Parameters are wrapped as transformers and PEFT do it (transformers' layers, and with them
peft.utils.other.fsdp_auto_wrap_policy: every trainable leaf is a unit of its own): frozen parameters of a layer are one
flat tensor, each trainable one of a method another. A layer's units are gathered together here, where really each leaf
is when it runs: errs high by a layer's adapters. PEFT's layers look at an adapter's dtype before that leaf is gathered,
so they cast to the one it is held in, and the leaf casts back. Everything in one flat tensor has one dtype, so packed
weights need a floating `format.quant_storage`, the compute dtype.

Hooks are made where gradients are on (_register_pre_backward_hooks, _register_post_backward_reshard_only_hook): under
reentrant checkpoints only when a layer runs again in backward. So nothing is gathered ahead for such a layer, which has
not asked for it yet (_needs_pre_backward_unshard). And a unit of frozen weights is let go by a hook on the gradients of
its inputs, which holds the nodes that accumulate them and is removed when all of backward is done (_finalize_params):
an input is a leaf then, so it and its gradient stay to the end of backward, two hidden states a layer (seen in torch
2.13, and in peaks of foundation-model-stack/fms-acceleration, torch 2.4).

Not modelled: forward prefetching, `limit_all_gathers` (which bounds what the allocator reserves, not what is
allocated), CPU offload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from peftplan.errors import RequestError
from peftplan.layouts._sharded import Sharded
from peftplan.layouts.base import Layout
from peftplan.layouts.units import Ledger, Piece, Schedule, Unit, Whole
from peftplan.units import ceil_div

_CAST, _FLAT = "@@gather/cast", "@@flat gradient"
_REDUCED, _PADDED, _PART = "@@reduce/cast", "@@reduce/padded", "@@reduce/part"
_ALIGNED_BYTES = 16
"""_flat_param.py, _get_aligned_numel."""


@final
@dataclass(frozen=True)
class Fsdp1(Sharded):
    gathers_new = False
    hooks_reruns = True

    backward_prefetch: Literal["BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"] = "BACKWARD_PRE"

    def regrouped(self, unit: Unit) -> Unit:
        """Frozen parameters as one flat tensor; those that train as one too, unless there are both: then each."""
        frozen = [p for p in unit.pieces if not p.trainable]
        trained = [p for p in unit.pieces if p.trainable]
        flats = [_flat(f"{unit.name} frozen", frozen)] if frozen else []
        if frozen:
            flats += [_flat(p.name, [p]) for p in trained]
        elif trained:
            flats.append(_flat(f"{unit.name} trained", trained))
        return unit._replace(pieces=tuple(flats))

    def shard(self, piece: Piece, layout: Layout) -> tuple[int, ...]:
        return (ceil_div(piece.numel, layout.shards),)

    def schedule(self, units: Sequence[tuple[Unit, int]], layout: Layout, *, adds: bool) -> Schedule:
        return _Run(self, units[-1][0], layout, adds=adds)


def _flat(name: str, pieces: Sequence[Piece]) -> Piece:
    """One flat parameter. Raises RequestError where dtypes differ, as FlatParamHandle does."""
    dtypes = {p.held for p in pieces}
    first = pieces[0]
    if len(dtypes) > 1 or not first.held.is_float:
        names = " and ".join(sorted(d.label for d in dtypes))
        raise RequestError(
            f"--layout fsdp1: {name} weights are {names}, and a flat parameter has one floating dtype; use --layout "
            "fsdp2, or with packed weights format.prepare=false and format.quant_storage of the compute dtype"
        )
    aligned = max(1, _ALIGNED_BYTES // first.gathered.size)
    *others, last = pieces
    numel = sum(ceil_div(p.numel, aligned) * aligned for p in others) + last.numel
    return first._replace(
        name=name, shape=(numel,), trainable=first.trainable, beside_bytes=sum(p.beside_bytes for p in pieces)
    )


class _Run(Schedule):
    def __init__(self, style: Fsdp1, root: Unit, layout: Layout, *, adds: bool) -> None:
        self.style, self.root, self.layout, self.adds = style, root, layout, adds
        self.whole: set[str] = set()
        """Units whose parameters are gathered."""
        self.late: list[tuple[Unit, Whole]] = []

    # -- gathering ----------------------------------------------------------------------------------------------

    def _unshard(self, unit: Unit, ledger: Ledger) -> None:
        for p in unit.pieces:
            size = self.style.whole_bytes(p, self.layout, p.gathered)
            cast = size // self.layout.shards if p.held is not p.gathered else 0
            if cast:
                ledger.alloc(cast, "all_gather", _CAST)
            ledger.alloc(size, "all_gather", _weights(unit))
            if cast:
                ledger.free(cast, _CAST)

    def _reshard(self, unit: Unit, ledger: Ledger) -> None:
        for p in unit.pieces:
            ledger.free(self.style.whole_bytes(p, self.layout, p.gathered), _weights(unit))

    def begin(self, ledger: Ledger) -> None:
        self._unshard(self.root, ledger)

    def enter(self, unit: Unit, ledger: Ledger) -> None:
        self._unshard(unit, ledger)

    def leave(self, unit: Unit, ledger: Ledger) -> None:
        if self.style.reshard_after_forward:
            self._reshard(unit, ledger)
        else:
            self.whole.add(unit.name)

    # -- backward -----------------------------------------------------------------------------------------------

    def _prefetch(self, unit: Unit | None, ledger: Ledger) -> None:
        if unit is not None and unit.name not in self.whole:
            self._unshard(unit, ledger)
            self.whole.add(unit.name)

    def begin_backward(self, last: Unit, ledger: Ledger) -> None:
        if self.style.backward_prefetch == "BACKWARD_PRE":
            self._prefetch(last, ledger)

    def enter_backward(self, unit: Unit, before: Unit | None, ledger: Ledger) -> None:
        if unit.name not in self.whole:
            self._unshard(unit, ledger)
        if self.style.reshard_after_forward:
            self.whole.discard(unit.name)
        if self.style.backward_prefetch == "BACKWARD_PRE":
            self._prefetch(before, ledger)

    def leave_backward(self, unit: Unit, gradients: Whole, ledger: Ledger, *, late: bool) -> None:
        if late:
            self.late.append((unit, gradients))
        else:
            self._finish(unit, gradients, ledger)
            if self.style.backward_prefetch == "BACKWARD_POST":
                self.whole.discard(unit.name)

    def _finish(self, unit: Unit, gradients: Whole, ledger: Ledger) -> None:
        trained = [p for p in unit.pieces if p.trainable]
        style, layout = self.style, self.layout
        several = len(gradients) > len(trained)
        flats = [p.numel * p.gathered.size for p in trained]
        if several:  # torch.split's backward puts them together
            for size in flats:
                ledger.alloc(size, "flat gradient", _FLAT)
            ledger.drop(gradients)
        self._reshard(unit, ledger)
        for p, flat in zip(trained, flats, strict=True):
            self._reduce(p, layout, ledger)
            if several:
                ledger.free(flat, _FLAT)
            part = style.held_bytes(p, layout)[0]
            if not self.adds:
                ledger.keep([part])
        if not several:
            ledger.drop(gradients)

    def _reduce(self, p: Piece, layout: Layout, ledger: Ledger) -> None:
        """The flat gradient in the dtype and size that it is reduced in, and the part that comes of it; the last cast
        of the part is what is kept."""
        dtype, numel = self.style.reduced(p), layout.shards * ceil_div(p.numel, layout.shards)
        cast = p.numel * dtype.size if dtype is not p.gathered else 0
        padded = numel * dtype.size if numel > p.numel else 0
        part = numel // layout.shards * dtype.size if dtype is not p.held else 0
        for size, key in ((cast, _REDUCED), (padded, _PADDED), (part, _PART)):
            if size:
                ledger.alloc(size, "reduce_scatter", key)
        for size, key in ((cast, _REDUCED), (padded, _PADDED), (part, _PART)):
            if size:
                ledger.free(size, key)

    def end_backward(self, gradients: Whole, ledger: Ledger) -> None:
        self._finish(self.root, gradients, ledger)
        for unit, its in self.late:
            self._finish(unit, its, ledger)


def _weights(unit: Unit) -> str:
    return f"@@gather/{unit.name} weights"
