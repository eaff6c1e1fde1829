"""What loading a model allocates and frees on the device, weight by weight: it decides what is cached afterwards.

Mirrors transformers 5.23.0, read 2026-11-21: `from_pretrained` with a device_map first allocates and frees one block
of the model's expected size (modeling_utils.py, caching_allocator_warmup, since 4.50), then takes the weights in the
order of their sorted names (core_model_loading.py, convert_and_load_state_dict_in_model). A weight to be quantized
arrives on the device in the model's dtype, is packed there (integrations/bitsandbytes.py, Bnb4bitQuantize.convert) and
freed. Then peft 0.21.2, utils/other.py, prepare_model_for_kbit_training casts what is not packed, one parameter after
another, and empties the cache (since 0.20.0).

Threads: some releases of transformers 5 (5.0.0 is one) also load ahead with up to four threads while they quantize.
That is a race: two equal runs end with different bytes. Here the threads are equally fast and quantizing takes no
time, so full-precision weights pile up behind the largest, the embedding. Errs high where the threads are slower.

Not replayed: a second tensor of a few KiB for each packed bias, in the small pool.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from peftplan.formats.base import Piece

Key = tuple[object, ...]
Event = tuple[Key, int]
"""A tensor's key, and its bytes: positive where it is allocated, negative where it is freed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One weight on its way into the model."""

    arrives_bytes: int
    """In the dtype that the model is loaded in."""
    expected_bytes: int
    """What the warm-up counts for it."""
    pieces: tuple[Piece, ...] = ()
    """What packing it allocates, in order."""
    casts: tuple[int, ...] = ()
    """Bytes after each cast that follows once all weights are there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Loading a model, the whole of it.

    `weights` in the order they arrive; `modules` holds their indices in the order of `model.parameters()`. `warmed`:
    after a block of the model's size; `threads` that load ahead (0: none); `empties` the cache at the end. `adapters`
    are put on afterwards.
    """

    weights: Sequence[Weight]
    modules: Sequence[int]
    adapters: Sequence[int]
    buffers: Sequence[int] = ()
    """What lies beside the weights, a method's above all; put on with the adapters."""
    warmed: bool = False
    threads: int = 0
    empties: bool = False

    def events(self) -> Iterator[Event]:
        """Every allocation and every free up to where the cache may be emptied."""
        if self.warmed:
            total = sum(w.expected_bytes for w in self.weights)
            yield ("warm-up",), total
            yield ("warm-up",), -total
        for index, arrives in arrivals([w.arrives_bytes for w in self.weights], self.threads):
            if arrives:
                if self.weights[index].arrives_bytes == 0:
                    continue  # its pieces are what arrives
                yield ("weight", index), self.weights[index].arrives_bytes
            else:
                yield from _packed(index, self.weights[index])
        yield from self._cast()

    def _cast(self) -> Iterator[Event]:
        """`param.data = param.data.to(dtype)`: the new tensor is there before the old one goes."""
        rounds = max((len(w.casts) for w in self.weights), default=0)
        for number in range(rounds):
            for index in self.modules:
                casts = self.weights[index].casts
                if number < len(casts):
                    before = casts[number - 1] if number else self.weights[index].arrives_bytes
                    yield ("weight", index, number + 1), casts[number]
                    yield (("weight", index, number) if number else ("weight", index)), -before


def _packed(index: int, weight: Weight) -> Iterator[Event]:
    if not weight.pieces:
        return
    keyed = [(("weight", index, "piece", n), piece) for n, piece in enumerate(weight.pieces)]
    for key, piece in keyed:
        yield key, piece.bytes
    for key, piece in keyed:
        if not piece.stays:
            yield key, -piece.bytes
    if weight.arrives_bytes:
        yield ("weight", index), -weight.arrives_bytes


def arrivals(sizes: Sequence[int], threads: int) -> Iterable[tuple[int, bool]]:
    """(index, True) when a weight is allocated, (index, False) when its turn to be packed has come.

    Weights are taken up in order by the first free thread, which needs time in proportion to their bytes; they are
    packed in order too, as soon as they are complete.
    """
    if not threads:
        return ((index, arrives) for index in range(len(sizes)) for arrives in (True, False))
    free = [0] * threads
    timed: list[tuple[int, bool, int]] = []
    packed = 0
    for index, size in enumerate(sizes):
        start = heapq.heappop(free)
        heapq.heappush(free, start + size)
        packed = max(packed, start + size)
        timed += ((start, False, index), (packed, True, index))
    return ((index, not complete) for _, complete, index in sorted(timed))
