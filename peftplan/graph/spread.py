"""What blocks write where ranks share a layer: values that enter split matrices, and partial results that leave them.

Every function hands its value back as it is where nothing is split. Mirrors transformers 5.23
(distributed/tensor_parallel.py) on torch 2.13's DTensor.
"""

from __future__ import annotations

from peftplan.graph.builder import Builder
from peftplan.graph.core import BUFFER, COMM, Tensor
from peftplan.graph.ops import Collective, Embedding, Whole
from peftplan.graph.ops.collective import Kind
from peftplan.units import DType


def entering(b: Builder, x: Tensor, site: str) -> Tensor:
    """What a layer split by columns takes of all: its gradient is summed over ranks, for every such layer apart."""
    if b.mesh.split(site) != "columns":
        return x
    return _told(b, x, *x.shape, label="entering", site=site, back="all_reduce")


def summed(b: Builder, y: Tensor, site: str) -> Tensor:
    """What the ranks' parts of a layer split by rows make together; its gradient is every rank's."""
    if b.mesh.split(site) != "rows":
        return y
    return _told(b, y, *y.shape, label="summed", site=site, forward="all_reduce")


def between(b: Builder, low: Tensor, site: str) -> Tensor:
    """What two small matrices beside a split one hand on: the first is whole and the second split by columns, or the
    first split by rows and the second whole (peft 0.21.2, tuners/lora/model.py, add_lora_tp_hooks_dtensor)."""
    return summed(b, entering(b, low, site), site)


def gathered(b: Builder, y: Tensor, width: int, site: str) -> Tensor:
    """All columns of what a layer split by columns makes, of which the last rank may have fewer.

    Parts come rank by rank, and are put side by side in a second tensor; a third is without the padding.
    """
    mesh = b.mesh
    if mesh.split(site) != "columns":
        return y
    padded = y.nbytes * mesh.tp
    out_bytes = y.nbytes // y.shape[-1] * width
    scratch = padded if padded == out_bytes else 2 * padded - out_bytes
    return _told(b, y, *y.shape[:-1], width, label="gathered", site=site, forward="all_gather", back="slice",
                 temporary_bytes=scratch)  # fmt: skip


def rows_of(b: Builder, weight: Tensor) -> Tensor:
    """The first rank's rows of a matrix."""
    rows = b.mesh.part(weight.shape[0])
    return weight if rows == weight.shape[0] else weight._replace(shape=(rows, *weight.shape[1:]))


def embedded(b: Builder, ids: Tensor, weight: Tensor, *, tied: bool) -> Tensor:
    """Rows of the embedding; where its vocabulary is split, each rank looks up its own words, and zeros for others.

    The gradient of a part is made of the whole vocabulary. It stays so unless a tied head's, which is of the part
    alone, is added.
    """
    name = "embed_tokens"
    out = Tensor(name, (*ids.shape, weight.shape[-1]), weight.dtype)
    if b.mesh.tp == 1:
        b.ops.append(Embedding(name=name, ins=(ids, weight), out=out, site="embed"))
        return out
    elsewhere = b.plain("elsewhere", *ids.shape, dtype=DType.boolean, ins=(ids,))
    rows = b.plain("rows", *ids.shape, dtype=DType.int64, ins=(ids, elsewhere))
    whole = Tensor("vocabulary", weight.shape, weight.dtype, BUFFER, base=weight.name)
    own = rows_of(b, weight)
    if tied:
        part = own.logical_bytes
        view = Collective(name=whole.name, ins=(own,), out=whole, forward="", back="slice", group="tp",
                          ranks=b.mesh.tp, grad_temporary_bytes=part, site="embed", part=COMM)  # fmt: skip
        b.ops.append(view)
    else:
        b.ops.append(Whole(name=whole.name, ins=(own,), out=whole, site="embed", part=COMM))
    partial = out._replace(name=f"{name}.part")
    b.ops.append(Embedding(name=partial.name, ins=(ids, whole), out=partial, site="embed"))
    with b.marked("embed", COMM):
        b.hold(elsewhere, rows)
    return _told(b, partial, *out.shape, label=name, site="embed", forward="all_reduce")


def _told(
    b: Builder, x: Tensor, *shape: int, label: str, site: str, forward: Kind = "", back: Kind = "",
    temporary_bytes: int = 0,
) -> Tensor:  # fmt: skip
    """One collective of the ranks that share matrices."""
    name = b.name(label)
    out = Tensor(name, shape, x.dtype, base="" if forward else x.storage)
    op = Collective(
        name=name, ins=(x,), out=out, forward=forward, back=back, group="tp", ranks=b.mesh.tp,
        temporary_bytes=temporary_bytes, site=site, part=COMM,
    )  # fmt: skip
    b.ops.append(op)
    return out
