"""What a model is: sizes and switches read from its config, nothing that depends on a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from peftplan.units import DType

Activation = Literal["silu", "gelu", "gelu_tanh"]
NormKind = Literal["rms", "rms_plus_one"]
RouterKind = Literal["softmax", "softmax_fp32", "sigmoid_groups"]
"""How a router makes weights of its logits: a softmax in float32 whose best are given back in the logits' dtype (Qwen),
or stay in float32 (Mixtral); a sigmoid of float32 logits, the best of the best groups of experts (DeepSeek-V3)."""
ExpertsImplementation = Literal["grouped_mm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent:
    """Keys and values out of one small vector for each token (DeepSeek-V2, arXiv:2405.04434)."""

    rank: int
    """Its width."""
    rope_dim: int
    """The last dimensions of a head, which rotate; keys share theirs between heads."""
    value_dim: int
    """Width of a head's values, which may be less than `head_dim`."""
    query_rank: int | None = None
    """Width of the vector that queries come out of, None where they are projected at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Multi-head attention with grouped keys and values (Ainslie 2023, arXiv:2305.13245)."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    fused_qkv: bool = False
    """One `qkv_proj` instead of `q_proj`, `k_proj`, `v_proj` (Phi-3)."""
    qk_norm: bool = False
    """RMS norm over head_dim on queries and keys (Qwen3)."""
    rotary_dim: int | None = None
    """Rotated leading dimensions of a head: head_dim unless partial; None without rotation (NoPE)."""
    rotary_concat: bool = False
    """The rotated slice and the rest are concatenated, even where the rest is empty (Phi-3)."""
    window: int | None = None
    """Sliding-window width in tokens, None for full attention."""
    dropout: float = 0.0
    latent: Latent | None = None

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.head_dim if self.latent is None else self.latent.value_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Mlp:
    """Gated feed-forward: down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    size: int
    activation: Activation = "silu"
    bias: bool = False
    fused_gate_up: bool = False
    """One `gate_up_proj` instead of two (Phi-3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Experts in equal groups, of which the `best` are looked at."""

    number: int
    best: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A router and gated feed-forwards of which each token visits `top_k` (Shazeer 2017, arXiv:1701.06538).

    The experts' matrices are two stacked parameters, as transformers 5 holds them.
    """

    number: int
    top_k: int
    size: int
    """Feed-forward width of one expert."""
    activation: Activation = "silu"
    router: RouterKind = "softmax"
    groups: Groups | None = None
    normalized: bool = False
    """Whether the weights of the chosen experts are divided by their sum."""
    shared_size: int | None = None
    """Feed-forward width of the expert that every token visits, None where there is none."""
    shared_gate: bool = False
    """Whether a sigmoid of a linear layer scales what the shared expert says (Qwen2-MoE)."""
    implementation: ExpertsImplementation = "grouped_mm"
    """transformers' `experts_implementation`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One decoder layer: norm, attention, norm, feed-forward, each with a residual."""

    attention: Attention
    mlp: Mlp | Experts
    residual_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Arch:
    """A decoder-only language model.

    `layers` is the stack as runs of equal layers, in order. `config` is the model's config.json as a
    JSON string with sorted keys (kept so that a resolved job and the trace instrument can rebuild it).
    """

    name: str
    family: str
    """`model_type` of the config."""
    hidden: int
    vocab: int
    layers: tuple[tuple[Layer, int], ...]
    norm: NormKind = "rms"
    tied: bool = False
    """The head's weight is the embedding's weight."""
    embed_scale: bool = False
    """Embeddings are multiplied by sqrt(hidden) (Gemma)."""
    multiplies: bool = False
    """Embeddings, both residual branches and logits are multiplied by numbers of the config (Granite)."""
    head_bias: bool = False
    dtype: DType = DType.bfloat16
    """The dtype the checkpoint states."""
    max_positions: int | None = None
    use_cache: bool = True
    idle_window: int | None = None
    """Width of the sliding-window mask that is made whether layers use one or not, as the full one is (Qwen2-MoE)."""
    returns_cache: bool = False
    """The model's output has the cache it was given even where `use_cache` is off (LlamaModel.forward)."""
    config: str = "{}"
    notes: tuple[str, ...] = ()
    """What a reader of the answer should know about where the sizes come from."""

    @property
    def num_layers(self) -> int:
        return sum(count for _, count in self.layers)

    def model_dump(self) -> dict[str, Any]:
        """The config this was read from, as a dict."""
        import json

        loaded: dict[str, Any] = json.loads(self.config)
        return loaded
