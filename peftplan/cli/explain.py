"""`peftplan explain`: where the bytes and FLOPs of one estimate come from."""

from __future__ import annotations

from peftplan.cli.options import Json, takes_job
from peftplan.job import Job


@takes_job
def command(job: Job, *, json: Json = False) -> str:
    """Where the bytes and FLOPs of one estimate come from, with formula and source."""
    from peftplan.breakdown import explain, savings
    from peftplan.pipeline import estimate

    answer = estimate(job)
    terms, changes = explain(job), savings(job, answer)
    if json:
        from peftplan.cli.output import as_json
        from peftplan.report import ledger

        return as_json(ledger.document(answer, terms, changes))
    from peftplan.cli.output import as_text
    from peftplan.report import ledger

    return as_text(ledger.render(answer, terms, changes))
