"""DeepSpeed's CPUAdam (Ren 2021, ZeRO-Offload, arXiv:2101.06840): fp32 weights and states in host memory.

DeepSpeed 0.18, deepspeed/ops/adam/cpu_adam.py: two fp32 states on the host (`fp32_optimizer_states`); with
ZeRO-Offload the fp32 master weights and gradients that it works on are there too (deepspeed/runtime/zero/
stage_1_and_2.py, single_partition_of_fp32_groups). Gradients are counted on the GPU until the step, which errs high
where ZeRO moves them during backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from peftplan.optimizers.base import Optimizer, State, Trained

VARIANTS: dict[str, dict[str, Any]] = {"cpu_adam": {}, "cpuadam": {}}
HARMLESS = frozenset({"adamw_mode", "amsgrad", "bias_correction"})


@final
@dataclass(frozen=True)
class DeepSpeedCpuAdam(Optimizer):
    fp32_optimizer_states: bool = True

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        for w in weights:
            each = 4 * w.numel if self.fp32_optimizer_states else w.bytes
            yield State(each, 2 * w.copies, host=backend == "cuda")
            yield State(4 * w.numel, 2 * w.copies, host=backend == "cuda")


OPTIMIZER = DeepSpeedCpuAdam
EXAMPLES = (DeepSpeedCpuAdam(), DeepSpeedCpuAdam(fp32_optimizer_states=False))
UNVERIFIED: dict[str, str] = {"costs": "DeepSpeed builds it with a compiler when it is first used; not run here"}
