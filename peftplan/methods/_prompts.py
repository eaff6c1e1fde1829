"""Virtual tokens in front of every sequence: what prompt tuning and its kin share.

Mirrors peft/peft_model.py, PeftModelForCausalLM.forward and get_prompt, peft 0.21.2. Prompt encoders are held in
fp32 whatever the model's dtype: PEFT makes them so and casts only their output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.blocks.setup import Batch
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Graph, Op, Region, Tensor
from peftplan.graph.edit import writing
from peftplan.graph.ops import Embedding, Make
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = frozenset(
    {"task_type", "inference_mode", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
)
INT64, FP32 = DType.int64, DType.float32


def checked_tokens(given: int | None) -> int:
    """`num_virtual_tokens`, which PEFT has no default for."""
    if given is None or given < 1:
        raise RequestError(f"method.num_virtual_tokens={given}: say how many virtual tokens, at least 1")
    return given


def longer(batch: Batch, tokens: int | None) -> Batch:
    """The batch with virtual tokens in front of every sequence."""
    if batch.documents > 1:
        raise Unsupported("--batching packed does not go with virtual tokens: PEFT drops position_ids; use padded")
    return replace(batch, seq=batch.seq + checked_tokens(tokens))


def after_cache(batch: Batch, tokens: int | None) -> Batch:
    """The batch after the keys and values of virtual tokens."""
    if batch.documents > 1:  # masking_utils.py, _preprocess_mask_arguments
        raise Unsupported(
            "--batching packed does not go with a prefix: behind a cache transformers does not tell documents apart; "
            "use padded"
        )
    return replace(batch, past=checked_tokens(tokens))


def check_shape(**knobs: tuple[int | None, ...]) -> None:
    """`name=(given, the model's, as PEFT writes it)`: PEFT takes these from the model; others do not fit it."""
    for name, (given, *own) in knobs.items():
        if given is not None and given not in own:
            raise Unsupported(f"method.{name}={given} does not fit this model, which has {own[0]}; leave it out")


def prompt_ids(b: Builder, tokens: int, rows: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The virtual tokens' numbers, and the buffer they are: PEFT keeps them on the CPU and copies them, expanded to
    the batch, to the GPU at every step."""
    if b.numerics.backend == "cpu":
        kept = Tensor("@prompt_tokens", (tokens,), INT64, BUFFER)
        return kept, (kept,)
    return b.plain("prompt_tokens", rows, tokens, dtype=INT64), ()


def lookup(
    b: Builder, ids: Tensor, rows: int, width: int, *, copies: int = 1, path: str = "embedding"
) -> Tensor:  # fmt: skip
    """The prompt encoder's nn.Embedding: (rows, width) weights as (copies, rows, width)."""
    weight = Tensor(f"@prompt_encoder.{path}.weight", (rows, width), FP32, ADAPTER, True)
    name = b.name("prompt_embedding")
    out = Tensor(name, (copies, rows, width), FP32)
    b.ops.append(Embedding(name=name, ins=(ids, weight), out=out))
    return out


def linear(b: Builder, x: Tensor, width: int, label: str) -> Tensor:
    """One nn.Linear of a prompt encoder."""
    name = f"@prompt_encoder.{label}"
    weight = Tensor(f"{name}.weight", (width, x.shape[-1]), FP32, ADAPTER, True)
    return b.linear(x, weight, Tensor(f"{name}.bias", (width,), FP32, ADAPTER, True), label=label)


def prepend(graph: Graph, host: Host, tokens: int, encode: Callable[[Builder, Tensor], Tensor]) -> Graph:
    """`graph`, laid out for `tokens` more positions, with those made by `encode(builder, ids)`: (B, tokens, hidden)."""
    given = {t.name: _shortened(t, tokens) for t in graph.inputs}
    size = given["@labels"].shape[0]
    first, *middle, head = graph.regions
    b = Builder(host.numerics)
    held = long_mask(b, given, tokens)
    embed, rest = _split(first)
    embeds = _shortened(first.exit._replace(name="given_embeds"), tokens)
    b.ops += (_short(op, tokens) for op in writing(embed, first.exit, embeds))
    prefix = b.plain("prefix_labels", size, tokens, dtype=INT64)
    labels = b.make("long_labels", size, first.exit.shape[1], dtype=INT64, ins=(prefix, given["@labels"]))
    ids, buffers = prompt_ids(b, tokens, size)
    prompts = encode(b, ids)
    prompts = b.cast(prompts, embeds.dtype, label="prompts_cast")
    joined = b.concat((prompts, embeds), *first.exit.shape, label="inputs_embeds")
    b.ops[-1:] = writing(b.ops[-1:], joined, first.exit)
    held += (prefix.name, labels.name, prompts.storage, first.exit.name)
    front = replace(first, ops=(*b.ops, *rest), held=held, leaf=embeds.name)
    return replace(
        graph,
        regions=(front, *middle, _relabelled(head, labels)),
        inputs=tuple(given.values()),
        buffers=(*graph.buffers, *buffers),
    )


def _shortened(t: Tensor, tokens: int) -> Tensor:
    return t._replace(shape=(t.shape[0], t.shape[1] - tokens, *t.shape[2:]))


def _short(op: Op, tokens: int) -> Op:
    ins = tuple(t if t.is_param else _shortened(t, tokens) for t in op.ins)
    return replace(op, ins=ins, out=_shortened(op.out, tokens))


def _relabelled(head: Region, labels: Tensor) -> Region:
    """The head with its loss on the longer labels."""
    ops = tuple(replace(op, ins=tuple(labels if t.name == "@labels" else t for t in op.ins)) for op in head.ops)
    return replace(head, ops=ops)


def long_mask(b: Builder, given: dict[str, Tensor], tokens: int) -> tuple[str, ...]:
    """torch.ones(B, n) before the mask: an fp32 mask, and so a float one for the whole batch."""
    mask = given.get("@attention_mask")
    if mask is None:
        return ()
    size, seq = mask.shape
    ones = b.plain("prefix_mask", size, tokens, dtype=FP32)
    return ones.name, b.plain("long_mask", size, tokens + seq, dtype=FP32, ins=(ones, mask)).name


def _split(first: Region) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """The embedding with its scale, and what the model makes after it (positions, masks, tables)."""
    cut = next((i for i, op in enumerate(first.ops) if isinstance(op, Make)), len(first.ops))
    return first.ops[:cut], first.ops[cut:]
