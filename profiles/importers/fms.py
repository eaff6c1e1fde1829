"""foundation-model-stack/fms-acceleration, scripts/benchmarks: HF Trainer on A100, packed to 4,096 tokens.

Setup read from the repository at 876e2ed (2026-01-30): TRL's SFTTrainer with constant-length packing, so
every mask is all ones and FlashAttention-2 runs unmasked (`exact`); gradient checkpointing, reentrant;
use_cache off; adamw_torch is foreach; the Trainer drops the model's outputs before backward; bitsandbytes
with double quantization. transformers 4.48.1 reserves nothing before it loads, and Trainer empties the cache
before it trains (trainer.py, _inner_training_loop: accelerator.free_memory). `baseline-peft-bnb` lets TRL
prepare the quantized model (norms end in fp32, embeddings and head in bf16), `accelerated-peft-bnb` prepares
it without any upcast. `accelerated-peft-autogptq` trains with AutoGPTQ's kernel (triton_v2) on checkpoints of 4 bits,
groups of 128, in order of activation.

Rows of pull request 14 (2024-05) print GB of 1e9 bytes: its CSV gives the same values in bytes (static
15,119,984,128 at batch 8, where the table says 15.12). That transformers release keeps each layer's rotary
table (32,768 positions x 128 x cos, sin x bf16 x 32 layers).

`kernels` is the plug-in fms-acceleration-foak, whose functions are read at the same commit; LoRA's are used on
quantized models only. transformers 4.45.2, under the rows of a100_80gb_liger.csv, gives Mistral's FlashAttention-2
keys and values once for every query head (modeling_mistral.py, MistralFlashAttention2), Llama's not.
"""

from __future__ import annotations

from importers.common import MIB, Row, beyond, exact, published
from peftplan.records import Measured, Record

_BASELINE_BNB = range(57, 69)
"""Rows of refs/a100_80gb.csv whose framework_config is baseline-peft-bnb."""
_ROTARY_TABLES = 32 * 2 * 32_768 * 128 * 2
_SMI = (
    "nvidia-smi over a whole run; allocated peaks agree. It reads 1,848, 1,850, 1,886, 1,976 and 2,232 MiB more than "
    "the replay reserves (rows 57, 59, 9, 79, 77), where a context of 480 MiB is assumed. Much the same at 17 and at "
    "75 GiB and at batch 4 and 8, so it is not the step's; what else the process or the card holds is not known. Row "
    "15 of the same campaign allows 2,120 MiB at most, row 98 of an earlier campaign with other releases 957"
)
_SMI_FAST_LOSS = (
    "nvidia-smi over a whole run; allocated peaks agree. With the fast loss it reads what it reads without: 20,132 MiB "
    "against 20,010 (rows 105 and 101 of a100_80gb.csv), 33,990 against 33,858 (rows 107 and 103), though less is "
    "allocated by the size of the fp32 logits, which the replay then does not reserve either. What else takes a block "
    "of that size is not known. Of full fine-tuning, eight rows a batch read 6 GiB less than four (rows 97 and 98)"
)
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
_GPTQ_BASE = {
    "TheBloke/Mistral-7B-v0.1-GPTQ": "mistralai/Mistral-7B-v0.1",
    "TechxGenus/Meta-Llama-3-8B-GPTQ": "meta-llama/Meta-Llama-3-8B",
}


def wants(row: Row) -> bool:
    """Dense rows on one GPU, or on several under FSDP1, that state their setup in full."""
    ours = row["id"].startswith(("fms-main-", "fms-liger-", "fms-granite-", "gh-fms14-"))
    spread = row["parallel"]
    modelled = spread.get("world_size") == 1 or str(spread.get("fsdp", "")).startswith("FULL_SHARD")
    return bool(
        ours and row["confidence"] == "full" and modelled and isinstance(row["measured"].get("mem_value"), float)
    )


def record(row: Row) -> Record:
    early = row["id"].startswith("gh-")
    measured = _measured_early(row) if early else _measured(row)
    campaign = "-".join(str(row["id"]).split("-")[:2])
    made = published(row, job=_job(row, early=early), measured=measured, campaign=campaign, gaps=_gaps(row))
    if not early:
        return made
    return made.model_copy(update={"notes": "GB of 1e9 bytes, as the pull request's CSV shows. " + made.notes})


def _job(row: Row, *, early: bool) -> Row:
    lora = row["method"] != "full"
    gptq = "gptq" in row["method"]
    autocast = "autocast" in row["precision"].replace("no autocast", "")
    half = "float16" if gptq else "bfloat16"
    world = row["parallel"].get("world_size", 1)
    return {
        "model": _GPTQ_BASE.get(row["model"], row["model"]),
        "method": {"lora-on-gptq": "lora"}.get(row["method"], row["method"]),
        "rank": 16 if lora else None,
        "target_modules": _TARGETS if lora else None,
        "set": _settings(row, early=early),
        "format": "gptq" if gptq else "nf4" if row["method"] == "qlora" else None,
        "dtype": half,
        "precision": ("fp16" if gptq else "bf16") + ("-mixed" if autocast else ""),
        "adapter_dtype": "bfloat16" if early and row["method"] == "lora" else "auto",
        "optimizer": "adamw",
        "micro_batch": row["batch_per_gpu"],
        "seq_len": row["seq_len"],
        "batching": "exact",
        "recompute": "full",
        "kernels": "foak" if row.get("kernels") else None,
        "attention": "flash_attention_2",
        "gpu": "a100-80gb",
        **({"gpus": world, "layout": "fsdp1"} if world > 1 else {}),
    }


def _settings(row: Row, *, early: bool) -> Row:
    settings: Row = {
        "model.use_cache": False,
        "optimizer.impl": "foreach",
        "recompute.use_reentrant": True,
        "loop.outputs_until": "loss",
        **_loss(row),
    }
    if row["id"].startswith("fms-liger-") and "Mistral" in row["model"]:
        settings["kernels.repeat_kv"] = True
    if row["method"] != "full":
        settings["method.lora_dropout"] = 0.0 if early else 0.1
    settings |= {"load.warm_up": False, "load.empty_cache": True}
    if "gptq" in row["method"]:
        settings |= {"format.kernel": "triton_v2", "format.desc_act": True}
    if row["method"] == "qlora":
        settings |= {"format.double_quant": True, **_prepared(row)}
    return settings


def _loss(row: Row) -> Row:
    if "Liger" in (row.get("kernels") or ""):
        return {"kernels.fast_loss": "fused_ce_liger"}
    return {"loss.style": "shifted_logits" if row["id"].startswith("fms-main-") else "shifted_fp32_logits"}


def _prepared(row: Row) -> Row:
    """Which of a quantized model's other weights are fp32: norms (TRL's casts), or none. TRL prepares no model whose
    quantized weights are sharded (SFTTrainer, is_sharded_qlora)."""
    identity = row["id"]
    if row["parallel"].get("world_size", 1) > 1:
        return {"format.prepare": False}
    number = int(identity.rsplit("-", 1)[1]) if identity.startswith("fms-main-") else 0
    return {"format.cast_back": "trl"} if number in _BASELINE_BNB else {"format.prepare": False}


def _gaps(row: Row) -> tuple[str, ...]:
    found = []
    if "santacoder" in row["model"]:
        found.append("gpt_bigcode architecture")
    if "PowerLM" in row["model"]:
        found.append("granite architecture (logits and residuals are scaled)")
    return tuple(found)


def _measured(row: Row) -> tuple[Measured, ...]:
    """Between steps, FSDP's rows count the gradients too, which are still there after the last step."""
    found, kernels = row["measured"], row.get("kernels") or ""
    if row["parallel"].get("world_size", 1) > 1:
        device = exact("device", found["nvidia_smi_mib"] * MIB, why_off=_SMI)
        return exact("allocated_peak", found["mem_value"]), device
    return (
        exact("allocated_peak", found["mem_value"]),
        exact("allocated_between_steps", found["static_alloc_bytes"]),
        exact("device", found["nvidia_smi_mib"] * MIB, why_off=_SMI_FAST_LOSS if "fast CE" in kernels else _SMI),
    )


def _measured_early(row: Row) -> tuple[Measured, ...]:
    found = row["measured"]
    peak, static = found["mem_value"] * 1e9, found["static_alloc_gib"] * 1e9
    tables = "each layer keeps a rotary table for 32,768 positions"
    return (
        beyond("allocated_peak", peak, extra_bytes=_ROTARY_TABLES, why=tables),
        beyond("allocated_between_steps", static, extra_bytes=_ROTARY_TABLES, why=tables),
    )
