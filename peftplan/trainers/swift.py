"""ms-swift: `swift sft FILE`, a flat YAML of SftArguments (4.6.0, arguments/sft_args.py).

Reads: YAML configs, with the older names of `tuner_type`. Writes: the YAML and the command.
Defaults that move memory: LoRA of rank 8 with dropout 0.05 on all linear layers, one sequence, 16 sequences a step,
checkpointing on and reentrant, autocast in the weights' dtype, logits of the answers only, fused AdamW.
Not expressed: methods other than full, BitFit, LoRA and its variants, VeRA on one module and IA3 on all; padded rows
where there is one sequence.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import final

import yaml

from peftplan.job import Job
from peftplan.trainers import _swift as own
from peftplan.trainers._shared import knobs, lora_plus, optim, startable
from peftplan.trainers.base import Folder, Run, Trainer
from peftplan.trainers.rules import Config, Fields, always, custom, same, words

_LORA = knobs(
    {
        "lora_rank": "rank",
        "lora_alpha": "method.lora_alpha",
        "lora_dropout": "method.lora_dropout",
        "lora_bias": "method.bias",
        "use_rslora": "method.use_rslora",
        "use_dora": "method.use_dora",
        "modules_to_save": "method.modules_to_save",
    },
    method="lora",
    where=own.is_lora,
    defaults={"rank": 8, "method.lora_dropout": 0.05},
    otherwise={"method.lora_alpha": 8, "method.lora_dropout": 0.0},
)
_VERA = knobs(
    {"vera_rank": "rank", "vera_dropout": "method.vera_dropout"},
    method="vera",
    where=own.is_vera,
    defaults={"rank": 256},
    otherwise={"method.vera_dropout": 0.0},
)


@final
class Swift(Trainer):
    name = "swift"
    title = "ms-swift"
    homepage = "https://swift.readthedocs.io"
    requirements = ("ms-swift==4.6.0", "transformers==5.19.0", "peft==0.20.0", "trl==0.29.1", "accelerate==1.15.0")
    signature = frozenset(
        {
            "tuner_type", "train_type", "sft_type", "torch_dtype", "attn_impl", "split_dataset_ratio", "quant_bits",
            "quant_method", "lora_rank", "target_modules", "model", "model_type", "use_hf", "padding_free", "max_length",
        }
    )  # fmt: skip
    dataset_keys = ("dataset",)
    harmless = frozenset(
        {
            "dataset*", "val_dataset*", "cached_*", "split_dataset_ratio", "template", "template_backend", "model_type",
            "model_revision", "use_hf", "hub_*", "output_dir", "add_version", "create_checkpoint_symlink", "logging_*",
            "log_*", "save_*", "eval_*", "report_to", "run_name", "learning_rate", "num_train_epochs", "max_epochs",
            "max_steps", "lr_scheduler*", "warmup_*", "weight_decay", "adam_*", "max_grad_norm", "seed", "data_seed",
            "dataloader_*", "system", "model_author", "model_name", "per_device_eval_batch_size", "load_from_cache_file",
            "streaming", "shuffle_buffer_size", "truncation_strategy", "loss_scale", "use_chat_template", "agent_template",
            "swanlab_*", "external_plugins", "custom_register_path", "resume_*", "adapters", "check_model", "ddp_*",
            "ENV*", "use_cpu", "acc_strategy", "packing_num_proc", "packing_strategy", "packing_length", "lazy_tokenize",
            "load_args", "load_data_args", "train_dataloader_shuffle", "group_by_length", "interleave_prob",
            "stopping_strategy", "strict", "remove_unused_columns", "columns", "enable_thinking", "metric*",
            "load_best_model_at_end", "predict_with_generate", "max_new_tokens", "temperature", "push_to_hub",
            "use_flash_ckpt", "vera_projection_prng_key", "vera_d_initial", "galore_*", "lisa_step_interval", "neftune_*",
            "early_stop*", "task_type", "response_prefix", "safe_serialization", "max_shard_size", "ignore_args_error",
            "freeze_vit", "freeze_aligner", "freeze_llm", "vit_gradient_checkpointing", "lorap_emb_lr", "attn_impl",
        }
    )  # fmt: skip
    instead = MappingProxyType(
        {
            "use_liger_kernel": "Liger's kernels and loss keep less; priced as transformers' own, errs high",
            "use_galore": "low-rank states are priced as full ones; errs high",
            "lisa_activated_layers": "LISA trains some layers at a time; priced as if all trained, errs high",
            "optimizer": "an optimizer of ms-swift's own is priced as `optim` says; errs either way",
            "sequence_parallel_size": "a sequence over several GPUs is not modelled; priced whole, errs high",
            "tuner_backend": "unsloth's kernels keep fewer activations; priced as transformers' own, errs high",
            "torch_compile*": "a compiled model keeps fewer activations; priced as it runs eagerly, errs high",
            "new_special_tokens": "the vocabulary is priced as it is; errs low by the new rows",
            "target_parameters": "adapters on bare parameters are not priced; errs low",
            "activation_cpu_offload": "activations are priced as if they stayed on the GPU; errs high",
            "device_map": "a model over several devices is not modelled; priced on one GPU, errs high",
            "max_memory": "a model over several devices is not modelled; priced on one GPU, errs high",
        }
    )
    rules = (
        same("model", "model"),
        custom(
            (
                "tuner_type", "train_type", "sft_type", "freeze_parameters_ratio", "freeze_parameters",
                "freeze_parameters_regex", "trainable_parameters", "trainable_parameters_regex",
            ),
            ("method", "method.train", "method.feedforward_modules"),
            read=own.read_method,
            write=own.write_method,
            stand_ins=own.method_stand_ins,
        ),
        _LORA,
        _VERA,
        custom(
            ("target_modules", "target_regex"),
            ("target_modules",),
            read=own.read_targets,
            write=own.write_targets,
            stand_ins=own.targets_stand_ins,
        ),
        custom(("init_weights",), ("method.init_lora_weights",), read=own.read_start, write=own.write_start),
        lora_plus("lorap_lr_ratio"),
        custom(
            (
                "quant_method", "quant_bits", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
                "bnb_4bit_compute_dtype",
            ),
            ("format", "format.double_quant", "format.blocksize", "format.compute_dtype"),
            read=own.read_format,
            write=own.write_format,
        ),
        custom(
            ("torch_dtype", "bf16", "fp16"),
            ("dtype", "precision"),
            read=own.read_precision,
            write=own.write_precision,
            defaults={"dtype": "bfloat16", "precision": "bf16-mixed"},
        ),
        same("lora_dtype", "adapter_dtype"),
        same("per_device_train_batch_size", "micro_batch", default=1),
        custom(
            ("gradient_accumulation_steps",),
            ("grad_accum",),
            read=own.read_accumulation,
            write=lambda fields: {"gradient_accumulation_steps": fields["grad_accum"]},
        ),
        same("max_length", "seq_len"),
        words("attn_impl", "attention", own.ATTENTION, default="sdpa"),
        custom(("packing", "padding_free"), ("batching",), read=own.read_batching, write=own.write_batching),
        custom(
            ("gradient_checkpointing", "gradient_checkpointing_kwargs.use_reentrant"),
            ("recompute", "recompute.use_reentrant"),
            read=own.read_recompute,
            write=own.write_recompute,
        ),
        optim("optim", default="adamw_torch_fused"),
        custom(
            ("use_logits_to_keep",),
            (),
            read=lambda _: {},
            write=lambda _: {"use_logits_to_keep": False},
            stand_ins=own.logits_stand_ins,
        ),
        always("loop.outputs_until", "loss"),
        always("model.use_cache", False),
    )

    def settled(self, full: Job, *, asked: Job) -> Job:
        """Autocast in the weights' dtype; IA3 on the modules that ms-swift puts it on."""
        update: dict[str, object] = {}
        if asked.precision is None and full.dtype in ("bfloat16", "float16"):
            update["precision"] = "bf16-mixed" if full.dtype == "bfloat16" else "fp16-mixed"
        if full.method == "ia3" and asked.target_modules is None and "method.feedforward_modules" not in asked.settings:
            update["target_modules"] = "all-linear"
            update["settings"] = {**full.settings, "method.feedforward_modules": own.IA3_FEEDFORWARD}
        return full.model_copy(update=update)

    def refuse(self, full: Job, fields: Fields) -> None:
        startable(fields)
        del full

    def run_keys(self, run: Run) -> Config:
        steps = {} if run.max_steps is None else {"max_steps": run.max_steps}
        cpu = {"use_cpu": True} if run.on_cpu else {}
        return {
            "use_hf": True,
            "dataset": [run.dataset],
            "split_dataset_ratio": 0.0,
            "output_dir": run.output_dir,
            "add_version": False,
            "num_train_epochs": 1.0,
            **steps,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "report_to": "none",
            **cpu,
        }

    def folder(self, job: Job, run: Run) -> Folder:
        text = yaml.safe_dump(self.config(job, run), sort_keys=False)
        return Folder(files={"swift.yaml": text}, command="swift sft swift.yaml")


TRAINER = Swift
