"""Weights that others have trained: GPT-2's own, Hugging Face's folders, nanoGPT's checkpoints.

Both file formats are read without the libraries that write them, tensor by tensor: each is mapped
from the file, copied to the device once and let go, so that the weights are in memory once. A
checkpoint of PyTorch is a pickle, and a pickle can call any function; the reader here knows two
constructors and the names of number types, and refuses everything else.

The formats differ little from ours, whose parameters have GPT-2's names:

- Hugging Face keeps most matrices as (in, out); some files put `transformer.` before each name.
- nanoGPT has (out, in) as here, `transformer.` always, and `_orig_mod.` if the model was compiled.
- Both may hold the causal mask as `attn.bias`, which is no weight, and the output layer's weight,
  which is the token embedding's.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tinygrad import Tensor

from tinygpt import checkpoint
from tinygpt.config import Activation, GPTConfig, InputError
from tinygpt.corpus import cache_folder, download, download_file
from tinygpt.model import GPT
from tinygpt.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    load_tokenizer,
    model_vocab_size,
)

Arrays = dict[str, NDArray[Any]]

GPT2_SIZES = {  # n_layer, n_head, n_embd
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
GPT2_VOCAB_SIZE = 50257
GPT2_URL = "https://huggingface.co/openai-community"

TRANSPOSED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
ACTIVATIONS: dict[str, Activation] = {  # by Hugging Face's names; the first of each is exported
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def load_pretrained(source: str | os.PathLike[str]) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer that `source` names; see `GPT.from_pretrained`.

    Raises:
        InputError: there is no such model, or it is damaged, or it is no GPT-2; it says why.
    """
    path = Path(source)
    if source in GPT2_SIZES:
        return _gpt2(str(source))
    if path.suffix == ".safetensors" and path.is_file():
        return _hugging_face(path.parent, [path])
    if path.is_file():
        return _nanogpt(path)
    if (path / checkpoint.METRICS).exists():
        model, tokenizer = checkpoint.load_run(path)
        if not isinstance(model, GPT):
            raise InputError(f"{source} is a run of the bigram model; this needs a GPT")
        return model, tokenizer
    if (path / "ckpt.pt").exists():
        return _nanogpt(path / "ckpt.pt")
    if files := sorted(path.glob("model*.safetensors")):
        return _hugging_face(path, files)
    raise InputError(
        f"no model at {source}; give {', '.join(GPT2_SIZES)}, or a folder with "
        "model.safetensors (Hugging Face), ckpt.pt (nanoGPT) or a run, or one of these files"
    )


def _gpt2(name: str) -> tuple[GPT, Tokenizer]:
    n_layer, n_head, n_embd = GPT2_SIZES[name]
    path = cache_folder() / f"{name}.safetensors"
    if not path.exists():
        # The server has a note beside each large file, in the format of Git LFS, with its checksum.
        note = download(f"{GPT2_URL}/{name}/raw/main/model.safetensors", 4096).decode("latin-1")
        found = re.search(r"oid sha256:([0-9a-f]{64})\nsize (\d+)", note)
        if not found:
            raise InputError(f"{GPT2_URL}/{name} gives no checksum of its weights")
        url = f"{GPT2_URL}/{name}/resolve/main/model.safetensors"
        download_file(url, path, int(found[2]), found[1])
    tokenizer = GPT2Tokenizer()
    config = GPTConfig(1024, GPT2_VOCAB_SIZE, n_layer, n_head, n_embd, bias=True)
    return _build(config, _from_hugging_face(read_safetensors(path)), path), tokenizer


def _hugging_face(folder: Path, files: list[Path]) -> tuple[GPT, Tokenizer]:
    config = _hugging_face_config(folder / "config.json")
    tokenizer = _tokenizer(folder, config)
    parts = (part for file in files for part in read_safetensors(file).items())
    return _build(config, _from_hugging_face(dict(parts)), files[0]), tokenizer


def _hugging_face_config(path: Path) -> GPTConfig:
    """What config.json says, if it is a GPT-2 as built here."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content["model_type"]
        C = content["n_embd"]
        needed = {
            "n_inner": (None, 4 * C),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "activation_function": tuple(ACTIVATIONS),
        }
        for name, values in needed.items():
            if (value := content.get(name, values[0])) not in values:
                raise InputError(f"{path} has {name} {value}; only {values[-1]} is known here")
        if kind == "gpt2":
            return GPTConfig(
                block_size=content["n_positions"],
                vocab_size=content["vocab_size"],
                n_layer=content["n_layer"],
                n_head=content["n_head"],
                n_embd=C,
                bias=True,
                tie_weights=content.get("tie_word_embeddings", True),
                activation=ACTIVATIONS[content.get("activation_function", "gelu_new")],
            )
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; the weights alone do not say all") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not the configuration of a GPT-2: {error!r}") from None
    raise InputError(f"{path} is of a {kind!r} model; only 'gpt2' is known here")


def _from_hugging_face(arrays: Arrays) -> Arrays:
    arrays = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    return {n: a.T if TRANSPOSED.fullmatch(n) else a for n, a in arrays.items()}


def _nanogpt(path: Path) -> tuple[GPT, Tokenizer]:
    content = read_torch(path)
    try:
        args = content["model_args"]
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
        config = GPTConfig(**{n: args[n] for n in names}, activation="gelu")
        model = _build(config, _from_nanogpt(content.pop("model")), path)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a checkpoint of nanoGPT: {error!r}") from None
    return model, _tokenizer(path.parent, config)


def _from_nanogpt(arrays: Arrays) -> Arrays:
    prefix = re.compile(r"(_orig_mod\.)?(transformer\.)?")
    return {prefix.sub("", name, count=1): array for name, array in arrays.items()}


def _tokenizer(folder: Path, config: GPTConfig) -> Tokenizer:
    """The tokenizer beside the weights; without one, GPT-2's where the vocabulary is as large."""
    if (folder / checkpoint.TOKENIZER).exists():
        tokenizer: Tokenizer = load_tokenizer(folder / checkpoint.TOKENIZER)
    elif (folder / "meta.pkl").exists():
        tokenizer = read_meta(folder / "meta.pkl")
    elif config.vocab_size < GPT2_VOCAB_SIZE:
        raise InputError(
            f"{folder} has no tokenizer: copy its tokenizer.json there, or nanoGPT's meta.pkl"
        )
    else:
        tokenizer = GPT2Tokenizer()
    if config.vocab_size not in (tokenizer.vocab_size, model_vocab_size(tokenizer)):
        raise InputError(
            f"the model in {folder} has {config.vocab_size} tokens, its tokenizer "
            f"{tokenizer.vocab_size}; one of them is of another model"
        )
    return tokenizer


def _build(config: GPTConfig, arrays: Arrays, path: Path) -> GPT:
    """The model with these weights, in float32; nobody else may hold `arrays`, to keep one copy."""
    arrays = {name: array for name, array in arrays.items() if not MASK.fullmatch(name)}
    if config.tie_weights:
        arrays.pop("lm_head.weight", None)
    model = GPT(config, seed=None)
    parameters = model.parameters()
    checkpoint.check_match(path, parameters, arrays)
    for name, tensor in parameters.items():
        array = np.ascontiguousarray(arrays.pop(name), np.float32)
        tensor.replace(Tensor(array, device=tensor.device).realize())
    return model


# Files --------------------------------------------------------------------------------------------

SAFETENSORS_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "bf16", "U8": "|u1"}
TORCH_TYPES = {
    "HalfStorage": "<f2", "FloatStorage": "<f4", "DoubleStorage": "<f8", "BFloat16Storage": "bf16",
    "ByteStorage": "|u1", "BoolStorage": "|b1", "IntStorage": "<i4", "LongStorage": "<i8",
}  # fmt: skip


def _mapped(path: Path, offset: int, count: int, kind: str) -> NDArray[Any]:
    """`count` numbers of a file, (count,), which are read when they are used."""
    if count == 0:
        return np.zeros(0, np.float32)
    if kind == "bf16":  # the upper half of a float32
        bits = np.memmap(path, "<u2", "r", offset, count)
        return (bits.astype("<u4") << 16).view("<f4")
    return np.memmap(path, kind, "r", offset, count).view(np.ndarray)


def read_safetensors(path: Path) -> Arrays:
    """The tensors of a safetensors file by name, mapped.

    Raises:
        InputError: the file is damaged, or holds types that are no weights.
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > os.fstat(file.fileno()).st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        arrays = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            kind, count = SAFETENSORS_TYPES[entry["dtype"]], int(np.prod(entry["shape"]))
            array = _mapped(path, 8 + length + start, count, kind)
            size = 2 if kind == "bf16" else array.itemsize
            if end - start != count * size:
                raise ValueError(f"{name} has {end - start} bytes")
            arrays[name] = array.reshape(entry["shape"])
        return arrays
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{path} is damaged, or not a safetensors file: {error!r}") from None


class _TorchUnpickler(pickle.Unpickler):
    """Makes dicts, lists, numbers, strings and mapped arrays, and nothing else."""

    def __init__(self, file: io.BufferedIOBase | io.BytesIO, path: Path, storages: dict[str, int]):
        super().__init__(file)
        self.path, self.storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in TORCH_TYPES:
            return TORCH_TYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict  # PyTorch gives it an attribute, which a plain dict cannot have
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of weights")

    def persistent_load(self, pid: Any) -> NDArray[Any]:
        _, kind, key, _, count = pid
        return _mapped(self.path, self.storages[key], count, kind)


def _tensor(
    storage: NDArray[Any], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> NDArray[Any]:
    """A view of a part of `storage`; numpy sees to it that it is a part."""
    size = storage.itemsize
    return np.ndarray(shape, storage.dtype, storage, offset * size, [s * size for s in strides])


def read_torch(path: Path) -> Any:
    """What torch.save wrote, with mapped arrays for tensors; runs no code that the file names.

    Raises:
        InputError: the file is damaged, or holds more than weights and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            storages, pickled = {}, ""
            for entry in archive.infolist():
                file.seek(entry.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                start = entry.header_offset + 30 + name_length + extra_length
                if entry.compress_type == zipfile.ZIP_STORED:
                    storages[entry.filename.rpartition("/")[2]] = start
                if entry.filename.endswith("/data.pkl"):
                    pickled = entry.filename
            return _TorchUnpickler(io.BytesIO(archive.read(pickled)), path, storages).load()
    except zipfile.BadZipFile:
        raise InputError(f"{path} is damaged, or older than PyTorch 1.6") from None
    except Exception as error:  # a damaged pickle may fail in any way
        raise InputError(f"{path} cannot be read: {error}") from None


def read_meta(path: Path) -> CharTokenizer:
    """The vocabulary in nanoGPT's meta.pkl: {"itos": {id: character}, ...}.

    Raises:
        InputError: it is something else.
    """
    try:
        itos = _TorchUnpickler(io.BytesIO(path.read_bytes()), path, {}).load()["itos"]
        return CharTokenizer([itos[i] for i in range(len(itos))])
    except Exception as error:  # a damaged pickle may fail in any way
        raise InputError(f"{path} is not a character vocabulary of nanoGPT: {error}") from None
