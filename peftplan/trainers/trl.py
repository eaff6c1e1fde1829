"""TRL: `trl sft --config FILE`, a flat YAML of SFTConfig, ModelConfig and ScriptArguments.

Reads: the YAML; beside it an accelerate YAML or a DeepSpeed JSON.
Writes: the YAML, an accelerate YAML where there are several GPUs, and the command.
Not expressed: methods other than full and LoRA with rsLoRA and DoRA; initialisations such as PiSSA.
Defaults: bf16 autocast, gradient checkpointing, float32 weights, 1,024 tokens, torch's fused AdamW, LoRA of rank 16
with 5 % dropout (trl 1.16.0: trainer/base_config.py, sft_config.py, model_config.py).
Does: never calls prepare_model_for_kbit_training, but holds the adapter of a quantized base in bf16; computes 4-bit
layers in `dtype`; builds no KV cache; never holds whole logits, unless labels are smoothed (trainer/sft_trainer.py,
trainer/utils.py: get_quantization_config, add_fused_lm_head).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import yaml

from peftplan.errors import RequestError, Unsupported
from peftplan.job import Job
from peftplan.trainers import _accelerate, _huggingface, _optimizers, _recompute
from peftplan.trainers.base import Folder, Run, Trainer
from peftplan.trainers.rules import Config, Fields, Inexpressible, StandIn, always, custom, does, keeps, same, unpriced
from peftplan.units import parse_dtype

_FLAGS = {"use_rslora": "method.use_rslora", "use_dora": "method.use_dora"}
_KNOBS = {
    "lora_alpha": "method.lora_alpha", "lora_dropout": "method.lora_dropout",
    "lora_modules_to_save": "method.modules_to_save", **_FLAGS,
}  # fmt: skip
_OLD_NAMES = {"torch_dtype": "dtype", "max_seq_length": "max_length", "use_liger": "use_liger_kernel"}
"""Until TRL 0.20."""
_OTHER_TRAINERS = (
    "beta", "max_prompt_length", "max_completion_length", "num_generations", "desirable_weight", "reward_model_path",
    "ref_model_mixup_alpha", "precompute_ref_log_probs",
)  # fmt: skip
"""Keys of the configs of TRL's other trainers (DPOConfig, GRPOConfig, KTOConfig, ...)."""
_MULTIPLE = StandIn(errs="low", because="rows grow by less than that many tokens")
_LORA_KEYS = ("lora_r", "lora_target_modules", *_KNOBS)


def _read_method(config: Config) -> Fields:
    if not config.get("use_peft"):
        return {} if config.get("use_peft") is None else {"method": "full"}
    found = {
        field: config[key] for key, field in _KNOBS.items() if config.get(key) is not None and config[key] is not False
    }
    targets = config.get("lora_target_modules")
    return {
        "method": "lora",
        **({"rank": config["lora_r"]} if config.get("lora_r") else {}),
        **({"target_modules": targets} if targets else {}),
        **found,
    }


def _lora_defaults(config: Config) -> Fields:
    return {"rank": 16, "method.lora_dropout": 0.05} if config.get("use_peft") else {"method": "full"}


def _write_method(fields: Fields) -> Config:
    if fields["method"] not in ("full", "lora"):
        raise Inexpressible("method", fields["method"])
    if fields["method"] == "full":
        return {"use_peft": False}
    targets = fields["target_modules"]
    knobs = {key: _plain(fields[field]) for key, field in _KNOBS.items() if field in fields}
    return {
        "use_peft": True,
        "lora_r": fields["rank"],
        "lora_target_modules": _plain(targets),
        "lora_dropout": 0.0,
        **knobs,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read_length(config: Config) -> Fields:
    return {} if config.get("max_length") is None else {"seq_len": config["max_length"]}


def _unbounded(config: Config) -> Mapping[str, str]:
    if config.get("max_length", 1024) is not None:
        return {}
    return {"max_length": StandIn(value=1024, errs="low", because="longer rows are not cut").why("seq_len")}


def _read_batching(config: Config) -> Fields:
    wrapped = config.get("packing_strategy") == "wrapped"
    if config.get("packing") and wrapped and not config.get("padding_free"):
        return {"batching": "exact"}
    if config.get("packing") or config.get("padding_free"):
        return {"batching": "packed"}
    return {"batching": "padded" if config.get("per_device_train_batch_size", 8) > 1 else "exact"}


def _write_batching(fields: Fields) -> Config:
    batching, several = fields["batching"], fields["micro_batch"] > 1
    if batching == "padded" and not several:
        raise Inexpressible("batching", "padded with --micro-batch 1")
    if batching == "exact" and several:
        return {"packing": True, "packing_strategy": "wrapped"}
    packed = {"packing": True, "packing_strategy": "bfd"}
    return packed if batching == "packed" else {"packing": False, "padding_free": False}


def _free(config: Config) -> Mapping[str, str]:
    if not config.get("padding_free") or config.get("packing"):
        return {}
    why = StandIn(value="packed", errs="high", because="rows count with their own lengths, and are not cut")
    return {"padding_free": why.why("batching")}


def _read_adapter_dtype(config: Config) -> Fields:
    trains = config.get("use_peft") and _huggingface.is_quantized(config)
    return {"adapter_dtype": "bfloat16"} if trains else {}


def _write_adapter_dtype(fields: Fields) -> Config:
    asked = fields.get("adapter_dtype")
    if asked is not None and parse_dtype(asked).label != ("bfloat16" if "format" in fields else "float32"):
        raise Inexpressible("adapter_dtype", asked)
    return {}


def _magnitudes(config: Config) -> Mapping[str, str]:
    if not (config.get("use_dora") and _huggingface.is_quantized(config)):
        return {}
    return {
        "use_dora": "magnitudes stay in fp32 while the rest is bf16; priced as bf16, which errs low by 2 bytes each"
    }


def _read_compute(config: Config) -> Fields:
    dtype = config.get("dtype", "float32")
    if dtype == "auto" and config.get("load_in_4bit"):
        raise RequestError("dtype: auto is no compute dtype of 4-bit layers; write bfloat16, float16 or float32")
    return {"format.compute_dtype": dtype} if config.get("load_in_4bit") else {}


def _write_compute(fields: Fields) -> Config:
    asked = fields.get("format.compute_dtype")
    if asked is not None and parse_dtype(asked) is not parse_dtype(fields["dtype"]):
        raise Inexpressible("format.compute_dtype", f"{asked} with --dtype {fields['dtype']}")
    return {}


def _storage(fields: Fields) -> Config:
    """FSDP shards only what is stored in the dtype of the rest; uint8 would leave the base whole on every GPU."""
    if fields.get("format") == "int8" and "fsdp" in str(fields.get("layout")):
        raise Inexpressible("format", "int8 with --layout fsdp")
    sharded = fields.get("format") in ("nf4", "fp4") and "fsdp" in str(fields.get("layout"))
    return {"bnb_4bit_quant_storage": fields["dtype"]} if sharded else {}


def _refuse_others(config: Config) -> Fields:
    other = next((key for key in _OTHER_TRAINERS if config.get(key) is not None), None)
    if other is not None:
        raise Unsupported(f"{other} is a key of TRL's preference or reward training; only `trl sft` is modelled")
    return {}


def _loss(config: Config) -> Fields:
    return {"loss.style": "shifted_labels" if config.get("label_smoothing_factor") else "fused_head"}


def _smoothed(config: Config) -> Mapping[str, str]:
    if not config.get("label_smoothing_factor"):
        return {}
    because = "the smoothed loss holds whole logits and other copies of them"
    return {
        "label_smoothing_factor": StandIn(value="shifted_labels", errs="either way", because=because).why("loss.style")
    }


@final
class Trl(Trainer):
    name = "trl"
    title = "TRL"
    homepage = "https://huggingface.co/docs/trl"
    requirements = (
        "trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0",
    )  # fmt: skip
    signature = frozenset({
        "use_peft", "lora_r", "lora_target_modules", "max_length", "use_bnb_nested_quant", "packing_strategy",
        "model_name_or_path", "dataset_name",
    })  # fmt: skip
    dataset_keys = ("dataset_name", "datasets")
    renamed = _OLD_NAMES
    beside = ("gpus", "nodes", "layout", "offload")
    proved = (
        "On the CPU with a tiny random model: full, LoRA, rsLoRA, DoRA, QLoRA (nf4) and int8 in one process, "
        "packed rows too; full and LoRA over two processes with DDP, FSDP2 and DeepSpeed (ZeRO-2 for LoRA, ZeRO-3 "
        "for both, with offload for full), QLoRA with FSDP2. Trained parameters, saved adapter and, in one "
        "process, optimizer states are peftplan's numbers exactly. Only parsed: flash attention, Liger, more "
        "nodes."
    )
    harmless = _huggingface.HARMLESS | {
        "dataset*", "ignore_bias_buffers", "chat_template_path", "chat_template", "eos_token", "pad_token", "streaming",
        "test_split_size", "truncation_mode", "shuffle_dataset", "eval_packing", "completion_only_loss",
        "assistant_only_loss", "use_cache", "loss_type", "lora_task_type", "router_aux_loss_coef",
        "ddp_broadcast_buffers",
    }  # fmt: skip
    rules = (
        custom(_OTHER_TRAINERS, (), read=_refuse_others, write=lambda _: {}),
        same("model_name_or_path", "model"),
        custom(
            ("use_peft", *_LORA_KEYS),
            ("method", "rank", "target_modules", "method.bias", *_KNOBS.values()),
            read=_read_method,
            write=_write_method,
            defaults=_lora_defaults,
        ),
        unpriced("lora_target_parameters", StandIn(errs="low", because="it trains more")),
        _huggingface.weights(default="float32"),
        _huggingface.mixed_precision(bf16_by_default=True),
        _huggingface.bits_and_bytes(nested="use_bnb_nested_quant"),
        custom((), ("format.compute_dtype",), read=_read_compute, write=_write_compute),
        does("format.prepare", False, when=_huggingface.is_quantized),
        custom(
            ("bnb_4bit_quant_storage",),
            (),
            read=lambda _: {},
            write=_storage,
            stand_ins=lambda config: keeps(config, "bnb_4bit_quant_storage"),
        ),
        custom((), ("adapter_dtype",), read=_read_adapter_dtype, write=_write_adapter_dtype, stand_ins=_magnitudes),
        *_huggingface.batches(),
        custom(
            ("max_length",),
            ("seq_len",),
            read=_read_length,
            write=lambda fields: {"max_length": fields["seq_len"]},
            defaults={"seq_len": 1024},
            stand_ins=_unbounded,
        ),
        custom(
            ("packing", "packing_strategy", "padding_free"),
            ("batching",),
            read=_read_batching,
            write=_write_batching,
            stand_ins=_free,
        ),
        unpriced("pad_to_multiple_of", _MULTIPLE, off=(None, "auto")),
        *_recompute.checkpointing(default=True, selects=True, offloads=("activation_offloading",)),
        _optimizers.optimizer(),
        _huggingface.attention(),
        *_huggingface.compiled_and_fused({"fused_linear_cross_entropy": False}),  # sft_trainer.py: its own loss stays
        unpriced("model_init_kwargs.use_kernels", _huggingface.KERNELS),
        custom(
            ("label_smoothing_factor",), ("loss.style",),
            read=lambda _: {}, write=lambda _: {}, defaults=_loss, stand_ins=_smoothed,
        ),
        _huggingface.layout(),
        always("loop.outputs_until", "loss"),
        always("model.use_cache", False),
    )  # fmt: skip

    def refuse(self, fields: Fields) -> None:
        _huggingface.refuse_packed_training(fields)

    def run_keys(self, run: Run) -> Config:
        is_file = run.dataset is not None and run.dataset.endswith((".json", ".jsonl"))
        rows = [{"path": "json", "data_files": run.dataset, "split": "train"}]
        return {
            **({"datasets": rows} if is_file else {"dataset_name": run.dataset}),
            "output_dir": run.output_dir,
            **({"num_train_epochs": 1} if run.max_steps is None else {"max_steps": run.max_steps}),
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            **({"use_cpu": True} if run.on_cpu else {}),
        }

    def folder(self, job: Job, run: Run) -> Folder:
        config = self.config(job, run)
        if _accelerate.spreads(job):
            config = {key: value for key, value in config.items() if key not in _huggingface.LAYOUT_KEYS}
        files = {"sft.yaml": yaml.safe_dump(config, sort_keys=False)}
        if not _accelerate.spreads(job):
            command = "trl sft --config sft.yaml --num_processes 1"
        else:
            files |= _accelerate.files(job)
            command = f"trl sft --config sft.yaml {_accelerate.options(job, '--accelerate_config')}"
        return Folder(files=files, command=command, program="-m trl.scripts.sft --config sft.yaml")


TRAINER = Trl
