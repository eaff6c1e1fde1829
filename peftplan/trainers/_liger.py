"""Liger's kernels as configs ask for them: one key, and in transformers a mapping of which ones.

transformers 5.23, integrations/liger.py: `liger_kernel_config` goes to `apply_liger_kernel_to_*` as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftplan.kernels import get
from peftplan.trainers.rules import Config, Fields, Inexpressible, Rule, custom

SWITCHES = ("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy")
_NAMES = {"geglu": "swiglu"}
"""Gemma's name for the gated product."""


def liger(key: str, *, config: str = "", always: Mapping[str, bool] | None = None) -> Rule:
    """`key` turns Liger on; `config.rope` and its like choose; `always` is what the trainer sets itself."""
    forced = {f"kernels.{name}": value for name, value in (always or {}).items()}

    def read(given: Config) -> Fields:
        if not given.get(key):
            return {}
        inner = {
            name.removeprefix(f"{config}."): value for name, value in given.items() if name.startswith(f"{config}.")
        }
        named = {_NAMES.get(name, name): value for name, value in inner.items()}
        chosen = {f"kernels.{name}": value for name, value in named.items() if name in SWITCHES}
        return {"kernels": "liger", **(chosen if config else {}), **forced}

    def write(fields: Fields) -> Config:
        chosen = chosen_of(fields)
        if chosen is None:
            return {}
        default = get("liger")()
        for name, value in (always or {}).items():
            if chosen.pop(name, getattr(default, name)) is not value:
                raise Inexpressible("kernels", f"liger with {name}={not value}")
        if chosen and not config:
            raise Inexpressible("kernels", f"liger with {next(iter(chosen))}={next(iter(chosen.values()))}")
        return {key: True, **{f"{config}.{name}": value for name, value in chosen.items()}}

    keys = (key, f"{config}.*") if config else (key,)
    return custom(keys, ("kernels", "kernels.*"), read=read, write=write)


_PLUGIN = "axolotl.integrations.liger.LigerPlugin"
_AXOLOTL = {
    "liger_rope": "rope", "liger_rms_norm": "rms_norm", "liger_glu_activation": "swiglu", "liger_swiglu": "swiglu",
    "liger_cross_entropy": "cross_entropy", "liger_fused_linear_cross_entropy": "fused_linear_cross_entropy",
}  # fmt: skip
"""integrations/liger/args.py; the older of two names comes last."""


def axolotl_liger() -> Rule:
    """Liger where its plugin is listed: only what a key turns on (axolotl 0.17, integrations/liger/plugin.py)."""

    def read(given: Config) -> Fields:
        listed = given.get("plugins") or ()
        on = {name for key, name in _AXOLOTL.items() if given.get(key)}
        if not on or not any(str(plugin).endswith("LigerPlugin") for plugin in listed):
            return {}
        return {"kernels": "liger", **{f"kernels.{name}": name in on for name in SWITCHES}}

    def write(fields: Fields) -> Config:
        chosen = chosen_of(fields)
        if chosen is None:
            return {}
        default = get("liger")()
        said = {name: key for key, name in reversed(_AXOLOTL.items())}
        return {"plugins": [_PLUGIN], **{said[name]: chosen.get(name, getattr(default, name)) for name in SWITCHES}}

    return custom(tuple(_AXOLOTL), ("kernels", "kernels.*"), read=read, write=write)


def chosen_of(fields: Fields) -> dict[str, Any] | None:
    """The switches that a job sets; None where it does not run Liger. Raises Inexpressible for other kernels."""
    name = fields.get("kernels")
    own = {field.partition(".")[2]: value for field, value in fields.items() if field.startswith("kernels.")}
    if name is None and not own:
        return None
    if name != "liger" or not own.keys() <= set(SWITCHES):
        raise Inexpressible("kernels", name or next(iter(own)))
    return own
