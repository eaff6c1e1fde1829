"""From constraints to ranked configurations: `plan()`."""

from peftplan.planner.goal import Goal
from peftplan.planner.result import Plan
from peftplan.planner.search import plan

__all__ = ["Goal", "Plan", "plan"]
