"""Llama-shaped decoders as Megatron-Core runs them on TransformerEngine, one rank's part.

Megatron-Core 0.12 and later: core/models/gpt/gpt_model.py, core/transformer/{transformer_layer,attention,mlp}.py,
core/models/common/embeddings/, core/fusions/fused_bias_swiglu.py, core/tensor_parallel/; TransformerEngine 2.x:
pytorch/module/, attention/, cross_entropy.py. Not traced (CUDA only): held to measured runs (`profiles/published`).

Hidden states are (tokens, B, H) of this rank's tokens; `sequence` leaves it 1/tp of them between matrices. Flags as
its Llama examples have them: fused norms, SwiGLU, rotary embedding and cross-entropy (TE), no dropout, gradients of
weights fused into fp32 `main_grad`. Gradients of norms' gains and of the embedding are made and dropped one by one:
left out, which errs low at the end of backward, far from the peak.
"""

from __future__ import annotations

from peftplan.arch.core import Arch, Attention, Layer, Mlp
from peftplan.errors import Unsupported
from peftplan.graph.blocks.self_attention import of_rank
from peftplan.graph.blocks.setup import Setup
from peftplan.graph.builder import Builder
from peftplan.graph.core import COMM, INPUT, Grad, Graph, Region, Tensor
from peftplan.graph.ops import Collective, Embedding, FusedAttention, MainGradLinear, internal
from peftplan.graph.ops.collective import Kind
from peftplan.units import DType, round_up

FP32 = DType.float32
VOCABULARY_MULTIPLE = 128
"""`--make-vocab-size-divisible-by`: words are padded to a multiple of it times tp."""


def megatron_decoder(arch: Arch, setup: Setup) -> Graph:
    """One rank's graph. Raises Unsupported for what is not written down."""
    return _Rank(arch, setup).graph()


class _Rank:
    """What one rank of a Megatron job holds of a model."""

    def __init__(self, arch: Arch, setup: Setup) -> None:
        self.arch, self.setup, self.mesh = arch, setup, setup.mesh
        self.dtype = setup.types.linear
        self.size = setup.batch.size
        self.tokens = setup.batch.seq // self.mesh.cp
        """Of a row, where matrices run."""
        self.rows = self.tokens // (self.mesh.tp if self.mesh.sequence else 1)
        """Of a row, between them."""
        self.vocab = round_up(arch.vocab, VOCABULARY_MULTIPLE * self.mesh.tp) // self.mesh.tp
        self.x = Tensor("hidden", (self.rows, self.size, arch.hidden), self.dtype)

    @property
    def shared(self) -> bool:
        """Whether ranks have parts of the tokens between matrices."""
        return self.rows < self.tokens

    @property
    def whole_bytes(self) -> int:
        """Hidden states of all tokens that matrices run on."""
        return self.tokens * self.size * self.arch.hidden * self.dtype.size

    def graph(self) -> Graph:
        if self.arch.norm != "rms" or any(not isinstance(layer.mlp, Mlp) for layer, _ in self.arch.layers):
            raise Unsupported(f"layout.framework=megatron on {self.arch.family} is not modelled; llama-shaped ones are")
        b, s = self.size, self.setup.batch.seq
        ids, labels = (Tensor(n, (b, s // self.mesh.cp), DType.int64, INPUT) for n in ("@input_ids", "@labels"))
        regions, index = [self._embed(ids)], 0
        for layer, count in self.arch.layers:
            regions.append(self._layer(layer, index, count))
            index += count
        regions += [self._norm(), self._head(labels)]
        return Graph(regions=tuple(regions), inputs=(ids, labels), buffers=self._buffers())

    def _builder(self) -> Builder:
        return Builder(self.setup.numerics, mesh=self.mesh)

    def _buffers(self) -> tuple[Tensor, ...]:
        """What the head gathers tokens into (GlobalMemoryBuffer); other stages of a pipeline have none: errs high."""
        if not self.shared:
            return ()
        return (Tensor("@mpu", (self.tokens, self.size, self.arch.hidden), self.dtype, "buffer"),)

    # -- layers -----------------------------------------------------------------------------------------------------

    def _layer(self, layer: Layer, index: int, count: int) -> Region:
        """TransformerLayer.forward."""
        b = self._builder()
        with b.scope("self_attn"):
            o = self._attention(b, layer.attention)
        mid = b.add(self.x, o, label="residual_attn")
        assert isinstance(layer.mlp, Mlp)
        with b.scope("mlp"):
            d = self._mlp(b, layer.mlp, mid)
        out = b.add(mid, d, label="residual_mlp")
        return Region(name="layers", ops=tuple(b.ops), entry=self.x, exit=out, count=count, first_index=index)

    def _attention(self, b: Builder, whole: Attention) -> Tensor:
        """SelfAttention.forward: the fused projection, rotary copies of queries and keys, the kernel, the output's."""
        a = of_rank(whole, self.mesh)
        heads, kv, dim = a.heads, a.kv_heads, a.head_dim
        mixed = self._columns(b, self.x, (heads + 2 * kv) * dim, label="linear_qkv", site="qkv", biased=a.qkv_bias)
        parts = (("query", heads), ("key", kv), ("value", kv))
        q, k, v = (self._part(b, mixed, n, dim, label) for label, n in parts)
        name = b.name("core_attention")
        every = self.tokens * self.mesh.cp
        lse = internal(name, "lse", (self.size, heads // self.mesh.cp, every), FP32)
        out = Tensor(name, (every, self.size, heads // self.mesh.cp * dim), self.dtype)
        back = 4 * self.size * every * (heads // self.mesh.cp) * (dim + 1)
        b.ops.append(FusedAttention(name=name, ins=(q, k, v), out=out, kv_len=every, extras=(lse,),
                                    grad_workspace_bytes=back, site="attention"))  # fmt: skip
        if self.mesh.cp > 1:
            out = self._exchanged(b, out, self.tokens, heads * dim, label="context")
        return self._rows(b, out, label="linear_proj", site="o", biased=a.out_bias)

    def _part(self, b: Builder, mixed: Tensor, heads: int, dim: int, label: str) -> Tensor:
        """Queries, keys or values as the kernel takes them: dense copies, turned where they are; with others' tokens
        in exchange for heads (TE's cp_comm_type a2a). Their gradients are put together by one more copy."""
        shape, cp = (self.tokens, self.size, heads, dim), self.mesh.cp
        own = Tensor("", shape, self.dtype)
        made = b.formula(label, own, mixed, grads=(Grad(mixed, mixed.nbytes, own.nbytes),), temporary_bytes=own.nbytes)
        return made if cp == 1 else self._exchanged(b, made, self.tokens * cp, heads // cp, dim, label=label)

    def _exchanged(self, b: Builder, x: Tensor, tokens: int, *rest: int, label: str) -> Tensor:
        """All tokens of a part of the heads for a part of the tokens of all heads, or back; a copy in the order that
        the collective takes is there besides (flash_attn_a2a_communicate)."""
        name = b.name(f"{label}_exchanged")
        out = Tensor(name, (tokens, self.size, *rest), x.dtype)
        b.ops.append(Collective(name=name, ins=(x,), out=out, forward="all_to_all", back="all_to_all", group="cp",
                                ranks=self.mesh.cp, temporary_bytes=x.nbytes, grad_temporary_bytes=x.nbytes,
                                site="attention", part=COMM))  # fmt: skip
        return out

    def _mlp(self, b: Builder, m: Mlp, x: Tensor) -> Tensor:
        """MLP.forward with one projection for gate and up; SwiGLUFunction keeps what goes in."""
        width = m.size // self.mesh.tp
        both = self._columns(b, x, 2 * width, label="linear_fc1", site="gate_up", biased=m.bias)
        shape = (self.tokens, self.size, width)
        product = b.formula("swiglu", Tensor("", shape, self.dtype), both, keeps=(both,),
                            grads=(Grad(both, both.nbytes),))  # fmt: skip
        return self._rows(b, product, label="linear_fc2", site="down", biased=m.bias)

    # -- matrices ---------------------------------------------------------------------------------------------------

    def _columns(self, b: Builder, x: Tensor, width: int, *, label: str, site: str, biased: bool) -> Tensor:
        """TELayerNormColumnParallelLinear: keeps what comes in and its norm, of this rank's tokens."""
        hidden = self.arch.hidden
        weight = b.weight(f"{label}.weight", width, hidden, dtype=self.dtype)
        gain = b.weight(f"{label}.layer_norm_weight", hidden, dtype=self.dtype)
        bias = (b.weight(f"{label}.bias", width, dtype=self.dtype),) if biased else ()
        name = b.name(label)
        normed = internal(name, "ln_out", x.shape, self.dtype)
        scale = internal(name, "rsigma", x.shape[:2], FP32)
        gathered = self.whole_bytes if self.shared else 0
        return self._linear(b, MainGradLinear(
            name=name, ins=(x, weight, gain, *bias), out=Tensor(name, (self.tokens, self.size, width), self.dtype),
            tokens=self.tokens * self.size, keeps=(x, normed, scale), made=(normed, scale), gathered_bytes=gathered,
            partial_grad_bytes=self.whole_bytes + (x.nbytes if self.shared else 0), site=site,
        ))  # fmt: skip

    def _rows(self, b: Builder, x: Tensor, *, label: str, site: str, biased: bool) -> Tensor:
        """TERowParallelLinear: keeps what comes in; what comes out is summed over ranks, of this rank's tokens."""
        hidden = self.arch.hidden
        weight = b.weight(f"{label}.weight", hidden, x.numel // (self.tokens * self.size), dtype=self.dtype)
        bias = (b.weight(f"{label}.bias", hidden, dtype=self.dtype),) if biased else ()
        name = b.name(label)
        partial = self.whole_bytes if self.shared else 0
        return self._linear(b, MainGradLinear(
            name=name, ins=(x, weight, *bias), out=self.x._replace(name=name), tokens=self.tokens * self.size,
            keeps=(x,), partial_bytes=partial, site=site,
        ))  # fmt: skip

    def _linear(self, b: Builder, op: MainGradLinear) -> Tensor:
        b.ops.append(op)
        return op.out

    # -- ends -------------------------------------------------------------------------------------------------------

    def _embed(self, ids: Tensor) -> Region:
        """LanguageModelEmbedding.forward: this rank's words of all tokens, summed over ranks."""
        b = self._builder()
        hidden = self.arch.hidden
        weight = Tensor("@embed_tokens.weight", (self.vocab, hidden), self.dtype, "weight")
        looked = Tensor("embed_tokens", (self.tokens, self.size, hidden), self.dtype)
        b.ops.append(Embedding(name="embed_tokens", ins=(ids, weight), out=looked, site="embed"))
        if self.mesh.tp == 1:
            return Region(name="embed", ops=tuple(b.ops), entry=None, exit=looked)
        out = self.x._replace(name="embedded")
        back: Kind = "all_gather" if self.shared else ""
        b.ops.append(Collective(name=out.name, ins=(looked,), out=out, back=back, group="tp", ranks=self.mesh.tp,
                                forward="reduce_scatter" if self.shared else "all_reduce", site="embed",
                                part=COMM))  # fmt: skip
        return Region(name="embed", ops=tuple(b.ops), entry=None, exit=out)

    def _norm(self) -> Region:
        """TENorm: keeps what comes in and its scale."""
        b = self._builder()
        weight = b.weight("norm.weight", self.arch.hidden, dtype=self.dtype)
        scale = internal("final_layernorm", "rsigma", self.x.shape[:2], FP32)
        out = b.formula("final_layernorm", self.x, self.x, weight, keeps=(self.x, scale),
                        grads=(Grad(self.x, self.x.nbytes),), temporary_bytes=scale.nbytes)  # fmt: skip
        return Region(name="norm", ops=tuple(b.ops), entry=self.x, exit=out)

    def _head(self, labels: Tensor) -> Region:
        """ColumnParallelLinear, and TE's parallel_cross_entropy, which puts the gradient in the logits' place: so the
        logits are counted from backward's start as their gradient, and not as kept."""
        b = self._builder()
        name = "@embed_tokens.weight" if self.arch.tied else "@lm_head.weight"
        weight = Tensor(name, (self.vocab, self.arch.hidden), self.dtype, "weight")
        partial = self.whole_bytes if self.shared else 0
        logits = self._linear(b, MainGradLinear(
            name="logits", ins=(self.x, weight), out=Tensor("logits", (self.tokens, self.size, self.vocab), self.dtype),
            tokens=self.tokens * self.size, keeps=(self.x,), partial_grad_bytes=partial, site="head",
        ))  # fmt: skip
        with b.marked("loss"):
            each = 4 * self.tokens * self.size
            loss = b.formula("loss", Tensor("", (), FP32), logits, labels, grads=(Grad(logits, logits.nbytes),),
                             temporary_bytes=each * (1 + 3 * (self.mesh.tp + 1)))  # fmt: skip
        return Region(name="head", ops=tuple(b.ops), entry=self.x, exit=loss)
