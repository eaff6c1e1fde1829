"""`peftplan export`: what was written, what it should take, what is left to fill in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from peftplan.report import screen, words
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from peftplan.exporter import Exported


def render(done: Exported) -> RenderableType:
    return Group(
        Text.assemble((f"{done.out}", "bold"), f"   {len(done.files)} files for {done.trainer}"),
        Text(words.headline(done.job), style="bright_black"),
        Text("  ".join(done.files)),
        Text(),
        _prediction(done),
        Text(f"cd {done.out} && pip install -r requirements.txt && {done.command}"),
        *(Text(f"put the rows to train on into {done.out}/{name} first", style="yellow") for name in done.fill_in),
    )


def _prediction(done: Exported) -> Text:
    if done.estimate is None:
        return Text(f"not priced: {done.unpriced}", style="yellow")
    needs = format_bytes(screen.needed_bytes(done.estimate.memory))
    fit = done.estimate.fit
    verdict = f"   {words.VERDICTS[fit.verdict][0]} on {fit.gpu}" if fit.verdict else ""
    return Text(f"needs {needs}{verdict}   (estimate.json)")
