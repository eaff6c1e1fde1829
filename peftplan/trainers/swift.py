"""ms-swift: `swift sft FILE`, a flat YAML of SftArguments (4.6.0, arguments/sft_args.py).

Reads: YAML configs, with the older names of `tuner_type`. Writes: the YAML and the command.
Defaults that move memory: LoRA of rank 8 with dropout 0.05 on all linear layers, one sequence, 16 sequences a step,
checkpointing on and reentrant, autocast in the weights' dtype, logits of the answers only, fused AdamW.
Not expressed: methods other than full, LISA, LLaMA-Pro, BitFit, LoRA and its variants, VeRA on one module, FourierFT,
BOFT and IA3; padded rows where there is one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import yaml

from peftplan.job import Job
from peftplan.trainers import _huggingface, _optimizers
from peftplan.trainers import _swift as own
from peftplan.trainers._liger import liger
from peftplan.trainers._shared import deepspeed_file, knobs, less, lisa, lora_plus, more, startable, write_recompute
from peftplan.trainers.base import Folder, Run, Trainer
from peftplan.trainers.rules import Config, Fields, StandIn, always, custom, does, same, words

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
_FOURIER = knobs(
    {"fourier_n_frequency": "method.n_frequency"},
    method="fourierft",
    where=own.is_fourier,
    defaults={"method.n_frequency": 2000},
    otherwise={"method.n_frequency": 1000},
)
_BOFT = knobs(
    {
        "boft_block_size": "method.boft_block_size",
        "boft_block_num": "method.boft_block_num",
        "boft_n_butterfly_factor": "method.boft_n_butterfly_factor",
        "boft_dropout": "method.boft_dropout",
    },
    method="boft",
    where=own.is_boft,
    defaults={"method.boft_block_size": 4},
    otherwise={"method.boft_block_size": 4, "method.boft_block_num": 0, "method.boft_n_butterfly_factor": 1},
)
_PRO = knobs(
    {"llamapro_num_new_blocks": "method.num_new_blocks", "llamapro_num_groups": "method.num_groups"},
    method="llama_pro",
    where=own.is_pro,
    defaults={"method.num_new_blocks": 4},
    otherwise={"method.num_new_blocks": 8},
)


@final
class Swift(Trainer):
    name = "swift"
    title = "ms-swift"
    homepage = "https://swift.readthedocs.io"
    requirements = ("ms-swift==4.6.0", "transformers==5.19.0", "peft==0.20.0", "trl==0.29.1", "accelerate==1.15.0")
    signature = frozenset({
        "tuner_type", "train_type", "sft_type", "torch_dtype", "attn_impl", "split_dataset_ratio", "quant_bits",
        "quant_method", "lora_rank", "target_modules", "model", "model_type", "use_hf", "padding_free", "max_length",
    })  # fmt: skip
    proved = (
        "On the CPU with a tiny random model: full, BitFit, LoRA, DoRA, QLoRA (nf4), IA3, VeRA, BOFT and "
        "FourierFT in one process: trained and saved counts and the optimizer's bytes are those of the estimate; LoRA "
        "on two processes, with DDP and FSDP2; every example config written back is accepted "
        "by its parser. Only parsed: flash attention and packing, Liger, GaLore, LISA, LLaMA-Pro; DeepSpeed is not "
        "installed where this is tested."
    )
    dataset_keys = ("dataset",)
    beside = ("gpus", "nodes")
    harmless = _huggingface.HARMLESS | {
        "ENV*", "acc_strategy", "adam_*", "adapters", "add_version", "agent_template", "cached_*", "check_model",
        "columns", "create_checkpoint_symlink", "custom_register_path", "dataset*", "ddp_*", "early_stop*",
        "enable_thinking", "external_plugins", "freeze_aligner", "freeze_llm", "freeze_vit", "galore_*",
        "ignore_args_error", "interleave_prob", "lazy_tokenize", "load_args", "load_data_args",
        "load_from_cache_file", "lorap_emb_lr", "loss_scale", "lr_scheduler*", "max_epochs", "max_new_tokens",
        "max_shard_size", "metric*", "model_author", "model_name", "model_type", "packing_length", "packing_num_proc",
        "packing_strategy", "predict_with_generate", "response_prefix", "resume_*", "safe_serialization",
        "shuffle_buffer_size", "split_dataset_ratio", "stopping_strategy", "streaming", "strict", "swanlab_*",
        "system", "task_type", "temperature", "template", "template_backend", "train_dataloader_shuffle",
        "truncation_strategy", "use_chat_template", "use_flash_ckpt", "use_hf", "val_dataset*", "vera_d_initial",
        "vera_projection_prng_key", "fourier_scaling", "vit_gradient_checkpointing",
    }  # fmt: skip
    instead: ClassVar[Mapping[str, StandIn]] = {
        "use_galore": less("its states are of low rank"),
        "optimizer": StandIn(errs="either way", because="an optimizer of ms-swift's own is priced as `optim` says"),
        "sequence_parallel_size": less("a row is spread over GPUs"),
        "tuner_backend": less("unsloth's kernels keep fewer activations"),
        "torch_compile*": less("compiled graphs keep and make fewer tensors"),
        "new_special_tokens": more("the vocabulary grows"),
        "target_parameters": more("bare parameters are adapted besides"),
        "activation_cpu_offload": less("what backward needs lies in host memory"),
        "device_map": less("layers lie on several devices"),
        "max_memory": less("layers lie on several devices"),
        "neftune_noise_alpha": more("it adds noise of the embeddings' size"),
    }
    rules = (
        same("model", "model"),
        liger("use_liger_kernel", config="liger_kernel_config"),
        custom(
            (
                "tuner_type",
                "train_type",
                "sft_type",
                "freeze_parameters_ratio",
                "freeze_parameters",
                "freeze_parameters_regex",
                "trainable_parameters",
                "trainable_parameters_regex",
            ),
            ("method", "method.train", "method.feedforward_modules", "method.expand"),
            read=own.read_method,
            write=own.write_method,
            stand_ins=own.method_stand_ins,
        ),
        _LORA,
        _VERA,
        _FOURIER,
        _BOFT,
        _PRO,
        lisa("lisa_activated_layers", "lisa_step_interval", "active", on=own.is_lisa),
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
                "quant_method",
                "quant_bits",
                "bnb_4bit_quant_type",
                "bnb_4bit_use_double_quant",
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
            write=write_recompute,
        ),
        _optimizers.optimizer(),
        custom(
            ("use_logits_to_keep",),
            (),
            read=lambda _: {},
            write=lambda _: {"use_logits_to_keep": False},
            stand_ins=own.logits_stand_ins,
        ),
        does("format.prepare", False, when=own.is_packed),
        custom((), (), read=lambda _: {}, write=own.write_layout),
        _huggingface.layout(),
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

    def refuse(self, fields: Fields) -> None:
        startable(fields)

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
        files = {"swift.yaml": yaml.safe_dump(self.config(job, run), sort_keys=False), **deepspeed_file(job)}
        return Folder(files=files, command="swift sft swift.yaml")


TRAINER = Swift
