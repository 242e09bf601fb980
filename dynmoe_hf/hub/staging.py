"""A copy of a model as it will be published, and its trial in a process without this package."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from . import clean_process

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynmoe_hf import DynMoeForCausalLM

CARD_NAME = "README.md"
TEXT = "def read_file(path): return the text of a file, and of nothing else."
NUM_TOKENS, NUM_NEW_TOKENS = 16, 4


class PublishingError(RuntimeError):
    """Why a model was not published, in one sentence."""


def stage(
    model: DynMoeForCausalLM, tokenizer: PreTrainedTokenizerBase, card: ModelCard, folder: Path
) -> dict[str, int]:
    """Write what is to be published into an empty folder, and nothing else.

    That is config.json with its map of classes, the code of the installed version, safetensors, generation_config.json,
    the files of the tokenizer, and the card. All is written anew from what was loaded, so nothing that lies beside the
    original is published by accident.

    Returns:
        The size of each file in bytes, by its name.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / CARD_NAME).write_text(f"{str(card).rstrip()}\n", encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


@torch.inference_mode()
def check_in_clean_process(folder: Path, model: DynMoeForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Load a staged folder where `dynmoe_hf` cannot be imported, as a stranger would.

    Tokens, logits and four tokens of greedy generation must be those of the model, to the bit.

    Raises:
        PublishingError: with the last line of what the process said.
    """
    model.eval()
    longest = min(NUM_TOKENS, model.config.max_position_embeddings - NUM_NEW_TOKENS)
    input_ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :longest]
    results = {
        "input_ids": input_ids.contiguous(),
        "logits": model(input_ids).logits,
        "generated": model.generate(input_ids, max_new_tokens=NUM_NEW_TOKENS, do_sample=False),
    }
    with tempfile.TemporaryDirectory() as workplace:
        reference = os.path.join(workplace, "reference.safetensors")
        save_file(results, reference, metadata={"text": TEXT})
        # A home of its own: no code of an earlier trial is taken for that of this one, and no token is in reach.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_HOME": os.path.join(workplace, "home"), "HF_HUB_OFFLINE": "1"}
        code = Path(clean_process.__file__).read_text(encoding="utf-8")
        arguments = [str(folder.absolute()), reference, str(torch.get_num_threads())]
        outcome = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=workplace,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if outcome.returncode != 0:
        said = [line.strip() for line in outcome.stderr.splitlines() if line.strip()]
        reason = said[-1] if said else f"the process ended with {outcome.returncode} and said nothing."
        raise PublishingError(f"nothing was uploaded, because the copy does not work without dynmoe_hf: {reason}")
