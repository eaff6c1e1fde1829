"""Files as they were at another revision, read with git and never checked out."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from peftplan.errors import OutsideError, RequestError

TIMEOUT_SECONDS = 60


def texts_at(revision: str, paths: Sequence[Path]) -> dict[Path, str | None]:
    """The text of each file at `revision` of the repository it lies in; None where that has no such file.

    One git process per repository. Bytes that are no UTF-8 become replacement characters. Raises RequestError for an
    unknown revision or a file outside of any repository, OutsideError where git cannot be run.
    """
    texts: dict[Path, str | None] = {}
    for root, members in _by_repository(paths).items():
        _git(root, "rev-parse", "--verify", "--quiet", _commit(revision), wrong=f"unknown revision {revision!r}")
        names = [f"{revision}:{path.resolve().relative_to(root).as_posix()}" for path in members]
        answer = _git(root, "cat-file", "--batch", given="\n".join(names) + "\n")
        texts.update(zip(members, _blobs(answer, len(names)), strict=True))
    return texts


def _commit(revision: str) -> str:
    if not revision or revision.startswith("-") or any(c.isspace() for c in revision):
        raise RequestError(f"{revision!r} is not a revision; name a branch, a tag or a commit")
    return revision + "^{commit}"


def _by_repository(paths: Sequence[Path]) -> dict[Path, list[Path]]:
    """The files under the top folder of their repository."""
    tops: dict[Path, Path] = {}
    groups: dict[Path, list[Path]] = {}
    for path in paths:
        folder = path.resolve().parent
        if folder not in tops:
            wrong = f"{path}: not in a git repository, so there is no other revision of it"
            tops[folder] = Path(_git(folder, "rev-parse", "--show-toplevel", wrong=wrong).decode().rstrip("\n"))
        groups.setdefault(tops[folder].resolve(), []).append(path)
    return groups


def _blobs(answer: bytes, count: int) -> list[str | None]:
    """What `git cat-file --batch` printed: a header line and the content of each object, or one line without."""
    found: list[str | None] = []
    for _ in range(count):
        header, _, answer = answer.partition(b"\n")
        kind, _, size = header.rpartition(b" ")
        if not kind.endswith(b" blob"):
            found.append(None)
            continue
        found.append(answer[: int(size)].decode("utf-8-sig", errors="replace"))
        answer = answer[int(size) + 1 :]
    return found


def _git(folder: Path, *arguments: str, given: str = "", wrong: str = "") -> bytes:
    """What git prints; `wrong` is what it means that git fails."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, input=given.encode(), capture_output=True, timeout=TIMEOUT_SECONDS
        )
    except FileNotFoundError:
        raise OutsideError("git is not installed; a base revision is read with it") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OutsideError(f"git cannot be run in {folder}: {error}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RequestError(wrong or f"git {arguments[0]} failed in {folder}: {said[-1] if said else done.returncode}")
    return done.stdout
