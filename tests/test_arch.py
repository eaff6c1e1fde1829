"""Readers of config.json: what an omitted key means, and that a wrong one is one clear line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peftplan.arch import Arch, Attention, Experts, Mlp, load_arch, parameter_count
from peftplan.arch.core import Latent
from peftplan.arch.families import COMMON_KEYS, families
from peftplan.errors import PeftplanError, RequestError, Unsupported
from peftplan.units import DType

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 97,
}
"""Awkward on purpose: no two sizes that could be mistaken for one another."""

KV_DEFAULTS = {
    "llama": None, "phi3": None, "mistral": 8, "qwen2": 32, "qwen3": 32, "gemma": 16, "smollm3": 4, "mixtral": 8,
    "qwen2_moe": 16, "qwen3_moe": 4, "granite": None, "deepseek_v3": 128,
}  # fmt: skip


ALL_HEADS = {"deepseek_v3": 6}
"""Where keys and values come for every head."""


def read(model_type: str, **keys: Any) -> Arch:
    """The Arch of a tiny config; a key given as None is null."""
    known_kv = {} if KV_DEFAULTS[model_type] is None else {"num_key_value_heads": ALL_HEADS.get(model_type, 2)}
    return load_arch("tiny", config={"model_type": model_type, **SIZES, **known_kv, **keys})


def dense(model_type: str, **keys: Any) -> Mlp:
    """The feed-forward of the first layer."""
    mlp = read(model_type, **keys).layers[0][0].mlp
    assert isinstance(mlp, Mlp)
    return mlp


def experts(model_type: str, **keys: Any) -> Experts:
    """Those of the first layer."""
    mlp = read(model_type, **keys).layers[0][0].mlp
    assert isinstance(mlp, Experts)
    return mlp


def attention(model_type: str, **keys: Any) -> Attention:
    """Of the first layer."""
    return read(model_type, **keys).layers[0][0].attention


@pytest.mark.parametrize("model_type", sorted(families()))
def test_a_minimal_config_reads(model_type: str) -> None:
    arch = read(model_type)
    assert (arch.hidden, arch.vocab, arch.num_layers) == (48, 97, 3)
    assert (arch.name, arch.family) == ("tiny", model_type)
    assert arch.dtype is DType.float32
    assert "states no dtype" in arch.notes[0]


@pytest.mark.parametrize(
    ("model_type", "default"), [(k, v) for k, v in KV_DEFAULTS.items() if v and k not in ALL_HEADS]
)
def test_omitted_kv_heads_are_the_class_default(model_type: str, default: int) -> None:
    config = {"model_type": model_type, **SIZES, "num_attention_heads": 32, "hidden_size": 64}
    assert load_arch("tiny", config=config).layers[0][0].attention.kv_heads == default


@pytest.mark.parametrize("model_type", sorted(families()))
def test_null_kv_heads_are_all_heads(model_type: str) -> None:
    assert attention(model_type, num_key_value_heads=None).kv_heads == 6


@pytest.mark.parametrize(
    ("model_type", "head_dim"),
    [
        ("llama", 8),
        ("mistral", 8),
        ("qwen2", 8),
        ("phi3", 8),
        ("smollm3", 8),
        ("qwen3", 128),
        ("gemma", 256),
        ("mixtral", 8),
        ("qwen2_moe", 8),
        ("qwen3_moe", 8),
        ("granite", 8),
    ],
)
def test_omitted_head_dim(model_type: str, head_dim: int) -> None:
    assert attention(model_type).head_dim == head_dim
    assert attention(model_type, head_dim=10).head_dim == 10


@pytest.mark.parametrize("model_type", sorted(families()))
def test_omitted_tie_word_embeddings(model_type: str) -> None:
    tied = model_type in ("gemma", "smollm3")
    assert read(model_type).tied is tied
    assert read(model_type, tie_word_embeddings=not tied).tied is not tied


@pytest.mark.parametrize(
    ("model_type", "positions"),
    [
        ("llama", 2048),
        ("mistral", 131072),
        ("qwen2", 32768),
        ("qwen3", 32768),
        ("phi3", 4096),
        ("gemma", 8192),
        ("smollm3", 32768),
        ("mixtral", 131072),
        ("qwen2_moe", 32768),
        ("qwen3_moe", 32768),
        ("granite", 2048),
        ("deepseek_v3", 4096),
    ],
)
def test_omitted_max_position_embeddings(model_type: str, positions: int) -> None:
    assert read(model_type).max_positions == positions


def test_biases() -> None:
    assert (attention("qwen2").qkv_bias, attention("qwen2").out_bias) == (True, False)
    for model_type in ("llama", "qwen3", "gemma", "smollm3", "granite"):
        on, off = attention(model_type, attention_bias=True), attention(model_type)
        assert (on.qkv_bias, on.out_bias, off.qkv_bias, off.out_bias) == (True, True, False, False)
    for model_type in ("mistral", "phi3"):
        assert attention(model_type, attention_bias=True) == attention(model_type)
    assert dense("llama", mlp_bias=True).bias
    assert (attention("qwen2_moe").qkv_bias, attention("qwen2_moe", qkv_bias=False).qkv_bias) == (True, False)


def test_the_marks_of_each_family() -> None:
    assert attention("qwen3").qk_norm
    phi = read("phi3", resid_pdrop=0.1, attention_dropout=0.2, embd_pdrop=0.3)
    layer = phi.layers[0][0]
    assert (layer.attention.fused_qkv, dense("phi3").fused_gate_up) == (True, True)
    assert (layer.residual_dropout, layer.attention.dropout) == (0.1, 0.2)
    gemma = read("gemma")
    assert (gemma.norm, gemma.embed_scale, gemma.layers[0][0].mlp.activation) == (
        "rms_plus_one",
        True,
        "gelu_tanh",
    )


@pytest.mark.parametrize(
    ("keys", "activation"),
    [
        ({"hidden_act": "gelu"}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": None}, "gelu_tanh"),
        ({"hidden_act": "silu", "hidden_activation": "gelu"}, "silu"),
        ({"hidden_activation": "silu"}, "gelu_tanh"),
    ],
)
def test_gemma_reads_hidden_act_alone(keys: dict[str, Any], activation: str) -> None:
    assert read("gemma", **keys).layers[0][0].mlp.activation == activation


@pytest.mark.parametrize(
    ("keys", "rotary_dim"),
    [
        ({}, 16),
        ({"partial_rotary_factor": 0.75}, 12),
        ({"partial_rotary_factor": 0.7}, 12),  # int(16 x 0.7) = 11, frequencies come in pairs
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, 8),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.25}, 8),
        ({"rope_scaling": {"type": "longrope"}, "partial_rotary_factor": 0.25}, 4),
    ],
)
def test_phi3_rotates_a_part_of_the_head(keys: dict[str, Any], rotary_dim: int) -> None:
    assert attention("phi3", head_dim=16, **keys).rotary_dim == rotary_dim


def test_experts() -> None:
    mixtral, qwen2, qwen3 = experts("mixtral"), experts("qwen2_moe"), experts("qwen3_moe")
    assert (mixtral.number, mixtral.top_k, mixtral.size, mixtral.router) == (8, 2, 88, "softmax_fp32")
    assert (qwen2.number, qwen2.top_k, qwen2.size, qwen2.shared_size) == (60, 4, 1408, 5632)
    assert (qwen3.number, qwen3.top_k, qwen3.size, qwen3.shared_size) == (128, 8, 768, None)
    assert (mixtral.normalized, qwen3.normalized, experts("qwen3_moe", norm_topk_prob=True).normalized) == (
        True,
        False,
        True,
    )
    layers = read("qwen3_moe", mlp_only_layers=[0], decoder_sparse_step=2).layers
    assert [type(layer.mlp) for layer, count in layers for _ in range(count)] == [Mlp, Experts, Mlp]


def test_latent_attention() -> None:
    keyed = attention("deepseek_v3")
    assert keyed.latent == Latent(rank=512, rope_dim=64, value_dim=128, query_rank=1536)
    assert (keyed.head_dim, keyed.value_dim, keyed.rotary_dim) == (192, 128, 64)
    whole = attention("deepseek_v3", q_lora_rank=None).latent
    assert whole is not None
    assert whole.query_rank is None
    sparse = read("deepseek_v3", num_hidden_layers=5).layers
    assert [(type(layer.mlp), count) for layer, count in sparse] == [(Mlp, 3), (Experts, 2)]


def windows(arch: Arch) -> list[int | None]:
    return [layer.attention.window for layer, count in arch.layers for _ in range(count)]


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        ("mistral", {}, [4096] * 3),
        ("mistral", {"sliding_window": None}, [None] * 3),
        ("mistral", {"sliding_window": 7}, [7] * 3),
        ("phi3", {}, [None] * 3),
        ("phi3", {"sliding_window": 7}, [7] * 3),
        ("llama", {"sliding_window": 7}, [None] * 3),
        ("qwen2", {"sliding_window": 7}, [None] * 3),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True}, [None] * 3),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, [None, 4096, 4096]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None] * 3),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["full_attention", "sliding_attention", "attention"],
            },
            [None, 7, None],
        ),
        ("smollm3", {"sliding_window": 7}, [None] * 3),
        ("mixtral", {}, [None] * 3),
        ("mixtral", {"sliding_window": 7}, [7] * 3),
        ("qwen2_moe", {"sliding_window": 7}, [None] * 3),
        ("qwen2_moe", {"sliding_window": 7, "use_sliding_window": True}, [7, None, 7]),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 1}, [4096, None, None]),
        ("qwen3_moe", {"sliding_window": 7}, [None] * 3),
        ("qwen3_moe", {"sliding_window": 7, "use_sliding_window": True}, [7] * 3),
        (
            "smollm3",
            {"sliding_window": 7, "use_sliding_window": True, "no_rope_layer_interval": 2},
            [None, 7, None],
        ),
        (
            "smollm3",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] + ["full_attention"] * 2,
            },
            [7, None, None],
        ),
    ],
)
def test_sliding_windows(model_type: str, keys: dict[str, Any], expected: list[int | None]) -> None:
    assert windows(read(model_type, **keys)) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"num_hidden_layers": 5}, [8, 8, 8, None, 8]),
        ({"no_rope_layer_interval": 2}, [8, None, 8]),
        ({"no_rope_layers": [0, 1, 1, 0]}, [None, 8, 8]),
    ],
)
def test_smollm3_layers_without_rotation(keys: dict[str, Any], expected: list[int | None]) -> None:
    arch = read("smollm3", **keys)
    assert [layer.attention.rotary_dim for layer, count in arch.layers for _ in range(count)] == expected


def test_equal_layers_are_runs() -> None:
    assert [count for _, count in read("llama").layers] == [3]
    assert [count for _, count in read("smollm3", num_hidden_layers=9).layers] == [3, 1, 3, 1, 1]


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"dtype": "bfloat16"}, DType.bfloat16),
        ({"torch_dtype": "float16"}, DType.float16),
        ({"torch_dtype": "float16", "dtype": None}, DType.float16),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, DType.bfloat16),
        ({"dtype": "torch.float32"}, DType.float32),
    ],
)
def test_dtype_is_read_from_either_key(keys: dict[str, Any], dtype: DType) -> None:
    arch = read("llama", **keys)
    assert (arch.dtype, arch.notes) == (dtype, ())


def test_the_config_is_kept_as_sorted_json() -> None:
    arch = read("llama", dtype="bfloat16", pad_token_id=None)
    assert json.loads(arch.config) == arch.model_dump()
    assert list(arch.model_dump()) == sorted(arch.model_dump())
    assert load_arch("tiny", config=arch.model_dump()) == arch


def test_parameter_count_by_hand() -> None:
    """3 x (2 norms + q, o of 48 x 48 + k, v of 48 x 16 + 3 of 48 x 88) + norm + embedding + head."""
    layer = 2 * 48 + 2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 88
    arch = read("llama", num_key_value_heads=2)
    assert parameter_count(arch) == 3 * layer + 48 + 2 * 97 * 48
    assert parameter_count(read("llama", num_key_value_heads=2, tie_word_embeddings=True)) == 3 * layer + 48 + 97 * 48


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive whole number, not 0"),
        ({"hidden_size": -48}, "hidden_size must be a positive whole number, not -48"),
        ({"hidden_size": True}, "hidden_size must be a positive whole number, not true"),
        ({"hidden_size": 48.0}, "hidden_size must be a positive whole number, not 48.0"),
        ({"hidden_size": float("nan")}, "hidden_size must be a positive whole number, not nan"),
        ({"hidden_size": "48"}, "hidden_size must be a positive whole number, not '48'"),
        ({"hidden_size": None}, "hidden_size must be a positive whole number, not null"),
        ({"hidden_size": [48]}, "hidden_size must be a positive whole number, not [48]"),
        ({"vocab_size": 10**30}, "vocab_size is 1000000000"),
        (
            {"num_hidden_layers": 10**6},
            "num_hidden_layers is 1000000, more than the largest believable value 10,000",
        ),
        ({"hidden_size": 50}, "hidden_size (50) must be a multiple of num_attention_heads (6)"),
        (
            {"hidden_size": 50, "head_dim": 8},
            "hidden_size (50) must be a multiple of num_attention_heads (6)",
        ),
        ({"num_key_value_heads": 4}, "num_attention_heads (6) must be a multiple of num_key_value_heads (4)"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a positive whole number, not 0"),
        ({"head_dim": 7}, "head_dim is 7; rotary embeddings need an even one"),
        ({"attention_dropout": 1.5}, "attention_dropout must be a number from 0 to 1, not 1.5"),
        ({"attention_dropout": float("nan")}, "attention_dropout must be a number from 0 to 1, not nan"),
        ({"attention_dropout": True}, "attention_dropout must be a number from 0 to 1, not true"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
        ({"attention_bias": 1}, "attention_bias must be true or false, not 1"),
        ({"use_cache": None}, "use_cache must be true or false, not null"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not modelled"),
        ({"hidden_act": None}, "hidden_act null is not modelled"),
        ({"torch_dtype": "int8"}, "torch_dtype must be a floating-point type, not 'int8'"),
        ({"dtype": "auto"}, "dtype 'auto' is not a known element type; use bfloat16"),
        ({"dtype": 16}, "dtype must be the name of an element type, not 16"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder true is not modelled"),
        ({"output_attentions": True}, "output_attentions true is not modelled"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        ({"quantization_config": 4}, "quantization_config must be an object, not 4"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"rms_norm_eps": float("inf")}, "cannot be written as JSON"),
        ({"some_object": object()}, "cannot be written as JSON"),
    ],
)
def test_a_wrong_value_is_one_line(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(RequestError) as caught:
        read("llama", **keys)
    message = str(caught.value)
    assert message.startswith("config of tiny: ")
    assert line in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("model_type", "keys", "line"),
    [
        (
            "qwen2",
            {"layer_types": ["full_attention"]},
            "layer_types has 1 entries but num_hidden_layers is 3",
        ),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "needs use_sliding_window true"),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, "layer type 'linear_attention'; modelled"),
        ("qwen2", {"layer_types": "full_attention"}, "layer_types must be a list"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers must be a whole number from 0, not -1"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be a positive"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a positive whole number, not 0"),
        ("mistral", {"hidden_size": 50}, "where head_dim is not given"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not modelled"),
        ("phi3", {"partial_rotary_factor": 0}, "partial_rotary_factor must be above 0 and at most 1, not 0"),
        ("phi3", {"partial_rotary_factor": 0.1}, "leaves nothing to rotate"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor must be above 0"),
        ("phi3", {"rope_scaling": [1]}, "rope_scaling must be an object, not [1]"),
        ("phi3", {"resid_pdrop": -0.1}, "resid_pdrop must be a number from 0 to 1"),
        (
            "smollm3",
            {"no_rope_layers": [1, 0]},
            "no_rope_layers must hold a 0 or a 1 for each of the 3 layers",
        ),
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers must hold a 0 or a 1"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval must be a positive"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 3}, "needs use_sliding_window true"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but there are 8 experts"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is not modelled; set it to 0"),
        ("mixtral", {"output_router_logits": True}, "the router's auxiliary loss) is not modelled"),
        ("mixtral", {"experts_implementation": "eager"}, "'eager' is not modelled; modelled: grouped_mm"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 3}, "needs use_sliding_window true"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave false is not modelled"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads other than num_attention_heads"),
        ("deepseek_v3", {"head_dim": 128}, "head_dim, where it is given, must be qk_rope_head_dim (64)"),
        ("deepseek_v3", {"n_group": 3}, "n_group (3) must divide n_routed_experts (256)"),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace must be a whole number from 0, not -1"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; rotary embeddings need an even one"),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers must be a list of layers' numbers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive"),
    ],
)
def test_a_wrong_value_of_one_family(model_type: str, keys: dict[str, Any], line: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(model_type, **keys)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", sorted(SIZES))
@pytest.mark.parametrize("model_type", sorted(families()))
def test_a_missing_size_is_named(model_type: str, key: str) -> None:
    config = {"model_type": model_type, "num_key_value_heads": ALL_HEADS.get(model_type, 2), **SIZES}
    del config[key]
    with pytest.raises(RequestError, match=f"config of tiny: {key} is missing"):
        load_arch("tiny", config=config)


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ({"auto_map": {"AutoConfig": "code.Config"}}, "names code of its own (auto_map), which is never run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "of a quantized checkpoint ('gptq')"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "names LlamaForSequenceClassification"),
    ],
)
def test_what_changes_the_reading_is_a_note(keys: dict[str, Any], note: str) -> None:
    plain, noted = read("llama", dtype="bfloat16"), read("llama", dtype="bfloat16", **keys)
    assert noted.layers == plain.layers
    assert [note in text for text in noted.notes] == [True]


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"model_type": "falcon"},
            "model_type 'falcon' is not modelled yet; modelled: deepseek_v3, gemma, granite, llama, mistral",
        ),
        ({"model_type": "mllama", "text_config": {}}, "is a multi-modal model, not modelled yet"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "x.y"}}, "auto_map), which is never run"),
    ],
)
def test_other_families_are_refused_with_what_can_be_done(config: dict[str, Any], line: str) -> None:
    with pytest.raises(Unsupported) as caught:
        load_arch("tiny", config=config)
    assert line in str(caught.value)
    assert "profile --device meta" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"num_hidden_layers": 2}, {"num_hidden_layers": 2}),
        ({"rope_parameters.factor": 8.0}, {"rope_parameters": {"factor": 8.0}}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "float32"}),
        ({"initializer_range": 0.1}, {"initializer_range": 0.1}),
    ],
)
def test_overrides_replace_keys(overrides: dict[str, Any], expected: dict[str, Any]) -> None:
    arch = load_arch("llama-7b", overrides=overrides)
    assert expected.items() <= arch.model_dump().items()


def test_an_override_changes_what_is_read() -> None:
    arch = load_arch("llama-7b", overrides={"num_hidden_layers": 2, "use_cache": False, "torch_dtype": "bfloat16"})
    assert (arch.num_layers, arch.use_cache, arch.dtype) == (2, False, DType.bfloat16)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"num_layer": 2}, "model.num_layer: llama configs have no such key; did you mean num_"),
        ({"sliding_window": 2}, "model.sliding_window: llama configs have no such key"),
        ({"": 2}, "llama configs have no such key"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers must be a positive whole number, not 'two'"),
        ({"model_type": "falcon"}, "model_type 'falcon' is not modelled yet"),
        ({"output_hidden_states": True}, "output_hidden_states true is not modelled"),
    ],
)
def test_a_wrong_override_is_one_line(overrides: dict[str, Any], line: str) -> None:
    with pytest.raises(PeftplanError) as caught:
        load_arch("llama-7b", overrides=overrides)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_family_file_declares_itself() -> None:
    assert list(families()) == [
        "deepseek_v3", "gemma", "granite", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3",
        "qwen3_moe", "smollm3",
    ]  # fmt: skip
    for model_type, family in families().items():
        assert model_type in family.model_types
        assert family.keys >= COMMON_KEYS
