"""Walking one region forward and backward: who is alive when.

The walk mirrors CPython's reference counting (a value dies after its last use or the last name that holds it) and
torch's autograd engine. All sizes are bytes, relative to what is alive when the region is entered.
"""

from __future__ import annotations

from peftplan.step.walk.account import EXIT_GRADIENT, Account, Recording, Watermark
from peftplan.step.walk.kept import Saved
from peftplan.step.walk.plan import Plan, propagate_need
from peftplan.step.walk.region import RegionWalk
from peftplan.step.walk.rules import Rules, exact

__all__ = [
    "EXIT_GRADIENT",
    "Account",
    "Plan",
    "Recording",
    "RegionWalk",
    "Rules",
    "Saved",
    "Watermark",
    "exact",
    "propagate_need",
]
