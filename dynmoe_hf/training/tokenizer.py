"""Load a tokenizer, or train a byte-level BPE on the training documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or a local folder. No code that comes with it is run.

    Raises:
        ValueError: there is none, or it cannot be reached.
    """
    from transformers import AutoTokenizer  # imports torch

    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # what a broken file leads to: tokenizers raises bare Exceptions, transformers anything
        reason = str(error).partition("\n")[0].rstrip(": ")
        raise ValueError(
            f"cannot load a tokenizer from {name_or_path!r}, which must be a Hub id or a local folder "
            f"with tokenizer files: {reason}"
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that encodes any text and decodes it back exactly.

    The same texts give the same tokenizer. Ids 0 and 1 are `<|endoftext|>` (eos) and `<|pad|>`, the next 256 the
    bytes. Text is split before merging by the pattern of GPT-2 (Radford et al. 2019, section 2.2).

    Args:
        texts: documents, read once.
        vocab_size: at least 258; the result is smaller if the texts have too few pairs to merge.

    Raises:
        ValueError: `vocab_size` cannot hold the special tokens and all bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special_tokens = [EOS_TOKEN, PAD_TOKEN]
    if vocab_size < len(alphabet) + len(special_tokens):
        raise ValueError(
            f"vocab_size is {vocab_size}, but {len(alphabet)} bytes and {len(special_tokens)} special tokens "
            f"need at least {len(alphabet) + len(special_tokens)}."
        )
    from transformers import PreTrainedTokenizerFast  # imports torch

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=alphabet,
        show_progress=False,  # it would print blank lines where a reader of --json looks
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )
