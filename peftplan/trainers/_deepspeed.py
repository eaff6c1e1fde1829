"""DeepSpeed's JSON: how the states of a job are spread over GPUs and what is kept on the host.

Key names are those of DeepSpeed 0.19 (runtime/config.py and zero/config.py) as transformers' integration fills them in
(integrations/deepspeed.py: `auto` takes the training arguments' value); read 2026-11-21.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from peftplan.errors import RequestError
from peftplan.job import Assumption
from peftplan.trainers.rules import Fields, Inexpressible, covers, flatten

SIGNATURE = frozenset({"zero_optimization", "train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer"})
_STAGE = "zero_optimization.stage"
_DEVICES = {
    "optimizer": "zero_optimization.offload_optimizer.device",
    "params": "zero_optimization.offload_param.device",
}
_HARMLESS = frozenset({
    "train_batch_size", "gradient_clipping", "steps_per_print", "wall_clock_breakdown", "scheduler.*", "fp16.*",
    "bf16.*", "zero_allow_untested_optimizer", "optimizer.*", "zero_optimization.offload_*", "tensorboard.*",
    "wandb.*", "zero_force_ds_cpu_optimizer", "communication_data_type", "prescale_gradients", "amp.*",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
})  # fmt: skip
"""Keys that TrainingArguments decide (`optimizer`, `bf16`), or that move nothing that stays on the GPU."""
_BUFFERS = "buffers and prefetched weights that the layout will price"


def read(config: Mapping[str, Any]) -> tuple[Fields, list[Assumption]]:
    """(fields, remarks) of a DeepSpeed config. Raises RequestError."""
    flat = flatten(config)
    fields = {"layout": layout(flat.get(_STAGE, 0)), **offload({part: flat.get(key) for part, key in _DEVICES.items()})}
    for key, field in (
        ("train_micro_batch_size_per_gpu", "micro_batch"),
        ("gradient_accumulation_steps", "grad_accum"),
    ):
        if isinstance(flat.get(key), int):
            fields[field] = flat[key]
    read_keys = {_STAGE, *_DEVICES.values(), "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    left = {k: v for k, v in flat.items() if k not in read_keys and not covers(_HARMLESS, k)}
    return fields, [Assumption(what=k, value=v, why=f"DeepSpeed's {_BUFFERS}") for k, v in left.items() if v != "auto"]


def layout(stage: Any) -> str:
    """ZeRO stage 0 is DDP. Raises RequestError."""
    if stage not in (0, 1, 2, 3):
        raise RequestError(f"{_STAGE}: {stage!r} is not a stage of ZeRO; use 0, 1, 2 or 3")
    return f"zero{stage}" if stage else "ddp"


def offload(devices: Mapping[str, Any]) -> Fields:
    """{"optimizer": "cpu", "params": "none"} as `offload`; nvme counts as host memory, of which it needs less."""
    parts = [part for part, device in devices.items() if device not in (None, "none")]
    return {"offload": "+".join(sorted(parts, reverse=True))} if parts else {}


def stage(name: str) -> int:
    """The ZeRO stage of a layout. Raises Inexpressible."""
    if name not in ("zero1", "zero2", "zero3"):
        raise Inexpressible("layout", name)
    return int(name[-1])


def stage_in_name(text: str) -> str | None:
    """The layout that a file's name or a keyword gives away: ds_z3_config.json, zero3_bf16.json, deepspeed/zero2."""
    found = re.findall(r"(?:zero|z|stage|ds)[_-]?([0-3])(?![0-9])", text.rpartition("/")[2].lower())
    return layout(int(found[-1])) if found else None


def config(fields: Fields) -> dict[str, Any]:
    """The JSON's content for a job's `layout` and `offload`; what the trainer decides is `auto`."""
    parts = str(fields.get("offload") or "").split("+")
    zero: dict[str, Any] = {"stage": stage(str(fields["layout"]))}
    for part, key in (("optimizer", "offload_optimizer"), ("params", "offload_param")):
        if part in parts:
            zero[key] = {"device": "cpu", "pin_memory": True}
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        **dict.fromkeys(auto, "auto"),
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
    }


def text(fields: Fields) -> str:
    return json.dumps(config(fields), indent=2) + "\n"


def guessed(path: Any) -> str:
    """What is remarked where the file that a config names was not given along."""
    layout_of = stage_in_name(str(path))
    if layout_of is None:
        return "a DeepSpeed file that was not given along; priced without it; give it as a second --config"
    return f"priced as layout {layout_of}, by its name; give the file as a second --config to have it read"
