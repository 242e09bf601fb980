import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynmoe_hf.training.tokenizer import load_tokenizer, train_tokenizer


def sample_texts() -> list[str]:
    rng = random.Random(0)
    words = ["router", "expert", "token", "naïve", "größer", "専門家", "def", "return", "    ", "\n", "🙂", "x += 1"]
    return [" ".join(rng.choices(words, k=40)) for _ in range(50)]


TOKENIZER = train_tokenizer(sample_texts(), 320)


@settings(deadline=None)
@given(st.text())
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


@pytest.mark.parametrize(
    "text", ["", " ", "  a  ,  b .", "\r\n\t\x00\x7f", "don ' t !", "<|endoftext|> x <|pad|>", "é e\u0301"]
)
def test_hard_cases_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_no_special_token_is_added_to_text():
    assert TOKENIZER("").input_ids == []
    assert not set(TOKENIZER("expert router").input_ids) & set(TOKENIZER.all_special_ids)


def test_special_tokens_and_size():
    assert len(TOKENIZER) == 320
    assert (TOKENIZER.eos_token, TOKENIZER.eos_token_id) == ("<|endoftext|>", 0)
    assert (TOKENIZER.pad_token, TOKENIZER.pad_token_id) == ("<|pad|>", 1)


def test_frequent_words_become_single_tokens():
    assert len(TOKENIZER(" expert").input_ids) == 1
    assert len(TOKENIZER(" zyxwvu").input_ids) == len(" zyxwvu")


def test_training_is_deterministic_and_reads_an_iterator_once():
    again = train_tokenizer(iter(sample_texts()), 320)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_saved_tokenizer_loads_and_agrees(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "  naïve expert ,\r\n 🙂 <|endoftext|>x"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)


def test_loads_from_a_folder_with_a_model_config(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dynmoe"}')
    assert load_tokenizer(str(tmp_path))("expert router").input_ids == TOKENIZER("expert router").input_ids


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, 257])
def test_too_small_a_vocabulary_is_refused_before_texts_are_read(vocab_size):
    texts = iter(["never read"])
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer(texts, vocab_size)
    assert next(texts) == "never read"


def test_smallest_vocabulary_has_no_merges():
    tokenizer = train_tokenizer(sample_texts(), 258)
    assert len(tokenizer) == 258
    assert len(tokenizer("expert é").input_ids) == len("expert é".encode())


def test_missing_tokenizers_are_a_value_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path), str(tmp_path / "none"), "./none", "some-org/not-cached"):
        with pytest.raises(ValueError, match="cannot load a tokenizer from") as caught:
            load_tokenizer(name)
        assert repr(name) in str(caught.value) and "\n" not in str(caught.value)
