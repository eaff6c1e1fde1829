"""Where a candidate may run: every card of the job's list, alone and in the numbers and layouts that are modelled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from peftplan.errors import RequestError
from peftplan.hardware import Gpu, find_gpu, hourly_usd
from peftplan.hardware.common import common_gpus
from peftplan.job import Assumption, Job
from peftplan.resolve import resolve

LAYOUTS = ("ddp", "fsdp")
"""Asked for, one by one, where the job names none."""
Cards = tuple[int, int, str | None]
"""GPUs of a node, nodes, layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """Cards and how they share the work."""

    gpu: Gpu
    gpus: int = 1
    nodes: int = 1
    layout: str | None = None
    effort: int = 0

    @property
    def cards(self) -> int:
        return self.gpus * self.nodes


def make_seats(cards: Sequence[Gpu], shared: Iterable[Cards]) -> tuple[Seat, ...]:
    """Every card alone, then with every count and layout."""
    alone = [Seat(gpu=gpu) for gpu in cards]
    several = [
        Seat(gpu=gpu, gpus=gpus, nodes=nodes, layout=layout, effort=step)
        for gpu, (step, (gpus, nodes, layout)) in product(cards, enumerate(shared, 1))
    ]
    return (*alone, *several)


def notes(job: Job, cards: Sequence[Gpu], refused: str | None) -> Iterator[Assumption]:
    """What was decided about cards that the job leaves open."""
    if job.gpu is None:
        names = tuple(gpu.name for gpu in cards)
        yield Assumption(what="gpu", value=names, why="no GPU named: the common ones that the price catalog holds")
    if refused is not None:
        why = f"only single GPUs are modelled of the {job.gpus * job.nodes} offered: {refused}"
        yield Assumption(what="gpus", value=1, why=why)


def named_gpus(text: str | None) -> tuple[Gpu, ...]:
    """The cards of a list like `rtx-4090,l40s`; without one, the common cards that have a price."""
    if text is None:
        return tuple(gpu for gpu in common_gpus().values() if hourly_usd(gpu) is not None)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise RequestError("--gpu names no GPU; give one or more, such as rtx-4090,l40s")
    return tuple({gpu.name: gpu for gpu in map(find_gpu, names)}.values())


def layouts(job: Job) -> tuple[list[Cards], str | None]:
    """How several cards up to the job's may share the work, as far as it is modelled; and why not, where none is."""
    counts = sorted({min(2**i, job.gpus) for i in range(job.gpus.bit_length() + 1)})
    pairs = [(gpus, 1) for gpus in counts if gpus > 1]
    if job.nodes > 1:
        pairs.append((job.gpus, job.nodes))
    names = (job.layout,) if job.layout is not None else LAYOUTS
    asked: list[Cards] = [(gpus, nodes, name) for gpus, nodes in pairs for name in names]
    refusals = [_refusal(job, *one) for one in asked]
    found = [one for one, why in zip(asked, refusals, strict=True) if why is None]
    return found, refusals[0] if refusals and not found else None


def _refusal(job: Job, gpus: int, nodes: int, layout: str | None) -> str | None:
    """Why several cards are not modelled so, or None where they are."""
    try:
        resolve(job.model_copy(update={"gpu": None, "gpus": gpus, "nodes": nodes, "layout": layout}))
    except RequestError as error:
        return str(error)
    return None
