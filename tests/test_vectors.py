"""The recorded files are the ones that their README describes."""

import hashlib
import re

from tests.recorded import FOLDER


def test_files_and_descriptions_belong_together() -> None:
    described = re.findall(r"`([\w.]+\.safetensors)`.*?`([0-9a-f]{64})`", (FOLDER / "README.md").read_text())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FOLDER.glob("*.safetensors")}
    assert len(described) == len(found) > 5
    assert dict(described) == found
