"""`peftplan estimate`: one configuration -> memory, FLOPs, time, cost, verdict."""

from __future__ import annotations

from peftplan.cli.options import Json, takes_job
from peftplan.job import Job


@takes_job
def command(job: Job, *, json: Json = False) -> str:
    """What a fine-tuning step needs, why, and whether it fits."""
    from peftplan.pipeline import estimate

    answer = estimate(job)
    if json:
        from peftplan.cli.output import as_json

        return as_json(answer)
    from peftplan.breakdown import savings
    from peftplan.cli.output import as_text
    from peftplan.report import cards, screen

    return as_text(screen.render(answer, savings(job, answer), cards.common()))
