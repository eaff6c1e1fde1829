"""Lifetimes in one region: what is alive when, on graphs small enough to count by hand."""

from __future__ import annotations

import pytest

from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Region, Tensor, verify
from peftplan.job import make_job
from peftplan.pipeline import read
from peftplan.recompute import Checkpoint
from peftplan.step.allocator import fresh_block_bytes
from peftplan.step.walk import Plan, Recording, RegionWalk, exact, propagate_need
from peftplan.units import KIB, MIB, DType

X = Tensor("x", (4, 8), DType.float32)
X_BYTES = 4 * 8 * 4


def walk(b: Builder, out: Tensor, *, entry_needs: bool, checkpoint: Checkpoint | None = None) -> RegionWalk:
    region = Region(name="layers", ops=tuple(b.ops), entry=X, exit=out)
    return RegionWalk(Plan(region, exact), propagate_need(region, entry_needs=entry_needs), checkpoint=checkpoint)


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


def penalised(weight: Tensor, named: str) -> Region:
    """A trained linear layer whose loss adds the norm of a weight."""
    b = builder()
    out = b.linear(X, weight)
    pay = builder()
    entry = Tensor("penalty", (), DType.float32)
    total = pay.add_into(entry, pay.norm(weight._replace(name=named)))
    penalty = Region(name="penalty", ops=tuple(pay.ops), entry=entry, exit=total)
    return Region(name="layers", ops=tuple(b.ops), entry=X, exit=out, penalty=penalty)


@pytest.mark.parametrize("grads_exist", [False, True])
def test_a_penalty_makes_the_gradient_that_its_layer_adds_to(grads_exist: bool) -> None:
    weight = builder().weight("w", 8, 8, dtype=DType.float32)._replace(trainable=True)
    region = penalised(weight, "w")
    assert region.penalty is not None
    changes = []
    for part, root in ((region, False), (region.penalty, True)):
        need = propagate_need(part, entry_needs=root)
        found = RegionWalk(Plan(part, exact), need, grads_exist=grads_exist)
        found.forward()
        before = found.account.current - found.account.saved_bytes
        found.backward(root=root)
        changes.append((found.account.grad_bytes, found.account.current - before))
    waits = -256 if grads_exist else 0
    assert changes[1] == (256, 256), "it waits for the layer's, whether or not there is one to add it to"
    assert changes[0] == (waits, waits - region.exit.nbytes), "and frees the exit's"


def test_a_penalty_reads_the_weights_of_its_own_region() -> None:
    weight = builder().weight("w", 8, 8, dtype=DType.float32)._replace(trainable=True)
    for named, problems in (("w", []), ("v", ["layers: its penalty reads v, which it lacks"])):
        graph = Graph(regions=(Region(name="embed", ops=(), entry=None, exit=X), penalised(weight, named)))
        assert [line for line in verify(graph) if "penalty" in line] == problems
        assert [count for _, count in graph.params()] == [1]


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
    assert walk(b, out, entry_needs=True).recomputed_ops() == []
    assert walk(b, out, entry_needs=True, checkpoint=Checkpoint(reentrant=True)).recomputed_ops() == [0, 1, 2]


def test_blocks_round_as_the_caching_allocator_does() -> None:
    assert fresh_block_bytes(1) == 512
    assert fresh_block_bytes(513) == 1024
    assert fresh_block_bytes(10 * MIB - 512) == 10 * MIB - 512
    assert fresh_block_bytes(10 * MIB + 1) == 10 * MIB + 512  # 1.5 MiB over a 2 MiB multiple is split off
    assert fresh_block_bytes(12 * MIB - 512 * KIB) == 12 * MIB  # a rest of half a MiB stays with the block


def test_the_gradients_of_two_products_meet_in_a_third_tensor() -> None:
    """Each comes back through the view that made its input flat, so the engine adds them out of place (torch 2.13:
    the profiler shows aten::add); a cast gives a tensor of its own, which is added to."""
    b = builder()
    wide = [b.linear(X, b.weight(f"w{i}", 8, 8, dtype=DType.float32), label=f"y{i}") for i in (1, 2)]
    made = gradients_made(b, b.add(wide[0], wide[1]))
    assert made.count(X_BYTES) == 3
    b = builder()
    narrow = [b.cast(X, DType.bfloat16, label=f"y{i}") for i in (1, 2)]
    assert gradients_made(b, b.add(narrow[0], narrow[1])).count(X_BYTES) == 2


def gradients_made(b: Builder, out: Tensor) -> list[int]:
    """Bytes of the gradients that a backward allocates."""
    book = Recording()
    region = Region(name="layers", ops=tuple(b.ops), entry=X, exit=out)
    found = RegionWalk(Plan(region, exact), propagate_need(region, entry_needs=True), account=book)
    found.forward()
    book.take()
    found.backward()
    return [size for key, size in book.take() if size > 0 and key.startswith("gradient")]


def test_temporaries_of_several_kernels_come_before_their_result() -> None:
    b = builder()
    out = b.rotate_half(X)
    book = Recording()
    region = Region(name="layers", ops=tuple(b.ops), entry=X, exit=out)
    RegionWalk(Plan(region, exact), set(), account=book).forward()
    assert [size for _, size in book.take() if size > 0] == [X_BYTES // 2, X_BYTES]


@pytest.mark.parametrize("format_", ["int8", "nf4"])
def test_ia3_on_packed_weights_reads_only_what_is_written(format_: str) -> None:
    """Its feed-forward modules end in the layer's own product, which bitsandbytes' 4 bit alone clones."""
    job = make_job(model="smollm2-135m", method="ia3", format=format_, micro_batch=1, seq_len=64)
    reading = read(job)
    assert list(verify(reading.graph)) == []
    static, found = reading.estimate.memory.static_bytes, reading.estimate.memory.phases
    assert found["optimizer"] - static < found["backward"] - static, "what the layers kept is gone"
