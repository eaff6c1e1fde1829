"""Loading a model: in which order its weights come, are packed and cast, and what of them stays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from peftplan.errors import RequestError
from peftplan.formats.base import Piece
from peftplan.formats.int8 import Int8
from peftplan.formats.nf4 import Nf4
from peftplan.graph.core import Tensor
from peftplan.job import make_job
from peftplan.loading import loading
from peftplan.pipeline import read
from peftplan.step.load import Event, Load, Weight, arrivals
from peftplan.units import DType

PLAIN = Weight(arrives_bytes=100, expected_bytes=100)
PACKED = Weight(arrives_bytes=40, expected_bytes=10, pieces=(Piece(4), Piece(30, stays=False), Piece(10)))


def left(events: Iterable[Event]) -> list[int]:
    """Bytes of what is alive at the end, in order of allocation; every free meets its allocation."""
    alive: dict[object, int] = {}
    for key, size in events:
        if size > 0:
            assert key not in alive
            alive[key] = size
        else:
            assert alive.pop(key) == -size
    return list(alive.values())


def load_of(**fields: Any) -> Load:
    job = make_job(**{"model": "smollm2-135m", "method": "lora", "micro_batch": 1, "seq_len": 64, **fields})
    reading = read(job)
    return loading(reading.case, reading.graph)


def test_a_packed_weight_arrives_whole_and_leaves_its_pieces() -> None:
    load = Load(weights=[PACKED, PLAIN], modules=[1, 0], adapters=[])
    sizes = [size for _, size in load.events()]
    assert sizes == [40, 4, 30, 10, -30, -40, 100]
    assert left(load.events()) == [4, 10, 100]


def test_a_block_of_the_expected_size_comes_and_goes_first() -> None:
    load = Load(weights=[PACKED, PLAIN], modules=[0, 1], adapters=[], warmed=True)
    assert [size for _, size in load.events()][:3] == [110, -110, 40]


def test_casts_come_last_in_the_modules_order_and_one_at_a_time() -> None:
    twice = Weight(arrives_bytes=50, expected_bytes=50, casts=(100, 50))
    once = Weight(arrives_bytes=20, expected_bytes=20, casts=(40,))
    load = Load(weights=[twice, once], modules=[1, 0], adapters=[])
    assert [size for _, size in load.events()] == [50, 20, 40, -20, 100, -50, 50, -100]


def test_without_threads_each_weight_is_packed_before_the_next_comes() -> None:
    assert list(arrivals([9, 1, 1], 0)) == [(0, True), (0, False), (1, True), (1, False), (2, True), (2, False)]


def test_threads_pile_weights_up_behind_the_largest() -> None:
    order = list(arrivals([9, 1, 1, 1], 2))
    assert order[:2] == [(0, True), (1, True)]
    assert [index for index, arrives in order if not arrives] == [0, 1, 2, 3], "packed in order"
    assert order.index((0, False)) > order.index((3, True)), "all had come before the first was packed"


def test_names_are_sorted_with_the_head_first_and_layers_by_number() -> None:
    load = load_of(model="tinyllama/tinyllama-1.1b-chat-v1.0", format="nf4", dtype="bfloat16")
    wide, narrow = 2 * 32000 * 2048, 2 * 2048
    arrived = [weight.arrives_bytes for weight in load.weights]
    assert arrived[:3] == [wide, wide, narrow], "lm_head, embed_tokens, then layer 0's input_layernorm"
    assert arrived[3] == 2 * 2048 * 5632, "mlp.down_proj"
    assert arrived[-1] == narrow, "the last norm"


@pytest.mark.parametrize("fields", [{"format": "nf4"}, {"method": "qlora"}, {"format": "int8"}, {}], ids=str)
def test_what_stays_is_what_is_stored(fields: dict[str, Any]) -> None:
    """But for the code that quantize_blockwise shares among all weights, which the sum counts for each."""
    load = load_of(**fields)
    job = make_job(**{"model": "smollm2-135m", "method": "lora", "micro_batch": 1, "seq_len": 64, **fields})
    stored = read(job).estimate.parameters.stored_bytes
    packed = sum(bool(weight.pieces) for weight in load.weights)
    shared = 1024 * packed if fields.get("method") == "qlora" else 0
    assert sum(left(load.events())) + sum(load.adapters) == stored - shared


def test_unpacked_models_are_moved_unless_they_have_a_device_map() -> None:
    moved, mapped = load_of(), load_of(set={"load.on_device": True})
    assert (moved.warmed, mapped.warmed) == (False, True)
    assert not moved.empties
    assert load_of(format="nf4").empties
    assert not load_of(format="nf4", set={"format.prepare": False}).empties


def test_int8_is_copied_to_the_device_twice() -> None:
    weight = Tensor("w", (3, 5), DType.float16)
    assert Int8().pieces(weight) == (Piece(30, stays=False), Piece(12), Piece(15))


def test_double_quantization_drops_the_first_constants() -> None:
    weight = Tensor("w", (64, 64), DType.float16)
    assert sum(p.bytes for p in Nf4(double_quant=True).pieces(weight) if p.stays) == 2048 + 64 + 4 + 4 + 64
    assert sum(p.bytes for p in Nf4().pieces(weight)) == Nf4().stored_bytes(weight.numel)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("load.threads", -1, "0 .none load ahead. to 64"),
        ("load.threads", True, "whole number"),
        ("load.warm_up", 1, "true or false"),
        ("load.thread", 4, "load"),
        ("allocator.seq_len_before", 0, "at least one token"),
    ],
)
def test_bad_settings_are_refused(key: str, value: object, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        load_of(set={key: value})
