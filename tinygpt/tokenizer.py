"""Text to tokens and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from tinygpt.config import InputError
from tinygpt.files import write_text


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
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
        codes = _code_points(text)
        known = codes < len(self._ids)
        ids = np.where(known, self._ids[np.where(known, codes, 0)], -1)
        if (unknown := np.flatnonzero(ids < 0)).size:
            at = int(unknown[0])
            raise InputError(
                f"character {text[at]!r} at position {at} is not among the {self.vocab_size} "
                "characters of this vocabulary"
            )
        return ids.tolist()  # type: ignore[no-any-return]

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
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["type"] != "char":
                raise InputError(
                    f"{path} holds a tokenizer of type {content['type']!r}, not 'char'"
                )
            return cls(content["characters"])
        except FileNotFoundError:
            raise InputError(f"{path} does not exist; a run writes its tokenizer there") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is not a tokenizer file; it is damaged or foreign") from None


def _code_points(text: str) -> np.ndarray:
    """(len(text),) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
