"""Training steps and evaluation, ours and PyTorch's in turn, in one process on the same batches.

    python -m benchmarks.throughput [--shape micro|medium] [--dropout 0.2] [--compiled]

Needs the extra `bench` (torch). Prints medians, the spread and the ratio, and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.peer import PeerTrainer
from tinygpt.batches import sample_blocks
from tinygpt.config import GPTConfig, RunConfig, TrainConfig
from tinygpt.device import device_name, select_device
from tinygpt.trainer import choose_trainer

SHAPES = {
    "micro": (GPTConfig(64, 65, 4, 4, 128, activation="gelu"), 12),
    "medium": (GPTConfig(256, 65, 6, 6, 384, activation="gelu"), 8),
}


def flop_per_step(c: GPTConfig, batch_size: int) -> float:
    """Forward and backward of the matrix products: 6 per weight and token, 12 L T C for attention
    scores and their use, as PaLM's appendix B counts (Chowdhery et al. 2022)."""
    weights = c.n_layer * 12 * c.n_embd**2 + c.vocab_size * c.n_embd
    per_token = 6 * weights + 12 * c.n_layer * c.block_size * c.n_embd
    return float(per_token * batch_size * c.block_size)


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=SHAPES, default="micro")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--compiled", action="store_true", help="torch.compile for the peer")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each, in turn")
    parser.add_argument("--steps", type=int, default=5, help="steps per measurement")
    parser.add_argument("--output", type=Path, default=Path("throughput.json"))
    args = parser.parse_args()
    select_device(None)
    shape, batch_size = SHAPES[args.shape]
    config = GPTConfig(**{**vars(shape), "dropout": args.dropout})
    recipe = TrainConfig(batch_size=batch_size)
    ours = choose_trainer(RunConfig("benchmark", config, recipe))
    peer = PeerTrainer(config, recipe, args.compiled)
    rng = np.random.default_rng(0)
    data = rng.integers(0, config.vocab_size, 100_000, dtype=np.int32)
    iteration = 0

    def our_steps() -> None:
        for _ in range(args.steps):
            ours.step(*sample_blocks(data, batch_size, config.block_size, rng), iteration)
            ours.train_loss()

    def peer_steps() -> None:
        for _ in range(args.steps):
            x, y = sample_blocks(data, batch_size, config.block_size, rng)
            peer.step(torch.from_numpy(x).long(), torch.from_numpy(y).long(), iteration)

    def our_evaluation() -> None:
        for _ in range(args.steps):
            ours.evaluate(*sample_blocks(data, batch_size, config.block_size, rng))

    def peer_evaluation() -> None:
        for _ in range(args.steps):
            x, y = sample_blocks(data, batch_size, config.block_size, rng)
            peer.evaluate(torch.from_numpy(x).long(), torch.from_numpy(y).long())

    results = {}
    for work, a, b in (
        ("training step", our_steps, peer_steps),
        ("evaluation", our_evaluation, peer_evaluation),
    ):
        a(), b()  # compile, warm up
        pairs = np.array([(timed(a), timed(b)) for _ in range(args.rounds)]) / args.steps
        results[work] = {
            "ours_ms": np.percentile(pairs[:, 0] * 1e3, [0, 50, 100]).round(2).tolist(),
            "peer_ms": np.percentile(pairs[:, 1] * 1e3, [0, 50, 100]).round(2).tolist(),
            "ratio": float(np.median(pairs[:, 1] / pairs[:, 0]).round(2)),
        }
        flop = flop_per_step(config, batch_size) / (1 if work == "training step" else 3)
        results[work]["gflops"] = round(flop / np.median(pairs[:, 0]) / 1e9, 1)

    torch_name = f"PyTorch {torch.__version__.split('+')[0]}, {torch.get_num_threads()} threads"
    print(f"{args.shape}, dropout {args.dropout}; {platform.processor() or platform.machine()}")
    print(f"ours: {device_name()}, {len(ours.devices)} cores; peer: {torch_name}")
    print(f"{'':15} {'ours, ms':>24} {'peer, ms':>24} {'ratio':>6} {'GFLOP/s':>8}")
    for work, r in results.items():
        cells = [f"{m[1]:.1f} ({m[0]:.1f}-{m[2]:.1f})" for m in (r["ours_ms"], r["peer_ms"])]
        print(f"{work:15} {cells[0]:>24} {cells[1]:>24} {r['ratio']:>6.2f} {r['gflops']:>8.1f}")
    args.output.write_text(json.dumps({"arguments": vars(args), "results": results}, default=str))


if __name__ == "__main__":
    main()
