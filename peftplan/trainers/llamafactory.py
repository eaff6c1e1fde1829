"""LLaMA-Factory: `llamafactory-cli train FILE`, a flat YAML (0.9.5, hparams/).

Reads: configs of every stage, priced as supervised training. Writes: the YAML, the dataset's entry and the command.
Defaults that move memory: LoRA of rank 8 on all linear layers, 8 sequences of 2,048 tokens, checkpointing on and
reentrant, trained weights in fp32 (full fine-tuning too, unless pure_bf16), no mixed precision unless asked, double
quantization, fused AdamW (transformers' default).
Not expressed: methods other than full, freeze, LoRA and its variants and OFT; another dtype than the checkpoint's.
"""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import final

import yaml

from peftplan.job import Job
from peftplan.resolve import TRAINS_BASE
from peftplan.trainers import _llamafactory as own
from peftplan.trainers._shared import knobs, lora_plus, optim, startable
from peftplan.trainers.base import Folder, Run, Trainer
from peftplan.trainers.rules import Config, Fields, always, custom, same, words

_LORA = knobs(
    {
        "lora_rank": "rank",
        "lora_alpha": "method.lora_alpha",
        "lora_dropout": "method.lora_dropout",
        "use_rslora": "method.use_rslora",
        "use_dora": "method.use_dora",
    },
    method="lora",
    where=own.is_lora,
    defaults={"rank": 8, "method.lora_dropout": 0.0},
    otherwise={"method.lora_alpha": 8, "method.lora_dropout": 0.0},
)
DATA = "data"
"""Name of the dataset's entry in dataset_info.json, beside the config."""


@final
class LlamaFactory(Trainer):
    name = "llamafactory"
    title = "LLaMA-Factory"
    homepage = "https://llamafactory.readthedocs.io"
    requirements = (
        "llamafactory==0.9.5", "transformers==5.6.0", "peft==0.18.1", "trl==0.24.0", "accelerate==1.11.0",
    )  # fmt: skip
    signature = frozenset(
        {
            "finetuning_type", "lora_target", "cutoff_len", "template", "stage", "lora_rank", "quantization_bit",
            "dataset_dir", "pure_bf16", "flash_attn", "model_name_or_path", "overwrite_cache",
            "preprocessing_num_workers", "do_train", "plot_loss",
        }
    )  # fmt: skip
    dataset_keys = ("dataset",)
    harmless = frozenset(
        {
            "dataset*", "eval_dataset", "template", "trust_remote_code", "do_*", "max_samples", "overwrite_*",
            "preprocessing_*", "dataloader_*", "output_dir", "logging_*", "log_*", "save_*", "plot_loss", "report_to",
            "run_name", "learning_rate", "num_train_epochs", "max_steps", "lr_scheduler*", "warmup_*", "ddp_*", "seed",
            "data_seed", "resume_from_checkpoint", "val_size", "per_device_eval_batch_size", "eval_*", "weight_decay",
            "adam_*", "max_grad_norm", "streaming", "buffer_size", "mix_strategy", "interleave_probs", "mask_history",
            "train_on_prompt", "cache_dir", "use_fast_tokenizer", "model_revision", "hf_hub_token", "adapter_name_or_path",
            "create_new_adapter", "media_dir", "image_*", "video_*", "pref_*", "dpo_*", "kto_*", "simpo_*", "ppo_*",
            "ref_model*", "reward_model*", "loraplus_lr_embedding", "pissa_convert", "module_dropout", "predict_with_generate",
            "compute_accuracy", "use_swanlab", "swanlab_*", "ray_*", "resources_per_worker*", "placement_strategy",
            "use_cpu", "push_to_hub", "hub_*", "galore_*", "apollo_*", "badam_*", "default_system", "enable_thinking",
            "packed_length", "disable_shuffling", "early_stopping_steps", "include_*", "bf16_full_eval", "tf32", "optim_args",
            "ignore_pad_token_for_loss", "metric_for_best_model", "greater_is_better", "load_best_model_at_end",
            "remove_unused_columns", "group_by_length", "low_cpu_mem_usage", "tool_format", "export_*", "infer_*",
        }
    )  # fmt: skip
    instead = MappingProxyType(
        {
            "enable_liger_kernel": "Liger's kernels and loss keep less; priced as transformers' own, errs high",
            "use_liger_kernel": "Liger's kernels and loss keep less; priced as transformers' own, errs high",
            "use_unsloth_gc": "priced as recomputation that keeps each layer's input on the GPU; errs high",
            "use_unsloth": "unsloth's kernels keep fewer activations; priced as transformers' own, errs high",
            "use_galore": "low-rank states are priced as full ones; errs high",
            "use_apollo": "low-rank states are priced as full ones; errs high",
            "use_badam": "BAdam trains one block at a time; priced as if all trained, errs high",
            "use_adam_mini": "one second moment a block is priced as one a weight; errs high",
            "use_muon": "one state for matrices is priced as two; errs high",
            "shift_attn": "shifted attention is priced as the whole; errs high",
            "mixture_of_depths": "tokens that skip layers are priced as if none did; errs high",
            "upcast_layernorm": "norms are priced in the model's dtype; errs low by what fp32 norms keep",
            "upcast_lmhead_output": "a hook keeps fp32 logits beside the model's own; errs low",
            "resize_vocab": "the vocabulary is priced as it is; errs low by the new rows",
            "use_kt": "experts on the host are priced on the GPU; errs high",
            "fp8*": "fp8 matrix products are priced as bf16 ones; errs high",
            "neftune_noise_alpha": "the noise takes another copy of the embeddings' output for a moment; errs low",
            "torch_compile*": "a compiled model keeps fewer activations; priced as it runs eagerly, errs high",
            "freeze_*": "parts of a multi-modal model are not priced apart",
        }
    )
    rules = (
        same("model_name_or_path", "model"),
        custom(
            (
                "finetuning_type", "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules",
                "use_llama_pro",
            ),
            ("method", "method.layers", "method.train"),
            read=own.read_method,
            write=own.write_method,
            stand_ins=own.method_stand_ins,
        ),
        _LORA,
        custom(
            ("lora_target", "oft_target"), ("target_modules",), read=own.read_targets, write=own.write_targets
        ),
        custom(
            ("additional_target",), ("method.modules_to_save",), read=own.read_saved, write=own.write_saved
        ),
        custom(
            ("pissa_init", "pissa_iter"),
            ("method.init_lora_weights",),
            read=own.read_start,
            write=own.write_start,
        ),
        custom(
            ("oft_rank", "oft_block_size"),
            ("rank", "method.oft_block_size"),
            read=own.read_oft,
            write=own.write_oft,
        ),
        lora_plus("loraplus_lr_ratio"),
        custom(
            ("quantization_bit", "quantization_method", "quantization_type", "double_quantization"),
            ("format", "format.double_quant", "format.blocksize"),
            read=own.read_format,
            write=own.write_format,
        ),
        custom(
            ("bf16", "fp16", "pure_bf16"),
            ("dtype", "precision"),
            read=own.read_precision,
            write=own.write_precision,
        ),
        same("per_device_train_batch_size", "micro_batch", default=8),
        same("gradient_accumulation_steps", "grad_accum", default=1),
        same("cutoff_len", "seq_len", default=2048),
        words("flash_attn", "attention", own.ATTENTION, default="sdpa"),
        custom(
            ("packing", "neat_packing"),
            ("batching",),
            read=own.read_batching,
            write=own.write_batching,
            stand_ins=own.batching_stand_ins,
        ),
        custom(
            ("disable_gradient_checkpointing", "use_reentrant_gc"),
            ("recompute", "recompute.use_reentrant"),
            read=own.read_recompute,
            write=own.write_recompute,
        ),
        optim("optim", default="adamw_torch_fused"),
        custom(("stage",), (), read=lambda _: {}, write=lambda _: {"stage": "sft"}, stand_ins=own.stage_stand_ins),
        always("loop.outputs_until", "loss"),
        always("model.use_cache", False),
    )

    def settled(self, full: Job, *, asked: Job) -> Job:
        """bf16 autocast, on fp32 weights where the base trains; rows are padded, not packed full."""
        update: dict[str, str] = {}
        if asked.precision is None and full.dtype != "float32":
            update["precision"] = "bf16-mixed"
            if full.method in TRAINS_BASE and asked.dtype is None:
                update["dtype"] = "float32"
        if asked.batching is None and full.batching == "exact":
            update["batching"] = "padded"
        return full.model_copy(update=update)

    def refuse(self, full: Job, fields: Fields) -> None:
        startable(fields)
        del full

    def run_keys(self, run: Run) -> Config:
        steps = {} if run.max_steps is None else {"max_steps": run.max_steps}
        cpu = {"use_cpu": True} if run.on_cpu else {}
        return {
            "do_train": True,
            "dataset": DATA,
            "dataset_dir": ".",
            "output_dir": run.output_dir,
            "num_train_epochs": 1.0,
            **steps,
            "learning_rate": run.learning_rate,
            "lr_scheduler_type": "cosine",
            "seed": run.seed,
            "report_to": "none",
            **cpu,
        }

    def folder(self, job: Job, run: Run) -> Folder:
        text = yaml.safe_dump(self.config(job, run), sort_keys=False)
        return Folder(
            files={"llamafactory.yaml": text, "dataset_info.json": json.dumps({DATA: _entry(run)}, indent=2) + "\n"},
            command="llamafactory-cli train llamafactory.yaml",
        )


def _entry(run: Run) -> dict[str, object]:
    """What dataset_info.json says of rows of `{"messages": [{"role", "content"}]}` (data/README.md)."""
    local = run.dataset is None or run.dataset.endswith((".json", ".jsonl"))
    return {
        "file_name" if local else "hf_hub_url": run.dataset,
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }


TRAINER = LlamaFactory
