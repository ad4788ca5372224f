"""What a run leaves on disk, and reading it back.

A run's folder holds `config.json`, `tokenizer.json`, `checkpoint.safetensors` (the last state: all
that is needed to go on as if nothing had happened), `best.safetensors` (the weights with the lowest
val loss), `metrics.jsonl`, `samples.jsonl` (a short text from every evaluation) and, once it has
finished, `summary.json`, `loss.png`, `report.html` and `sample.txt`. Nothing is pickled; every file
but the growing metrics.jsonl is written whole or not at all.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tinygrad import Tensor

from tinygpt.config import InputError, RunConfig
from tinygpt.files import replacing, write_text
from tinygpt.model import LanguageModel, build_model
from tinygpt.tokenizer import Tokenizer, load_tokenizer, model_vocab_size

T = TypeVar("T")

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
LAST = "checkpoint.safetensors"
BEST = "best.safetensors"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
LOSS_PLOT = "loss.png"
REPORT = "report.html"
SAMPLE = "sample.txt"
ALL_FILES = (
    CONFIG, TOKENIZER, LAST, BEST, METRICS, SAMPLES, SUMMARY, LOSS_PLOT, REPORT, SAMPLE,
)  # fmt: skip


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0  # training steps done
    seconds: float = 0.0  # spent on them, evaluations included
    seconds_to_first_iteration: float = 0.0  # from the start of `train`
    val_loss: float = math.inf  # of the last evaluation
    best_val_loss: float = math.inf


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes a safetensors file; metadata is stored as JSON.

    Raises:
        InputError: the disk is full or cannot be written; the file at `path` is as it was.
    """
    arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(arrays, temporary, {"tinygpt": json.dumps(metadata)})
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"could not write {path}: {error}; what was there before is unharmed"
        ) from None


def load_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Reads what `save_tensors` wrote: arrays by name, and the metadata.

    Raises:
        InputError: the file is missing, truncated or of another origin.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; a run writes it at its first evaluation")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {})["tinygpt"])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged or was not written by tinygpt ({error})") from None


def check_match(path: Path, tensors: dict[str, Tensor], arrays: dict[str, NDArray[Any]]) -> None:
    """Raises InputError where a tensor is missing, unexpected or of another shape; it is named."""
    if missing := sorted(tensors.keys() - arrays.keys()):
        raise InputError(f"{path} is of another model: it lacks {_listing(missing)}")
    if unexpected := sorted(arrays.keys() - tensors.keys()):
        raise InputError(f"{path} is of another model: this one has no {_listing(unexpected)}")
    for name, tensor in tensors.items():
        array, dtype = arrays[name], np.dtype(tensor.dtype.fmt)
        if array.shape != tensor.shape:
            raise InputError(
                f"{path} is of another model: {name} is {array.dtype} {array.shape}, "
                f"not {dtype} {tensor.shape}"
            )


def restore(path: Path, tensors: dict[str, Tensor], arrays: dict[str, NDArray[Any]]) -> None:
    """Copies arrays into tensors of the same names and shapes, all or none.

    Raises:
        InputError: a tensor is missing, unexpected, or of another shape or dtype; it is named.
    """
    check_match(path, tensors, arrays)
    for name, tensor in tensors.items():
        if arrays[name].dtype != (dtype := np.dtype(tensor.dtype.fmt)):
            raise InputError(f"{path} is damaged: {name} is {arrays[name].dtype}, not {dtype}")
    for name, tensor in tensors.items():
        tensor.assign(Tensor(arrays[name], device=tensor.device)).realize()


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def training_state(weights: dict[str, Tensor], moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that a step changes, by name: weights and moments."""
    return weights | {f"optimizer.{name}": moment for name, moment in moments.items()}


def save_state(folder: Path, state: dict[str, Tensor], progress: Progress) -> None:
    """Writes the last state, and the best weights if the last evaluation was the best so far."""
    if progress.val_loss < progress.best_val_loss:
        progress.best_val_loss = progress.val_loss
        save_tensors(folder / BEST, _weights(state), asdict(progress))
    save_tensors(folder / LAST, state, asdict(progress))


def load_state(folder: Path, state: dict[str, Tensor]) -> Progress:
    """Puts the last state into the tensors of `state`.

    Raises:
        InputError: the checkpoint is damaged or of another model; nothing has changed.
    """
    arrays, metadata = load_tensors(folder / LAST)
    restore(folder / LAST, state, arrays)
    return Progress(**metadata)


def _weights(state: dict[str, T]) -> dict[str, T]:
    return {n: t for n, t in state.items() if not n.startswith("optimizer.")}


def start_run(folder: Path, config: RunConfig, tokenizer: Tokenizer, progress: Progress) -> None:
    """Readies `folder` for a run that goes on from `progress`; rows after it are dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    if progress.iteration == 0:
        for name in ALL_FILES:
            (folder / name).unlink(missing_ok=True)
    (folder / SUMMARY).unlink(missing_ok=True)
    write_text(folder / CONFIG, json.dumps(asdict(config), indent=2) + "\n")
    tokenizer.save(folder / TOKENIZER)
    for name, rows in ((METRICS, read_metrics(folder)), (SAMPLES, read_samples(folder))):
        _write_rows(folder / name, [row for row in rows if row["iteration"] <= progress.iteration])


def finish_run(folder: Path, summary: dict[str, Any], sample: str) -> None:
    write_text(folder / SAMPLE, sample + "\n")
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def check_free(folder: Path) -> None:
    """Raises InputError where `folder` holds a run that a new one would overwrite."""
    if (folder / SUMMARY).exists():
        state = "a finished run"
    elif (folder / LAST).exists():
        state = "a run that was stopped"
    else:
        return
    raise InputError(
        f"{folder} holds {state}; add --resume to go on with it, --overwrite to replace it, "
        "or --out-dir to write elsewhere"
    )


def load_config(folder: Path) -> RunConfig:
    """Raises InputError where `folder` holds no run."""
    path = folder / CONFIG
    try:
        return RunConfig.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise InputError(f"{folder} holds no run: there is no {CONFIG} in it") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{path} is damaged: it is not JSON") from None


def load_run(folder: Path) -> tuple[LanguageModel, Tokenizer]:
    """The model and the tokenizer of a run, with its best weights (the last before there are any).

    Raises:
        InputError: the folder holds no run, or a file of it is missing or damaged.
    """
    config = load_config(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if config.model.vocab_size not in (tokenizer.vocab_size, model_vocab_size(tokenizer)):
        raise InputError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} tokens, "
            f"the run's model {config.model.vocab_size}; one of them is of another run"
        )
    model = build_model(config.model, None)
    path = folder / BEST if (folder / BEST).exists() else folder / LAST
    arrays, _ = load_tensors(path)
    restore(path, model.parameters(), _weights(arrays))
    return model, tokenizer


def newest_run(root: Path = Path("runs")) -> Path:
    """The folder in `root` whose weights were written last.

    Raises:
        InputError: there is none.
    """
    found = sorted(root.glob(f"*/{LAST}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(
            f"no trained model in {root}/; train one with `python -m tinygpt.train`, "
            "or name a run's folder with --run"
        )
    return found[-1].parent


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line cut short by a crash is left out."""
    return _read_rows(folder / METRICS)


def append_sample(folder: Path, iteration: int, text: str) -> None:
    """Adds what the model wrote after `iteration` steps."""
    _write_rows(folder / SAMPLES, [*read_samples(folder), {"iteration": iteration, "text": text}])


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of samples.jsonl, `iteration` and `text`; none where a run has kept none."""
    return _read_rows(folder / SAMPLES)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
