"""A case's weights as its layout spreads them: what a rank holds of each, and what a step gathers and reduces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from peftplan.assemble import Trainees, build_graph, trainees
from peftplan.errors import Unsupported
from peftplan.graph.core import ADAPTER, Graph, Region, Tensor, is_global
from peftplan.layouts import Layout
from peftplan.layouts.units import Before, Message, Piece, Style, Unit
from peftplan.optimizers.base import Trained
from peftplan.resolve import Case, held_case
from peftplan.step.conductor import Place, Sharding
from peftplan.step.load import Load, Weight
from peftplan.step.segments import Loop
from peftplan.units import DType, ceil_div

BEFORE: dict[bool, Before] = {False: "none", True: "whole"}


class Held(NamedTuple):
    """What a rank keeps of one parameter, in each of so many layers."""

    piece: Piece
    kind: str
    sizes: Sequence[int]
    times: int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The weights of a case by units, and the style that holds them."""

    style: Style
    layout: Layout
    units: dict[Place, Unit]
    counts: dict[str, int]
    """How many equal units of each name there are."""
    root: Unit
    kinds: dict[str, str]
    trainees: Trainees
    """What its optimizer steps over."""

    @property
    def held(self) -> list[Held]:
        """Every parameter, as the fullest rank keeps it."""
        return [Held(p, self.kinds[p.name], self._sizes(p), count) for unit, count in self.counted for p in unit.pieces]

    def _sizes(self, p: Piece) -> Sequence[int]:
        own = (p.numel * p.held.size,) if p.whole else self.style.held_bytes(p, self.layout)
        return (*own, p.beside_bytes) if p.beside_bytes else own

    def load(self, graph: Graph) -> Load:
        """The shards as they lie on the device, each made there: how the whole model came there is not replayed."""
        base = [s for one in self.held if one.kind != ADAPTER for s in [*one.sizes] * one.times]
        adapters = [s for one in self.held if one.kind == ADAPTER for s in [*one.sizes] * one.times]
        return Load(
            weights=[Weight(arrives_bytes=size, expected_bytes=size) for size in base],
            modules=range(len(base)),
            adapters=adapters,
            buffers=[t.nbytes for t in graph.buffers],
        )

    @property
    def counted(self) -> list[tuple[Unit, int]]:
        """Every unit in the order of the model, the root last, with how many equal ones there are."""
        return [*((unit, self.counts[unit.name]) for unit in self.units.values()), (self.root, 1)]

    @property
    def buffers(self) -> Sequence[int]:
        return self.style.buffers(self.counted, self.layout)

    def messages(self, *, micro_batches: int) -> Sequence[Message]:
        """What a rank sends and is sent in an optimizer step."""
        backwards = any(p.trainable for unit, _ in self.counted for p in unit.pieces)
        return self.style.messages(self.counted, self.layout, micro_batches=micro_batches, backwards=backwards)

    def sharding(self, before: Before) -> Sharding | None:
        """For walks of the step; None where it runs as on one GPU."""
        if not self.style.shards_weights:
            return None
        schedule = partial(self.style.schedule, self.counted, self.layout, adds=before == "shards")
        return Sharding(
            schedule=schedule,
            units=self.units,
            root=self.root,
            accumulated=before == "whole",
            hooks_reruns=self.style.hooks_reruns,
        )

    def gradients_before(self, loop: Loop) -> Before:
        """What is there of gradients when the last micro-batch begins."""
        return self.style.before(accumulates=loop.grads_exist)

    def gradients(self, before: Before) -> Iterator[int]:
        """Bytes of each gradient that a rank has: of whole parameters, or of its shards."""
        for unit, count in self.counted:
            for p in unit.pieces:
                whole = before == "whole"
                size = p.numel * p.gathered.size if whole else self.style.kept_bytes(p, self.layout)
                yield from [size] * (count * p.trainable)


def spread(case: Case, graph: Graph) -> Spread | None:
    """None where one GPU holds everything."""
    style, layout = case.style, case.layout
    if style is None or layout.dp == 1:
        return None
    own = held_case(case)
    held = graph if own is case else build_graph(own)
    return _Maker(own, style).spread(graph, held, _trainees(own, held, style))


def _trainees(case: Case, held: Graph, style: Style) -> Trainees:
    """What the fullest rank's optimizer steps over."""
    train = trainees(case, held)

    def own(weights: list[Trained]) -> list[Trained]:
        return [_shard(w, case, style) for w in weights]

    weights = own(train.weights)
    stepped = weights if train.stepped is train.weights else own(train.stepped)
    known = weights if train.remembered is train.weights else own(train.remembered)
    if style.masters is not None and any(w.dtype.is_half for w in weights):
        weights = [Trained((sum(w.numel * w.copies for w in weights),), weights[0].dtype, name="flat")]
        stepped = known = [w._replace(dtype=style.masters) for w in weights]
    return train._replace(weights=weights, stepped=stepped, remembered=known)


def _shard(w: Trained, case: Case, style: Style) -> Trained:
    dtype = DType.float32 if case.upcasts and w.dtype.is_half else w.dtype
    piece = Piece(w.name, w.shape, dtype, dtype, trainable=True)
    return w._replace(shape=style.stepped(piece, case.layout), dtype=dtype)


class _Maker:
    def __init__(self, case: Case, style: Style) -> None:
        self.case, self.style = case, style
        self.kinds: dict[str, str] = {}
        self.root: list[Piece] = []
        self.ends: dict[str, list[Piece]] = {}
        self.seen: set[str] = set()

    def spread(self, graph: Graph, held: Graph, train: Trainees) -> Spread:
        units: dict[Place, Unit] = {}
        counts: dict[str, int] = {}
        for number, (region, other) in enumerate(zip(graph.regions, held.regions, strict=True)):
            types = {t.name: t for t in other.owned()}
            own: list[Piece] = []
            for t in region.owned():
                piece = self._piece(region, number, t, types.get(t.name, t))
                if not is_global(t.name):
                    own.append(piece)
                elif t.name not in self.seen:
                    self.seen.add(t.name)
                    self.root.append(piece)
            if region.first_index is None:
                self.root.extend(own)
                continue
            unit = self._unit(f"layer {region.first_index}", own, is_layer=True)
            units[region.name, region.first_index] = unit
            counts[unit.name] = region.count
        self.root.extend(self._piece(None, 0, t, t) for t in graph.unused)
        return Spread(
            style=self.style,
            layout=self.case.layout,
            units=units,
            counts=counts,
            root=self._unit("root", self.root, is_layer=False),
            kinds=self.kinds,
            trainees=train,
        )

    def _unit(self, name: str, pieces: list[Piece], *, is_layer: bool) -> Unit:
        made = self.style.regrouped(Unit(name, tuple(pieces), is_layer))
        trained = next((self.kinds[p.name] for p in pieces if p.trainable), "weight")
        for p in made.pieces:
            self.kinds.setdefault(p.name, trained if p.trainable else "weight")
        return made

    def _piece(self, region: Region | None, number: int, t: Tensor, held: Tensor) -> Piece:
        name = t.name if is_global(t.name) or region is None else f"{number}.{t.name}"
        self.kinds[name] = ADAPTER if t.kind == ADAPTER else "weight"
        if t.stored_bytes is not None:
            return self._packed(name, t)
        dtype = held.dtype
        if t.trainable and self.case.upcasts and dtype.is_half:
            dtype = DType.float32
        return Piece(name, t.shape, dtype, t.dtype, trainable=t.trainable)

    def _packed(self, name: str, t: Tensor) -> Piece:
        """Packed weights are a column of their storage's elements; their constants lie beside them."""
        storage = self.case.format.storage(self.case.compute)
        packed = self.case.format.sharded_bytes(t)
        assert t.stored_bytes is not None
        if self.style.shards_weights and storage is None:
            raise Unsupported(
                f"--format {self.case.job.format}: its weights cannot be sharded; use nf4 or fp4, or --layout ddp"
            )
        storage = storage or DType.uint8
        column = (ceil_div(packed, storage.size), 1)
        return Piece(
            name, column, storage, storage,
            trainable=False,
            beside_bytes=t.stored_bytes - column[0] * storage.size,
            whole=self.style.shards_weights and not storage.is_float,
        )  # fmt: skip
