"""The Arch of a config equals the real transformers model built from that config on the meta device."""

from __future__ import annotations

import inspect
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from peftplan.arch import Arch, Attention, Experts, Layer, Mlp, load_arch, parameter_count
from peftplan.arch.config import runs
from peftplan.arch.core import Activation, Groups, Latent, RouterKind
from peftplan.arch.families import families
from peftplan.units import parse_dtype

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.trace

CATALOG_MODELS = (
    "llama-7b",
    "llama-2-70b",
    "llama-3.1-8b",
    "llama-3.2-1b",
    "tinyllama",
    "smollm2-135m",
    "yi-34b",
    "vicuna-7b",
    "mistral-7b",
    "mistral-7b-v0.3",
    "mistral-nemo",
    "qwen2.5-0.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-32b",
    "gemma-2b",
    "gemma-7b",
    "phi-3-mini",
    "phi-3-medium",
    "phi-4",
    "phi-4-mini",
    "smollm3",
    "granite-3.0-8b-base",
    "granite-3.3-2b-instruct",
    "DeepSeek-V3",
    "Moonlight-16B-A3B",
    "Kimi-K2-Instruct",
    "mixtral-8x7b",
    "mixtral-8x22b",
    "Qwen1.5-MoE-A2.7B",
    "Qwen2-57B-A14B",
    "Qwen3-30B-A3B",
    "Qwen3-235B-A22B",
    "Qwen3-Coder-480B-A35B-Instruct",
)

ACTIVATIONS: dict[str, Activation] = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}


ROUTERS: dict[str, RouterKind] = {"MixtralTopKRouter": "softmax_fp32", "DeepseekV3TopkRouter": "sigmoid_groups"}


def build(config: dict[str, Any]) -> Any:
    """The causal language model of `config`, without weights."""
    parsed = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(parsed)


def observe(model: Any, like: Arch) -> Arch:
    """What the modules of `model` say; name, config and notes are those of `like`."""
    config, body = model.config, model.model
    embedding, norm = body.embed_tokens, body.norm
    return Arch(
        name=like.name,
        family=config.model_type,
        hidden=embedding.weight.shape[1],
        vocab=embedding.weight.shape[0],
        layers=runs(observe_layer(layer, body) for layer in body.layers),
        norm="rms_plus_one" if type(norm).__name__.startswith("Gemma") else "rms",
        tied=model.lm_head.weight is embedding.weight,
        embed_scale=hasattr(embedding, "embed_scale"),
        head_bias=model.lm_head.bias is not None,
        dtype=parse_dtype(str(model.dtype)),
        max_positions=config.max_position_embeddings,
        use_cache=config.use_cache,
        multiplies=config.model_type == "granite",
        idle_window=config.sliding_window if config.model_type == "qwen2_moe" else None,
        returns_cache="past_key_values if use_cache" not in inspect.getsource(type(body)),
        config=like.config,
        notes=like.notes,
    )


def observe_layer(layer: Any, body: Any) -> Layer:
    attention = layer.self_attn
    dropout = layer.resid_attn_dropout.p if hasattr(layer, "resid_attn_dropout") else 0.0
    return Layer(attention=observe_attention(attention, body), mlp=observe_mlp(layer.mlp), residual_dropout=dropout)


def observe_attention(attention: Any, body: Any) -> Attention:
    if hasattr(attention, "kv_b_proj"):
        return observe_latent(attention, body)
    fused = hasattr(attention, "qkv_proj")
    head_dim = attention.head_dim
    heads = attention.o_proj.in_features // head_dim
    if fused:
        kv_heads = (attention.qkv_proj.out_features // head_dim - heads) // 2
        bias = attention.qkv_proj.bias
    else:
        kv_heads, bias = attention.k_proj.out_features // head_dim, attention.q_proj.bias
    rotates = getattr(attention, "use_rope", True)
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=bias is not None,
        out_bias=attention.o_proj.bias is not None,
        fused_qkv=fused,
        qk_norm=hasattr(attention, "q_norm"),
        rotary_dim=2 * body.rotary_emb.inv_freq.numel() if rotates else None,
        rotary_concat=observe_concat(attention),
        window=observe_window(attention),
        dropout=attention.attention_dropout,
    )


def observe_latent(attention: Any, body: Any) -> Attention:
    down, queries = attention.kv_a_proj_with_mqa, attention.q_a_proj
    return Attention(
        heads=attention.num_heads,
        kv_heads=attention.num_heads // attention.num_key_value_groups,
        head_dim=attention.qk_head_dim,
        qkv_bias=down.bias is not None,
        out_bias=attention.o_proj.bias is not None,
        rotary_dim=2 * body.rotary_emb.inv_freq.numel(),
        dropout=attention.attention_dropout,
        latent=Latent(
            rank=attention.kv_a_layernorm.weight.shape[0],
            rope_dim=down.out_features - attention.kv_b_proj.in_features,
            value_dim=attention.o_proj.in_features // attention.num_heads,
            query_rank=None if queries is None else queries.out_features,
        ),
    )


def observe_concat(attention: Any) -> bool:
    """Whether the rotated part and the rest are concatenated, as Phi-3's own apply_rotary_pos_emb does."""
    function = sys.modules[type(attention).__module__].__dict__["apply_rotary_pos_emb"]
    return "torch.cat(" in inspect.getsource(function)


def observe_window(attention: Any) -> int | None:
    """The width that reaches the attention function; Mistral and Phi-3 look it up as they run."""
    window: int | None
    if hasattr(attention, "sliding_window"):
        window = attention.sliding_window
    else:
        reads_config = type(attention).__name__ in ("MistralAttention", "Phi3Attention", "MixtralAttention")
        window = attention.config.sliding_window if reads_config else None
    return window


def observe_mlp(mlp: Any) -> Mlp | Experts:
    if hasattr(mlp, "experts"):
        return observe_experts(mlp)
    fused = hasattr(mlp, "gate_up_proj")
    act = mlp.activation_fn if fused else mlp.act_fn
    return Mlp(
        size=mlp.down_proj.in_features,
        activation=ACTIVATIONS[type(act).__name__],
        bias=mlp.down_proj.bias is not None,
        fused_gate_up=fused,
    )


def observe_experts(mlp: Any) -> Experts:
    stack, router, shared = mlp.experts, mlp.gate, getattr(mlp, "shared_expert", None)
    kind = ROUTERS.get(type(router).__name__, "softmax")
    mixtral, deepseek = kind == "softmax_fp32", kind == "sigmoid_groups"
    shared = mlp.shared_experts if deepseek else shared
    return Experts(
        number=stack.gate_up_proj.shape[0],
        top_k=router.top_k,
        size=stack.down_proj.shape[2],
        activation=ACTIVATIONS[type(stack.act_fn).__name__],
        router=kind,
        groups=Groups(number=router.num_group, best=router.topk_group) if deepseek else None,
        normalized=mixtral or router.norm_topk_prob,
        shared_size=None if shared is None else shared.down_proj.in_features,
        shared_gate=hasattr(mlp, "shared_expert_gate"),
        implementation=stack.config._experts_implementation,
    )


def check(arch: Arch, model: Any) -> None:
    assert arch == observe(model, arch)
    assert parameter_count(arch) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", CATALOG_MODELS)
def test_catalog_models_at_full_size(name: str) -> None:
    arch = load_arch(name)
    check(arch, build(arch.model_dump()))


def random_config(model_type: str, seed: int) -> dict[str, Any]:
    """A tiny config with about half of the optional keys omitted."""
    draw = random.Random(f"{model_type}/{seed}")
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": 64 * draw.choice((1, 2, 3)),
        "intermediate_size": draw.choice((88, 41)),
        "num_hidden_layers": draw.randint(1, 6),
        "num_attention_heads": 32,
        "vocab_size": draw.choice((97, 131)),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    optional = {**COMMON_OPTIONS, **OPTIONS.get(model_type, {})}
    if model_type == "deepseek_v3":
        config["num_key_value_heads"] = optional.pop("num_key_value_heads")[-1]
        del optional["head_dim"]
        config |= {"n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
        config |= {"n_group": draw.choice((2, 4, 6)), "topk_group": draw.choice((1, 2))}
    for key, values in optional.items():
        if draw.random() < 0.5:
            config[key] = draw.choice(values)
    if config["num_hidden_layers"] != len(config.get("layer_types") or [None] * config["num_hidden_layers"]):
        del config["layer_types"]
    return config


COMMON_OPTIONS: dict[str, tuple[Any, ...]] = {
    "num_key_value_heads": (1, 4, 32),
    "head_dim": (6, 10),
    "tie_word_embeddings": (True, False),
    "attention_dropout": (0, 0.0, 0.25),
    "max_position_embeddings": (512,),
    "hidden_act": ("silu", "gelu_pytorch_tanh"),
    "use_cache": (True, False),
    "torch_dtype": ("bfloat16", "float16", "float32"),
    "dtype": ("bfloat16", "float32", None),
    "rope_theta": (1e4, 1e6),
    "attention_bias": (True, False),
    "mlp_bias": (True, False),
}
SLIDING = {
    "use_sliding_window": (True, True, False),
    "sliding_window": (4, 9),
    "max_window_layers": (0, 1, 3, 28),
}
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "mistral": {"sliding_window": (None, 5)},
    "qwen2": SLIDING,
    "qwen3": SLIDING,
    "gemma": {"hidden_act": ("gelu", "gelu_pytorch_tanh"), "hidden_activation": (None, "silu")},
    "phi3": {
        "sliding_window": (None, 5),
        "resid_pdrop": (0.0, 0.1),
        "embd_pdrop": (0.0, 0.1),
        "partial_rotary_factor": (0.5, 0.7, 1.0),
    },
    "deepseek_v3": {
        "n_shared_experts": (1, 2),
        "kv_lora_rank": (12, 20),
        "q_lora_rank": (None, 12, 20),
        "qk_rope_head_dim": (6, 8),
        "v_head_dim": (10, 12),
        "qk_nope_head_dim": (10, 12),
        "first_k_dense_replace": (0, 1, 2),
        "norm_topk_prob": (True, False),
        "attention_bias": (True, False),
    },
    "mixtral": {"sliding_window": (None, 5), "num_local_experts": (4, 7), "num_experts_per_tok": (1, 3)},
    "qwen2_moe": {
        **SLIDING,
        "max_window_layers": (1, 3, 28),
        "qkv_bias": (True, False),
        "decoder_sparse_step": (1, 2),
        "mlp_only_layers": ([], [0, 2], None),
        "num_experts": (5, 6),
        "num_experts_per_tok": (2, 3),
        "moe_intermediate_size": (24, 40),
        "shared_expert_intermediate_size": (32, 56),
        "norm_topk_prob": (True, False),
    },
    "qwen3_moe": {
        "use_sliding_window": (True, True, False),
        "sliding_window": (4, 9),
        "decoder_sparse_step": (1, 2),
        "mlp_only_layers": ([], [0, 2], None),
        "num_experts": (9, 10),
        "num_experts_per_tok": (2, 3),
        "moe_intermediate_size": (24, 40),
        "norm_topk_prob": (True, False),
    },
    "smollm3": {
        "use_sliding_window": (True, False),
        "sliding_window": (4, 9),
        "no_rope_layer_interval": (1, 2, 3),
        "no_rope_layers": ([1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0]),
    },
}


@pytest.mark.parametrize("model_type", sorted(families()))
@pytest.mark.parametrize("seed", range(20))
def test_random_configs_with_omitted_keys(model_type: str, seed: int) -> None:
    config = random_config(model_type, seed)
    check(load_arch("tiny", config=config), build(config))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "smollm3"])
def test_layer_types(model_type: str) -> None:
    config = {
        **random_config(model_type, 0),
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    }
    check(load_arch("tiny", config=config), build(config))


@pytest.mark.parametrize("model_type", sorted(families()))
def test_a_saved_config_reads_back(model_type: str, tmp_path: Path) -> None:
    """What save_pretrained writes (nested rope_parameters, `dtype`, defaults filled in) reads the same."""
    config = random_config(model_type, 1)
    model = build(config)
    model.config.save_pretrained(tmp_path)
    arch = load_arch(str(tmp_path))
    original = load_arch("tiny", config={**config, "dtype": json.loads(arch.config).get("dtype")})
    assert (arch.layers, arch.tied, arch.dtype, arch.norm, arch.max_positions, arch.use_cache) == (
        original.layers,
        original.tied,
        original.dtype,
        original.norm,
        original.max_positions,
        original.use_cache,
    )
    check(arch, model)


@pytest.mark.parametrize("model_type", sorted(families()))
def test_every_key_of_the_config_class_can_be_set(model_type: str) -> None:
    from dataclasses import fields

    config_class = type(transformers.AutoConfig.for_model(model_type))
    own = {field.name for field in fields(config_class)}
    assert own - families()[model_type].keys == set()


@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_size": 50},
        {"hidden_size": 50, "head_dim": 8},
        {"head_dim": 7},
        {"num_hidden_layers": 3.0},
        {"hidden_act": "nonsense"},
        {"attention_dropout": "no"},
    ],
)
def test_what_transformers_refuses_is_refused_too(keys: dict[str, Any]) -> None:
    from peftplan.errors import RequestError

    config = {**random_config("llama", 0), "num_attention_heads": 6, "num_key_value_heads": 2, **keys}
    with pytest.raises(RequestError):
        load_arch("tiny", config=config)
    with pytest.raises(Exception):  # noqa: B017, PT011 - transformers raises what it likes
        build(config)
