"""The caching allocator's documented rules, one by one, and what they add up to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftplan.step.allocator import (
    BLOCK_BYTES,
    AllocatorSettings,
    CachingAllocator,
    Event,
    block_bytes,
    divided_bytes,
    fresh_block_bytes,
    segment_bytes,
    steady_usage,
)
from peftplan.units import MIB


def allocator(*sizes: int, settings: AllocatorSettings | None = None) -> CachingAllocator:
    """An allocator that holds `sizes` under the identities 0, 1, ..."""
    made = CachingAllocator(settings)
    for identity, size in enumerate(sizes):
        made.alloc(identity, size)
    return made


@pytest.mark.parametrize(
    ("request_bytes", "block"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)]
)
def test_requests_round_up_to_512_bytes(request_bytes: int, block: int) -> None:
    assert block_bytes(request_bytes) == block
    assert allocator(request_bytes).allocated_bytes == block


@pytest.mark.parametrize(
    ("block", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (1187 * MIB, 1188 * MIB),
    ],
)
def test_segments_are_2_20_or_rounded_to_2_mib(block: int, segment: int) -> None:
    assert segment_bytes(block) == segment
    assert allocator(block).reserved_bytes == segment


def test_an_unsplit_rest_counts_as_allocated() -> None:
    held = allocator(1187 * MIB)
    assert held.allocated_bytes == 1188 * MIB == fresh_block_bytes(1187 * MIB)
    assert fresh_block_bytes(10 * MIB + 512) == 10 * MIB + 512, "a rest above 1 MiB is split off"


def test_the_small_pool_shares_segments_and_splits_from_512_bytes() -> None:
    held = allocator(MIB, MIB - BLOCK_BYTES, BLOCK_BYTES)
    assert held.reserved_bytes == 2 * MIB
    assert held.allocated_bytes == 2 * MIB


def test_the_large_pool_splits_only_above_1_mib() -> None:
    held = allocator(12 * MIB)
    held.free(0)
    held.alloc(1, 11 * MIB)
    assert held.allocated_bytes == 12 * MIB, "1 MiB left over is not split off"
    held.free(1)
    held.alloc(2, 11 * MIB - BLOCK_BYTES)
    assert held.allocated_bytes == 11 * MIB - BLOCK_BYTES


def test_best_fit_takes_the_smallest_block_that_is_large_enough() -> None:
    held = allocator(40 * MIB, 30 * MIB, 20 * MIB)
    for identity in range(3):
        held.free(identity)
    held.alloc(3, 25 * MIB)
    held.alloc(4, 40 * MIB)
    held.alloc(5, 20 * MIB)
    assert held.reserved_bytes == 90 * MIB


def test_free_neighbours_merge() -> None:
    held = allocator(6 * MIB, 6 * MIB, 8 * MIB)
    assert held.reserved_bytes == 20 * MIB
    for identity in (0, 2, 1):
        held.free(identity)
    held.alloc(3, 20 * MIB)
    assert held.reserved_bytes == 20 * MIB


def test_pools_do_not_help_each_other() -> None:
    held = allocator(20 * MIB)
    held.free(0)
    held.alloc(1, MIB)
    assert held.reserved_bytes == 22 * MIB


def test_cached_segments_stay_until_the_cache_is_emptied() -> None:
    held = allocator(64 * MIB, 6 * MIB, 512)
    held.free(0)
    held.alloc(3, 4 * MIB)
    held.free(3)
    assert (held.allocated_bytes, held.reserved_bytes) == (6 * MIB + 512, 86 * MIB)
    held.empty_cache()
    assert held.reserved_bytes == 22 * MIB, "segments that still hold a block are kept whole"


def test_peaks_start_again_from_what_is_held() -> None:
    held = allocator(64 * MIB)
    held.free(0)
    held.reset_peaks()
    usage = held.usage()
    assert (usage.peak_allocated_bytes, usage.peak_reserved_bytes) == (0, 64 * MIB)


def test_oversize_blocks_are_neither_split_nor_lent_to_smaller_requests() -> None:
    held = allocator(100 * MIB, settings=AllocatorSettings(max_split_bytes=50 * MIB))
    held.free(0)
    held.alloc(1, 10 * MIB)
    assert held.reserved_bytes == 110 * MIB
    held.alloc(2, 90 * MIB)
    assert (held.reserved_bytes, held.allocated_bytes) == (110 * MIB, 110 * MIB)
    held.free(2)
    held.alloc(3, 79 * MIB)
    assert held.reserved_bytes == 190 * MIB, "more than 20 MiB too large"


def test_expandable_segments_grow_by_pages_and_leave_no_slivers() -> None:
    held = allocator(30 * MIB, 5 * MIB, settings=AllocatorSettings(expandable_segments=True))
    assert (held.allocated_bytes, held.reserved_bytes) == (35 * MIB, 40 * MIB)
    held.free(1)
    held.alloc(2, 31 * MIB)
    assert (held.allocated_bytes, held.reserved_bytes) == (61 * MIB, 80 * MIB)
    held.alloc(3, 512)
    assert held.reserved_bytes == 82 * MIB
    held.free(2)
    held.empty_cache()
    assert held.reserved_bytes == 42 * MIB


def test_expandable_segments_prefer_an_inner_block() -> None:
    held = allocator(10 * MIB, 10 * MIB, 4 * MIB, settings=AllocatorSettings(expandable_segments=True))
    held.free(0)
    held.alloc(3, 9 * MIB)
    held.alloc(4, 16 * MIB)
    assert held.reserved_bytes == 40 * MIB


def test_of_equal_blocks_the_newer_segments_goes_first() -> None:
    """The 12 MiB left of the newer segment of 24, not the older segment of 12: 24 MiB in one piece are then gone."""
    held = allocator(12 * MIB, 24 * MIB)
    held.free(1)
    held.alloc(2, 12 * MIB)
    held.free(0)
    held.alloc(3, 12 * MIB)
    held.free(2)
    held.alloc(4, 24 * MIB)
    assert held.reserved_bytes == 60 * MIB


def test_a_full_card_gets_cached_segments_back() -> None:
    held = allocator(60 * MIB, 20 * MIB, settings=AllocatorSettings(capacity_bytes=100 * MIB))
    held.free(0)
    held.alloc(2, 70 * MIB)
    assert held.reserved_bytes == 90 * MIB
    assert held.usage().peak_reserved_bytes == 90 * MIB


def test_what_does_not_fit_is_counted_all_the_same() -> None:
    assert (
        allocator(60 * MIB, 50 * MIB, settings=AllocatorSettings(capacity_bytes=100 * MIB)).reserved_bytes == 110 * MIB
    )


@pytest.mark.parametrize(
    ("request_bytes", "divisions", "block"),
    [
        (1200, 4, 1536),  # at most 512 B times the divisions: rounded to 512 B
        (2049, 4, 2560),
        (5 * MIB, 4, 5 * MIB),
        (5 * MIB + 1, 4, 6 * MIB),
        (9 * MIB, 8, 9 * MIB),
        (9 * MIB + 1, 8, 10 * MIB),
        (3 * MIB + 1, 1, 3 * MIB + 512),
        (4 * MIB, 2, 4 * MIB),
        (5 * MIB, 2, 6 * MIB),
    ],
)
def test_requests_round_up_to_a_division_between_powers_of_2(request_bytes: int, divisions: int, block: int) -> None:
    """As the comment above roundup_power2_next_division has it: 1200 among 4 divisions of 1024 would be 1280."""
    assert divided_bytes(request_bytes, divisions) == block
    settings = AllocatorSettings(roundup_power2_divisions=divisions)
    assert allocator(request_bytes, settings=settings).allocated_bytes == block


def collecting(start: int, *sizes: int) -> CachingAllocator:
    return allocator(*sizes, settings=AllocatorSettings(collects_from_bytes=start))


def test_old_free_segments_go_back_before_a_new_one_is_made() -> None:
    """Segments of 60 and 40 MiB are free; the first for two searches more. Its age is above the average: it goes."""
    held = collecting(50 * MIB, 60 * MIB, 40 * MIB)
    held.free(0)
    held.alloc(2, 70 * MIB)
    assert held.reserved_bytes == 110 * MIB, "60 MiB were given back"
    held.free(1)
    held.alloc(3, 12 * MIB)
    assert held.reserved_bytes == 110 * MIB, "what is cached and fits is used before anything is collected"


def test_nothing_is_collected_below_the_threshold_or_from_split_segments() -> None:
    below = collecting(200 * MIB, 60 * MIB)
    below.free(0)
    below.alloc(1, 70 * MIB)
    assert below.reserved_bytes == 130 * MIB
    split = collecting(10 * MIB, 60 * MIB)
    split.free(0)
    split.alloc(1, 20 * MIB)
    split.alloc(2, 70 * MIB)
    assert split.reserved_bytes == 130 * MIB


def test_collecting_goes_on_until_enough_is_back() -> None:
    """The oldest first; the second round takes what is then the oldest."""
    held = collecting(30 * MIB, 30 * MIB, 32 * MIB, 34 * MIB)
    for identity in range(3):
        held.free(identity)
        held.alloc(10 + identity, MIB)
    held.alloc(20, 40 * MIB)
    assert held.reserved_bytes == 40 * MIB + 4 * MIB


def test_a_full_card_gets_an_oversize_block_back_first() -> None:
    """With max_split_size_mb the smallest free oversize block that is large enough; the others stay cached."""
    settings = AllocatorSettings(max_split_bytes=50 * MIB, capacity_bytes=300 * MIB)
    held = allocator(60 * MIB, 100 * MIB, 80 * MIB, 20 * MIB, settings=settings)
    for identity in range(4):
        held.free(identity)
    held.alloc(4, 40 * MIB)
    assert held.reserved_bytes == 300 * MIB
    held.alloc(5, 45 * MIB)
    assert held.reserved_bytes == 300 * MIB - 60 * MIB + 46 * MIB


def test_several_oversize_blocks_go_back_where_none_is_large_enough() -> None:
    settings = AllocatorSettings(max_split_bytes=50 * MIB, capacity_bytes=300 * MIB)
    held = allocator(60 * MIB, 100 * MIB, 80 * MIB, 20 * MIB, settings=settings)
    for identity in range(4):
        held.free(identity)
    held.alloc(4, 150 * MIB)
    assert held.reserved_bytes == 260 * MIB - 180 * MIB + 150 * MIB


def test_identities_are_checked() -> None:
    held = allocator(512)
    with pytest.raises(ValueError, match="0 is allocated already"):
        held.alloc(0, 512)
    with pytest.raises(KeyError):
        held.free(7)


def test_states_born_in_a_cached_segment_make_the_next_step_reserve_more() -> None:
    activation, state = 100 * MIB, 2 * MIB
    step: list[Event] = [(1, activation), (1, None)]
    first = [*step, (9, state)]
    usage = steady_usage([(0, 50 * MIB)], first, [(2, activation), (2, None)])
    assert usage.peak_allocated_bytes == 152 * MIB
    assert usage.peak_reserved_bytes == 250 * MIB


LIVES = st.lists(st.tuples(st.integers(1, 64 * MIB), st.integers(1, 90)), max_size=60)
"""(bytes, how many allocations later it is freed)."""


def as_events(lives: list[tuple[int, int]]) -> list[Event]:
    timed: list[tuple[float, Event]] = [(at, (at, size)) for at, (size, _) in enumerate(lives)]
    timed += [(at + life - 0.5, (at, None)) for at, (_, life) in enumerate(lives)]
    return [event for when, event in sorted(timed, key=lambda item: item[0]) if when < len(lives)]


SETTINGS = st.builds(
    AllocatorSettings,
    expandable_segments=st.booleans(),
    max_split_bytes=st.sampled_from([None, 21 * MIB, 64 * MIB]),
    roundup_power2_divisions=st.sampled_from([None, 1, 2, 4, 16]),
    collects_from_bytes=st.sampled_from([None, 1, 100 * MIB]),
    capacity_bytes=st.sampled_from([None, 300 * MIB]),
)


@given(LIVES, SETTINGS)
def test_reserved_covers_allocated_and_everything_comes_back(
    lives: list[tuple[int, int]], settings: AllocatorSettings
) -> None:
    events = as_events(lives)
    held = CachingAllocator(settings)
    usage = held.run(events)
    freed = {identity for identity, size in events if size is None}
    left = [identity for identity in range(len(lives)) if identity not in freed]
    assert sum(lives[i][0] for i in left) <= usage.allocated_bytes <= usage.reserved_bytes
    assert usage.reserved_bytes <= usage.peak_reserved_bytes
    assert usage.peak_allocated_bytes <= usage.peak_reserved_bytes
    for identity in left:
        held.free(identity)
    held.empty_cache()
    assert (held.allocated_bytes, held.reserved_bytes) == (0, 0)


@given(LIVES)
def test_collecting_and_finer_rounding_never_reserve_more_than_they_must(lives: list[tuple[int, int]]) -> None:
    """What is collected lowers what is held at the end; more divisions never round a request up further."""
    events = as_events(lives)
    plain = CachingAllocator().run(events)
    eager = CachingAllocator(AllocatorSettings(collects_from_bytes=1)).run(events)
    assert eager.allocated_bytes <= eager.reserved_bytes
    assert eager.peak_reserved_bytes >= plain.peak_allocated_bytes - len(lives) * MIB
    for size, _ in lives:
        rounded = [divided_bytes(size, divisions) for divisions in (2, 4, 8, 16)]
        assert rounded == sorted(rounded, reverse=True)
        assert block_bytes(size) <= rounded[-1]
