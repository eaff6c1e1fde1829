"""What comes before the first layer and after the last: embedding, masks, rotary tables; last norm, head, loss."""

from __future__ import annotations

from peftplan.arch.core import Arch, Experts
from peftplan.errors import Unsupported
from peftplan.graph.blocks.kernels import Loss, only_transformers
from peftplan.graph.blocks.loss import causal_lm_loss, returned_logits
from peftplan.graph.blocks.modules import rms_norm
from peftplan.graph.blocks.setup import Setup, Shared
from peftplan.graph.builder import Builder
from peftplan.graph.core import Region, Tensor
from peftplan.graph.spread import embedded
from peftplan.units import DType

FP32 = DType.float32


def entrance(arch: Arch, setup: Setup, ids: Tensor) -> tuple[Region, Shared]:
    """LlamaModel.forward up to the first layer: embedding, positions, mask, rotary tables."""
    b = Builder(setup.numerics, mesh=setup.mesh)
    types, batch = setup.types, setup.batch
    weight = Tensor("@embed_tokens.weight", (arch.vocab, arch.hidden), types.embedding, "weight")
    out = embedded(b, ids, weight, tied=arch.tied)
    with b.marked("embed"):  # part of the embedding's module
        hidden = b.scale(out, label="embed_scale") if arch.embed_scale else out
    if arch.multiplies:
        hidden = b.scale(hidden, label="embed_multiplied")
    position = b.make("position_ids", 1, batch.seq, dtype=DType.int64, temporary_bytes=8 * batch.seq)
    if setup.modeling.repeats_positions and batch.size > 1:
        b.make("row_positions", batch.size, batch.seq, dtype=DType.int64, ins=(position,))
    mask, window_mask = _masks(arch, setup, b)
    cos, sin = _rotary_tables(b, _rotary_width(arch), setup, position, hidden.dtype)
    shared = Shared(cos=cos, sin=sin, mask=mask, window_mask=window_mask)
    idle = _idle(arch, mask, window_mask)
    leaf = out.name if arch.multiplies else None
    return Region(name="embed", ops=tuple(b.ops), entry=None, exit=hidden, idle=idle, leaf=leaf), shared


def buffers(arch: Arch, setup: Setup) -> tuple[Tensor, ...]:
    """Buffers: rotary inverse frequencies (twice), DeepSeek's corrections of its routers, Gemma's embedding scale."""
    names = ("inv_freq", "original_inv_freq")[: setup.modeling.frequency_tables]
    tables = tuple(Tensor(f"@{n}", (_rotary_width(arch) // 2,), FP32, "buffer") for n in names)
    corrections = tuple(
        Tensor("@e_score_correction_bias", (count, layer.mlp.number), setup.types.linear, "buffer")
        for layer, count in arch.layers
        if isinstance(layer.mlp, Experts) and layer.mlp.groups is not None
    )
    scale = (Tensor("@embed_scale", (), setup.types.linear, "buffer"),) if arch.embed_scale else ()
    return (*tables, *corrections, *scale)


def _rotary_width(arch: Arch) -> int:
    return max((layer.attention.rotary_dim or 0 for layer, _ in arch.layers), default=0)


def _rotary_tables(b: Builder, dims: int, setup: Setup, position: Tensor, dtype: DType) -> tuple[Tensor, Tensor]:
    """LlamaRotaryEmbedding.forward."""
    seq = setup.batch.seq
    table = 4 * seq * dims
    if setup.modeling.rotary_product and dims:
        rows = b.plain("positions_fp32", seq, 1, dtype=FP32, ins=(position,))
        frequencies = Tensor("@inv_freq", (1, dims // 2, 1), FP32, "buffer")
        position = b.detached_linear(frequencies, rows, label="freqs")
    cos = b.make("cos", 1, seq, dims, dtype=dtype, ins=(position,), temporary_bytes=3 * table)
    sin = b.make("sin", 1, seq, dims, dtype=dtype, ins=(position,), temporary_bytes=3 * table)
    return cos, sin


def _masks(arch: Arch, setup: Setup, b: Builder) -> tuple[Tensor | None, Tensor | None]:
    """masking_utils.create_causal_mask and create_sliding_window_causal_mask.

    sdpa: a boolean (B, 1, S, S) mask, skipped where there is no padding, one document, and the window is not reached;
    eager: always, as an additive mask of the hidden dtype (B, 1, S, S), boolean as a temporary.
    """
    batch = setup.batch
    windows = {layer.attention.window for layer, _ in arch.layers}
    whole = batch.masked or setup.modeling.mask_given
    rows = batch.size if whole else 1  # without padding the mask is one square, seen B times
    square = rows * batch.seq * batch.keys

    def one(label: str, *, needed: bool) -> Tensor | None:
        shape = (batch.size, 1, batch.seq, batch.keys)
        if setup.attention == "eager":
            return b.make(label, *shape, dtype=setup.types.embedding, temporary_bytes=square)
        if needed and setup.attention.startswith("sdpa"):
            one_row = batch.seq * batch.keys
            mask = b.make(label, rows, 1, batch.seq, batch.keys, dtype=DType.boolean, temporary_bytes=one_row)
            return mask.view(*shape)
        return None

    always = batch.masked or batch.documents > 1 or batch.past > 0
    both = arch.idle_window is not None
    full = one("causal_mask", needed=always) if both or None in windows else None
    widths = [w for w in (*windows, arch.idle_window) if w is not None]
    reached = any(batch.seq >= w for w in widths)
    window = one("window_mask", needed=always or reached) if widths else None
    return full, window


def _idle(arch: Arch, *masks: Tensor | None) -> tuple[str, ...]:
    """Those of the masks, full and sliding, that no layer uses."""
    windowed = {layer.attention.window is not None for layer, _ in arch.layers}
    return tuple(m.name for m, kind in zip(masks, (False, True), strict=True) if m is not None and kind not in windowed)


def final_norm(arch: Arch, setup: Setup, dtype: DType) -> Region:
    """The last norm of the backbone."""
    b = Builder(setup.numerics, mesh=setup.mesh)
    x = Tensor("hidden", (setup.batch.size, setup.batch.seq, arch.hidden), dtype)
    out = rms_norm(b, arch, setup, x, "norm")
    b.hold(x)
    return Region(name="norm", ops=tuple(b.ops), entry=x, exit=out)


def head(arch: Arch, setup: Setup, labels: Tensor, h: Tensor) -> Region:
    """lm_head and the loss."""
    b = Builder(setup.numerics, mesh=setup.mesh)
    types = setup.types
    name = "@embed_tokens.weight" if arch.tied else "@lm_head.weight"
    weight = Tensor(name, (arch.vocab, arch.hidden), types.head, "weight")
    if arch.multiplies:
        loss, returned = _scaled_loss(b, arch, setup, h, weight, labels)
    else:
        loss, returned = setup.kernels.loss(b, h, weight, labels, setup.loss)
    return Region(name="head", ops=tuple(b.ops), entry=h, exit=loss, returned=returned)


def _scaled_loss(b: Builder, arch: Arch, setup: Setup, h: Tensor, weight: Tensor, labels: Tensor) -> Loss:
    """GraniteForCausalLM.forward: the logits are divided by a number before the loss."""
    only_transformers(setup.kernels, f"{arch.family}, which scales its logits,")
    if setup.loss in ("fused_head", "chunked", "split"):
        raise Unsupported(f"a loss fused with the head on {arch.family}, which scales its logits, is not modelled")
    with b.marked("head"):
        logits = b.linear(h, weight, label="lm_head")
    logits = b.scale(logits, label="logits_scaled")
    loss = causal_lm_loss(b, logits, labels, h, setup.loss, criterion=setup.kernels.cross_entropy_of)
    return loss, (returned_logits(setup.loss, logits),)
