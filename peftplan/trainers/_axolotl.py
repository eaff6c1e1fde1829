"""What Axolotl's keys mean where one key is not one field. Read from axolotl 0.19.0; where, stands at each function."""

from __future__ import annotations

from typing import Any

from peftplan.errors import RequestError
from peftplan.trainers._shared import names
from peftplan.trainers.rules import Config, Fields, Inexpressible, Kept

_BIASES = ".+bias$"
_BNB = "bnb_config_kwargs."
_LORAS = ("lora", "relora")
"""Methods that are an adapter of LoRA's."""
_LINEAR = {
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
    "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "c_attn", "c_proj", "w1", "w2", "w3", "Wqkv",
}  # fmt: skip
"""What linear layers of blocks are called; `lora_target_linear` adds nothing to a list of them."""


def is_lora(config: Config) -> bool:
    return config.get("adapter") in ("lora", "qlora")


def is_lisa(config: Config) -> bool:
    """core/builders/causal.py: both keys are needed."""
    return not config.get("adapter") and bool(config.get("lisa_n_layers") and config.get("lisa_step_interval"))


# -- method -----------------------------------------------------------------------------------------------------------


def read_method(config: Config) -> Fields:
    """loaders/adapter.py, load_adapter: none is full fine-tuning; `unfrozen_parameters` freezes the rest of it."""
    adapter = config.get("adapter") or None
    if is_lisa(config):
        return {"method": "lisa"}
    if adapter is None:
        return _unfrozen(config.get("unfrozen_parameters"))
    if adapter not in ("lora", "qlora"):
        raise RequestError(f"adapter: {adapter!r} is not read; known: lora, qlora, or none for full fine-tuning")
    if not config.get("relora"):
        return {"method": "lora"}
    offload = {"method.cpu_offload": True} if config.get("relora_cpu_offload") else {}
    steps = config.get("jagged_restart_steps")
    return {"method": "relora", **offload, **({} if steps is None else {"method.restart_steps": steps})}


def _unfrozen(patterns: Any) -> Fields:
    """utils/freeze.py, LayerNamePattern: matched from the start of the name, a dot is a dot, `.+` is anything."""
    listed = names(patterns)
    if listed == (_BIASES,):
        return {"method": "bitfit"}
    inner = [pattern.removeprefix(".+").removesuffix(".bias$") for pattern in listed]
    if listed and listed == tuple(map(_bias_of, inner)):
        return {"method": "bitfit", "method.train": tuple(inner)}
    return {"method": "full"}


def _bias_of(module: str) -> str:
    return f".+{module}.bias$"


def write_method(fields: Fields) -> Config:
    method = fields["method"]
    if method in _LORAS:
        adapter = {"adapter": "qlora" if fields.get("format") in ("nf4", "fp4") else "lora"}
        return {**adapter, **(_restarts(fields) if method == "relora" else {})}
    if method in ("full", "lisa"):
        return {}
    if method == "bitfit":
        train = fields.get("method.train")
        return {"unfrozen_parameters": [_bias_of(name) for name in train] if train else [_BIASES]}
    raise Inexpressible("method", method)


def _restarts(fields: Fields) -> Config:
    return {
        "relora": True,
        "relora_cpu_offload": fields.get("method.cpu_offload", False),
        "jagged_restart_steps": fields.get("method.restart_steps", 150),
    }


def method_stand_ins(config: Config) -> Kept:
    patterns = config.get("unfrozen_parameters")
    if not patterns or read_method(config)["method"] == "bitfit":
        return {}
    if is_lora(config):
        return {"unfrozen_parameters": "weights trained beside the adapter are not priced; errs low"}
    return {"unfrozen_parameters": "priced as if every weight trained; errs high by the others' gradients and states"}


def read_targets(config: Config) -> Fields:
    """loaders/adapter.py, _build_peft_lora_config: `lora_target_linear` joins every linear layer but the head."""
    if not is_lora(config):
        return {}
    wanted = config.get("lora_target_modules")
    if config.get("lora_target_linear") is True:
        return {"target_modules": "all-linear"}
    if not wanted:
        return {}
    return {"target_modules": wanted if isinstance(wanted, str) else tuple(wanted)}


def targets_stand_ins(config: Config) -> Kept:
    wanted = config.get("lora_target_modules")
    if not (is_lora(config) and config.get("lora_target_linear") is True and wanted):
        return {}
    more = [name for name in names(wanted) if name not in _LINEAR]
    why = f"lora_target_linear is priced, without {', '.join(more)}; errs low" if more else None
    return {"lora_target_modules": why}


def write_targets(fields: Fields) -> Config:
    wanted = fields.get("target_modules")
    if fields["method"] not in _LORAS:
        return {}
    if wanted == "all-linear":
        return {"lora_target_linear": True}
    return {"lora_target_modules": list(wanted) if isinstance(wanted, tuple) else wanted}


# -- weights ----------------------------------------------------------------------------------------------------------


def read_format(config: Config) -> Fields:
    """loaders/model.py, _set_quantization_config. Norms, embeddings and head, which peft casts to fp32, are cast back
    to the model's dtype (_configure_embedding_dtypes)."""
    adapter = config.get("adapter")
    if adapter == "qlora" and config.get("load_in_4bit"):
        double = config.get(_BNB + "bnb_4bit_use_double_quant", True)
        compute = config.get(_BNB + "bnb_4bit_compute_dtype")
        found: dict[str, Any] = {"format": config.get(_BNB + "bnb_4bit_quant_type", "nf4")}
        found |= {"format.double_quant": True} if double else {}
        return found | ({"format.compute_dtype": compute} if compute else {})
    if adapter == "lora" and config.get("load_in_8bit"):
        return {"format": "int8"}
    if adapter == "qlora":
        raise RequestError("adapter: qlora needs load_in_4bit: true")
    return {}


def is_packed(config: Config) -> bool:
    return "format" in read_format(config)


def write_format(fields: Fields) -> Config:
    name = fields.get("format")
    if name is None:
        return {"load_in_4bit": False, "load_in_8bit": False}
    if fields["method"] not in _LORAS or name not in ("nf4", "fp4", "int8"):
        raise Inexpressible("format", name)
    if name == "int8":
        return {"load_in_4bit": False, "load_in_8bit": True}
    if fields.get("format.blocksize", 64) != 64:
        raise Inexpressible("format.blocksize", fields["format.blocksize"])
    bnb = {"bnb_4bit_quant_type": name, "bnb_4bit_use_double_quant": fields.get("format.double_quant", False)}
    if fields.get("format.compute_dtype"):
        bnb["bnb_4bit_compute_dtype"] = fields["format.compute_dtype"]
    return {"load_in_4bit": True, "load_in_8bit": False} | {_BNB + key: value for key, value in bnb.items()}


def format_stand_ins(config: Config) -> Kept:
    """loaders/model.py reads `load_in_4bit` for qlora and `load_in_8bit` for lora; another pair loads unpacked."""
    adapter = config.get("adapter")
    ignored = {"lora": "load_in_4bit", "qlora": "load_in_8bit"}.get(str(adapter))
    if ignored and config.get(ignored):
        return {ignored: f"Axolotl does not read it for adapter: {adapter}; priced without"}
    return {}


def read_precision(config: Config) -> Fields:
    """utils/config/__init__.py, resolve_dtype, on a GPU that has bf16; core/builders/base.py, autocast."""
    bf16, fp16 = config.get("bf16", "auto"), config.get("fp16")
    if bf16 == "full":
        return {"dtype": "bfloat16", "precision": "bf16"}
    if bf16 == "auto" or (bf16 is None and "bf16" not in config):
        bf16 = not fp16
    if bf16 or config.get("bfloat16"):
        return {"dtype": "bfloat16", "precision": "bf16-mixed"}
    if fp16:
        return {"dtype": "float16", "precision": "fp16-mixed"}
    if config.get("float16") or config.get("load_in_8bit"):
        return {"dtype": "float16", "precision": "fp16"}
    return {"dtype": "float32", "precision": "fp32"}


def write_precision(fields: Fields) -> Config:
    said = (fields["dtype"], fields["precision"])
    known = {
        ("bfloat16", "bf16-mixed"): {"bf16": True, "fp16": False},
        ("float16", "fp16-mixed"): {"bf16": False, "fp16": True},
        ("float16", "fp16"): {"bf16": False, "fp16": False, "float16": True},
        ("float32", "fp32"): {"bf16": False, "fp16": False},
    }
    if said not in known:
        raise Inexpressible("precision", f"{said[1]} on {said[0]} weights")
    return known[said]


def read_adapter_dtype(config: Config) -> Fields:
    """peft_autocast_adapter_dtype: false leaves adapters in the base's dtype; on int8 layers they are made in fp32."""
    if config.get("peft_autocast_adapter_dtype") is not False or not is_lora(config) or config.get("load_in_8bit"):
        return {}
    return {"adapter_dtype": read_precision(config)["dtype"]}


def write_adapter_dtype(fields: Fields) -> Config:
    asked = fields.get("adapter_dtype", "auto")
    if fields["method"] not in _LORAS or asked == "auto":
        return {}
    if asked == "float32":
        return {"peft_autocast_adapter_dtype": True}
    if asked != fields["dtype"] or fields.get("format") == "int8":
        raise Inexpressible("adapter_dtype", asked)
    return {"peft_autocast_adapter_dtype": False}
