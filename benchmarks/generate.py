"""Generation, ours and PyTorch's in turn: one text of a character model, a token after the other.

    python -m benchmarks.generate [--shape micro|medium] [--tokens 1000]

Needs the extra `bench` (torch). There are two peers. `window` reads the last block_size tokens
again for every token, as nanoGPT's sample.py does. `cached` keeps keys and values as long as the
text fits into a block; beyond, where every token's position changes, it reads the window, as ours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.peer import PeerGPT
from benchmarks.roofline import cpu_name
from benchmarks.throughput import SHAPES
from tinygpt.device import device_name, select_device
from tinygpt.model import GPT
from tinygpt.sampling import sample_tokens

START = np.zeros((1, 1), np.int32)


@torch.no_grad()
def peer_tokens(model: PeerGPT, count: int, cached: bool) -> list[float]:
    """Seconds of each token."""
    block, text = model.config.block_size, torch.from_numpy(START).long()
    cache: list[list[torch.Tensor]] = []
    times = []
    for _ in range(count):
        start = time.perf_counter()
        if cached and text.shape[1] <= block:
            logits = model.decode(text[:, -1:], cache, text.shape[1] - 1)[:, -1]
        else:
            logits = model(text[:, -block:])[:, -1]
        p = torch.softmax(logits / 0.8, dim=-1)
        text = torch.cat([text, torch.multinomial(p, 1)], dim=1)
        times.append(time.perf_counter() - start)
    return times


def our_tokens(decoder: Callable, count: int) -> list[float]:
    times, start = [], time.perf_counter()
    for _ in sample_tokens(decoder, START, count, temperature=0.8, seed=0):
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="micro")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5, help="texts of each, in turn")
    parser.add_argument("--output", type=Path, default=Path("generate.json"))
    args = parser.parse_args()
    select_device(None)
    config, _ = SHAPES[args.shape]
    decoder, peer = GPT(config).decoder(1), PeerGPT(config).eval()
    works: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: our_tokens(decoder, args.tokens),
        "window": lambda: peer_tokens(peer, args.tokens, cached=False),
        "cached": lambda: peer_tokens(peer, args.tokens, cached=True),
    }
    for work in works.values():
        work()  # compiles, warms up
    rounds = [{name: work() for name, work in works.items()} for _ in range(args.rounds)]
    block = config.block_size
    spans = {f"all {args.tokens} tokens": slice(None), f"the first {block}": slice(0, block)}
    print(f"ours: {device_name()}; PyTorch {torch.__version__.split('+')[0]}; {cpu_name()}")
    print(f"{'milliseconds a token':22}{'ours':>8}{'window':>16}{'cached':>16}")
    results = {}
    for title, span in spans.items():
        ms = {
            name: float(np.median([np.mean(r[name][span]) for r in rounds])) * 1e3 for name in works
        }
        cells = "".join(f"{ms[n]:>8.2f} ({ms[n] / ms['ours']:.1f} x)" for n in ("window", "cached"))
        print(f"{title:22}{ms['ours']:>8.2f}{cells}")
        results[title] = ms
    args.output.write_text(json.dumps({"cpu": cpu_name(), "milliseconds": results}))


if __name__ == "__main__":
    main()
