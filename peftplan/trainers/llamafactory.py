"""LLaMA-Factory: `llamafactory-cli train FILE`, a flat YAML (0.9.5, hparams/).

Reads: configs of every stage, priced as supervised training. Writes: the YAML, the dataset's entry and the command.
Defaults that move memory: LoRA of rank 8 on all linear layers, 8 sequences of 2,048 tokens, checkpointing on and
reentrant, trained weights in fp32 (full fine-tuning too, unless pure_bf16), no mixed precision unless asked, double
quantization, fused AdamW (transformers' default).
Not expressed: methods other than full, freeze, LLaMA-Pro on an expanded model, BAdam by layers, LoRA and its variants
and OFT; another dtype than the checkpoint's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import ClassVar, final

import yaml

from peftplan.job import Job
from peftplan.trainers import _accelerate, _huggingface, _optimizers
from peftplan.trainers import _llamafactory as own
from peftplan.trainers._liger import liger
from peftplan.trainers._shared import deepspeed_file, knobs, less, lora_plus, more, spread, startable
from peftplan.trainers.base import Folder, Run, Trainer
from peftplan.trainers.rules import Config, Fields, StandIn, always, custom, does, same, words

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
_BADAM = replace(knobs(
    {f"badam_{key}": f"method.{key}" for key in (
        "mode", "start_block", "switch_mode", "switch_interval", "update_ratio", "mask_mode", "verbose",
    )},
    method="badam",
    where=own.is_badam,
), stand_ins=own.unread_badam)  # fmt: skip
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
    signature = frozenset({
        "finetuning_type", "lora_target", "cutoff_len", "template", "stage", "lora_rank", "quantization_bit",
        "dataset_dir", "pure_bf16", "flash_attn", "model_name_or_path", "overwrite_cache",
        "preprocessing_num_workers", "do_train", "plot_loss",
    })  # fmt: skip
    proved = (
        "On the CPU with a tiny random model: full, freeze, LoRA, PiSSA, DoRA, QLoRA (nf4) and OFT in one process: "
        "trained and saved counts and the optimizer's bytes are those of the estimate; LoRA on two processes, with "
        "DDP and FSDP2; every example config written back is accepted by "
        "get_train_args. Only parsed: flash attention and packing, Liger, GaLore, APOLLO, BAdam; DeepSpeed is not "
        "installed where this is tested."
    )
    dataset_keys = ("dataset",)
    beside = ("gpus", "nodes")
    harmless = _huggingface.HARMLESS | {
        "asft_alpha", "tokenized_path", "gradient_checkpointing",
        "adam_*", "adapter_name_or_path", "apollo_*", "buffer_size", "cache_dir", "compute_accuracy",
        "create_new_adapter", "dataset*", "ddp_*", "default_system", "disable_shuffling", "dpo_*",
        "early_stopping_steps", "enable_thinking", "export_*", "galore_*", "hf_hub_token",
        "ignore_pad_token_for_loss", "image_*", "include_*", "infer_*", "interleave_probs", "kto_*",
        "loraplus_lr_embedding", "low_cpu_mem_usage", "lr_scheduler*", "mask_history", "max_samples", "media_dir",
        "mix_strategy", "module_dropout", "optim_args", "overwrite_*", "packed_length", "pissa_convert",
        "placement_strategy", "plot_loss", "ppo_*", "predict_with_generate", "pref_*", "preprocessing_*", "ray_*",
        "ref_model*", "resources_per_worker*", "reward_model*", "simpo_*", "streaming", "swanlab_*", "template",
        "tool_format", "train_on_prompt", "use_fast_tokenizer", "use_swanlab", "val_size", "video_*",
    }  # fmt: skip
    instead: ClassVar[Mapping[str, StandIn]] = {
        "use_unsloth_gc": less("each layer's input lies in host memory"),
        "use_unsloth": less("its kernels keep fewer activations"),
        "use_galore": less("its states are of low rank"),
        "use_apollo": less("its states are of low rank"),
        "use_adam_mini": less("it holds one second moment a block"),
        "use_muon": less("it holds one state for matrices"),
        "shift_attn": less("attention sees parts of a row"),
        "mixture_of_depths": less("some tokens skip layers"),
        "upcast_layernorm": more("norms in fp32 keep fp32 activations"),
        "upcast_lmhead_output": more("a hook makes fp32 logits besides"),
        "resize_vocab": more("the vocabulary grows"),
        "use_kt": less("experts lie in host memory"),
        "fp8*": less("products in fp8 keep smaller inputs"),
        "neftune_noise_alpha": more("it adds noise of the embeddings' size"),
        "torch_compile*": less("compiled graphs keep and make fewer tensors"),
        "use_*_loss": more("a loss of its own holds more copies of the logits"),
        "freeze_*": StandIn(errs="either way", because="parts of a multi-modal model are not priced apart"),
    }
    renamed: ClassVar[Mapping[str, str]] = {
        "use_liger_kernel": "enable_liger_kernel"
    }  # transformers' own key does the same
    rules = (
        same("model_name_or_path", "model"),
        liger("enable_liger_kernel"),
        custom(
            (
                "finetuning_type",
                "freeze_trainable_layers",
                "freeze_trainable_modules",
                "freeze_extra_modules",
                "use_llama_pro",
                "use_badam",
            ),
            ("method", "method.layers", "method.train", "method.num_new_blocks", "method.expand"),
            read=own.read_method,
            write=own.write_method,
            stand_ins=own.method_stand_ins,
        ),
        _LORA,
        _BADAM,
        custom(("lora_target", "oft_target"), ("target_modules",), read=own.read_targets, write=own.write_targets),
        custom(("additional_target",), ("method.modules_to_save",), read=own.read_saved, write=own.write_saved),
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
        _optimizers.optimizer(),
        custom(("stage",), (), read=lambda _: {}, write=lambda _: {"stage": "sft"}, stand_ins=own.stage_stand_ins),
        does("format.prepare", False, when=own.is_packed),
        custom((), (), read=lambda _: {}, write=spread),
        _huggingface.layout(),
        always("loop.outputs_until", "loss"),
        always("model.use_cache", False),
    )

    def settled(self, full: Job, *, asked: Job) -> Job:
        """bf16 autocast, on fp32 weights where the base trains; rows are padded, not packed full."""
        if asked.trainer == self.name:
            return full
        update: dict[str, str] = {}
        if asked.precision is None and full.dtype != "float32":
            update["precision"] = "bf16-mixed"
            if full.method in own.UPCAST and asked.dtype is None:
                update["dtype"] = "float32"
        if asked.batching is None and full.batching == "exact":
            update["batching"] = "padded"
        return full.model_copy(update=update)

    def refuse(self, fields: Fields) -> None:
        startable(fields)

    def run_keys(self, run: Run) -> Config:
        steps = {} if run.max_steps is None else {"max_steps": run.max_steps}
        cpu = {"use_cpu": True} if run.on_cpu else {}
        return {
            "do_train": True,
            "dataset": None if run.dataset is None else DATA,
            "dataset_dir": str(_place(run)),
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
        files = {
            "llamafactory.yaml": yaml.safe_dump(self.config(job, run), sort_keys=False),
            "dataset_info.json": json.dumps({DATA: _entry(run)}, indent=2) + "\n",
            **deepspeed_file(job),
        }
        if job.layout == "fsdp":
            files |= _accelerate.files(job)
            launch = f"accelerate launch {_accelerate.options(job)} -m llamafactory.launcher llamafactory.yaml"
            return Folder(files=files, command=launch)
        several = "env FORCE_TORCHRUN=1 " if _accelerate.spreads(job) else ""
        command = f"{several}llamafactory-cli train llamafactory.yaml"
        return Folder(files=files, command=command, program="-m llamafactory.launcher llamafactory.yaml")


def _place(run: Run) -> PurePosixPath:
    """Where dataset_info.json lies: beside the config, which a dry run puts beside its data."""
    data = PurePosixPath(run.dataset or "")
    return data.parent if run.on_cpu and not data.is_absolute() else PurePosixPath()


def _entry(run: Run) -> dict[str, object]:
    """What dataset_info.json says of rows of `{"messages": [{"role", "content"}]}` (data/README.md)."""
    local = run.dataset is None or run.dataset.endswith((".json", ".jsonl"))
    return {
        "file_name" if local else "hf_hub_url": _name(run),
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


def _name(run: Run) -> str | None:
    place = _place(run)
    return run.dataset if run.dataset is None or place == PurePosixPath() else run.dataset.removeprefix(f"{place}/")


TRAINER = LlamaFactory
