"""Adaption prompts: gated attention to trained tokens in the last layers (LLaMA-Adapter, Zhang 2023, arXiv:2303.16199).

Trains: adapter_len x hidden and one gate in each of the last `adapter_layers` layers, in the dtype of q_proj's weight
(fp32 where that is packed).
Keeps for backward: in each adapted layer the queries a second time, and the scores of every token with every prompt
token: in fp32 behind their softmax, and gated; keys and values of the prompt for every sequence and query head.
Not modelled: gpt2, which peftplan does not know; PEFT has it on llama and mistral besides.
Mirrors peft/tuners/adaption_prompt/layer.py AdaptedAttention.forward and utils.py llama_compute_query_states, peft
0.21.2. A second projection to values is computed there and not used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from peftplan.arch.core import Arch, Attention
from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Graph, Op, Region, Tensor
from peftplan.graph.edit import after, modules, split_runs
from peftplan.methods import _again
from peftplan.methods._linears import BACKENDS, COMMON, layer_of, packed
from peftplan.methods.base import Family, Host, Method, Trains
from peftplan.units import DType

FAMILIES = ("llama", "mistral")
"""TRANSFORMERS_MODEL_CONFIG, less gpt2."""
HARMLESS = COMMON


@final
@dataclass(frozen=True)
class AdaptionPrompt(Method):
    """PEFT's AdaptionPromptConfig."""

    adapter_len: int | None = None
    adapter_layers: int | None = None
    target_modules: str | tuple[str, ...] | None = None
    family: ClassVar[Family] = "additive"
    trains: ClassVar[Trains] = "like base"

    def apply(self, graph: Graph, host: Host) -> Graph:
        tokens, first = self._shape(host.arch)

        def adapted(region: Region) -> Region:
            index = region.first_index
            return region if index is None or index < first else _Adapted(region, host, tokens).region()

        return replace(graph, regions=tuple(map(adapted, split_runs(graph, lambda i: i >= first).regions)))

    def _shape(self, arch: Arch) -> tuple[int, int]:
        """(tokens, the first layer that gets them). Raises RequestError for what PEFT cannot build or run."""
        if arch.family not in FAMILIES:
            raise Unsupported(
                f"PEFT has no adaption prompts for {arch.family}, only for llama, mistral and gpt2; use lora"
            )
        if self.target_modules not in (None, "self_attn", ("self_attn",)):
            raise RequestError("--target-modules: adaption prompts go on attention as a whole; name self_attn, or none")
        for name, value in (("adapter_len", self.adapter_len), ("adapter_layers", self.adapter_layers)):
            if value is None or value < 1:
                raise RequestError(f"method.{name}={value}: PEFT has no default for it; say how many, at least 1")
        tokens, layers = self.adapter_len or 0, self.adapter_layers or 0
        if layers > arch.num_layers:
            raise RequestError(
                f"method.adapter_layers={layers}: this model has {arch.num_layers} layers; use at most those"
            )
        _check_heads(_attention(arch), arch.hidden)
        return tokens, arch.num_layers - layers


def _attention(arch: Arch) -> Attention:
    """The heads of any layer: they are alike in these families."""
    return arch.layers[0][0].attention


def _check_heads(a: Attention, hidden: int) -> None:
    """PEFT takes hidden over the keys' width for the number of query heads that share a key."""
    shared = hidden // (a.kv_heads * a.head_dim)
    if shared < 1 or a.heads // shared != a.kv_heads or a.kv_heads * shared != a.heads:
        raise Unsupported(
            f"PEFT's adaption prompts need heads x head_dim to be the hidden size, not {a.heads} x {a.head_dim} for "
            f"{hidden}; use lora"
        )


class _Adapted:
    """One layer's attention with its prompt."""

    def __init__(self, region: Region, host: Host, tokens: int) -> None:
        self.layer = region
        self.host = host
        self.tokens = tokens
        self.attention = _attention(host.arch)
        self.projections = {m.site: m for _, _, m in modules(region)}
        self.b = Builder(host.numerics, "self_attn.adaption_")
        layer = layer_of(self.projections["q"])
        if layer in BACKENDS:
            raise RequestError(
                f"PEFT's adaption prompts read q_proj.weight, which {layer}'s layers lack; use lora, or an unquantized "
                "--format"
            )

    def region(self) -> Region:
        return after(self.layer, "self_attn", self.projections["o"].out, self._forward)

    def _forward(self, output: Tensor) -> tuple[tuple[Op, ...], Tensor]:
        """AdaptedAttention.forward."""
        b, a = self.b, self.attention
        size, seq, _ = output.shape
        single = size == 1  # batch and heads are one dimension then, whatever their order
        with b.marked("attention", "extra"):
            prompt = self._prompt()
            key, keys = self._of_prompt(prompt, "k")
            value, values = self._of_prompt(prompt, "v")
            q = self._queries()
            q_flat = q if single else b.copy(q, label="q")
            keys_cast = b.cast(keys, q.dtype, label="k_cast")
            square = (size, a.heads, seq, self.tokens)
            products = b.matmul(q_flat, keys_cast, *square, inner=a.head_dim, label="products")
            scores = b.scale(products, label="scores")
            weights = b.cast(b.softmax(scores, DType.float32, label="softmax"), q.dtype, label="weights")
            gated = b.mul(self._gate(), weights, label="gated")
            b.hold(scores)
            mixed = b.matmul(gated, values, size, a.heads, seq, a.head_dim, inner=self.tokens, label="mixed")
            flat = b.copy(mixed, size, seq, a.heads * a.head_dim, label="output", grad_copied=not single)
            added = self._project("o", flat)
            total = b.add(output, added, label="sum")
            result = b.cast(total, q.dtype, label="result")
            b.hold(output, key, value, keys, values, q, gated, added, total)
        return tuple(b.ops), result

    @property
    def _dtype(self) -> DType:
        """`q_proj.weight.dtype`, or fp32 for int8 and uint8."""
        weight = self.projections["q"].weight
        return DType.float32 if packed(self.projections["q"]) is not None else weight.dtype

    def _project(self, site: str, x: Tensor) -> Tensor:
        """One of the layer's projections on another input."""
        return _again.project(self.b, self.projections[site], x, self.host, f"{site}_proj")

    def _gate(self) -> Tensor:
        return self.b.weight("gate", 1, dtype=self._dtype, kind=ADAPTER)

    def _prompt(self) -> Tensor:
        """The prompt; autocast's copy of an fp32 one serves both projections (autocast_mode.cpp, cached_cast)."""
        shape = (1, self.tokens, self.projections["q"].in_features)
        prompt = self.b.weight("prompt", *shape, dtype=self._dtype, kind=ADAPTER)
        if self.projections["k"].weight.stored_bytes is not None:
            return self.b.alias(prompt)
        return self.b.autocast(prompt) if prompt.dtype is DType.float32 else prompt

    def _of_prompt(self, prompt: Tensor, site: str) -> tuple[Tensor, Tensor]:
        """Keys or values of the prompt, and for every sequence and query head."""
        b, a = self.b, self.attention
        size = self.projections["o"].out.shape[0]
        made = self._project(site, prompt)
        each = b.copy(made, size, a.kv_heads, self.tokens, a.head_dim, label=f"{site}", grad_copied=size > 1)
        shared = a.heads > a.kv_heads
        return made, b.copy(each, size, a.heads, self.tokens, a.head_dim, label=f"{site}_repeat", grad_copied=shared)

    def _queries(self) -> Tensor:
        """llama_compute_query_states: projected and turned again."""
        b, a = self.b, self.attention
        x = self.projections["q"].x
        size, seq, _ = x.shape
        tables = {t.name: t for op in self.layer.ops for t in op.ins}
        q = b.view(self._project("q", x), size, a.heads, seq, a.head_dim, label="heads", grad_copied=True)
        unused = _again.project_unused(b, self.projections["v"], x, self.host, "unused")
        straight = b.mul(q, tables["@cos"], label="cos")
        turned = b.mul(b.rotate_half(q, label="turned"), tables["@sin"], label="sin")
        out = b.add(straight, turned, label="queries")
        b.hold(q, unused)
        return out


METHOD = AdaptionPrompt
EXAMPLES = (AdaptionPrompt(adapter_len=10, adapter_layers=3), AdaptionPrompt(adapter_len=5, adapter_layers=1))
UNVERIFIED: dict[str, str] = {}
