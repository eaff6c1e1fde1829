"""AdEMAMix (Pagliardini 2024, arXiv:2409.03137) as bitsandbytes 0.50.2 runs it: three states, in fp32 or in 8 bits.

bitsandbytes/optim/ademamix.py, AdEMAMix.init_state: the fast and the slow average are one tensor of twice the weight's
size, the second moment another one; with 8 bits, absmax per 256 elements of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from peftplan.optimizers._blockwise import Blockwise

VARIANTS: dict[str, dict[str, Any]] = {
    "ademamix_32bit": {},
    "ademamix_8bit": {"optim_bits": 8},
    "paged_ademamix_32bit": {"is_paged": True},
    "paged_ademamix_8bit": {"is_paged": True, "optim_bits": 8},
}
HARMLESS = frozenset({"alpha", "t_alpha", "t_beta3", "beta1", "beta2", "beta3"})


@final
@dataclass(frozen=True)
class AdEMAMix(Blockwise):
    parts: ClassVar[tuple[int, ...]] = (2, 1)

    optim_bits: Literal[8, 32] = 32


OPTIMIZER = AdEMAMix
EXAMPLES = (AdEMAMix(), AdEMAMix(optim_bits=8), AdEMAMix(is_paged=True), AdEMAMix(is_paged=True, optim_bits=8))
UNVERIFIED: dict[str, str] = {}
