"""Accelerators, the machines they sit in, and what they rent for."""

from peftplan.hardware.find import find_gpu, variants
from peftplan.hardware.gpus import Gpu, GpuMemory, Link, Node, Pcie, UsableMemory, gpus, usable_bytes
from peftplan.hardware.prices import HourlyPrice, Price, hourly_usd, prices

__all__ = [
    "Gpu",
    "GpuMemory",
    "HourlyPrice",
    "Link",
    "Node",
    "Pcie",
    "Price",
    "UsableMemory",
    "find_gpu",
    "gpus",
    "hourly_usd",
    "prices",
    "usable_bytes",
    "variants",
]
