"""PEFT's methods that are not modelled, and why; each goes when its file comes.

As of peft 0.21.2 (peft/utils/peft_types.py, PeftType). tests/test_completeness.py holds this list against PEFT.
"""

from __future__ import annotations

REASONS: dict[str, str] = {}
