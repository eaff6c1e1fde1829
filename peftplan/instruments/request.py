"""What a measuring process is asked: a job, how to measure it, and what to call the record. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from peftplan.errors import RequestError
from peftplan.job import Job
from peftplan.units import parse_bytes

DEVICES = ("cuda", "cpu")
SINGLE = "single"
"""The campaign of runs that belong to none."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure, beside what to run."""

    device: str = "cuda"
    warm_up: int = 2
    timed: int = 3
    limit_bytes: int | None = None
    """What the process may take of the device at most; a run that needs more fails for want of memory."""
    history: str | None = None
    """File for the allocator's history from the first weight to the step that is read (see `history`)."""

    def __post_init__(self) -> None:
        if self.warm_up < 1:
            raise RequestError(f"warm-up {self.warm_up}: a steady step needs one before it; give 1 or more")
        if self.timed < 0:
            raise RequestError(f"timed {self.timed}: give 0 (time nothing) or more steps")
        if self.history is not None and self.device != "cuda":
            raise RequestError("--history: only CUDA's caching allocator keeps one; leave it out")


def limit(text: str | None) -> int | None:
    """Bytes of `--limit`. Raises RequestError."""
    return None if text is None else parse_bytes(text)


def identity_of(job: Job, device: str) -> str:
    """An id for a run of its own: what is asked, in short."""
    parts = (job.model.rsplit("/", 1)[-1], job.method, job.format, f"r{job.rank}" if job.rank else None)
    sizes = (f"b{job.micro_batch}", f"s{job.seq_len}" if job.seq_len else None, device)
    return "-".join(part for part in (SINGLE, *parts, *sizes) if part)


def stated(job: Job) -> dict[str, object]:
    return job.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def line(job: Job, settings: Settings, *, identity: str, campaign: str) -> str:
    """One line for a worker's standard input (see `cuda`)."""
    asked = {"job": stated(job), "settings": asdict(settings), "identity": identity, "campaign": campaign}
    return json.dumps(asked) + "\n"


def fingerprint(job: Job, settings: Settings) -> str:
    """The same for the same request; a campaign knows by it what is measured already."""
    asked = {"job": stated(job), "limit": settings.limit_bytes, "device": settings.device}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
