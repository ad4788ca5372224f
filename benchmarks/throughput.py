"""Training steps and evaluation, ours and PyTorch's in turn, in one process on the same batches.

    python -m benchmarks.throughput [--shape micro|medium] [--dropout 0.2] [--batch-size 24] ...

Needs the extra `bench` (torch). The peer is measured eager and compiled, and the faster of the two
counts. Prints medians, the spread, the ratio, what share of the machine's measured arithmetic ours
is (see roofline.py), and writes JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.peer import PeerTrainer
from benchmarks.roofline import cpu_name, peak_gflops
from tinygpt.batches import sample_blocks
from tinygpt.config import GPTConfig, RunConfig, TrainConfig
from tinygpt.device import device_name, select_device
from tinygpt.trainer import choose_trainer

SHAPES = {
    "micro": (GPTConfig(64, 65, 4, 4, 128, activation="gelu"), 12),
    "medium": (GPTConfig(256, 65, 6, 6, 384, activation="gelu"), 8),
}
CHANGES = "block_size", "n_layer", "n_head", "n_embd", "dropout"


def flop_per_step(c: GPTConfig, batch_size: int) -> float:
    """Forward and backward of the matrix products: 6 per weight and token, 12 L T C for attention
    scores and their use, as PaLM's appendix B counts (Chowdhery et al. 2022)."""
    weights = c.n_layer * 12 * c.n_embd**2 + c.vocab_size * c.n_embd
    per_token = 6 * weights + 12 * c.n_layer * c.block_size * c.n_embd
    return float(per_token * batch_size * c.block_size)


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(works: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list]:
    """Milliseconds of each work, once per round; a round repeats each for some time on end."""
    for work in works.values():
        work()  # compiles, warms up
    repeats = {name: max(1, round(seconds / seconds_of(work))) for name, work in works.items()}
    results: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            total = sum(seconds_of(work) for _ in range(repeats[name]))
            results[name].append(total / repeats[name] * 1e3)
    return results


def measure(config: GPTConfig, recipe: TrainConfig, args: argparse.Namespace) -> dict[str, dict]:
    ours = choose_trainer(RunConfig("benchmark", config, recipe))
    peers = {"eager": PeerTrainer(config, recipe)}
    if args.compiled:
        peers["compiled"] = PeerTrainer(config, recipe, compiled=True)
    rng = np.random.default_rng(0)
    data = rng.integers(0, config.vocab_size, 100_000, dtype=np.int32)

    def batch() -> tuple[np.ndarray, np.ndarray]:
        return sample_blocks(data, recipe.batch_size, config.block_size, rng)

    def train() -> float:
        ours.step(*batch(), 0)
        return ours.train_loss()

    def train_peer(peer: PeerTrainer) -> float:
        x, y = map(torch.from_numpy, batch())
        return peer.step(x.long(), y.long(), 0)

    def evaluate_peer(peer: PeerTrainer) -> float:
        x, y = map(torch.from_numpy, batch())
        return peer.evaluate(x.long(), y.long())

    steps: dict[str, Callable[[], object]] = {"ours": train}
    evaluations: dict[str, Callable[[], object]] = {"ours": lambda: ours.evaluate(*batch())}
    for name, peer in peers.items():
        steps[name] = lambda peer=peer: train_peer(peer)
        evaluations[name] = lambda peer=peer: evaluate_peer(peer)
    flop = flop_per_step(config, recipe.batch_size)
    results = {}
    for work, competitors, count in (
        ("training step", steps, flop),
        ("evaluation", evaluations, flop / 3),
    ):
        times = in_turn(competitors, args.rounds, args.seconds)
        fastest = min(peers, key=lambda name: np.median(times[name]))
        results[work] = {
            "ms": {name: np.percentile(ms, [0, 50, 100]).round(2).tolist() for name, ms in
                   times.items()},
            "fastest_peer": fastest,
            "ratio": round(float(np.median(np.divide(times[fastest], times["ours"]))), 2),
            "gflops": round(count / np.median(times["ours"]) / 1e6, 1),
        }  # fmt: skip
    results["roofline_gflops"] = round(peak_gflops(len(ours.devices)), 1)
    results["cores"] = len(ours.devices)
    return results


def show(results: dict[str, dict], title: str) -> None:
    print(title)
    torch_name = f"PyTorch {torch.__version__.split('+')[0]}, {torch.get_num_threads()} threads"
    print(f"ours: {device_name()}, {results['cores']} cores; peer: {torch_name}; {cpu_name()}")
    print(f"{'':15}{'ours, ms':>22}{'peer, ms':>22} {'':9}{'ratio':>6}{'GFLOP/s':>9}{'of peak':>9}")
    for work in ("training step", "evaluation"):
        r = results[work]
        ours, peer = (
            f"{m[1]:.1f} ({m[0]:.1f}-{m[2]:.1f})"
            for m in (r["ms"]["ours"], r["ms"][r["fastest_peer"]])
        )
        share = r["gflops"] / results["roofline_gflops"]
        print(
            f"{work:15}{ours:>22}{peer:>22} {r['fastest_peer']:9}{r['ratio']:>6.2f}"
            f"{r['gflops']:>9.1f}{share:>9.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="micro")
    for name in CHANGES:
        kind = float if name == "dropout" else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="instead of the shape's")
    parser.add_argument("--batch-size", type=int, help="instead of the shape's")
    parser.add_argument("--devices", type=int, default=0, help="cores for ours (0: all)")
    parser.add_argument("--threads", type=int, help="threads for PyTorch (default: its own choice)")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="eager only")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each, in turn")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a measurement")
    parser.add_argument("--output", type=Path, default=Path("throughput.json"))
    args = parser.parse_args()
    select_device(None)
    if args.threads:
        torch.set_num_threads(args.threads)
    shape, batch_size = SHAPES[args.shape]
    changes = {name: value for name in CHANGES if (value := getattr(args, name)) is not None}
    config = dataclasses.replace(shape, **changes)
    recipe = TrainConfig(batch_size=args.batch_size or batch_size, devices=args.devices)
    results = measure(config, recipe, args)
    c = config
    show(
        results,
        f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, block {c.block_size}, "
        f"batch {recipe.batch_size}, dropout {c.dropout}",
    )
    args.output.write_text(
        json.dumps({"arguments": vars(args), "cpu": cpu_name(), "results": results}, default=str)
    )


if __name__ == "__main__":
    main()
