"""Pictures of runs: loss.png, the page report.html, and `python -m tinygpt.report`.

A page is the template `report.html` with the data of one run or of several in it, as JSON, and
nothing from elsewhere: it opens from a file, without network. The template draws everything in the
browser, and puts texts there as text; nothing that a corpus holds is ever read as HTML.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tinygrad import Tensor

from tinygpt.checkpoint import (
    BEST,
    LAST,
    LOSS_PLOT,
    METRICS,
    REPORT,
    SAMPLE,
    SAMPLES,
    SUMMARY,
    load_config,
    load_run,
    newest_run,
    read_metrics,
    read_samples,
)
from tinygpt.cli import run_command
from tinygpt.config import PRESETS, InputError, RunConfig, TrainConfig
from tinygpt.device import select_device
from tinygpt.files import replacing, write_text
from tinygpt.model import GPT, LanguageModel, attention_weights, causal_mask
from tinygpt.prepare import load_data
from tinygpt.sampling import Tokens
from tinygpt.tokenizer import Tokenizer

# What a page shows at most; together these keep it below a megabyte.
MAX_ROWS = 1000  # of metrics.jsonl
MAX_SAMPLES = 12
PASSAGE = 400  # tokens
CANDIDATES = 5  # for each of them
ATTENTION_TOKENS = 64
ATTENTION_GRID = 12  # layers, and heads of each

COLUMNS = ("iteration", "tokens", "seconds", "train_loss", "val_loss", "learning_rate",
           "tokens_per_second")  # fmt: skip
TEMPLATE = Path(__file__).with_name("report.html")


# What a model does with a text --------------------------------------------------------------------


def attention_maps(model: GPT, idx: Tensor) -> NDArray[np.float32]:
    """The attention weights of every layer and head for the tokens idx (1, T).

    Returns:
        (n_layer, n_head, T, T): [l, h, t, s] is how much of token s's value token t takes. Every
        row adds up to 1, and is 0 where s > t.

    Raises:
        InputError: idx is not one row of at most block_size tokens of the vocabulary.
    """
    model(idx)  # checks idx
    if idx.shape[0] != 1:
        raise InputError(f"idx has {idx.shape[0]} rows; attention maps are made of one")
    x, maps = model.embed(idx), []
    for block in model.h:
        q, k, _ = block.attn.heads(block.ln_1(x), model.rotary)
        maps.append(attention_weights(q, k, causal_mask(idx.shape[1], idx.device)).numpy()[0])
        x = block(x, model.rotary).realize()
    return np.stack(maps)


def next_token_logits(model: LanguageModel, ids: Tokens) -> NDArray[np.float32]:
    """The logits of every token of ids (N,) but the first, from what stands before it.

    A text that is longer than a block is read in blocks that overlap by half: behind every token
    are at least half a block, or all there is.

    Returns:
        (N - 1, V).
    """
    n_targets = len(ids) - 1
    length = min(model.config.block_size, n_targets)
    starts = [*range(0, n_targets - length, max(1, length // 2)), n_targets - length]
    logits = model.logits(Tensor(np.stack([ids[s : s + length] for s in starts]))).numpy()
    result = np.empty((n_targets, logits.shape[-1]), np.float32)
    for start, rows in reversed(list(zip(starts, logits, strict=True))):
        result[start : start + length] = rows  # an earlier block has more of the past
    return result


# The content of a page ----------------------------------------------------------------------------


def passage_content(model: LanguageModel, tokenizer: Tokenizer, ids: Tokens) -> dict[str, Any]:
    """The tokens of ids (N,), how surprising each was, and what was likelier in its place."""
    logits = next_token_logits(model, ids).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    bits = (np.log(np.exp(logits).sum(axis=-1, keepdims=True)) - logits) / math.log(2)  # (N - 1, V)
    surprise = np.take_along_axis(bits, ids[1:, None].astype(np.int64), axis=-1)[:, 0]
    known = bits[:, : tokenizer.vocab_size]  # the model's vocabulary may be padded
    best = np.argsort(known, axis=-1, kind="stable")[:, :CANDIDATES]
    chances = 2 ** -np.take_along_axis(known, best, axis=-1)
    return {
        "ids": ids.tolist(),
        "text": {int(i): tokenizer.decode([int(i)]) for i in np.union1d(ids, best)},
        "bits": [round(float(b), 3) for b in surprise],
        "candidates": best.tolist(),
        "chances": [[_round(p, 3) for p in row] for row in chances],
        "context": model.config.block_size // 2 if isinstance(model, GPT) else 1,
    }


def attention_content(model: GPT, ids: Tokens) -> dict[str, Any]:
    """Attention maps of ids (T,) in eight bits; of a large model only some."""
    maps = attention_maps(model, Tensor(ids[None]))
    layers, heads = (_spread(n, ATTENTION_GRID) for n in maps.shape[:2])
    rows, columns = np.tril_indices(len(ids))
    lower = maps[np.ix_(layers, heads)][:, :, rows, columns]
    steps = np.rint(255 * np.sqrt(lower)).astype(np.uint8)  # the root keeps small weights apart
    return {
        "layers": layers,
        "heads": heads,
        "of": maps.shape[:2],
        "tokens": len(ids),
        "maps": base64.b64encode(steps.tobytes()).decode(),
    }


def reading_content(
    folder: Path, config: RunConfig, val_data: NDArray[np.integer] | None
) -> dict[str, Any]:
    """What the model makes of the val split's first tokens, or a note on why that is missing."""
    if not any((folder / name).exists() for name in (BEST, LAST)):
        return {"note": "The run has saved no weights yet, so there is no model to read a text."}
    model, tokenizer = load_run(folder)
    if val_data is None:
        try:
            _, val_data, _ = load_data(config.train, tokenizer)
        except InputError as error:
            return {
                "note": f"The run's data cannot be read now, so no text is shown here: {error}."
            }
    ids = np.array(val_data[:PASSAGE], np.int32)
    if len(ids) < 2 or ids.max() >= config.model.vocab_size:
        return {"note": "The run's data has changed, so no text is shown here."}
    content: dict[str, Any] = {"passage": passage_content(model, tokenizer, ids)}
    if isinstance(model, GPT):
        length = min(model.config.block_size, ATTENTION_TOKENS)
        content["attention"] = attention_content(model, ids[:length])
    return content


def run_content(folder: Path) -> dict[str, Any]:
    """What the files of a run's folder say, but for its weights.

    Raises:
        InputError: the folder holds no run, a file is damaged, or there are no metrics yet.
    """
    config, rows = load_config(folder), _rows(folder, METRICS, read_metrics, COLUMNS)
    if not rows:
        raise InputError(f"{folder} has no metrics yet; a run writes them from its first step on")
    evaluated = [row for row in rows if row["val_loss"] is not None]
    samples = _rows(folder, SAMPLES, read_samples, ("iteration", "text"))
    shown = [samples[i] for i in _spread(len(samples), MAX_SAMPLES)]
    summary = _summary(folder / SUMMARY)
    return {
        "name": folder.resolve().name,
        "preset": config.preset,
        "unit": "character" if _is_char(config) else "token",
        "rows": {c: [_round(row[c], 6) for row in _thinned(rows, evaluated)] for c in COLUMNS},
        "every": math.ceil(len(rows) / MAX_ROWS),
        "samples": shown,
        "samples_of": len(samples),
        "sample": _read_text(folder / SAMPLE),
        "summary": summary,
        "max_iters": config.train.max_iters,
        "speed": _round(float(np.median([row["tokens_per_second"] for row in rows])), 4),
        "config": config_content(config),
    }


def config_content(config: RunConfig) -> list[dict[str, Any]]:
    """Every setting with its help; `preset` is the preset's value where the run has another."""
    preset = PRESETS.get(config.preset)
    defaults = (preset.model, dataclasses.asdict(preset.train)) if preset else ({}, {})
    # what a run works out for itself, from the text, the cores and its folder
    derived = ("vocab_size", "devices", "out_dir")
    content = []
    for part, settings, chosen in zip(
        ("model", "training"), (config.model, config.train), defaults, strict=True
    ):
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            default = chosen.get(field.name, field.default)
            is_own = preset and field.name not in derived and value != default
            content.append({
                "part": part,
                "name": field.name,
                "value": _shown(field.name, value, config.train),
                "preset": _shown(field.name, default, preset.train) if preset and is_own else None,
                "help": field.metadata["help"],
            })  # fmt: skip
    return content


def _shown(name: str, value: Any, recipe: TrainConfig) -> str:
    if value is None:  # what follows from other settings
        value = {
            "attn_dropout": "that of dropout",
            "min_lr": recipe.final_lr,
            "lr_decay_iters": recipe.decay_iters,
            "warmdown_iters": recipe.linear_iters,
            "embedding_lr": recipe.learning_rate,
            "head_lr": recipe.learning_rate,
        }[name]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_char(config: RunConfig) -> bool:
    return config.train.tokenizer == "char"


def _rows(
    folder: Path,
    name: str,
    read: Callable[[Path], list[dict[str, Any]]],
    columns: tuple[str, ...],
) -> list[dict[str, Any]]:
    """The rows of one of a run's files, each with these columns, numbers finite."""
    path = folder / name
    try:
        rows = read(folder)
        n_lines = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path} is damaged: it is not text") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not all(_is_cell(c, row.get(c)) for c in columns):
            raise InputError(f"{path} is damaged: line {i + 1} is not a row of a run")
    if len(rows) < n_lines - 1:  # a crash may cut the last line short, no other
        raise InputError(f"{path} is damaged: line {len(rows) + 1} is not JSON")
    return rows


def _is_cell(column: str, value: Any) -> bool:
    if column == "text":
        return isinstance(value, str)
    if column == "val_loss" and value is None:
        return True
    return isinstance(value, int | float) and math.isfinite(value)


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    names = ("parameters", "iterations", "val_loss", "best_val_loss", "seconds", "device")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return {name: summary[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged: it is not the summary of a run") from None


def _read_text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode() if path.exists() else None
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path} is damaged: it is not text") from None


def _thinned(rows: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows at equal distances, and those of evaluations, in order."""
    kept = rows[:: math.ceil(len(rows) / MAX_ROWS)]
    kept += [evaluated[i] for i in _spread(len(evaluated), MAX_ROWS)]
    return [kept[i] for i in np.unique([row["iteration"] for row in kept], return_index=True)[1]]


def _spread(n: int, most: int) -> list[int]:
    """At most `most` of 0 .. n - 1, at about equal distances, with the first and the last."""
    chosen: list[int] = np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()
    return chosen


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


# Pages --------------------------------------------------------------------------------------------


def page(title: str, content: dict[str, Any]) -> str:
    """The template with this content, as ASCII JSON in which nothing can end the script element."""
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    values = {"title": html.escape(title), "data": data}
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|data)\}\}", lambda match: values[match[1]], template)


def write_report(
    folder: Path, val_data: NDArray[np.integer] | None = None, path: Path | None = None
) -> Path:
    """Writes the page of the run in `folder`; the same run gives the same page.

    Args:
        val_data: the run's val split; without it the run's data is loaded.
        path: where to, by default report.html in the run's folder.

    Raises:
        InputError: the folder holds no run, a file is damaged, there are no metrics yet, or the
            page cannot be written.
    """
    path = path or folder / REPORT
    run = run_content(folder)
    content = {"runs": [run], **reading_content(folder, load_config(folder), val_data)}
    _write(path, page(run["name"], content))
    return path


def write_comparison(folders: list[Path], path: Path) -> Path:
    """Writes a page that compares runs; raises InputError as `write_report` does."""
    runs = [run_content(folder) for folder in folders]
    names = [run["name"] for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = str(folder)
    _write(path, page("Runs compared", {"runs": runs}))
    return path


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def draw_pages(folder: Path, val_data: NDArray[np.integer]) -> None:
    """loss.png and report.html of a run that has ended; what cannot be drawn is said, no more."""
    drawings: dict[str, Callable[[], object]] = {
        LOSS_PLOT: lambda: plot_loss(folder),
        REPORT: lambda: write_report(folder, val_data),
    }
    for name, draw in drawings.items():
        try:
            draw()
        except Exception as error:  # whatever it is: the run is done, and saved
            print(f"{folder / name} could not be written: {error}", file=sys.stderr)


def plot_loss(folder: Path) -> Path | None:
    """Draws loss.png, the train and val loss of the run in `folder` over its iterations.

    Returns:
        The picture's path, or None where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = read_metrics(folder)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [row["iteration"] for row in rows],
        [row["train_loss"] for row in rows],
        color="#9ecae1",
        label="train, one batch",
    )
    evaluated = [row for row in rows if row["val_loss"] is not None]
    axes.plot(
        [row["iteration"] for row in evaluated],
        [row["val_loss"] for row in evaluated],
        color="#d95f0e",
        marker="o",
        markersize=4,
        label="val",
    )
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with replacing(folder / LOSS_PLOT) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return folder / LOSS_PLOT


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinygpt.report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Makes a web page of a run, or of several beside each other. A page is one\n"
        "file that needs no network; open it in a browser.",
        epilog="examples:\n"
        "  python -m tinygpt.report                     the newest run in runs/\n"
        "  python -m tinygpt.report runs/laptop         also while it runs, or stopped\n"
        "  python -m tinygpt.report runs/A runs/B       curves, results and settings compared\n",
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, help="folders of runs (default: the newest in runs/)"
    )
    parser.add_argument(
        "--output", type=Path,
        help="the page to write (default: report.html in the run's folder; comparison.html here "
        "for several)",
    )  # fmt: skip
    parser.add_argument("--device", help="CPU, METAL, CUDA, GPU (OpenCL), ... (default: $DEV)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    folders = args.runs or [newest_run()]
    select_device(args.device)
    if len(folders) == 1:
        path = write_report(folders[0], path=args.output)
    else:
        path = write_comparison(folders, args.output or Path("comparison.html"))
    print(path)
    return 0


if __name__ == "__main__":
    run_command(main)
