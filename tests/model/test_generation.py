"""Everything that `generate` offers, for every preset: each way gives what plain greedy decoding gives."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    TextStreamer,
    pipeline,
    set_seed,
)
from transformers.utils import is_optimum_quanto_available

from dynmoe_hf import DynMoeForCausalLM
from dynmoe_hf.model.methods import METHODS
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.tiny import greedy, tiny_model, tokens

READS_ATTENTION = ("da_moe", "rmoe_da_moe")
NUM_TOKENS = 6
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
GREEDY: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PAGED = ContinuousBatchingConfig(num_blocks=24, page_size=8, max_batch_tokens=24)


def generate(model: DynMoeForCausalLM, prompt: Tensor, **options: Any) -> Any:
    return model.generate(prompt, **(GREEDY | options))


@pytest.mark.parametrize("cache", [None, "dynamic", "static", "offloaded", "offloaded_static"])
@pytest.mark.parametrize("method", METHODS)
def test_every_cache(method: str, cache: str | None) -> None:
    if cache is not None and cache.startswith("offloaded") and not torch.accelerator.is_available():
        pytest.skip("an offloaded cache moves keys between a CPU and an accelerator, and here is none")
    model = tiny_model(method)
    prompt = tokens(2, 6)
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    assert torch.equal(generate(model, prompt, **options), greedy(model, prompt, NUM_TOKENS))


@pytest.mark.skipif(not is_optimum_quanto_available(), reason="optimum-quanto is not installed")
@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_cache(method: str) -> None:
    """The prompt itself is not touched by it; the step after it errs by less with more bits."""
    model = tiny_model(method, head_dim=32)
    prompt = tokens(2, 20)
    wanted = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    exact = generate(model, prompt, **wanted).logits
    errors = []
    for bits in (4, 2):
        config = {"backend": "quanto", "nbits": bits, "q_group_size": 32}
        logits = generate(model, prompt, cache_implementation="quantized", cache_config=config, **wanted).logits
        torch.testing.assert_close(logits[0], exact[0])
        errors.append((logits[1] - exact[1]).norm() / exact[1].norm())
    assert 0 < errors[0] < errors[1] and errors[0] < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_left_padding(method: str) -> None:
    model = tiny_model(method)
    prompt = tokens(2, 6)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt], dim=1)
    generated = generate(model, padded, attention_mask=(padded != 0).long())
    assert torch.equal(generated[:, 3:], greedy(model, prompt, NUM_TOKENS))


@pytest.mark.parametrize("method", METHODS)
def test_samples_can_be_repeated(method: str) -> None:
    model = tiny_model(method)

    def sample(seed: int, **options: Any) -> Tensor:
        set_seed(seed)
        return generate(model, tokens(2, 6), do_sample=True, temperature=1.5, **options)

    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))
    assert torch.equal(sample(0, use_cache=False), sample(0))
    assert torch.equal(sample(0, top_k=1), greedy(model, tokens(2, 6), NUM_TOKENS))


@pytest.mark.parametrize("method", METHODS)
def test_beams_find_what_a_search_without_cache_finds(method: str) -> None:
    """Beams are reordered between steps, and with them whatever the model has cached."""
    model = tiny_model(method)
    options = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    found = generate(model, tokens(2, 6), **options)
    expected = generate(model, tokens(2, 6), **options, use_cache=False)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)
    new = found.sequences[:, 6:]
    log_probs = model(found.sequences, use_cache=False).logits[:, 5:-1].log_softmax(-1).gather(2, new[..., None])
    torch.testing.assert_close(found.sequences_scores, log_probs[..., 0].mean(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_an_assistant_and_prompt_lookup_change_nothing(method: str) -> None:
    """Both propose several tokens at once; refused ones are cropped from the cache."""
    model = tiny_model(method)
    prompt = tokens(1, 4).repeat(1, 3)
    expected = greedy(model, prompt, 12)
    smaller = tiny_model(method, seed=1, num_hidden_layers=1, mlp_layer_types=["sparse"])
    assert torch.equal(generate(model, prompt, max_new_tokens=12, assistant_model=smaller), expected)
    assert torch.equal(generate(model, prompt, max_new_tokens=12, assistant_model=tiny_model(method)), expected)
    assert torch.equal(generate(model, prompt, max_new_tokens=12, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("method", METHODS)
def test_beyond_a_sliding_window(method: str, cache: str) -> None:
    model = tiny_model(method, sliding_window=4, layer_types=WINDOWS)
    prompt = tokens(2, 3)
    expected = greedy(model, prompt, 10)
    assert torch.equal(generate(model, prompt, max_new_tokens=10, cache_implementation=cache), expected)
    unlimited = tiny_model(method)
    assert not torch.equal(unlimited(expected).logits[:, -1], model(expected).logits[:, -1])


def batches(model: DynMoeForCausalLM, prompts: list[Tensor], num_tokens: int) -> list[Any]:
    config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(
        [prompt[0].tolist() for prompt in prompts],
        generation_config=config,
        continuous_batching_config=PAGED,
        warmup=False,
    )
    return [results[name] for name in sorted(results)]


@pytest.mark.parametrize("method", [method for method in METHODS if method not in READS_ATTENTION])
def test_continuous_batching(method: str) -> None:
    """Prompts within a page of 8, at its edge and beyond it, more tokens than fit one batch, and than a window sees."""
    model = tiny_model(method, sliding_window=6, layer_types=WINDOWS)
    prompts = [tokens(1, length, seed=length) for length in (3, 8, 19)]
    for prompt, result in zip(prompts, batches(model, prompts, 12), strict=True):
        assert result.error is None
        assert result.generated_tokens == greedy(model, prompt, 12)[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("method", READS_ATTENTION)
def test_continuous_batching_is_refused_where_routing_reads_attention(method: str) -> None:
    """A paged cache goes to the attention kernel; the model never sees its keys."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    logger.disabled = True
    try:
        (result,) = batches(tiny_model(method), [tokens(1, 4)], 2)
    finally:
        logger.disabled = False
    assert "use generate() instead of generate_batch()" in result.error and not result.generated_tokens
    with pytest.raises(ValueError, match="generate_batch"):
        tiny_model(method)(tokens(1, 4), cache=object(), use_cache=False)


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_instead_of_a_prompt(method: str) -> None:
    model = tiny_model(method)
    prompt = tokens(2, 6)
    embeds = model.get_input_embeddings()(prompt)
    generated = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(prompt), **GREEDY)
    assert torch.equal(generated, greedy(model, prompt, NUM_TOKENS)[:, 6:])


@pytest.mark.parametrize("method", METHODS)
def test_logits_and_scores_are_those_of_one_forward_pass(method: str) -> None:
    model = tiny_model(method)
    prompt = tokens(2, 6)
    wanted = ("output_logits", "output_scores", "output_hidden_states", "return_dict_in_generate")
    output = generate(model, prompt, **dict.fromkeys(wanted, True))
    logits = model(output.sequences, use_cache=False).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(output.logits, 1), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(output.scores, 1), logits, rtol=1e-4, atol=1e-5)
    assert len(output.hidden_states) == NUM_TOKENS and output.past_key_values.get_seq_length() == 6 + NUM_TOKENS - 1


@pytest.mark.parametrize("method", METHODS)
def test_generation_goes_on_from_a_cache(method: str) -> None:
    model = tiny_model(method)
    first = generate(model, tokens(2, 6), max_new_tokens=3, return_dict_in_generate=True)
    rest = generate(model, first.sequences, max_new_tokens=3, past_key_values=first.past_key_values)
    assert torch.equal(rest, greedy(model, tokens(2, 6), 6))


@pytest.mark.parametrize("method", METHODS)
def test_a_row_ends_at_the_token_of_the_end(method: str) -> None:
    """A row that has ended is padded while the other goes on."""
    model = tiny_model(method)
    expected = greedy(model, tokens(2, 6), NUM_TOKENS)
    end = expected[0, 7].item()
    generated = generate(model, tokens(2, 6), eos_token_id=end)
    for row, found in zip(expected[:, 6:].tolist(), generated[:, 6:].tolist(), strict=True):
        length = row.index(end) + 1 if end in row else NUM_TOKENS
        assert found == (row[:length] + [0] * NUM_TOKENS)[: len(found)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    trained = train_tokenizer(["a small text, a small text"], vocab_size=270)
    trained.padding_side = "left"
    return trained


def text_model(method: str, tokenizer: PreTrainedTokenizerBase) -> DynMoeForCausalLM:
    return tiny_model(method, vocab_size=270, pad_token_id=tokenizer.pad_token_id, eos_token_id=None)


@pytest.mark.parametrize("method", METHODS)
def test_pipeline(method: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Alone and in a batch, whose shorter prompt is padded."""
    model = text_model(method, tokenizer)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["a small", "a small text, a small text"]
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = []
    for prompt in prompts:
        output = greedy(model, tokenizer(prompt, return_tensors="pt")["input_ids"], 4)[0]
        expected.append(tokenizer.decode(output, skip_special_tokens=True))
    assert [generator(prompt, **options)[0]["generated_text"] for prompt in prompts] == expected
    assert [result[0]["generated_text"] for result in generator(prompts, batch_size=2, **options)] == expected


@pytest.mark.parametrize("method", METHODS)
def test_stop_strings_and_streams(
    method: str, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    model = text_model(method, tokenizer)
    prompt = tokenizer("a small", return_tensors="pt")["input_ids"]
    texts = [tokenizer.decode([token]) for token in range(270)]
    unreadable = [token for token, text in enumerate(texts) if not (len(text) < 8 and text.isascii() and text.strip())]
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": unreadable, "pad_token_id": 1}
    full = model.generate(prompt, **options, streamer=TextStreamer(tokenizer, skip_prompt=True))[0]
    new = full[prompt.shape[1] :]
    assert capsys.readouterr().out == tokenizer.decode(new) + "\n"
    stop = tokenizer.decode(new[2:4])
    stopped = model.generate(prompt, **options, stop_strings=[stop], tokenizer=tokenizer)[0, prompt.shape[1] :]
    length = next(count for count in range(1, 9) if stop in tokenizer.decode(new[:count]))
    assert length < 8 and torch.equal(stopped, new[:length])
