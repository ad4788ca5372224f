"""From texts of any size to files of tokens and back, and `python -m tinygpt.prepare`.

A folder holds `train.bin` and `val.bin`, nothing but the tokens' ids one after the other, as
nanoGPT writes and reads them; `tokenizer.json`; and `meta.json`, which says how wide the ids are. A
folder of nanoGPT's own making has 16-bit ids and none of the JSON files: its characters are in
`meta.pkl`, and without that the tokens are GPT-2's.

Texts are read in pieces, files are written in pieces and trained from through a memory map: no step
needs more memory for a longer text.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tinygrad.helpers import tqdm

from tinygpt.batches import split_tokens
from tinygpt.checkpoint import TOKENIZER
from tinygpt.cli import run_command
from tinygpt.config import InputError, TrainConfig
from tinygpt.corpus import load_corpus
from tinygpt.files import replacing, write_text
from tinygpt.interop import read_meta
from tinygpt.tokenizer import (
    END_OF_TEXT,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    load_tokenizer,
    same_vocabulary,
)

META = "meta.json"
PIECE = 1 << 20  # characters
TRAIN_FRACTION = 0.9

Tokens = NDArray[np.integer]


# Writing ------------------------------------------------------------------------------------------


def pieces(source: str) -> Iterator[str]:
    """The text that `source` names (see `load_corpus`), in pieces that together are all of it.

    A piece ends before white space that follows something else, where GPT-2's tokenizer never makes
    one token of what is before and after: the tokens of the pieces are those of the text. (A text
    with no such place in a million characters is cut all the same.)

    Raises:
        InputError: there is no such text, or it is not UTF-8.
    """
    try:
        if not Path(source).is_file():
            yield from _cut(iter([load_corpus(source)]))
            return
        with open(source, encoding="utf-8-sig", newline="") as file:
            yield from _cut(iter(lambda: file.read(PIECE), ""))
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 ({error}); convert it first") from None
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from None


def _cut(parts: Iterator[str]) -> Iterator[str]:
    rest = ""
    for part in parts:
        rest += part
        while len(rest) > PIECE:
            end = _boundary(rest, PIECE)
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _boundary(text: str, end: int) -> int:
    """The last place up to `end` where text may be cut, or `end`."""
    for i in range(end, 0, -1):
        if text[i] in " \n" and not text[i - 1].isspace():
            return i
    return end


def characters_of(texts: Iterable[str]) -> CharTokenizer:
    """The tokenizer whose vocabulary is every character of `texts`."""
    seen = np.zeros(0x110000, bool)
    for text in texts:
        seen[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")] = True
    return CharTokenizer(chr(code) for code in np.flatnonzero(seen))


@functools.cache
def _gpt2() -> GPT2Tokenizer:
    """One per process."""
    return GPT2Tokenizer()


def _encode_gpt2(text: str) -> NDArray[np.int32]:
    return _gpt2().encode_array(text)


def encode_gpt2(texts: Iterator[str]) -> Iterator[NDArray[np.int32]]:
    """GPT-2's tokens of each text in turn; all cores work, on one text each.

    Not threads: with two of them tiktoken is no faster than with one.
    """
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(
        cores,
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,  # Ctrl-C is the parent's affair
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        waiting: deque[Future[NDArray[np.int32]]] = deque()
        for text in texts:
            waiting.append(pool.submit(_encode_gpt2, text))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def prepare(sources: list[str], kind: str, folder: Path) -> dict[str, Any]:
    """Writes the tokens of the texts to `folder`, the first nine tenths to train on.

    Between two texts GPT-2's tokens have an `<|endoftext|>`; characters have nothing there.

    Args:
        sources: files of any size, or what else `load_corpus` takes.
        kind: "char" or "gpt2".

    Returns:
        What meta.json holds.

    Raises:
        InputError: a text cannot be read, or the folder holds tokens or cannot be written.
    """
    if (folder / "train.bin").exists():
        raise InputError(f"{folder} holds prepared data; take another --out, or delete it first")
    tokenizer: Tokenizer
    if kind == "gpt2":
        tokenizer = GPT2Tokenizer()
        end = np.array(tokenizer.encode(END_OF_TEXT, special=True), np.int32)
    else:
        texts = (piece for source in sources for piece in pieces(source))
        tokenizer = characters_of(_with_bar(texts, sources, "vocabulary"))
        end = np.zeros(0, np.int32)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")

    def tokens() -> Iterator[NDArray[np.int32]]:
        for i, source in enumerate(sources):
            if i > 0:
                yield end
            texts = _with_bar(pieces(source), [source], source)
            is_gpt2 = isinstance(tokenizer, GPT2Tokenizer)
            yield from encode_gpt2(texts) if is_gpt2 else map(tokenizer.encode_array, texts)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        counts = _write(folder, dtype, tokens())
        tokenizer.save(folder / TOKENIZER)
        meta = {"dtype": dtype.name, "vocab_size": tokenizer.vocab_size, **counts}
        write_text(folder / META, json.dumps(meta, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from None
    return meta


def _write(
    folder: Path, dtype: np.dtype[Any], tokens: Iterator[NDArray[np.int32]]
) -> dict[str, int]:
    """Writes train.bin and val.bin, or neither; returns how many tokens each has."""
    with replacing(folder / "train.bin") as train, replacing(folder / "val.bin") as val:
        with open(train, "wb") as file:
            for ids in tokens:
                file.write(ids.astype(dtype).data)
        n_tokens = train.stat().st_size // dtype.itemsize
        n_train = int(TRAIN_FRACTION * n_tokens)
        with open(train, "r+b") as file, open(val, "wb") as rest:
            file.seek(n_train * dtype.itemsize)
            shutil.copyfileobj(file, rest)
            file.truncate(n_train * dtype.itemsize)
    return {"train_tokens": n_train, "val_tokens": n_tokens - n_train}


def _with_bar(texts: Iterator[str], sources: list[str], name: str) -> Iterator[str]:
    size = sum(os.path.getsize(source) for source in sources if os.path.isfile(source))
    with tqdm[None](desc=name, total=size, unit="B", unit_scale=True, disable=None) as bar:
        for text in texts:
            yield text
            bar.update(len(text.encode("utf-8", "surrogatepass")))


# Reading ------------------------------------------------------------------------------------------


def load_data(config: TrainConfig, tokenizer: Tokenizer | None) -> tuple[Tokens, Tokens, Tokenizer]:
    """The tokens to train and to validate on, and their tokenizer.

    Args:
        tokenizer: that of the weights to go on from; None if there are none.

    Raises:
        InputError: the data cannot be had, or its tokens are not those of the weights.
    """
    if Path(config.data).is_dir():
        train_data, val_data, own = load_tokens(Path(config.data))
        if tokenizer and not same_vocabulary(own, tokenizer):
            raise InputError(f"the tokens in {config.data} are not of the model's vocabulary")
        return train_data, val_data, own
    text = load_corpus(config.data, max_bytes=config.max_download_mb * 10**6)
    if tokenizer is None:
        is_gpt2 = config.tokenizer == "gpt2"
        tokenizer = GPT2Tokenizer() if is_gpt2 else CharTokenizer.from_text(text)
    return *split_tokens(tokenizer.encode_array(text)), tokenizer


def load_tokens(folder: Path) -> tuple[Tokens, Tokens, Tokenizer]:
    """The train and val tokens of a folder, mapped, and what they are tokens of.

    Raises:
        InputError: a file is missing or damaged, or holds ids that are not in the vocabulary.
    """
    try:
        path = folder / META
        meta = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        dtype = {"uint16": "<u2", "uint32": "<u4"}[meta.get("dtype", "uint16")]
    except (ValueError, KeyError, AttributeError):
        raise InputError(f"{folder / META} is damaged") from None
    tokenizer: Tokenizer
    if (folder / TOKENIZER).exists():
        tokenizer = load_tokenizer(folder / TOKENIZER)
    elif (folder / "meta.pkl").exists():
        tokenizer = read_meta(folder / "meta.pkl")
    else:
        tokenizer = GPT2Tokenizer()
    train, val = (_map(folder / name, dtype, tokenizer) for name in ("train.bin", "val.bin"))
    return train, val, tokenizer


def _map(path: Path, dtype: str, tokenizer: Tokenizer) -> Tokens:
    try:
        tokens = np.memmap(path, dtype, "r").view(np.ndarray)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; `python -m tinygpt.prepare` makes it") from None
    except (OSError, ValueError) as error:  # empty, or half a token too long
        raise InputError(f"{path} is damaged: {error}") from None
    for start in range(0, len(tokens), 1 << 24):
        part = tokens[start : start + (1 << 24)]
        if part.max() >= tokenizer.vocab_size:
            at = start + int(np.argmax(part >= tokenizer.vocab_size))
            raise InputError(
                f"{path} holds id {tokens[at]} at token {at} (byte {at * tokens.itemsize}); its "
                f"vocabulary ends at {tokenizer.vocab_size - 1}"
            )
    return tokens


# The command --------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tinygpt.prepare",
        description="Turns texts into files of tokens, which `train --data FOLDER` learns from.",
    )
    parser.add_argument(
        "texts", nargs="+", metavar="TEXT", help="a UTF-8 file, tinyshakespeare, or a URL"
    )
    parser.add_argument("--tokenizer", choices=("char", "gpt2"), default="char", help="char")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    meta = prepare(args.texts, args.tokenizer, args.out)
    print(
        f"{args.out}/ holds {meta['train_tokens']:,} tokens to train on and "
        f"{meta['val_tokens']:,} to validate on, of {meta['vocab_size']:,} different ones"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
