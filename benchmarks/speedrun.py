"""The scoreboard: what a preset reaches, and in which time, over several seeds.

    python -m benchmarks.speedrun [--preset record] [--seeds 1 2 3] [--peer] [--cold] [-- FLAGS]

Every seed is a run of its own, `python -m tinygpt.train`, as a user starts it; FLAGS go to it. The
val loss is the mean over the whole val split, in nats per token, in blocks of the preset's
block_size: contexts are never longer, and longer ones would give a lower loss at equal quality. The
val split only measures. Nothing chooses among seeds: all that were asked for are in the mean.

`--peer` runs nanoGPT's CPU recipe (the preset `micro`) on PyTorch, after each of our runs, from the
start of its process too. `--cold` compiles every kernel anew. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.roofline import cpu_name
from tinygpt.batches import evaluation_batches, sample_blocks, split_tokens
from tinygpt.checkpoint import METRICS, SUMMARY, load_config, read_metrics
from tinygpt.config import PRESETS, GPTConfig
from tinygpt.corpus import load_corpus
from tinygpt.tokenizer import CharTokenizer

COLUMNS = ("val_loss", "train_loss", "wall_s", "without_start_s", "tokens")


def our_run(preset: str, seed: int, folder: Path, flags: list[str], cold: bool) -> dict[str, Any]:
    """Trains in a process of its own, and reads what the run has left."""
    command = [sys.executable, "-m", "tinygpt.train", "--preset", preset, "--seed", str(seed)]
    command += ["--out-dir", str(folder), "--overwrite", *flags]
    with TemporaryDirectory() as empty:
        fresh = {"CACHEDB": f"{empty}/cache.db"} if cold else {}  # tinygrad's compiled kernels
        start = time.time()
        subprocess.run(command, check=True, env=os.environ | fresh)
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    wall = (folder / SUMMARY).stat().st_mtime - start  # what follows are pictures
    rows, config = read_metrics(folder), load_config(folder)
    last_tenth = [r["train_loss"] for r in rows if r["iteration"] > 0.9 * config.train.max_iters]
    return {
        "seed": seed,
        "val_loss": summary["val_loss"],
        "train_loss": float(np.mean(last_tenth)),
        "wall_s": wall,
        "without_start_s": wall - summary["seconds_to_first_iteration"],
        "tokens": rows[-1]["tokens"],
        "parameters": summary["parameters"],
        "block_size": config.model.block_size,
        "device": summary["device"],
        "cores": config.train.devices,
        "run": str(folder / METRICS),
    }


def peer_run(seed: int, path: Path) -> None:
    """nanoGPT's CPU recipe on PyTorch; writes its result to `path`."""
    import torch

    from benchmarks.peer import PeerTrainer

    text = load_corpus("tinyshakespeare")
    tokenizer = CharTokenizer.from_text(text)
    train, val = split_tokens(tokenizer.encode_array(text))
    chosen = PRESETS["micro"]
    config = GPTConfig(**chosen.model, vocab_size=tokenizer.vocab_size)
    c, T = chosen.train, config.block_size
    trainer, losses = PeerTrainer(config, replace(c, seed=seed)), []
    for i in range(c.max_iters):
        x, y = sample_blocks(train, c.batch_size, T, np.random.default_rng([seed, i]))
        losses.append(trainer.step(torch.from_numpy(x).long(), torch.from_numpy(y).long(), i))
        if i == 0:
            after_first_step = time.perf_counter()
    total = 0.0
    for x, y in evaluation_batches(val, c.batch_size, T):
        total += trainer.total_loss(torch.from_numpy(x).long(), torch.from_numpy(y).long())
    result = {
        "seed": seed,
        "val_loss": total / (len(val) - 1),
        "train_loss": float(np.mean(losses[-c.max_iters // 10 :])),
        "seconds_after_first_step": time.perf_counter() - after_first_step,
        "tokens": c.max_iters * c.batch_size * T,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "block_size": T,
        "device": f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads",
    }
    path.write_text(json.dumps(result), encoding="utf-8")


def timed_peer_run(seed: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        start = time.perf_counter()
        process = multiprocessing.get_context("spawn").Process(target=peer_run, args=(seed, path))
        process.start()
        process.join()
        wall = time.perf_counter() - start
        if process.exitcode:
            sys.exit("the peer's run failed")
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    after = result.pop("seconds_after_first_step")
    return result | {"wall_s": wall, "without_start_s": after}


def mean(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of every column, and how uncertain the mean val loss is: the standard error."""
    means = {name: float(np.mean([run[name] for run in runs])) for name in COLUMNS}
    losses = [run["val_loss"] for run in runs]
    error = float(np.std(losses, ddof=1)) / math.sqrt(len(runs)) if len(runs) > 1 else math.nan
    return means | {"val_loss_error": error}


def table(title: str, runs: list[dict[str, Any]]) -> str:
    first = runs[0]
    lines = [
        f"{title}: {first['parameters']:,} parameters, blocks of {first['block_size']}, "
        f"{first['device']}",
        f"{'seed':>6} {'val':>8} {'train':>8} {'wall, s':>9} {'no start':>9} {'tokens':>11}",
    ]
    for name, row in [*((str(r["seed"]), r) for r in runs), ("mean", mean(runs))]:
        lines.append(
            f"{name:>6} {row['val_loss']:8.4f} {row['train_loss']:8.4f} {row['wall_s']:9.1f} "
            f"{row['without_start_s']:9.1f} {row['tokens']:11,.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="record")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--peer", action="store_true", help="measure nanoGPT's CPU recipe, too")
    parser.add_argument("--cold", action="store_true", help="compile every kernel in every run")
    parser.add_argument("--runs", type=Path, default=Path("runs/speedrun"), help="their folder")
    parser.add_argument("--output", type=Path, default=Path("speedrun.json"))
    parser.add_argument("flags", nargs="*", help="for tinygpt.train, after --")
    args = parser.parse_args()

    ours: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    for seed in args.seeds:
        folder = args.runs / f"{args.preset}-{seed}"
        ours.append(our_run(args.preset, seed, folder, args.flags, args.cold))
        if args.peer:
            peers.append(timed_peer_run(seed))
    found = {args.preset: ours} | ({"nanoGPT's micro on PyTorch": peers} if peers else {})
    print(f"\n{cpu_name()}, {os.cpu_count()} cores; train is the")
    print("mean of the last tenth of the steps, dropout on; wall is from the start of the process")
    print("until its val loss is known; no start is that without the time to the end of the first")
    print("step, where kernels are compiled or found compiled")
    for title, runs in found.items():
        print(table(title, runs))
    content = {
        "arguments": vars(args),
        "results": [
            {"name": title, "mean": mean(runs), "runs": runs} for title, runs in found.items()
        ],
    }
    args.output.write_text(json.dumps(content, default=str, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
