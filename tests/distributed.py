"""Two processes on this machine."""

import os
import subprocess
import sys
from pathlib import Path


def run_two_processes(script: str, folder: Path) -> None:
    """Run a script in two gloo processes, each with one thread and the folder as its argument."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, folder / "script.py", folder], env=environment, check=True, timeout=300)
