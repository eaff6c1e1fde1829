"""accelerate's YAML: how many processes there are, and how the job is spread over them (DDP, FSDP, DeepSpeed).

Key names are those of accelerate 1.15.0 (commands/config/config_args.py, class ClusterConfig; utils/dataclasses.py,
FullyShardedDataParallelPlugin and DeepSpeedPlugin), read 2026-11-21.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from peftplan.errors import RequestError
from peftplan.job import Assumption, Job
from peftplan.trainers import _deepspeed
from peftplan.trainers.base import decided, fields_of
from peftplan.trainers.rules import Config, Fields, Inexpressible, StandIn, flatten

SIGNATURE = frozenset({"compute_environment", "distributed_type", "num_processes", "num_machines", "machine_rank"})
SHARDED = ("fsdp", "fsdp1", "zero1", "zero2", "zero3")
_PLAIN = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "downcast_bf16": "no",
    "machine_rank": 0,
    "main_training_function": "main",
    "rdzv_backend": "static",
    "same_network": True,
    "use_cpu": False,
}


def read(config: Mapping[str, Any]) -> tuple[Fields, list[Assumption]]:
    """(fields, remarks) of an accelerate YAML. Raises RequestError."""
    flat = flatten(config)
    kind = str(flat.get("distributed_type", "NO")).upper()
    if kind not in _KINDS:
        raise RequestError(f"distributed_type: {kind} is not read; known: {', '.join(_KINDS)}")
    fields, remarks = _KINDS[kind](flat)
    nodes = flat.get("num_machines") or 1
    processes = 1 if kind == "NO" else flat.get("num_processes") or 1
    if processes % nodes:
        raise RequestError(f"num_processes: {processes} do not divide among {nodes} machines")
    spread = {"gpus": processes // nodes, "nodes": nodes}
    return {**spread, **fields, **_precision(flat)}, [*remarks, *_parallel(flat)]


def spreads(job: Job) -> bool:
    """Whether more than one process trains, or a layout asks for its wrapper."""
    return job.gpus * job.nodes > 1 or job.layout not in (None, "none", "single")


def files(job: Job) -> dict[str, str]:
    """accelerate.yaml for a job on several GPUs. Raises Inexpressible."""
    return {"accelerate.yaml": yaml.safe_dump(config(job), sort_keys=False)}


def options(job: Job, config_option: str = "--config_file") -> str:
    """What to tell `accelerate launch`; with several nodes the same command runs on each, which says its place."""
    if job.nodes == 1:
        return f"{config_option} accelerate.yaml"
    meeting = '--main_process_ip "${MASTER_ADDR:?}" --main_process_port "${MASTER_PORT:-29500}"'
    place = f'--machine_rank "${{NODE_RANK:?}}" {meeting}'
    return f"{config_option} accelerate.yaml {place}"


def config(job: Job) -> dict[str, Any]:
    """The YAML's content. Raises Inexpressible for layouts and pairs that accelerate cannot run."""
    fields = {**fields_of(decided(job)), "layout": job.layout or "ddp", "offload": job.offload}
    mixed = str(fields["precision"])
    return {
        **_PLAIN,
        **_kind(fields),
        "mixed_precision": mixed.removesuffix("-mixed") if mixed.endswith("-mixed") else "no",
        "num_machines": job.nodes,
        "num_processes": job.gpus * job.nodes,
    }


def _kind(fields: Fields) -> dict[str, Any]:
    layout = str(fields["layout"])
    if layout in ("fsdp", "fsdp1"):
        return {"distributed_type": "FSDP", "fsdp_config": _fsdp(fields, first=layout == "fsdp1")}
    if layout.startswith("zero"):
        return {"distributed_type": "DEEPSPEED", "deepspeed_config": _zero(fields)}
    if layout != "ddp":
        raise Inexpressible("layout", layout)
    if fields["offload"] not in (None, "none"):
        raise Inexpressible("offload", f"{fields['offload']} with --layout ddp")
    return {"distributed_type": "MULTI_GPU"}


def _fsdp(fields: Fields, *, first: bool) -> dict[str, Any]:
    """`first`: FSDP1, whose strategy is named where FSDP2 has a switch."""
    if fields.get("format") == "int8":
        raise Inexpressible("format", "int8 with --layout fsdp")
    offload = fields["offload"] or "none"
    if offload not in ("none", "params+optimizer"):
        raise Inexpressible("offload", f"{offload} with --layout fsdp; it moves params+optimizer together")
    return {
        "fsdp_version": 1 if first else 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": "FULL_SHARD" if first else True,
        **({"fsdp_use_orig_params": True, "fsdp_backward_prefetch": "BACKWARD_PRE"} if first else {}),
        "fsdp_activation_checkpointing": False,
        "fsdp_offload_params": offload != "none",
        "fsdp_cpu_ram_efficient_loading": "format" not in fields,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    }


def _zero(fields: Fields) -> dict[str, Any]:
    stage = _deepspeed.stage(str(fields["layout"]))
    parts = str(fields["offload"] or "").split("+")
    return {
        "deepspeed_multinode_launcher": "standard",
        "zero_stage": stage,
        "offload_optimizer_device": "cpu" if "optimizer" in parts else "none",
        "offload_param_device": "cpu" if "params" in parts else "none",
        "zero3_init_flag": stage == 3,
        **({"zero3_save_16bit_model": True} if stage == 3 else {}),
    }


# -- reading ---------------------------------------------------------------------------------------------------

Read = tuple[dict[str, Any], list[Assumption]]


def _one(_: Config) -> Read:
    return {}, []


def _ddp(_: Config) -> Read:
    return {"layout": "ddp"}, []


def _read_fsdp(flat: Config) -> Read:
    first = str(flat.get("fsdp_config.fsdp_version", 1)) == "1"  # FullyShardedDataParallelPlugin's default
    fields: dict[str, Any] = {"layout": "fsdp1" if first else "fsdp"}
    if _on(flat.get("fsdp_config.fsdp_offload_params")):
        fields["offload"] = "params+optimizer"
    if _on(flat.get("fsdp_config.fsdp_activation_checkpointing")):
        fields["recompute"] = "full"
    keys = ("fsdp_config.fsdp_reshard_after_forward", "fsdp_config.fsdp_sharding_strategy")
    partly = [key for key in keys if str(flat.get(key, "true")).upper() not in ("TRUE", "FULL_SHARD", "1")]
    why = StandIn(value=fields["layout"], errs="low", because="not everything is sharded at all times").why("layout")
    return fields, [Assumption(what=key, value=flat[key], why=why) for key in partly]


def _read_deepspeed(flat: Config) -> Read:
    path = flat.get("deepspeed_config.deepspeed_config_file")
    if path is not None:
        found = _deepspeed.stage_in_name(str(path))
        what = "deepspeed_config.deepspeed_config_file"
        return {"layout": found}, [Assumption(what=what, value=path, why=_deepspeed.guessed(path))]
    parts = {"optimizer": "offload_optimizer_device", "params": "offload_param_device"}
    devices = {part: flat.get(f"deepspeed_config.{key}") for part, key in parts.items()}
    stage = flat.get("deepspeed_config.zero_stage", 2)
    return {"layout": _deepspeed.layout(stage), **_deepspeed.offload(devices)}, []


_KINDS = {
    "NO": _one, "MULTI_GPU": _ddp, "MULTI_CPU": _ddp, "FSDP": _read_fsdp, "DEEPSPEED": _read_deepspeed,
}  # fmt: skip


def _precision(flat: Config) -> dict[str, Any]:
    word = str(flat.get("mixed_precision", "no"))
    return {"precision": f"{word}-mixed"} if word in ("bf16", "fp16") else {}


def _parallel(flat: Config) -> list[Assumption]:
    sizes = [k for k, v in flat.items() if k.startswith("parallelism_config") and k.endswith("_size") and v != 1]
    why = "a second way of spreading the job that is not read; priced without it, which errs high"
    return [Assumption(what=key, value=flat[key], why=why) for key in sizes]


def _on(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")
