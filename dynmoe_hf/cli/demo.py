"""`dynmoe demo`: the main job on the embedded corpus, from text to a generated line, for two routing methods."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dynmoe_hf.errors import UserError

from .compare import print_table, train_and_measure
from .folders import empty_folder

METHODS = ("top_k", "top_p")
PROMPT = "def read_file(path):\n"
BLOCK_SIZE = 128
NEW_TOKENS = 64

# One set of arguments for every method: only the routing differs. The keys are those of a `dynmoe train` YAML file.
SETTINGS: dict[str, Any] = {
    "model": {
        "hidden_size": 128,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_experts": 8,
        "max_position_embeddings": 2 * BLOCK_SIZE,
    },
    "block_size": BLOCK_SIZE,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 30,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "logging_first_step": True,
    "logging_steps": 10,
    "log_experts_per_layer": True,
    "save_strategy": "no",
    "seed": 0,
}
VOCAB_SIZE = 2048
TRAINING_PLOT, LAYER_PLOT = "experts_over_training.png", "experts_per_layer.png"
FILES = ("tokenizer", "results.json", TRAINING_PLOT, LAYER_PLOT)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--output", default="runs/demo", help="folder for models, plots and results.json (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier demo left in that folder")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps for each method (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    output = Path(args.output)
    _prepare(output, args.overwrite, args.steps)

    from dynmoe_hf.analysis.plots import plot_experts_over_training, plot_experts_per_layer

    tokenizer = _train_tokenizer(output)
    results, histories = {}, {}
    for method in METHODS:
        print(f"\n== {method} ==", flush=True)
        results[method] = _train_and_measure(method, output / method, tokenizer, args.steps)
        histories[method] = results[method].pop("log_history")
    (output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    plot_experts_over_training(histories, output / TRAINING_PLOT)
    per_layer = {method: result["experts_per_token_by_layer"] for method, result in results.items()}
    plot_experts_per_layer(per_layer, output / LAYER_PLOT)
    print_table(results)
    print(f"Models, plots and results.json are in {output}.")
    _generate_in_a_new_process(output / METHODS[-1])


def _prepare(output: Path, overwrite: bool, steps: int) -> None:
    """Refuse what cannot work before any time is spent; leave an empty output folder."""
    if steps < 1:
        raise UserError(f"--steps must be at least 1, got {steps}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("the demo draws plots, which need matplotlib: pip install 'dynmoe-hf[demo]'") from error
    own_names = {*FILES, *METHODS, *(f"{method}.yaml" for method in METHODS)}
    empty_folder(output, own_names, "demo", overwrite)


def _train_tokenizer(output: Path) -> Path:
    from dynmoe_hf.training.corpus import stdlib_corpus
    from dynmoe_hf.training.tokenizer import train_tokenizer

    corpus = stdlib_corpus()
    sizes = {split: sum(len(text.encode()) for text in documents["text"]) for split, documents in corpus.items()}
    print(f"{corpus['train'].info.description}")
    print(", ".join(f"{split}: {len(corpus[split])} documents, {size / 1e6:.1f} MB" for split, size in sizes.items()))
    train_tokenizer(corpus["train"]["text"], VOCAB_SIZE).save_pretrained(output / "tokenizer")
    return output / "tokenizer"


def _train_and_measure(method: str, folder: Path, tokenizer: Path, steps: int) -> dict[str, Any]:
    """Train one method; the figures of the table, all from this run."""
    import yaml

    settings = SETTINGS | {"routing": method, "tokenizer": str(tokenizer), "max_steps": steps}
    config_file = folder.with_suffix(".yaml")
    config_file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return train_and_measure(str(config_file), folder, [])


def _generate_in_a_new_process(model: Path) -> None:
    """Show that the saved model stands on its own."""
    print(f"\n{model} in a new process, through AutoModelForCausalLM:\n", flush=True)
    command = [sys.executable, "-m", "dynmoe_hf", "generate", str(model), "--prompt", PROMPT]
    subprocess.run([*command, "--max-new-tokens", str(NEW_TOKENS)], check=True)
