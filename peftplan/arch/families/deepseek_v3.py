"""DeepSeek-V3, R1, Moonlight, Kimi-K2.

Mirrors transformers 5.23.0 models/deepseek_v3: latent attention (queries through a small vector too where `q_lora_rank`
is given), dense layers below `first_k_dense_replace`, then experts chosen by groups with shared ones beside them. Parts
of the checkpoint that predict further tokens (MTP) are not loaded.
"""

from __future__ import annotations

from peftplan.arch.config import Config
from peftplan.arch.core import Arch, Attention, Experts, Groups, Latent, Layer, Mlp
from peftplan.arch.families import _experts

MODEL_TYPES = ("deepseek_v3",)
KEYS = (
    *_experts.KEYS,
    "attention_bias",
    "moe_intermediate_size",
    "n_shared_experts",
    "n_routed_experts",
    "routed_scaling_factor",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "v_head_dim",
    "qk_nope_head_dim",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
    "norm_topk_prob",
    "pretraining_tp",
    "rope_interleave",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "aux_loss_alpha",
    "ep_size",
    "moe_layer_freq",
    "scoring_func",
    "seq_aux",
    "topk_method",
)


def read(config: Config) -> Arch:
    if not config.flag("rope_interleave", True):
        raise config.unsupported("rope_interleave false is not modelled; only interleaved rotation is")
    attention, experts = _attention(config), _feed_forward(config)
    dense = Mlp(size=config.size("intermediate_size"), activation=config.activation())
    first = _first_sparse(config)
    layers = [Layer(attention=attention, mlp=dense if i < first else experts) for i in range(config.depth)]
    return config.decoder(layers, tied=False, max_positions=4096, returns_cache=True)


def _attention(config: Config) -> Attention:
    bias, rope = config.flag("attention_bias", False), config.size("qk_rope_head_dim", 64)
    if config.kv_heads(128) != config.heads:
        raise config.unsupported("num_key_value_heads other than num_attention_heads is not modelled")
    if config.stated("head_dim") and config.size("head_dim") != rope:  # what rotary tables are made for
        raise config.wrong(f"head_dim, where it is given, must be qk_rope_head_dim ({rope})")
    if rope % 2:
        raise config.wrong(f"qk_rope_head_dim is {rope}; rotary embeddings need an even one")
    queries = None if "q_lora_rank" in config.values and not config.stated("q_lora_rank") else 1536
    return Attention(
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.size("qk_nope_head_dim", 128) + rope,
        qkv_bias=bias,
        out_bias=bias,
        rotary_dim=rope,
        dropout=config.probability("attention_dropout"),
        latent=Latent(
            rank=config.size("kv_lora_rank", 512),
            rope_dim=rope,
            value_dim=config.size("v_head_dim", 128),
            query_rank=None if queries is None else config.size("q_lora_rank", queries),
        ),
    )


def _first_sparse(config: Config) -> int:
    value = config.values.get("first_k_dense_replace", 3)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise config.wrong(f"first_k_dense_replace must be a whole number from 0, not {value!r:.40}")
    return value


def _feed_forward(config: Config) -> Experts:
    number = config.size("n_routed_experts", 256)
    groups, best = config.size("n_group", 8), config.size("topk_group", 4)
    if number % groups or best > groups or number // groups < 2:
        raise config.wrong(f"n_group ({groups}) must divide n_routed_experts ({number}) into groups of two or more, "
                           f"and topk_group ({best}) be at most that")  # fmt: skip
    size = config.size("moe_intermediate_size", 2048)
    return Experts(
        number=number,
        top_k=_experts.top_k(config, 8, of=number),
        size=size,
        activation=config.activation(),
        router="sigmoid_groups",
        groups=Groups(number=groups, best=best),
        normalized=config.flag("norm_topk_prob", True),
        shared_size=size * config.size("n_shared_experts", 1),
        implementation=_experts.implementation(config),
    )
