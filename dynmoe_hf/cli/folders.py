"""The folders that commands write into."""

import shutil
from collections.abc import Collection
from pathlib import Path

from dynmoe_hf.errors import UserError


def empty_folder(folder: Path, own_names: Collection[str], what: str, overwrite: bool) -> None:
    """Leave an empty folder, or refuse before anything is touched.

    Args:
        folder: to be made or emptied.
        own_names: what an earlier run may have left there; anything else is never deleted.
        what: the kind of run, for messages: `demo`.
        overwrite: delete what an earlier run has left.

    Raises:
        UserError: for a file of that name, foreign content, or an earlier run without `overwrite`.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file.")
    left = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if strange := left - set(own_names):
        raise UserError(f"{str(folder)!r} holds {min(strange)!r}, which is not from a {what}; choose another --output.")
    if left and not overwrite:
        raise UserError(f"{str(folder)!r} holds an earlier {what}; --overwrite deletes it.")
    if left:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
