"""Files as they were at another revision, read with git and never checked out."""

from __future__ import annotations

import os
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
        _verify(root, revision)
        names = [f"{revision}:{path.resolve().relative_to(root).as_posix()}" for path in members]
        answer = _git(root, "cat-file", "--batch", given="\n".join(names) + "\n")
        texts.update(zip(members, _blobs(answer, len(names)), strict=True))
    return texts


def _verify(root: Path, revision: str) -> None:
    """Raises RequestError where the repository has no such commit."""
    commit = _commit(revision)
    if _run(root, "rev-parse", "--verify", "--quiet", commit).returncode:
        shallow = _git(root, "rev-parse", "--is-shallow-repository").strip() == b"true"
        fix = "; this clone is shallow, fetch its history first" if shallow else ""
        raise RequestError(f"unknown revision {revision!r}{fix}")


def _commit(revision: str) -> str:
    if not revision or revision.startswith("-") or any(c.isspace() for c in revision):
        raise RequestError(f"{revision!r} is not a revision; name a branch, a tag or a commit")
    return revision + "^{commit}"


def _by_repository(paths: Sequence[Path]) -> dict[Path, list[Path]]:
    """The files under the top folder of their repository."""
    tops: dict[Path, Path] = {}
    groups: dict[Path, list[Path]] = {}
    for path in paths:
        if "\n" in str(path):
            raise RequestError(f"{str(path)!r}: git cannot be asked for a file name with a line break")
        folder = path.resolve().parent
        if folder not in tops:
            tops[folder] = _top(folder, path)
        groups.setdefault(tops[folder], []).append(path)
    return groups


def _top(folder: Path, path: Path) -> Path:
    try:
        return Path(_git(folder, "rev-parse", "--show-toplevel").decode().rstrip("\n")).resolve()
    except RequestError as error:
        if "not a git repository" not in str(error):  # such as a repository of another owner
            raise
        raise RequestError(f"{path}: not in a git repository, so there is no other revision of it") from None


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


def _git(folder: Path, *arguments: str, given: str = "") -> bytes:
    """What git prints. Raises RequestError with its first line where it fails."""
    done = _run(folder, *arguments, given=given)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RequestError(f"git {arguments[0]} failed in {folder}: {said[0] if said else done.returncode}")
    return done.stdout


def _run(folder: Path, *arguments: str, given: str = "") -> subprocess.CompletedProcess[bytes]:
    plain = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            ["git", *arguments],
            cwd=folder,
            input=given.encode(),
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            env=plain,
        )
    except FileNotFoundError:
        raise OutsideError("git is not installed; a base revision is read with it") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OutsideError(f"git cannot be run in {folder}: {error}") from None
