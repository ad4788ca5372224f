"""Weights in and out, against transformers and torch where they are installed (extra `interop`)."""

import hashlib
import io
import json
import pickle
import struct
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tinygrad import Tensor

from tests.text import SONNETS
from tinygpt import GPT, CharTokenizer, GPTConfig, InputError, interop
from tinygpt.export import export_huggingface, export_nanogpt
from tinygpt.export import main as export
from tinygpt.generate import main as generate
from tinygpt.interop import load_pretrained, read_torch
from tinygpt.tokenizer import GPT2Tokenizer

# Both sides compute in float32 and add in different orders; logits are of order 1 to 10, and the
# largest difference seen is 2e-6.
TOLERANCE = 1e-4

CHARACTERS = CharTokenizer.from_text(SONNETS)


def logits(model: GPT, idx: NDArray[np.int32]) -> NDArray[np.float32]:
    return model(Tensor(idx))[0].numpy()


def tokens(vocab_size: int, shape: tuple[int, int] = (2, 16)) -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)


def small_model(**changes: Any) -> GPT:
    """Weights far from their start, biases too, so that each of them matters."""
    shape = dict(block_size=16, vocab_size=CHARACTERS.vocab_size, n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(**{**shape, **changes}))
    rng = np.random.default_rng(1)
    for tensor in model.parameters().values():
        tensor.assign(Tensor(rng.normal(0, 0.3, tensor.shape).astype(np.float32))).realize()
    return model


# With the peers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def peer_logits(model: Any, idx: NDArray[np.int32]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        result = model(torch.tensor(idx, dtype=torch.long)).logits.numpy()
    return np.asarray(result)


@pytest.fixture(scope="module")
def peer(transformers: Any) -> Any:
    """A random GPT-2, its biases too, with the tokens of our character tokenizer."""
    import torch

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=CHARACTERS.vocab_size, n_positions=32, n_embd=48, n_layer=3, n_head=4
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.2)
        model.transformer.wpe.weight.normal_(0, 2.0)  # else it repeats one token for ever
    return model


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_model_of_transformers(peer: Any, tmp_path: Path, prefix: bool, sharded: bool) -> None:
    size = "20KB" if sharded else "1GB"
    (peer if prefix else peer.transformer).save_pretrained(tmp_path, max_shard_size=size)
    if not prefix:  # GPT2Model's configuration is the same
        assert not any(n.startswith("transformer.") for n in load_file_names(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if sharded else True
    CHARACTERS.save(tmp_path / "tokenizer.json")
    model, tokenizer = load_pretrained(tmp_path)
    assert tokenizer.encode("Shall") == CHARACTERS.encode("Shall")
    idx = tokens(CHARACTERS.vocab_size)
    assert np.abs(logits(model, idx) - peer_logits(peer, idx)).max() < TOLERANCE


def load_file_names(folder: Path) -> list[str]:
    return [name for path in folder.glob("*.safetensors") for name in load_file(path)]


def test_greedy_text_is_equal(peer: Any, tmp_path: Path) -> None:
    """30 tokens; the two likeliest logits of this model are never as near as TOLERANCE."""
    import torch

    peer.save_pretrained(tmp_path)
    CHARACTERS.save(tmp_path / "tokenizer.json")
    idx = tokens(CHARACTERS.vocab_size, (1, 2))
    ours = GPT.from_pretrained(tmp_path).generate(Tensor(idx), 30, temperature=0).numpy()
    theirs = peer.generate(
        torch.tensor(idx, dtype=torch.long), max_new_tokens=30, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours[0].tolist())) > 5  # a text that says something about the weights


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize(("bias", "tie_weights"), [(False, True), (True, True), (True, False)])
def test_transformers_loads_what_we_export(
    transformers: Any, tmp_path: Path, activation: str, bias: bool, tie_weights: bool
) -> None:
    model = small_model(activation=activation, bias=bias, tie_weights=tie_weights)
    export_huggingface(model, CHARACTERS, tmp_path)
    peer, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or of another shape
    idx = tokens(CHARACTERS.vocab_size)
    assert np.abs(logits(model, idx) - peer_logits(peer.eval(), idx)).max() < TOLERANCE

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(SONNETS)["input_ids"] == CHARACTERS.encode(SONNETS)
    assert tokenizer.decode(CHARACTERS.encode(SONNETS)) == SONNETS
    with pytest.raises(Exception, match="UNK"):
        tokenizer("7")


def test_transformers_loads_gpt2s_tokenizer(transformers: Any, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    ours = GPT2Tokenizer()
    model = small_model(vocab_size=50304, n_embd=4, n_layer=1)
    export_huggingface(model, ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(SONNETS)["input_ids"] == ours.encode(SONNETS)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    idx = tokens(ours.vocab_size, (1, 8))
    difference = logits(model, idx)[..., : ours.vocab_size] - peer_logits(peer, idx)
    assert np.abs(difference).max() < TOLERANCE
    theirs.save_pretrained(tmp_path / "saved")  # as a tokenizer.json
    peer.save_pretrained(tmp_path / "saved")
    assert load_pretrained(tmp_path / "saved")[1].encode(SONNETS) == ours.encode(SONNETS)


# nanoGPT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpoint_as_nanogpt_saves_it(tmp_path: Path, bias: bool, compiled: bool) -> None:
    """Its names, its tied weights as one storage, its optimizer and mask beside them."""
    torch = pytest.importorskip("torch")
    model = small_model(bias=bias, activation="gelu")
    c = model.config
    prefix = "_orig_mod." if compiled else ""
    weights = torch.nn.Module().state_dict()  # an OrderedDict with an attribute
    for name, tensor in model.parameters().items():
        weights[f"{prefix}transformer.{name}"] = torch.tensor(tensor.numpy())
    weights[f"{prefix}lm_head.weight"] = weights[f"{prefix}transformer.wte.weight"]
    mask = torch.ones(c.block_size, c.block_size).tril()[None, None]
    weights[f"{prefix}transformer.h.0.attn.bias"] = mask
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights.values()]
    optimizer = torch.optim.AdamW(parameters)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    content = {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "model_args": {**{n: getattr(c, n) for n in names}, "dropout": 0.2},
        "iter_num": 10,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3},
    }
    torch.save(content, tmp_path / "ckpt.pt")
    meta = {"itos": dict(enumerate(CHARACTERS.characters))}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    loaded, tokenizer = load_pretrained(tmp_path)
    idx = tokens(c.vocab_size)
    np.testing.assert_array_equal(logits(loaded, idx), logits(model, idx))  # the same numbers
    assert loaded.config == c
    assert tokenizer.encode("Love") == CHARACTERS.encode("Love")


def test_torch_loads_what_we_export(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = small_model(bias=True, activation="gelu")
    export_nanogpt(model, CHARACTERS, tmp_path / "mine")
    content = torch.load(tmp_path / "mine/ckpt.pt", weights_only=True)
    assert content["model_args"] == {
        "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "bias": True,
        "vocab_size": CHARACTERS.vocab_size, "dropout": 0.0,
    }  # fmt: skip
    assert content["config"]["dataset"] == "mine"
    weights = content["model"]
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()
    assert len(weights) == len(model.parameters()) + 1
    for name, tensor in model.parameters().items():
        np.testing.assert_array_equal(weights[f"transformer.{name}"].numpy(), tensor.numpy())
    meta = pickle.loads((tmp_path / "mine/meta.pkl").read_bytes())
    assert [meta["stoi"][c] for c in "Love"] == CHARACTERS.encode("Love")
    assert meta["vocab_size"] == CHARACTERS.vocab_size


# Without peers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_out_and_in_again(tmp_path: Path, bias: bool) -> None:
    model = small_model(bias=bias, activation="gelu")
    idx = tokens(CHARACTERS.vocab_size)
    for write in (export_huggingface, export_nanogpt):
        write(model, CHARACTERS, tmp_path / write.__name__)
        again, tokenizer = load_pretrained(tmp_path / write.__name__)
        np.testing.assert_array_equal(logits(again, idx), logits(model, idx))
        assert tokenizer.encode(SONNETS) == CHARACTERS.encode(SONNETS)
    file = tmp_path / "export_nanogpt/ckpt.pt"
    np.testing.assert_array_equal(logits(GPT.from_pretrained(file), idx), logits(model, idx))


def test_half_precision_files(tmp_path: Path) -> None:
    """bfloat16 is the upper half of float32: what is cut off is less than 1/128 of each weight."""
    model = small_model(bias=True)
    export_huggingface(model, CHARACTERS, tmp_path)
    path = tmp_path / "model.safetensors"
    arrays = load_file(path)
    save_file({n: a.astype(np.float16) for n, a in arrays.items()}, path)
    halves = GPT.from_pretrained(tmp_path).parameters()
    for name, tensor in model.parameters().items():
        expected = tensor.numpy().astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(halves[name].numpy(), expected)

    header, body, at = {}, b"", 0
    for name, array in arrays.items():
        bits = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        entry = {"dtype": "BF16", "shape": array.shape, "data_offsets": [at, at + len(bits)]}
        header[name], body, at = entry, body + bits, at + len(bits)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    halves = GPT.from_pretrained(tmp_path).parameters()
    for name, tensor in model.parameters().items():
        np.testing.assert_allclose(halves[name].numpy(), tensor.numpy(), rtol=2**-7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of Hugging Face's kind, to be damaged."""
    export_huggingface(small_model(bias=True), CHARACTERS, tmp_path)
    return tmp_path


def refused(source: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_pretrained(source)


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    arrays = load_file(path)
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file({n: a for n, a in arrays.items() if n != name}, path)
    refused(folder, r"lacks h\.1\.mlp\.c_fc\.weight")
    save_file({**arrays, "transformer.h.2.ln_1.weight": arrays[name]}, path)
    refused(folder, r"has no h\.2\.ln_1\.weight")
    save_file({**arrays, name: arrays[name].T.copy()}, path)
    refused(folder, r"h\.1\.mlp\.c_fc\.weight is float32 \(16, 64\), not float32 \(64, 16\)")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "llama", "'llama' model; only 'gpt2'"),
        ("n_inner", 20, "n_inner 20"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon 1e-06; only 1e-05"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx True"),
        ("activation_function", "silu", "activation_function silu"),
        ("n_head", 3, "n_embd 16 is not divisible by n_head 3"),
        ("n_layer", "two", "n_layer is 'two'"),
        ("n_layer", 3, r"lacks h\.2\."),
        ("vocab_size", 7, "the model in .* has 7 tokens, its tokenizer"),
        ("n_embd", None, "not the configuration of a GPT-2"),
    ],
)
def test_configurations_that_are_not_ours(
    folder: Path, field: str, value: Any, message: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    refused(folder, message)


def test_damaged_and_missing_files(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for size in (0, 4, 100, len(data) - 1):
        path.write_bytes(data[:size])
        refused(folder, "is damaged, or not a safetensors file")
    path.write_bytes(data)
    (folder / "tokenizer.json").unlink()
    refused(path, "has no tokenizer")
    (folder / "config.json").write_text("[]")
    refused(path, "not the configuration of a GPT-2")
    (folder / "config.json").unlink()
    refused(path, "config.json does not exist")
    refused(folder / "nowhere", "no model at .*nowhere; give gpt2")


def archive(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("ckpt/data.pkl", pickled)
    return path


@pytest.mark.parametrize(
    "function",
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("numpy.f2py.crackfortran", "myeval"),  # numpy's own eval, which laxer readers let through
        ("torch._utils", "_rebuild_parameter"),
        ("collections", "namedtuple"),
    ],
)
def test_a_checkpoint_runs_no_code(tmp_path: Path, function: tuple[str, str]) -> None:
    witness = tmp_path / "witness"
    module, name = function
    argument = f"__import__('pathlib').Path({str(witness)!r}).touch()"
    pickled = f"c{module}\n{name}\n(V{argument}\ntR.".encode()
    refused(archive(tmp_path / "bad.pt", pickled), f"it asks for {module}.{name}")
    assert not witness.exists()


def test_the_witness_works(tmp_path: Path) -> None:
    """The pickle of the test before does what it says, where nothing stops it."""
    witness = tmp_path / "witness"
    argument = f"__import__('pathlib').Path({str(witness)!r}).touch()"
    pickle.load(io.BytesIO(f"cbuiltins\neval\n(V{argument}\ntR.".encode()))
    assert witness.exists()


def test_a_view_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    """Offsets and strides in a pickle may point anywhere; memory beyond the file stays unread."""
    export_nanogpt(small_model(activation="gelu"), CHARACTERS, tmp_path)
    with zipfile.ZipFile(tmp_path / "ckpt.pt") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    shape = pickle.dumps((16, 16), 2)[2:-1]  # the position table's
    assert parts["ckpt/data.pkl"].count(shape) >= 1
    larger = pickle.dumps((16, 99), 2)[2:-1]
    parts["ckpt/data.pkl"] = parts["ckpt/data.pkl"].replace(shape, larger)
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)
    refused(tmp_path / "bad.pt", "cannot be read")


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02}.", pickle.dumps({"model": 1})])
def test_other_files_are_no_checkpoints(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt", "is damaged, or older than")
    refused(archive(tmp_path / "b.pt", content), "cannot be read|not a checkpoint of nanoGPT")


def test_what_nanogpt_cannot_build(tmp_path: Path) -> None:
    for changes in ({"activation": "relu"}, {"activation": "gelu", "tie_weights": False}):
        with pytest.raises(InputError, match="exact GELU and tied embeddings only"):
            export_nanogpt(small_model(**changes), CHARACTERS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [export_huggingface, export_nanogpt])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"position": "rotary"}, "position rotary"),
        ({"norm": "rms"}, "norm rms"),
        ({"qk_norm": True, "norm": "rms"}, "norm rms, qk_norm True"),
        ({"activation": "relu2"}, "activation relu2"),
    ],
)
def test_only_a_gpt_2_can_be_exported(
    tmp_path: Path, write: Any, change: dict[str, Any], named: str
) -> None:
    message = "only a GPT-2 can be exported, such as --preset micro trains; this model has"
    with pytest.raises(InputError, match=f"{message} {named}"):
        write(small_model(**change), CHARACTERS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_huggingface(small_model(), CHARACTERS, tmp_path)
    flags = "--max-new-tokens 9 --prompt Love --temperature 0"
    assert generate(["--weights", str(tmp_path), *flags.split()]) == 0
    idx = Tensor([CHARACTERS.encode("Love")])
    text = CHARACTERS.decode(small_model().generate(idx, 9, temperature=0).numpy()[0])
    assert capsys.readouterr().out == text + "\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A server with Hugging Face's addresses, the files it has, and a small `gpt2` to expect."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(interop, "GPT2_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setitem(interop.GPT2_SIZES, "gpt2", (1, 1, 2))
    monkeypatch.setenv("TINYGPT_DATA", str(tmp_path / "cache"))
    GPT2Tokenizer()  # into the cache, offline
    monkeypatch.setenv("TINYGPT_OFFLINE", "0")
    yield files
    server.shutdown()
    server.server_close()


def test_gpt2_by_name(
    hub: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the real file: no prefix, and each block's causal mask."""
    pytest.importorskip("tiktoken")
    model = small_model(vocab_size=50257, block_size=1024, n_layer=1, n_head=1, n_embd=2, bias=True)
    export_huggingface(model, GPT2Tokenizer(), tmp_path / "theirs")
    path = tmp_path / "theirs/model.safetensors"
    arrays = {n.removeprefix("transformer."): a for n, a in load_file(path).items()}
    arrays["h.0.attn.bias"] = np.tril(np.ones((1, 1, 1024, 1024), np.float32))
    save_file(arrays, path)
    data = path.read_bytes()
    note = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
    note = note.format(hashlib.sha256(data).hexdigest(), len(data))
    hub["/gpt2/raw/main/model.safetensors"] = note.encode()
    hub["/gpt2/resolve/main/model.safetensors"] = data[:-1] + b"?"
    with pytest.raises(InputError, match="is damaged, and is dropped"):
        load_pretrained("gpt2")
    hub["/gpt2/resolve/main/model.safetensors"] = data
    loaded, tokenizer = load_pretrained("gpt2")
    for name, tensor in model.parameters().items():
        np.testing.assert_array_equal(loaded.parameters()[name].numpy(), tensor.numpy())
    assert tokenizer.vocab_size == 50257
    hub.clear()
    monkeypatch.setenv("TINYGPT_OFFLINE", "1")
    assert load_pretrained("gpt2")[0].config == loaded.config  # from the cache
    with pytest.raises(InputError, match="TINYGPT_OFFLINE is set and .*gpt2-xl.* not in the cache"):
        load_pretrained("gpt2-xl")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_huggingface(small_model(activation="gelu"), CHARACTERS, tmp_path)
    assert export([str(tmp_path), "--format", "nanogpt"]) == 0
    assert "nanogpt/ holds" in capsys.readouterr().out
    content = read_torch(tmp_path / "nanogpt/ckpt.pt")
    assert content["model_args"]["n_layer"] == 2
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        export([str(tmp_path), "--out", str(tmp_path / "file")])
