"""The upload to the Hub, and what is asked of it before."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of httpx or httpx2, whichever this release of huggingface_hub uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dynmoe_hf.errors import UserError

from .staging import PublishingError

# A file of an earlier push that this one does not bring would be loaded in place of the new weights, or beside them.
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_](?:[\w.-]*\w)?")


@dataclass(frozen=True)
class Target:
    """Where a model goes.

    Args:
        repo_id: `organisation/name`.
        revision: branch; None is `main`.
        exists: whether the repository does.
        is_private: whether it is, or will be.
    """

    repo_id: str
    revision: str | None
    exists: bool
    is_private: bool


def check_repo_id(repo_id: str) -> None:
    """Raises UserError for what cannot be the name of a repository."""
    name = repo_id.partition("/")[2]
    if not _REPO_ID.fullmatch(repo_id) or len(repo_id) > 96 or re.search(r"--|\.\.|\.git$", name):
        raise UserError(f"{repo_id!r} is no name for a model on the Hub, which looks like organisation/name.")


def find_target(repo_id: str, revision: str | None, public: bool) -> Target:
    """Ask the Hub who we are and what is there. Nothing is changed.

    Raises:
        UserError: there is no token, or the repository is public and that was not asked for.
        PublishingError: the Hub cannot be reached or refuses.
    """
    api = HfApi()
    with _in_one_sentence():
        if get_token() is None:
            raise UserError(
                "there is no token for the Hub: `hf auth login` stores one, HF_TOKEN gives one; it must allow to "
                "write. --dry-run needs none."
            )
        api.whoami()
        try:
            is_private = bool(api.model_info(repo_id).private)
        except RepositoryNotFoundError:
            return Target(repo_id, revision, exists=False, is_private=not public)
    if not is_private and not public:
        raise UserError(f"{repo_id!r} is there and public: --public says that the model may be, too.")
    return Target(repo_id, revision, exists=True, is_private=is_private)


def upload(folder: Path, target: Target, message: str, create_pr: bool = False) -> str | None:
    """Upload a folder in one commit.

    Args:
        folder: as `stage` writes it.
        target: see `find_target`.
        message: of the commit.
        create_pr: open a pull request instead.

    Returns:
        The address of the commit or pull request, None if nothing has changed since the last one.

    Raises:
        PublishingError: the Hub cannot be reached or refuses.
    """
    api = HfApi()
    with _in_one_sentence():
        if not target.exists:
            api.create_repo(target.repo_id, private=target.is_private)
        if target.revision and not create_pr:
            api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)
        head = api.model_info(target.repo_id, revision=target.revision).sha
        commit = api.upload_folder(
            repo_id=target.repo_id,
            folder_path=folder,
            commit_message=message,
            revision=target.revision,
            create_pr=create_pr,
            delete_patterns=list(WEIGHT_FILES),
        )
    if commit.pr_url:
        return commit.pr_url
    return None if commit.oid == head else commit.commit_url


@contextlib.contextmanager
def _in_one_sentence() -> Iterator[None]:
    """What huggingface_hub raises, as a PublishingError."""
    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled as error:
        raise PublishingError("HF_HUB_OFFLINE is set, so the Hub is not asked; --dry-run does the rest.") from error
    except RevisionNotFoundError as error:
        raise PublishingError(f"the Hub has no such revision: {_reason(error)}") from error
    except HfHubHTTPError as error:
        raise PublishingError(f"{constants.ENDPOINT} refuses: {_reason(error)}") from error
    except (HTTPError, OSError) as error:
        raise PublishingError(f"{constants.ENDPOINT} cannot be reached: {_reason(error)}") from error
    except (RuntimeError, ValueError) as error:
        raise PublishingError(f"the upload failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
