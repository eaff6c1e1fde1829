"""Lifetimes in one region: what is alive when, on graphs small enough to count by hand."""

from __future__ import annotations

from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Region, Tensor
from peftplan.step.allocator import fresh_block_bytes
from peftplan.step.walk import Plan, RegionWalk, exact, propagate_need
from peftplan.units import KIB, MIB, DType

X = Tensor("x", (4, 8), DType.float32)
X_BYTES = 4 * 8 * 4


def walk(b: Builder, out: Tensor, *, entry_needs: bool, reentrant: bool = False) -> RegionWalk:
    region = Region(name="layers", ops=tuple(b.ops), entry=X, exit=out)
    return RegionWalk(Plan(region, exact), propagate_need(region, entry_needs=entry_needs), reentrant=reentrant)


def builder() -> Builder:
    return Builder(Numerics(backend="cpu"))


def test_a_frozen_linear_keeps_nothing_of_its_input() -> None:
    b = builder()
    out = b.linear(X, b.weight("w", 16, 8, dtype=DType.float32))
    found = walk(b, out, entry_needs=True)
    found.forward()
    assert found.saved == []
    assert found.account.current == 4 * 16 * 4 - X_BYTES


def test_a_trained_linear_keeps_its_input_until_its_backward_is_done() -> None:
    b = builder()
    weight = b.weight("w", 16, 8, dtype=DType.float32)._replace(trainable=True)
    out = b.linear(X, weight)
    found = walk(b, out, entry_needs=False)
    found.forward()
    assert [s.tensor.name for s in found.saved] == ["x"]
    assert found.account.saved_bytes == X_BYTES
    found.backward()
    assert found.account.saved_bytes == 0
    assert found.account.grad_bytes == 16 * 8 * 4
    assert found.account.current == found.account.grad_bytes - X_BYTES


def test_a_held_value_lives_to_the_end_of_its_scope() -> None:
    peaks = []
    for held in (False, True):
        b = builder()
        first = b.scale(X)
        second = b.scale(first)
        third = b.scale(second)
        if held:
            b.hold(first)
        found = walk(b, third, entry_needs=False)
        found.forward()
        peaks.append(found.account.peak.bytes)
    assert peaks[1] == peaks[0] + X_BYTES


def test_meeting_gradients_are_added_in_place() -> None:
    b = builder()
    out = b.add(b.scale(X, "left"), b.scale(X, "right"))
    found = walk(b, out, entry_needs=True)
    found.forward()
    before = found.account.current
    assert found.backward()
    assert found.account.current == before
    assert found.entry_gradient is not None


def test_a_view_has_no_bytes_and_frees_with_its_owner() -> None:
    b = builder()
    wide = b.linear(X, b.weight("w", 16, 8, dtype=DType.float32))
    part = b.slice(wide, 4, 8)
    out = b.scale(part)
    found = walk(b, out, entry_needs=False)
    found.forward()
    assert found.account.current == X_BYTES - X_BYTES
    assert found.account.peak.bytes == 4 * 16 * 4 + X_BYTES - X_BYTES


def test_recomputation_stops_at_the_last_op_that_saves() -> None:
    b = builder()
    trained = b.weight("w", 8, 8, dtype=DType.float32)._replace(trainable=True)
    first = b.linear(X, trained, label="first")
    out = b.scale(b.scale(first))
    assert walk(b, out, entry_needs=True).recomputed_ops() == 0
    assert walk(b, out, entry_needs=True, reentrant=True).recomputed_ops() == 3


def test_blocks_round_as_the_caching_allocator_does() -> None:
    assert fresh_block_bytes(1) == 512
    assert fresh_block_bytes(513) == 1024
    assert fresh_block_bytes(10 * MIB - 512) == 10 * MIB - 512
    assert fresh_block_bytes(10 * MIB + 1) == 10 * MIB + 512  # 1.5 MiB over a 2 MiB multiple is split off
    assert fresh_block_bytes(12 * MIB - 512 * KIB) == 12 * MIB  # a rest of half a MiB stays with the block
