"""Configs of the trainers' own repositories: facts of them, retyped, each with its source in the first line."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


def of(trainer: str) -> list[Path]:
    return sorted(path for path in (CONFIGS / trainer).iterdir() if not path.name.startswith("."))
