"""Weights for other programs, and `python -m tinygpt.export`.

`huggingface` is a folder for `transformers`: `GPT2LMHeadModel.from_pretrained(folder)` gives equal
logits, `AutoTokenizer.from_pretrained(folder)` the tokenizer. GPT-2 has biases everywhere; a model
without gets zeros.

`nanogpt` is a folder with the `ckpt.pt` that nanoGPT's sample.py and train.py load from
`--out_dir`, and, for characters, `meta.pkl`, which they look for in nanoGPT's `data/<folder's
name>/`: copy it there. A `.pt` file is a zip of raw numbers and a pickle that puts them together.
The pickle is written here opcode by opcode: dicts, strings, numbers, and for each tensor the one
call, `torch._utils._rebuild_tensor_v2`, that PyTorch itself writes and that `torch.load` allows
where it loads weights only.
"""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tinygpt.cli import run_command
from tinygpt.config import GPTConfig, InputError
from tinygpt.device import select_device
from tinygpt.files import replacing, write_text
from tinygpt.interop import ACTIVATIONS, TRANSPOSED, load_pretrained
from tinygpt.model import GPT
from tinygpt.tokenizer import (
    END_OF_TEXT,
    HUGGING_FACE_NAMES,
    CharTokenizer,
    Tokenizer,
    vocabulary_file,
)


def check_is_gpt2(config: GPTConfig) -> None:
    """Raises InputError for what neither format has a place for."""
    if found := config.beyond_gpt2():
        named = ", ".join(f"{name} {getattr(config, name)}" for name in found)
        raise InputError(
            f"only a GPT-2 can be exported, such as --preset micro trains; this model has {named}"
        )


def export_huggingface(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer's files.

    Raises:
        InputError: the model is no GPT-2.
    """
    check_is_gpt2(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    c, n_tokens = model.config, tokenizer.vocab_size
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in model.parameters().items():
        array = tensor.numpy()
        if name in ("wte.weight", "lm_head.weight"):
            array = array[:n_tokens]  # without the rows that stand for no token
        prefix = "" if name == "lm_head.weight" else "transformer."
        array = array.T if TRANSPOSED.fullmatch(name) else array
        arrays[prefix + name] = np.ascontiguousarray(array)
        if not c.bias and name.startswith(("h.", "ln_f.")):
            arrays[prefix + name.replace(".weight", ".bias")] = np.zeros(
                array.shape[-1], np.float32
            )
    with replacing(folder / "model.safetensors") as temporary:
        save_file(arrays, temporary, {"format": "pt"})
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.activation)
    end_of_text = None if isinstance(tokenizer, CharTokenizer) else n_tokens - 1
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": n_tokens,
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "activation_function": activation,
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.attention_dropout,
        "tie_word_embeddings": c.tie_weights,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if isinstance(tokenizer, CharTokenizer):
        _save_characters(tokenizer, folder)
    else:
        for name, theirs in HUGGING_FACE_NAMES.items():
            write_text(folder / theirs, vocabulary_file(name).decode("utf-8"))
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": c.block_size, **names}
        write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def _save_characters(tokenizer: CharTokenizer, folder: Path) -> None:
    """A `tokenizer.json` that cuts a text into characters and looks each one up."""
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {character: i for i, character in enumerate(tokenizer.characters)},
            "unk_token": "",  # no token: a character that is not known is an error
        },
    }
    write_text(folder / "tokenizer.json", json.dumps(content) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def export_nanogpt(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes ckpt.pt, and meta.pkl for characters.

    Raises:
        InputError: nanoGPT cannot build this model.
    """
    c = model.config
    check_is_gpt2(c)
    if c.activation != "gelu" or not c.tie_weights:
        raise InputError(
            "nanoGPT has the exact GELU and tied embeddings only; this model has activation "
            f"{c.activation} and tie_weights {c.tie_weights}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    weights = {f"transformer.{n}": t.numpy() for n, t in model.parameters().items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    with replacing(folder / "ckpt.pt") as temporary:
        save_torch(
            temporary,
            weights,
            {
                "model_args": {name: getattr(c, name) for name in names},
                "config": {"dataset": folder.resolve().name},
            },
        )
    if isinstance(tokenizer, CharTokenizer):
        characters = tokenizer.characters
        meta = {
            "vocab_size": len(characters),
            "itos": dict(enumerate(characters)),
            "stoi": {character: i for i, character in enumerate(characters)},
        }
        with replacing(folder / "meta.pkl") as temporary:
            temporary.write_bytes(pickle.dumps(meta))


def save_torch(path: Path, weights: dict[str, NDArray[Any]], others: dict[str, Any]) -> None:
    """Writes {"model": weights, **others} as torch.save would; an array given twice is stored once.

    weights are contiguous and float32, others are plain values.
    """
    storages: dict[int, str] = {}
    tensors = []
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in weights.items():
            if id(array) not in storages:
                storages[id(array)] = key = str(len(storages))
                with archive.open(f"ckpt/data/{key}", "w", force_zip64=True) as file:
                    file.write(array.data.cast("B"))
            tensors.append((_plain(name), _rebuild_tensor(storages[id(array)], array)))
        items = [(_plain(name), _plain(value)) for name, value in others.items()]
        items.append((_plain("model"), _dict(tensors)))
        archive.writestr("ckpt/data.pkl", b"\x80\x02" + _dict(items) + b".")  # protocol 2, stop
        archive.writestr("ckpt/byteorder", "little")
        archive.writestr("ckpt/version", "3\n")


# Each of these gives the opcodes that leave a value on the stack of the pickle machine.


def _plain(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]  # without the mark of the protocol, and the stop


def _tuple(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _dict(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"}(" + b"".join(name + value for name, value in items) + b"u"


def _rebuild_tensor(key: str, array: NDArray[Any]) -> bytes:
    """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, backward_hooks)."""
    where = _plain(key) + _plain("cpu") + _plain(array.size)
    storage = _tuple(_plain("storage"), b"ctorch\nFloatStorage\n", where) + b"Q"
    strides = tuple(step // array.itemsize for step in array.strides)
    hooks = b"ccollections\nOrderedDict\n)R"
    values = _plain(0) + _plain(array.shape) + _plain(strides) + _plain(False)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(storage, values, hooks) + b"R"


# The command --------------------------------------------------------------------------------------

FORMATS = {"huggingface": export_huggingface, "nanogpt": export_nanogpt}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tinygpt.export",
        description="Writes a trained model in the format of Hugging Face or of nanoGPT.",
    )
    parser.add_argument("source", help="a run's folder, or what generate takes as --weights")
    parser.add_argument("--format", choices=FORMATS, default="huggingface", help="huggingface")
    parser.add_argument("--out", type=Path, help="folder to write (default: source/<format>)")
    args = parser.parse_args(argv)
    select_device(None)
    out = args.out or Path(args.source) / args.format
    try:
        model, tokenizer = load_pretrained(args.source)
        FORMATS[args.format](model, tokenizer, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    print(f"{out}/ holds {model.num_parameters():,} parameters for {args.format}")
    return 0


if __name__ == "__main__":
    run_command(main)
