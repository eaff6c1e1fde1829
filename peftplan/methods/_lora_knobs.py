"""Methods that are a plain LoRA and something besides."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from peftplan.methods.base import Family, Method
from peftplan.methods.lora import Lora
from peftplan.methods.targets import DEFAULTS, Names


@dataclass(frozen=True)
class LoraKnobs(Method):
    """The settings of PEFT's LoraConfig that such methods take."""

    r: int = 8
    target_modules: Names = None
    exclude_modules: Names = None
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    family: ClassVar[Family] = "reparameterized"

    def default_targets(self, family: str) -> Names:
        return DEFAULTS.get(family)

    def plain(self) -> Lora:
        """The LoRA that it is."""
        return Lora(**{knob.name: getattr(self, knob.name) for knob in fields(LoraKnobs)})
