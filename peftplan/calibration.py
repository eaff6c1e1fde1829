"""How far predictions were off on real cards, and what that says of the next one.

`calibration.jsonl` beside this file holds every measured run whose memory a card had to hold (`device` bytes, or
`reserved_peak` where nothing else was read), with what was predicted for it; `python profiles/calibrate.py` writes it
from `profiles/`. Predictions never read it: nothing is fitted. Runs of one campaign err alike (one machine, one set of
versions), so a campaign counts once however many runs it has, and what is said of a new job is tried by leaving each
campaign out and judging it by the others (`left_out`).

Packed and plain weights are apart: loading packed weights leaves cached memory that differs from run to run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).with_name("calibration.jsonl")
LEVEL = 0.9
"""Of the interval: a tenth of the weight of what was seen lies outside, half of it on each side."""


class Seen(NamedTuple):
    """One measured run."""

    id: str
    campaign: str
    packed: bool
    """Whether its frozen weights were quantized."""
    measured_bytes: int
    predicted_bytes: int

    @property
    def ratio(self) -> float:
        """Measured over predicted: above 1 where the prediction is short."""
        return self.measured_bytes / self.predicted_bytes


@dataclass(frozen=True)
class Calibration:
    """What was seen of comparable runs. `seen` must not be empty."""

    seen: tuple[Seen, ...]

    @cached_property
    def campaigns(self) -> tuple[str, ...]:
        return tuple(sorted({s.campaign for s in self.seen}))

    @cached_property
    def _weighed(self) -> tuple[tuple[float, float], ...]:
        """(ratio, weight), smallest ratio first; weights sum to 1 and are equal between campaigns."""
        runs = Counter(s.campaign for s in self.seen)
        return tuple(sorted((s.ratio, 1 / (len(runs) * runs[s.campaign])) for s in self.seen))

    @cached_property
    def margin(self) -> float:
        """What `fits` asks for beyond the predicted bytes, as a share of them: the worst that was seen."""
        return max(0.0, self._weighed[-1][0] - 1)

    def probability(self, needed: int, usable: int) -> float:
        """That a job predicted to need `needed` bytes runs where it can use `usable`.

        The weight of what was seen to run, and one campaign more of which nobody knows: never 0 or 1.
        """
        room = usable / needed
        ran = sum(weight for ratio, weight in self._weighed if ratio <= room)
        return (len(self.campaigns) * ran + 0.5) / (len(self.campaigns) + 1)

    def interval(self, needed: int) -> tuple[int, int]:
        """(low, high) bytes that hold LEVEL of the weight."""
        return self._quantile((1 - LEVEL) / 2, needed), self._quantile((1 + LEVEL) / 2, needed)

    def _quantile(self, share: float, needed: int) -> int:
        below = 0.0
        for ratio, weight in self._weighed:
            below += weight
            if below >= share - 1e-9:
                return round(ratio * needed)
        return round(self._weighed[-1][0] * needed)

    def without(self, campaign: str) -> Calibration:
        """What the other campaigns say."""
        return Calibration(tuple(s for s in self.seen if s.campaign != campaign))

    @cached_property
    def left_out(self) -> float:
        """The share of runs inside the interval that the other campaigns give, each campaign counted once."""
        shares = [self._held(campaign) for campaign in self.campaigns]
        return sum(shares) / len(shares)

    def _held(self, campaign: str) -> float:
        others = self.without(campaign)
        own = [s for s in self.seen if s.campaign == campaign]
        bounds = [(s, others.interval(s.predicted_bytes)) for s in own]
        return sum(low <= s.measured_bytes <= high for s, (low, high) in bounds) / len(own)

    @property
    def says(self) -> str:
        """What a verdict rests on, in one line."""
        kind = "packed" if self.seen[0].packed else "unpacked"
        least, most = self._weighed[0][0], self._weighed[-1][0]
        return (
            f"{len(self.seen)} measured runs with {kind} weights in {len(self.campaigns)} campaigns used {least:.2f} "
            f"to {most:.2f} times what was predicted; of a campaign left out, {self.left_out:.0%} lay in the interval "
            "that the others give"
        )


@lru_cache
def seen() -> tuple[Seen, ...]:
    """Every run of `calibration.jsonl`."""
    return tuple(Seen(**json.loads(line)) for line in DATA.read_text(encoding="utf-8").splitlines())


@lru_cache
def calibration(*, packed: bool) -> Calibration:
    """What was seen of runs with packed, or plain, frozen weights."""
    return Calibration(tuple(s for s in seen() if s.packed is packed))


def least_margin() -> float:
    """The smallest margin of any kind of run: what lacks it fits in no case."""
    return min(calibration(packed=True).margin, calibration(packed=False).margin)


def lines(rows: Iterable[Seen]) -> str:
    """The text of `calibration.jsonl`."""
    return "".join(json.dumps(row._asdict()) + "\n" for row in rows)
