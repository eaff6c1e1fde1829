"""The order of micro-batches against torch's own schedules."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from peftplan.layouts import Layout
from peftplan.layouts.base import Schedule
from peftplan.layouts.schedules import actions, moments

SIZES = [
    (pp, chunks, micro_batches)
    for pp, chunks, micro_batches in product((2, 3, 4), (1, 2, 3), (1, 2, 4, 6, 8, 12))
    if micro_batches % max(1, micro_batches // pp) == 0
]
NAMES = {"FORWARD": "forward", "FULL_BACKWARD": "backward", "BACKWARD_INPUT": "backward", "BACKWARD_WEIGHT": "weights"}


def theirs(kind: str, pp: int, chunks: int, micro_batches: int, rank: int) -> list[tuple[str, int, int]]:
    """What torch's schedule makes a rank do, its waits left out."""
    schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")
    made = getattr(schedules, kind).__new__(getattr(schedules, kind))
    made.pp_group_size, made.n_local_stages, made._n_microbatches, made.rank = pp, chunks, micro_batches, rank
    made.number_of_rounds = max(1, micro_batches // pp)
    made.microbatches_per_round = micro_batches // made.number_of_rounds
    found = [a for a in made._calculate_single_rank_operations(rank) if a is not None]
    return [(NAMES[a.computation_type.name], (a.stage_index - rank) // pp, a.microbatch_index) for a in found]


@pytest.mark.trace
@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble"])
def test_orders_are_torchs(schedule: Schedule) -> None:
    kind = {"interleaved": "ScheduleInterleaved1F1B", "zero_bubble": "ScheduleInterleavedZeroBubble"}[schedule]
    for pp, chunks, micro_batches in SIZES:
        layout = Layout(pp=pp, chunks=chunks, schedule=schedule)
        for rank in range(pp):
            mine = [tuple(action) for action in actions(layout, rank, micro_batches)]
            assert mine == theirs(kind, pp, chunks, micro_batches, rank), (pp, chunks, micro_batches, rank)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
def test_every_micro_batch_goes_forward_and_back_once(schedule: Schedule) -> None:
    for pp, chunks, micro_batches in SIZES:
        if chunks > 1 and schedule in ("gpipe", "1f1b"):
            continue
        for rank in range(pp):
            done = list(actions(Layout(pp=pp, chunks=chunks, schedule=schedule), rank, micro_batches))
            for work in ("forward", "backward"):
                expected = set(product(range(chunks), range(micro_batches)))
                assert {(a.chunk, a.micro_batch) for a in done if a.work == work} == expected
            for i, action in enumerate(done):
                if action.work == "backward":
                    assert action._replace(work="forward") in done[:i]


@pytest.mark.parametrize(
    ("schedule", "rank", "micro_batches", "most"),
    [("gpipe", 0, 7, 7), ("1f1b", 0, 9, 4), ("1f1b", 3, 9, 1), ("1f1b", 0, 2, 2), ("1f1b", 1, 1000, 3)],
)
def test_how_many_are_in_flight(schedule: Schedule, rank: int, micro_batches: int, most: int) -> None:
    found = moments(Layout(pp=4, schedule=schedule), rank, micro_batches)
    assert max(sum(moment.held) + 1 for moment in found) == most
