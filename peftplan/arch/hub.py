"""config.json from the Hugging Face Hub through huggingface_hub: its cache, HF_ENDPOINT, HF_HUB_OFFLINE.

Only config.json is ever fetched; no code, no weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

from peftplan.arch.files import LARGEST_BYTES
from peftplan.errors import BadFile, OutsideError, PeftplanError, RequestError, UnknownName

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_hub_id(name: str) -> bool:
    """Whether `name` reads `owner/name` or `owner/name@revision`."""
    return _HUB_ID.fullmatch(name) is not None


def fetch_config(name: str) -> Path:
    """The local copy of config.json of the Hub model `name`, fetched unless cached.

    Raises RequestError where the Hub says there is no such model, revision or file, or that it is gated, and
    OutsideError where it cannot be asked.
    """
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise RequestError(f"{name!r} is not a Hub id; write it as owner/name or owner/name@revision")
    return _download(match["repo"], match["revision"])


def _download(repo: str, revision: str | None) -> Path:
    hub = _huggingface_hub()
    hub.utils.disable_progress_bars("huggingface_hub.http_get")
    try:
        # asked first because a download retries for half a minute where the Hub does not answer
        size = hub.get_hf_file_metadata(hub.hf_hub_url(repo, "config.json", revision=revision)).size
        if size is None or size <= LARGEST_BYTES:
            return Path(hub.hf_hub_download(repo, "config.json", revision=revision))
    except Exception as error:  # every transport has its own tree of errors
        return _cached(repo, revision) or _fail(error, repo, revision)
    raise BadFile(f"{repo}: config.json is larger than {LARGEST_BYTES // 10**6} MB, so not a model's")


def _huggingface_hub() -> Any:
    """The library, imported when a Hub id is asked for and not before."""
    import huggingface_hub.utils

    return huggingface_hub


def _cached(repo: str, revision: str | None) -> Path | None:
    try:
        found = _huggingface_hub().try_to_load_from_cache(repo, "config.json", revision=revision)
    except ValueError:  # not a valid repository name
        return None
    return Path(found) if isinstance(found, str) else None


def _fail(error: Exception, repo: str, revision: str | None) -> NoReturn:
    raise _explain(error, repo, revision) from None


def _explain(error: Exception, repo: str, revision: str | None) -> PeftplanError:
    """`error` as one line: whose fault it is, and the fix."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return RequestError(
            f"{repo} is gated on the Hub: accept its terms there and log in (`hf auth login`), or give its config.json"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _not_found(repo)
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(f"{repo} has no revision {revision!r} on the Hub")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return RequestError(f"{repo} has no config.json on the Hub, so it is not a transformers model")
    if isinstance(error, errors.HFValidationError):
        return RequestError(f"{repo!r} is not a valid Hub id: {_first_line(error)}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return OutsideError(f"config.json of {repo} is not in the Hub cache, and HF_HUB_OFFLINE forbids to fetch it")
    return OutsideError(
        f"config.json of {repo} is not in the Hub cache, and {constants.ENDPOINT} did not serve it "
        f"({_first_line(error)})"
    )


def _not_found(repo: str) -> UnknownName:
    from peftplan.arch.catalog import nearest

    return UnknownName("model", repo, nearest(repo), hint="neither the catalog nor the Hub has it (or it is private)")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
