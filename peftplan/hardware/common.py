"""The cards that reports name: what is owned or rented most in each size, our choice (2026-11)."""

from __future__ import annotations

from peftplan.hardware.find import find_gpu
from peftplan.hardware.gpus import Gpu

COMMON = {
    "NVIDIA GeForce RTX 3060 12GB": "RTX 3060 12GB",
    "NVIDIA T4": "T4 16GB",
    "NVIDIA GeForce RTX 3090": "RTX 3090 24GB",
    "NVIDIA GeForce RTX 4090": "RTX 4090 24GB",
    "NVIDIA L4": "L4 24GB",
    "NVIDIA GeForce RTX 5090": "RTX 5090 32GB",
    "NVIDIA A100 SXM4 40GB": "A100 40GB",
    "NVIDIA L40S": "L40S 48GB",
    "NVIDIA A100 SXM4 80GB": "A100 80GB",
    "NVIDIA H100 SXM5 80GB": "H100 80GB",
    "NVIDIA H200 SXM 141GB": "H200 141GB",
    "NVIDIA B200 SXM": "B200 180GB",
}
"""Catalog names and short ones."""


def common_gpus() -> dict[str, Gpu]:
    """The common cards by their short names."""
    return {short: find_gpu(name) for name, short in COMMON.items()}
