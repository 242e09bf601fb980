"""Whether a folder loads without this package. `staging.py` runs this text in an interpreter of its own.

Arguments: the folder, a safetensors file with the expected results, and the number of threads that computed them.
"""

import importlib.abc
import sys
from typing import Any


class _Absent(importlib.abc.MetaPathFinder):
    """Hides this package even where it is installed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.partition(".")[0] == "dynmoe_hf":
            raise ModuleNotFoundError(f"the published code needs the module {fullname!r}.")


def main(folder: str, reference: str, num_threads: str) -> None:
    """Exit with a sentence if anything differs."""
    sys.meta_path.insert(0, _Absent())
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(num_threads))
    with safe_open(reference, framework="pt") as file:
        expected = {name: file.get_tensor(name) for name in ("input_ids", "logits", "generated")}
        text = file.metadata()["text"]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    input_ids = expected["input_ids"]
    with torch.inference_mode():
        found = {
            "input_ids": tokenizer(text, return_tensors="pt")["input_ids"][:, : input_ids.shape[1]],
            "logits": model(input_ids).logits,
            "generated": model.generate(input_ids, max_new_tokens=4, do_sample=False),
        }
    for name, tensor in expected.items():
        if not torch.equal(found[name], tensor):
            sys.exit(f"it computes other {name.replace('_', ' ')} than the original.")


if __name__ == "__main__":
    main(*sys.argv[1:])
