"""Axolotl: `axolotl train FILE`, a nested YAML (0.19.0, utils/schemas/config.py: AxolotlInputConfig).

Reads: configs since 2023, with the older switches for attention and FSDP. Writes: the YAML and the command.
Defaults that move memory: one sequence of 512 tokens, bf16 weights under bf16 autocast, no checkpointing, fused AdamW,
fused LoRA kernels where no key says otherwise, adapters in fp32, and norms, embeddings and head of a packed base cast
back to the model's dtype (loaders/model.py, _configure_embedding_dtypes).
Not expressed: weights trained in pure bf16, methods other than full, LISA, LoRA and its
variants, ReLoRA and BitFit.
Approximated: with `attn_implementation: sdpa` or `eager`, full fine-tuning holds norms, embeddings and head in fp32;
they are priced in the model's dtype (errs low).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import yaml

from peftplan.job import Job
from peftplan.trainers import _accelerate, _huggingface, _optimizers
from peftplan.trainers import _axolotl as own
from peftplan.trainers import _axolotl_step as step
from peftplan.trainers._liger import axolotl_liger
from peftplan.trainers._shared import deepspeed_file, knobs, less, lisa, lora_plus, more, startable
from peftplan.trainers.base import TORCHRUN, Folder, Run, Trainer
from peftplan.trainers.rules import Config, Fields, StandIn, always, custom, does, same

_LORA = knobs(
    {
        "lora_r": "rank",
        "lora_alpha": "method.lora_alpha",
        "lora_dropout": "method.lora_dropout",
        "lora_modules_to_save": "method.modules_to_save",
        "lora_rank_pattern": "method.rank_pattern",
        "lora_alpha_pattern": "method.alpha_pattern",
        "peft_layers_to_transform": "method.layers_to_transform",
        "peft_layers_pattern": "method.layers_pattern",
        "peft_use_dora": "method.use_dora",
        "peft_use_rslora": "method.use_rslora",
        "peft_init_lora_weights": "method.init_lora_weights",
    },
    method=("lora", "relora"),
    where=own.is_lora,
    defaults={"method.lora_dropout": 0.0},
    otherwise={"method.lora_alpha": 8, "method.lora_dropout": 0.0},
)


def _accumulation(config: Config) -> Fields:
    """utils/config/__init__.py, normalize_config: `batch_size` is what accumulates, where it is given."""
    steps, batch = config.get("gradient_accumulation_steps"), config.get("batch_size")
    if steps is None and batch is not None:
        steps = max(1, batch // (config.get("micro_batch_size") or 1))
    return {} if steps is None else {"grad_accum": steps}


@final
class Axolotl(Trainer):
    name = "axolotl"
    title = "Axolotl"
    homepage = "https://docs.axolotl.ai"
    requirements = ("axolotl==0.19.0", "transformers==5.16.1", "peft==0.20.0", "accelerate==1.13.0")
    signature = frozenset({
        "base_model", "sequence_len", "micro_batch_size", "adapter", "sample_packing", "lora_target_linear", "lora_r",
        "load_in_4bit", "datasets", "pad_to_sequence_len", "val_set_size", "flash_attention",
    })  # fmt: skip
    proved = (
        "On the CPU with a tiny random model: full, BitFit, LoRA, DoRA, QLoRA (nf4) and int8, 8-bit AdamW, in one "
        "process: trained and saved counts and the optimizer's bytes are those of the estimate. Only parsed: flash "
        "attention and packing, fused kernels, Liger, LISA, ReLoRA and FSDP; its processes, where there are several, "
        "want a GPU. DeepSpeed is not installed where this is tested. Axolotl's validation accepts any key: a "
        "misspelt one is found by the list of its schema's keys."
    )
    dataset_keys = ("datasets",)
    beside = ("gpus", "nodes")
    half_on_cpu = False
    whole = frozenset({"lora_rank_pattern", "lora_alpha_pattern", "special_tokens", "added_tokens_overrides"})
    harmless = _huggingface.HARMLESS | {
        "trl.*", "ebft.*", "vllm.*", "skip_prepare_dataset", "processor_type", "eta_min",
        "adam_*", "auto_resume_from_checkpoints", "base_model_config", "base_model_ignore_patterns", "chat_template*",
        "comet_*", "cosine_*", "curriculum_sampling", "dataset*", "ddp*", "default_system_message",
        "early_stopping_*", "embedding_lr*", "eot_tokens", "evals_per_epoch", "excess_length_strategy",
        "fsdp_version", "gc_*", "hf_use_auth_token", "include_t*", "is_*_derived_model", "jagged_*",
        "lora_fan_in_fan_out", "lora_model_dir", "loraplus_lr_embedding", "loss_watchdog_*", "low_cpu_mem_usage",
        "lr_*", "merge_*", "min_sample_len", "mlflow_*", "model_type", "noisy_embedding_alpha", "num_epochs",
        "optim_args*", "otel_*", "overrides_of_model_kwargs*", "peft_ensure_weight_tying", "pretraining_dataset*",
        "profiler_*", "push_dataset_to_hub", "ray_*", "relora_*", "revision_of_model", "roles_to_train",
        "sample_packing_*", "saves_per_epoch", "shuffle_*", "special_tokens*", "streaming*", "strict", "swanlab_*",
        "test_datasets*", "tokenizer_*", "tokens", "torchdistx_path", "train_on_*", "train_on_inputs",
        "type_of_model", "use_comet", "use_mlflow", "use_otel_metrics", "use_ray", "use_swanlab", "use_tensorboard",
        "use_trackio", "use_wandb", "val_set_size", "wandb_*",
    }  # fmt: skip
    instead: ClassVar[Mapping[str, StandIn]] = {
        "liger_*": less("its kernels keep fewer activations"),
        "unsloth_*": less("its kernels keep fewer activations"),
        "cut_cross_entropy": less("it never makes the logits"),
        "chunked_cross_entropy*": less("a loss in chunks never holds all logits in fp32"),
        "tiled_mlp*": less("a feed-forward in tiles holds one at a time"),
        "fused_attn_kernel": less("fused norms and rotations keep fewer activations"),
        "flash_attn_*": less("fused kernels keep fewer activations"),
        "flash_optimum": less("fused kernels keep fewer activations"),
        "torch_compile*": less("compiled graphs keep and make fewer tensors"),
        "layer_offloading": less("frozen layers lie in host memory"),
        "selective_checkpointing.offload": less("what is kept besides each layer's input lies in host memory"),
        "selective_checkpointing.save_sliding_window": more("windowed attention is kept too"),
        "rl": more("pairs of answers, and for some a reference model"),
        "reward_model": less("a reward takes the place of the vocabulary's logits"),
        "process_reward_model": less("a reward takes the place of the vocabulary's logits"),
        "neftune_noise_alpha": more("it adds noise of the embeddings' size"),
        "resize_token_embeddings_to_32x": more("the vocabulary grows by up to 31 rows"),
        "gptq*": less("the base is packed"),
        "quantize_moe_experts": less("experts are packed"),
        "peft_layer_replication": more("replicated layers have adapters and activations of their own"),
        "peft_trainable_token_indices": more("token embeddings train besides"),
        "lora_target_parameters": more("bare parameters are adapted besides"),
        "peft.loftq_config*": StandIn(errs="either way", because="only the start differs, once it is made"),
        "gpu_memory_limit": less("layers beyond the limit lie elsewhere"),
        "max_memory*": less("layers beyond the limit lie elsewhere"),
        "expert_parallel_size": less("experts are spread over GPUs"),
        "model_config.*": StandIn(errs="either way", because="the model's config is changed"),
        "fp8*": less("products in fp8 keep smaller inputs"),
        "qat*": more("weights are quantized on the fly"),
    }
    rules = (
        same("base_model", "model"),
        custom(
            ("adapter", "unfrozen_parameters", "relora", "relora_cpu_offload", "jagged_restart_steps"),
            ("method", "method.train", "method.cpu_offload", "method.restart_steps"),
            read=own.read_method,
            write=own.write_method,
            stand_ins=own.method_stand_ins,
        ),
        _LORA,
        lisa(
            "lisa_n_layers", "lisa_step_interval", "all", on=own.is_lisa, also={"lisa_layers_attribute": "model.layers"}
        ),
        custom(
            ("lora_target_linear", "lora_target_modules"),
            ("target_modules",),
            read=own.read_targets,
            write=own.write_targets,
            stand_ins=own.targets_stand_ins,
        ),
        lora_plus("loraplus_lr_ratio"),
        custom(
            (
                "load_in_4bit",
                "load_in_8bit",
                "bnb_config_kwargs.bnb_4bit_quant_type",
                "bnb_config_kwargs.bnb_4bit_use_double_quant",
                "bnb_config_kwargs.bnb_4bit_compute_dtype",
            ),
            ("format", "format.double_quant", "format.blocksize", "format.compute_dtype"),
            read=own.read_format,
            write=own.write_format,
            stand_ins=own.format_stand_ins,
        ),
        does("format.prepare", False, when=own.is_packed),
        custom(
            ("bf16", "fp16", "bfloat16", "float16", "float32"),
            ("dtype", "precision"),
            read=own.read_precision,
            write=own.write_precision,
        ),
        custom(
            ("peft_autocast_adapter_dtype",),
            ("adapter_dtype",),
            read=own.read_adapter_dtype,
            write=own.write_adapter_dtype,
        ),
        same("micro_batch_size", "micro_batch", default=1),
        custom(
            ("gradient_accumulation_steps", "batch_size"),
            ("grad_accum",),
            read=_accumulation,
            write=lambda fields: {"gradient_accumulation_steps": fields["grad_accum"]},
            defaults={"grad_accum": 1},
        ),
        same("sequence_len", "seq_len", default=512),
        custom(
            ("attn_implementation", *step.LEGACY_ATTENTION),
            ("attention",),
            read=step.read_attention,
            write=step.write_attention,
            stand_ins=step.attention_stand_ins,
        ),
        custom(
            ("sample_packing", "pad_to_sequence_len", "batch_flattening"),
            ("batching",),
            read=step.read_batching,
            write=step.write_batching,
            stand_ins=step.batching_stand_ins,
        ),
        custom(
            step.RECOMPUTES,
            ("recompute", "recompute.use_reentrant", "recompute.offload", "recompute.save"),
            read=step.read_recompute,
            write=step.write_recompute,
            stand_ins=step.recompute_stand_ins,
        ),
        _optimizers.optimizer("optimizer", others=step.OPTIMIZERS, also=step.MODELLED),
        custom(step.KERNELS, (), read=lambda _: {}, write=step.write_kernels, stand_ins=step.kernels_stand_ins),
        axolotl_liger(),
        custom(("plugins",), (), read=lambda _: {}, write=lambda _: {}, stand_ins=step.plugins_stand_ins),
        custom(
            step.LAYOUT_KEYS,
            ("layout", "offload"),
            read=step.read_layout,
            write=step.write_layout,
            stand_ins=step.layout_stand_ins,
        ),
        always("loop.outputs_until", "loss"),
        always("model.use_cache", False),
    )

    def settled(self, full: Job, *, asked: Job) -> Job:
        """bf16 weights under autocast, where the job leaves it open: what `bf16: auto` does on a GPU that has it."""
        if asked.precision not in (None, "bf16-mixed", "fp16-mixed") or (asked.precision, full.dtype) == (
            None,
            "float32",
        ):
            return full
        half = "float16" if "fp16" in (asked.precision or "") or asked.dtype in ("float16", "fp16") else "bfloat16"
        dtype = full.dtype if asked.dtype is not None else half
        precision = asked.precision or ("fp16-mixed" if half == "float16" else "bf16-mixed")
        return full.model_copy(update={"dtype": dtype, "precision": precision})

    def refuse(self, fields: Fields) -> None:
        startable(fields)

    def run_keys(self, run: Run) -> Config:
        local = run.dataset is None or run.dataset.endswith((".json", ".jsonl"))
        data: dict[str, Any] = {"path": run.dataset} | ({"ds_type": "json"} if local else {})
        steps = {} if run.max_steps is None else {"max_steps": run.max_steps}
        return {
            "datasets": [{**data, "type": "chat_template", "field_messages": "messages"}],
            "output_dir": run.output_dir,
            "num_epochs": 1,
            **steps,
            "learning_rate": run.learning_rate,
            "lr_scheduler": "cosine",
            "seed": run.seed,
        }

    def folder(self, job: Job, run: Run) -> Folder:
        files = {"axolotl.yaml": yaml.safe_dump(self.config(job, run), sort_keys=False)}
        files |= deepspeed_file(job)
        several = TORCHRUN.replace("torchrun", "torchrun --", 1) if _accelerate.spreads(job) else "python"
        command = f"axolotl train axolotl.yaml --launcher {several}"
        return Folder(files=files, command=command, program="-m axolotl.cli.train axolotl.yaml")


TRAINER = Axolotl
