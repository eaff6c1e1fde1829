"""The styles of data parallelism by name, with their settings from a job's `layout.*`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftplan.errors import RequestError
from peftplan.layouts.base import DataParallel
from peftplan.layouts.ddp import Ddp
from peftplan.layouts.fsdp1 import Fsdp1
from peftplan.layouts.fsdp2 import Fsdp2
from peftplan.layouts.units import Style
from peftplan.layouts.zero import Zero1, Zero2, Zero3
from peftplan.plugins import configure

STYLES: Mapping[DataParallel, type[Style]] = {
    "ddp": Ddp,
    "fsdp1": Fsdp1,
    "fsdp2": Fsdp2,
    "zero1": Zero1,
    "zero2": Zero2,
    "zero3": Zero3,
}


def style_of(name: DataParallel, knobs: Mapping[str, Any]) -> Style | None:
    """The style with its settings; None where there is one replica. Raises RequestError for settings it lacks."""
    cls = STYLES.get(name)
    if cls is not None:
        return configure(cls, knobs, what=f"layout {name}")
    if knobs:
        raise RequestError(f"layout.{next(iter(knobs))}: a layout without replicas has no such setting; leave it out")
    return None
