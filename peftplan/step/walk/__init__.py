"""Walking one region forward and backward: who is alive when.

The walk mirrors CPython's reference counting (a value dies after its last use or the last name that holds it) and
torch's autograd engine. All sizes are bytes, relative to what is alive when the region is entered.
"""

from __future__ import annotations

from peftplan.step.walk.account import CARRIED, EXIT_GRADIENT, Account, Recording, Watermark
from peftplan.step.walk.kept import Saved
from peftplan.step.walk.plan import Plan, propagate_need
from peftplan.step.walk.region import RegionWalk
from peftplan.step.walk.rules import Rules, exact
from peftplan.step.walk.updates import InBackward, Updates, Waiting, shared_weights

__all__ = [
    "CARRIED",
    "EXIT_GRADIENT",
    "Account",
    "InBackward",
    "Plan",
    "Recording",
    "RegionWalk",
    "Rules",
    "Saved",
    "Updates",
    "Waiting",
    "Watermark",
    "exact",
    "propagate_need",
    "shared_weights",
]
