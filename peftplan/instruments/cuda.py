"""Measure one job on this machine: `python -m peftplan.instruments.cuda JOB.json [--out FILE]`.

The same as `peftplan profile --device cuda --job JOB.json`, where only torch, transformers, peft and accelerate are
installed (and bitsandbytes for packed weights): of peftplan's own needs it takes pydantic, and
PyYAML for a job in YAML. Prints the record. `--worker` waits for one request on standard input instead and
answers with one line: a campaign's child process, which has loaded the libraries by the time its turn comes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from peftplan import datafile
from peftplan.errors import BadFile, PeftplanError
from peftplan.instruments.request import DEVICES, SINGLE, Settings, identity_of, limit
from peftplan.job import Job, make_job
from peftplan.records import Record, add


def read_job(path: Path) -> Job:
    """The job in a file. Raises BadFile and RequestError."""
    data = datafile.load(path)
    if not isinstance(data, dict):
        raise BadFile(f"{path}: expected a mapping of job fields, found {datafile.kind(data)}")
    return make_job(**{str(key): value for key, value in data.items()})


def answer(line: str) -> dict[str, Any]:
    """What a worker says to a request: a `record`, or an `error` with its exit code."""
    from peftplan.instruments.run import NoDevice, measure

    asked = json.loads(line)
    try:
        record = measure(
            make_job(**asked["job"]),
            Settings(**asked["settings"]),
            identity=asked["identity"],
            campaign=asked["campaign"],
        )
    except PeftplanError as error:
        return {"error": str(error), "exit_code": error.exit_code, "no_device": isinstance(error, NoDevice)}
    return {"record": json.loads(record.to_line())}


def _work() -> int:
    """Answers one request; whatever libraries print goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _warm()
    line = sys.stdin.readline()
    if line.strip():
        print(json.dumps(answer(line)), file=out, flush=True)
    return 0


def _warm() -> None:
    """Imports what takes seconds and leaves the GPU alone; PEFT's import may go there (through bitsandbytes)."""
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m peftplan.instruments.cuda", description="Measure one job.")
    parser.add_argument("job", nargs="?", type=Path, help="a job as JSON or YAML")
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--out", type=Path, help="file of records that the record is put into")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the one that is read")
    parser.add_argument("--timed", type=int, default=3, help="steps that are timed")
    parser.add_argument("--limit", help="take no more of the device than this, such as 16GiB")
    parser.add_argument("--history", help="file for the allocator's history (gzipped JSON)")
    parser.add_argument("--worker", action="store_true", help="answer one request on standard input")
    return parser


def _measured(asked: argparse.Namespace) -> Record:
    if asked.job is None:
        raise BadFile("name a file with a job, or --worker")
    job = read_job(asked.job)
    settings = Settings(
        device=asked.device,
        warm_up=asked.warm_up,
        timed=asked.timed,
        limit_bytes=limit(asked.limit),
        history=asked.history,
    )
    from peftplan.instruments.run import measure

    return measure(job, settings, identity=identity_of(job, asked.device), campaign=SINGLE)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, 2 for a wrong request, 3 where there is no GPU or the libraries fail."""
    asked = _parser().parse_args(arguments)
    if asked.worker:
        return _work()
    try:
        record = _measured(asked)
        for problem in add(asked.out, record) if asked.out else ():
            print(f"warning: {problem}", file=sys.stderr)
    except PeftplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(record.to_line())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
