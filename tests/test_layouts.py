"""Layouts as people write them, and what a model and a machine refuse."""

from __future__ import annotations

import pytest

from peftplan.arch import load_arch
from peftplan.errors import RequestError
from peftplan.graph.mesh import Mesh
from peftplan.layouts import SINGLE, Layout, check, layout_of

ARCH = load_arch("llama-7b")


@pytest.mark.parametrize(
    ("text", "gpus", "nodes", "expected"),
    [
        (None, 1, 1, SINGLE),
        ("none", 1, 1, SINGLE),
        (None, 8, 1, Layout(style="ddp", dp=8)),
        ("zero3", 8, 1, Layout(style="zero3", dp=8, shards=8)),
        ("hsdp", 8, 2, Layout(style="fsdp2", dp=16, shards=8)),
        ("fsdp=4,tp=2", 8, 1, Layout(style="fsdp2", dp=4, shards=4, mesh=Mesh(tp=2))),
        ("fsdp + tp=2 + sp", 8, 1, Layout(style="fsdp2", dp=4, shards=4, mesh=Mesh(tp=2, sequence=True))),
        ("tp=4,pp=2,dp=2", 8, 2, Layout(style="ddp", dp=2, mesh=Mesh(tp=4), pp=2)),
        ("dp_replicate=2,dp_shard=4,fsdp1", 8, 1, Layout(style="fsdp1", dp=8, shards=4)),
        ("ulysses=4,zero3", 8, 1, Layout(style="zero3", dp=2, shards=2, mesh=Mesh(cp=4, context="ulysses"))),
        ("pp=2,vpp=2", 2, 1, Layout(pp=2, chunks=2, schedule="interleaved")),
    ],
)
def test_words_are_read(text: str | None, gpus: int, nodes: int, expected: Layout) -> None:
    found = layout_of(text, gpus=gpus, nodes=nodes)
    assert found == expected
    assert found.world == gpus * nodes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero4", "unknown layout 'zero4'; did you mean zero"),
        ("tp=4,pp=4", r"takes dp x 16 ranks, but --gpus and --nodes give 8; give 16 GPUs"),
        ("tp=0", "tp=0: give a whole number of ranks"),
        ("tq=2", "unknown layout degree 'tq'; did you mean tp"),
        ("zero3,fsdp", "exclude each other"),
        ("fsdp=4,dp=2", "names .* replicas"),
        ("dp_shard=3", "ranks|groups of 3"),
    ],
)
def test_wrong_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        layout_of(text, gpus=8, nodes=1)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(mesh=Mesh(tp=3)), r"tp=3 does not divide the number of heads, 32; use 1 or 2 or 4"),
        (Layout(pp=5), r"pp=5 does not divide the number of layers, 32; use 2 or 4 or 8, or set layout.uneven=true"),
        (Layout(pp=64, uneven=True), "32 layers make no 64 stages"),
        (Layout(mesh=Mesh(cp=3)), "cp=3 does not divide --seq-len, 512"),
        (Layout(pp=4, chunks=2, schedule="interleaved"), "multiples of pp=4"),
    ],
)
def test_what_a_model_cannot_do_is_refused_with_the_nearest_legal(layout: Layout, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check(layout, ARCH, 9, 512)
