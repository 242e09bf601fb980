"""The target appears whole or not at all, and the source is only read."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dynmoe_hf.convert import convert, writing
from dynmoe_hf.errors import UserError
from tests.convert.sources import DENSE_CONFIGS, contents, new_model


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    new_model(DENSE_CONFIGS["llama"]).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize("shard", [0, 2])
def test_a_full_disk(theirs: Path, tmp_path: Path, shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, save, written = contents(theirs), writing.save_file, []

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if len(written) == shard:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(writing, "save_file", full)
    with pytest.raises(UserError, match="could not be written, and nothing is left of it: .*No space left"):
        convert(theirs, tmp_path / "ours", max_shard_size="8KB")
    assert len(written) == shard
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert contents(theirs) == before


SLOW = """
import sys, time
from dynmoe_hf.convert import convert, writing
save = writing.save_file
def slow(*args, **kwargs):
    save(*args, **kwargs)
    print("written", flush=True)
    time.sleep(60)
writing.save_file = slow
convert(sys.argv[1], sys.argv[2], max_shard_size="8KB", overwrite=True)
"""


@pytest.mark.parametrize("is_there", [False, True])
def test_a_killed_conversion(theirs: Path, tmp_path: Path, is_there: bool) -> None:
    """What is left has another name; an earlier model is as it was, and the next run does its work."""
    target = tmp_path / "ours"
    if is_there:
        convert(theirs, target, check=False)
    before = contents(target) if is_there else None
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(theirs), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert target.exists() == is_there
    if is_there:
        assert contents(target) == before
    left = {path.name for path in tmp_path.iterdir()} - {"theirs", "ours"}
    assert len(left) == 1 and all(name.startswith(".ours.") for name in left)
    convert(theirs, target, overwrite=True, check=False)
    assert (target / "model.safetensors").exists()


def test_interrupting_leaves_nothing(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(theirs, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_target_that_is_there(theirs: Path, tmp_path: Path) -> None:
    target = tmp_path / "ours"
    target.mkdir()
    convert(theirs, target, check=False)
    first = contents(target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists; --overwrite replaces it"):
        convert(theirs, target)
    assert contents(target) == first | {"notes.txt": b"mine"}
    convert(theirs, target, overwrite=True, check=False)
    assert contents(target) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_targets_that_are_never_written(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    before = contents(tmp_path)
    for name, reason in (
        ("photos", "only the folder of a model is overwritten"),
        ("file", "is a file or a link"),
        ("link", "is a file or a link"),
        ("theirs", "none in the other"),
        ("theirs/inside", "none in the other"),
        (".", "none in the other"),
    ):
        with pytest.raises(ValueError, match=reason):
            convert(theirs, tmp_path / name, overwrite=True)
    assert contents(tmp_path) == before


def test_the_folder_is_as_open_as_others(theirs: Path, tmp_path: Path) -> None:
    convert(theirs, tmp_path / "new" / "ours", check=False)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "new" / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_older_model_returns_if_the_new_one_cannot_take_its_place(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(theirs, tmp_path / "ours", check=False)
    before, rename, calls = contents(tmp_path / "ours"), Path.rename, []

    def second_fails(self: Path, other: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(UserError, match="could not be written"):
        convert(theirs, tmp_path / "ours", overwrite=True, check=False)
    assert len(calls) == 3 and contents(tmp_path / "ours") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
