"""Axolotl: `axolotl train FILE`, a nested YAML (0.19.0, utils/schemas/config.py: AxolotlInputConfig).

Reads: configs since 2023, with the older switches for attention and FSDP. Writes: the YAML and the command.
Defaults that move memory: one sequence of 512 tokens, bf16 weights under bf16 autocast, no checkpointing, fused AdamW,
fused LoRA kernels where no key says otherwise, adapters in fp32, and norms, embeddings and head of a packed base cast
back to the model's dtype (loaders/model.py, _configure_embedding_dtypes).
Not expressed: weights trained in pure bf16, methods other than full, LoRA and its variants and BitFit.
Approximated: with `attn_implementation: sdpa` or `eager`, full fine-tuning holds norms, embeddings and head in fp32;
they are priced in the model's dtype (errs low).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, final

import yaml

from peftplan.job import Job
from peftplan.trainers import _axolotl as own
from peftplan.trainers._shared import knobs, lora_plus, optim, startable
from peftplan.trainers.base import Folder, Run, Trainer
from peftplan.trainers.rules import Config, Fields, Inexpressible, always, custom, same

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
    method="lora",
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


def _machines(fields: Fields) -> Config:
    if fields.get("layout") or fields.get("offload"):
        raise Inexpressible("layout", fields.get("layout") or fields["offload"])
    return {}


@final
class Axolotl(Trainer):
    name = "axolotl"
    title = "Axolotl"
    homepage = "https://docs.axolotl.ai"
    requirements = ("axolotl==0.19.0", "transformers==5.16.1", "peft==0.20.0", "accelerate==1.13.0")
    signature = frozenset(
        {
            "base_model", "sequence_len", "micro_batch_size", "adapter", "sample_packing", "lora_target_linear",
            "lora_r", "load_in_4bit", "datasets", "pad_to_sequence_len", "val_set_size", "flash_attention",
        }
    )  # fmt: skip
    dataset_keys = ("datasets",)
    whole = frozenset({"lora_rank_pattern", "lora_alpha_pattern", "special_tokens", "added_tokens_overrides"})
    harmless = frozenset(
        {
            "dataset*", "test_datasets*", "pretraining_dataset*", "shuffle_*", "chat_template*", "special_tokens*",
            "tokens", "tokenizer_*", "model_type", "is_*_derived_model", "trust_remote_code", "strict", "hub_*",
            "push_dataset_to_hub", "hf_use_auth_token", "output_dir", "wandb_*", "use_wandb", "mlflow_*", "use_mlflow",
            "comet_*", "use_comet", "use_tensorboard", "use_trackio", "use_otel_metrics", "otel_*", "trackio_*",
            "swanlab_*", "use_swanlab", "logging_*", "save_*", "saves_per_epoch", "eval_*", "evals_per_epoch",
            "evaluation_strategy", "do_*eval", "val_set_size", "num_epochs", "max_steps", "warmup_*", "weight_decay",
            "learning_rate", "lr_*", "cosine_*", "adam_*", "max_grad_norm", "optim_args*", "embedding_lr*",
            "loraplus_lr_embedding", "seed", "resume_from_checkpoint", "auto_resume_from_checkpoints", "lora_model_dir",
            "lora_fan_in_fan_out", "merge_*", "train_on_inputs", "group_by_length", "dataloader_*", "early_stopping_*",
            "load_best_model_at_end", "loss_watchdog_*", "debug", "tf32", "fsdp_version", "ddp*", "excess_length_strategy",
            "sample_packing_*", "curriculum_sampling", "streaming*", "roles_to_train", "min_sample_len", "low_cpu_mem_usage",
            "revision_of_model", "model_revision", "eot_tokens", "default_system_message", "remove_unused_columns",
            "include_t*", "profiler_*", "jagged_*", "relora_*", "peft_ensure_weight_tying", "data_seed", "gc_*",
            "accelerator_config*", "train_on_*", "use_ray", "ray_*", "noisy_embedding_alpha", "type_of_model",
            "overrides_of_model_kwargs*", "base_model_config", "base_model_ignore_patterns", "torchdistx_path",
        }
    )  # fmt: skip
    instead = MappingProxyType(
        {
            "liger_fused_linear_cross_entropy": "Liger's loss never makes the logits; priced with them, errs high",
            "liger_*": "Liger's kernels keep fewer activations; priced as transformers' own, errs high",
            "unsloth_*": "unsloth's kernels keep fewer activations; priced as transformers' own, errs high",
            "cut_cross_entropy": "cut cross-entropy never makes the logits; priced with them, errs high",
            "chunked_cross_entropy*": "a loss in chunks never holds all logits in fp32; priced with them, errs high",
            "tiled_mlp*": "a feed-forward in tiles is priced whole, errs high",
            "fused_attn_kernel": "fused norms and rotations keep fewer activations; priced without, errs high",
            "flash_attn_*": "a fused kernel keeps fewer activations; priced as transformers' own, errs high",
            "torch_compile*": "a compiled model keeps fewer activations; priced as it runs eagerly, errs high",
            "activation_offloading": "activations are priced as if they stayed on the GPU; errs high",
            "layer_offloading": "frozen layers are priced as if they stayed on the GPU; errs high",
            "selective_checkpointing*": "priced as if everything were recomputed; errs low by what it keeps",
            "lisa_*": "LISA trains some layers at a time; priced as if all trained, errs high",
            "relora": "priced between restarts; the merge into the base for a moment takes more, errs low",
            "rl": "priced as supervised training; pairs of answers and a reference model take more, errs low",
            "reward_model": "priced as supervised training on the whole vocabulary; errs high",
            "process_reward_model": "priced as supervised training on the whole vocabulary; errs high",
            "neftune_noise_alpha": "the noise takes another copy of the embeddings' output for a moment; errs low",
            "resize_token_embeddings_to_32x": "the vocabulary is priced unpadded; errs low by up to 31 rows",
            "gptq*": "GPTQ weights are not read from here; priced in the model's dtype, errs high",
            "peft_layer_replication": "replicated layers are not priced; errs low",
            "peft_trainable_token_indices": "trained token embeddings are not priced; errs low",
            "lora_target_parameters": "adapters on bare parameters are not priced; errs low",
            "embeddings_skip_upcast": "embeddings are priced in the model's dtype, as they end up either way",
            "peft.loftq_config*": "LoftQ starts the adapter otherwise; what is trained is the same",
            "gpu_memory_limit": "a limit by device is not modelled; priced as if all stayed on one GPU, errs high",
            "max_memory*": "a limit by device is not modelled; priced as if all stayed on one GPU, errs high",
            "batch_flattening": "",
        }
    )
    rules = (
        same("base_model", "model"),
        custom(
            ("adapter", "unfrozen_parameters"),
            ("method", "method.train"),
            read=own.read_method,
            write=own.write_method,
            stand_ins=own.method_stand_ins,
        ),
        _LORA,
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
                "load_in_4bit", "load_in_8bit", "bnb_config_kwargs.bnb_4bit_quant_type",
                "bnb_config_kwargs.bnb_4bit_use_double_quant", "bnb_config_kwargs.bnb_4bit_compute_dtype",
            ),
            ("format", "format.double_quant", "format.blocksize", "format.compute_dtype"),
            read=own.read_format,
            write=own.write_format,
            stand_ins=own.format_stand_ins,
        ),
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
            ("attn_implementation", *own.LEGACY_ATTENTION),
            ("attention",),
            read=own.read_attention,
            write=own.write_attention,
            stand_ins=own.attention_stand_ins,
        ),
        custom(
            ("sample_packing", "pad_to_sequence_len", "batch_flattening"),
            ("batching",),
            read=own.read_batching,
            write=own.write_batching,
            stand_ins=own.batching_stand_ins,
        ),
        custom(
            ("gradient_checkpointing", "gradient_checkpointing_kwargs.use_reentrant"),
            ("recompute", "recompute.use_reentrant"),
            read=own.read_recompute,
            write=own.write_recompute,
            stand_ins=own.recompute_stand_ins,
        ),
        optim("optimizer", default="adamw_torch_fused"),
        custom(own.KERNELS, (), read=own.read_kernels, write=own.write_kernels, stand_ins=own.kernels_stand_ins),
        custom(("plugins",), (), read=own.read_kernels, write=lambda _: {}, stand_ins=own.plugins_stand_ins),
        custom((), ("gpus", "nodes", "layout", "offload"), read=own.read_layout, write=_machines),
        always("loop.outputs_until", "loss"),
    )

    def settled(self, full: Job, *, asked: Job) -> Job:
        """bf16 under autocast, where the job leaves it open: what `bf16: auto` does on a GPU that has it."""
        if asked.precision is not None or full.dtype == "float32":
            return full
        dtype = full.dtype if asked.dtype is not None else "bfloat16"
        short = "fp16" if dtype == "float16" else "bf16"
        return full.model_copy(update={"dtype": dtype, "precision": f"{short}-mixed"})

    def refuse(self, full: Job, fields: Fields) -> None:
        startable(fields)
        del full

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
        text = yaml.safe_dump(self.config(job, run), sort_keys=False)
        return Folder(files={"axolotl.yaml": text}, command="axolotl train axolotl.yaml")


TRAINER = Axolotl
