"""The training loop, and `python -m tinygpt.train`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tinygrad import Context, Device, Tensor, TinyJit
from tinygrad.helpers import tqdm

from tinygpt import checkpoint
from tinygpt.batches import check_lengths, evaluation_batches, sample_blocks, split_tokens
from tinygpt.checkpoint import Progress
from tinygpt.cli import add_flags, run_command
from tinygpt.config import (
    PRESETS,
    GPTConfig,
    InputError,
    RunConfig,
    TrainConfig,
    model_config,
)
from tinygpt.corpus import load_corpus
from tinygpt.device import device_name, select_device
from tinygpt.generate import stream_text
from tinygpt.model import LanguageModel, build_model, cross_entropy
from tinygpt.optimizer import (
    AdamW,
    clip_coefficient,
    global_norm,
    learning_rate,
    moments_by_name,
    step_rates,
)
from tinygpt.parallel import ParallelTrainer
from tinygpt.report import plot_loss
from tinygpt.sampling import Tokens
from tinygpt.tokenizer import CharTokenizer, Tokenizer

SAMPLE_LENGTH = 500  # tokens in sample.txt


class Trainer(Protocol):
    """A model and its optimizer, on whatever devices."""

    model: LanguageModel
    devices: list[str]

    def moments(self) -> dict[str, Tensor]: ...
    def step(self, x: Tokens, y: Tokens, iteration: int) -> None: ...
    def train_loss(self) -> float: ...  # of the last step, in nats; waits for it
    def evaluate(self, x: Tokens, y: Tokens) -> float: ...  # mean loss over (B, T), no dropout


class OneDevice:
    """The `Trainer` for any device: a step is one compiled function."""

    def __init__(self, config: RunConfig):
        self.config, self.devices = config.train, [Device.DEFAULT]
        self.model = build_model(config.model, config.train.seed)
        self.optimizer = AdamW(self.model.parameters(), config.train)
        self.compiled_step = training_step(self.model, self.optimizer, config.train.grad_clip)
        self.compiled_loss = TinyJit(lambda x, y: cross_entropy(self.model.logits(x), y).realize())

    def moments(self) -> dict[str, Tensor]:
        return moments_by_name(self.optimizer.m, self.optimizer.v)

    def step(self, x: Tokens, y: Tokens, iteration: int) -> None:
        rates = Tensor(step_rates(iteration, self.config))
        self.loss = self.compiled_step(Tensor(x), Tensor(y), rates)

    def train_loss(self) -> float:
        return self.loss.item()

    def evaluate(self, x: Tokens, y: Tokens) -> float:
        return self.compiled_loss(Tensor(x), Tensor(y)).item()


def training_step(
    model: LanguageModel, optimizer: AdamW, grad_clip: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A step of training as a compiled function from x, y (B, T) and rates (3,) to the loss."""
    names, parameters = zip(*model.parameters().items(), strict=True)

    @TinyJit
    @Context(TRAINING=1)  # dropout is on
    def step(x: Tensor, y: Tensor, rates: Tensor) -> Tensor:
        _, loss = model(x, y)
        assert loss is not None
        gradients = [g.contiguous() for g in loss.gradient(*parameters)]
        if grad_clip > 0:
            coefficient = clip_coefficient(global_norm(gradients), grad_clip).contiguous()
            gradients = [g * coefficient for g in gradients]
        updated = optimizer.schedule_step(dict(zip(names, gradients, strict=True)), rates)
        return loss.realize(*updated)

    return step


def choose_trainer(config: RunConfig) -> Trainer:
    """All cores of a CPU, as far as they can share the batches equally; else the one device."""
    if Device.DEFAULT == "CPU":
        wanted = config.train.devices or os.cpu_count() or 1
        cores = max(n for n in range(1, wanted + 1) if config.train.batch_size % n == 0)
        if cores > 1:
            return ParallelTrainer(config, cores)
    return OneDevice(config)


def exact_loss(
    trainer: Trainer, data: NDArray[np.integer], batch_size: int, block_size: int
) -> float:
    """Mean loss over every target of `data`, in non-overlapping blocks, in nats per token."""
    batches = evaluation_batches(data, batch_size, block_size)
    count = -(-(len(data) - 1) // (batch_size * block_size))
    total = 0.0
    for x, y in tqdm(batches, desc="evaluating", total=count, disable=None):
        total += trainer.evaluate(x, y) * y.size  # it is the mean over y.size positions
    return total / (len(data) - 1)


def estimated_loss(trainer: Trainer, data: NDArray[np.integer], config: RunConfig) -> float:
    """Mean loss over eval_iters random batches, the same ones at every evaluation of a run."""
    c, rng = config.train, np.random.default_rng(config.train.seed)
    sizes = c.batch_size, config.model.block_size
    losses = [trainer.evaluate(*sample_blocks(data, *sizes, rng)) for _ in range(c.eval_iters)]
    return float(np.mean(losses))


def train(
    config: RunConfig, tokens: NDArray[np.int32], tokenizer: Tokenizer, resume: bool = False
) -> dict[str, Any]:
    """Trains config.model on `tokens` (N,) and leaves the run's files in config.train.out_dir.

    All that is random depends on the seed and the iteration alone, or is saved with the weights: a
    run that was stopped and resumed ends exactly as one that was not.

    Returns:
        What summary.json holds. If a signal stopped the run, only `iterations` and `signal`.

    Raises:
        InputError: the text is too short, the checkpoint is of another model or damaged, the disk
            is full, or the loss is no longer a finite number.
    """
    start, c = time.perf_counter(), config.train
    folder, block_size = Path(c.out_dir), config.model.block_size
    train_data, val_data = split_tokens(tokens)
    check_lengths(train_data, val_data, block_size)

    trainer = choose_trainer(config)
    model = trainer.model
    state = checkpoint.training_state(
        model.parameters(), trainer.moments(), trainer.devices, c.seed
    )
    saved = resume and (folder / checkpoint.LAST).exists()  # no: stopped before the first save
    progress = checkpoint.load_state(folder, state) if saved else Progress()
    checkpoint.start_run(folder, config, tokenizer, progress)
    print(f"text    {len(train_data):,} tokens to train on, {len(val_data):,} to validate on")
    print(f"model   {describe(config, model)}")
    cores = f", {len(trainer.devices)} cores" if len(trainer.devices) > 1 else ""
    print(f"device  {device_name()}{cores}; compiling the first step", flush=True)

    log = Log(folder, config, progress)
    with stop_signals() as signals:
        while progress.iteration < c.max_iters and not signals:
            i = progress.iteration
            rng = np.random.default_rng([c.seed, i])
            x, y = sample_blocks(train_data, c.batch_size, block_size, rng)
            trainer.step(x, y, i)
            progress.iteration = done = i + 1

            evaluating = done % c.eval_interval == 0 or done == c.max_iters
            if evaluating or done % c.log_interval == 0 or i == 0:
                train_loss = trainer.train_loss()
                check_finite(train_loss, done)
                log.stop_clock()
                if i == 0:
                    progress.seconds_to_first_iteration = time.perf_counter() - start
                val_loss = estimated_loss(trainer, val_data, config) if evaluating else None
                log.write(train_loss, val_loss)
            if evaluating:
                checkpoint.save_state(folder, state, progress)
    if progress.iteration < c.max_iters:  # a signal stopped it
        checkpoint.save_state(folder, state, progress)
        return {"iterations": progress.iteration, "signal": signals[0]}

    sample = "".join(stream_text(model.decoder(1), tokenizer, "", SAMPLE_LENGTH, seed=c.seed))
    print(f"\n{sample}\n", flush=True)
    summary = {
        "parameters": sum(int(p.numel()) for p in model.parameters().values()),
        "iterations": progress.iteration,
        "val_loss": exact_loss(trainer, val_data, c.batch_size, block_size),
        "best_val_loss": progress.best_val_loss,
        "seconds": progress.seconds,
        "seconds_to_first_iteration": progress.seconds_to_first_iteration,
        "device": device_name(),
    }
    checkpoint.finish_run(folder, summary, sample)
    plot_loss(folder)
    return summary


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Gives a list that gets the number of a first SIGINT (Ctrl-C) or SIGTERM; a second one acts.

    Between two kernels of a step the weights are half old, half new: a run may stop only between
    two iterations. Outside the main thread Python delivers no signals, and the list stays empty.
    """
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nstopping after this iteration; again to stop at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {n: signal.signal(n, receive) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_finite(loss: float, iteration: int) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is {loss} at iteration {iteration}; a lower --learning-rate or a "
            "--grad-clip may help, and the last checkpoint is as it was"
        )


class Log:
    """Writes metrics.jsonl and the status line, and keeps the time."""

    def __init__(self, folder: Path, config: RunConfig, progress: Progress):
        self.folder, self.config, self.progress = folder, config, progress
        self.tokens_per_step = config.train.batch_size * config.model.block_size
        self.first = progress.iteration  # the compiling iteration says nothing about the speed
        self.began = self.lap = time.perf_counter()
        self.lap_iteration, self.seconds_before = progress.iteration, progress.seconds
        self.speed = 0.0
        self.is_terminal = sys.stdout.isatty()

    def stop_clock(self) -> None:
        """Measures the speed since the last row; evaluations that follow are not in it."""
        steps = self.progress.iteration - self.lap_iteration
        self.speed = steps * self.tokens_per_step / (time.perf_counter() - self.lap)

    def write(self, train_loss: float, val_loss: float | None) -> None:
        p = self.progress
        p.seconds = self.seconds_before + time.perf_counter() - self.began
        if val_loss is not None:
            p.val_loss = val_loss
        checkpoint.append_metrics(
            self.folder,
            {
                "iteration": p.iteration,
                "tokens": p.iteration * self.tokens_per_step,
                "seconds": round(p.seconds, 3),
                "train_loss": train_loss,
                "val_loss": val_loss,
                "learning_rate": learning_rate(p.iteration - 1, self.config.train),
                "tokens_per_second": round(self.speed, 1),
            },
        )
        self._show(train_loss, val_loss)
        self.lap, self.lap_iteration = time.perf_counter(), p.iteration

    def _show(self, train_loss: float, val_loss: float | None) -> None:
        p, total = self.progress, self.config.train.max_iters
        left = int((total - p.iteration) * self.tokens_per_step / self.speed)
        time_left = f"{left // 60}:{left % 60:02d} left" if p.iteration > self.first + 1 else ""
        val = "      " if math.isinf(p.val_loss) else f"{p.val_loss:.4f}"
        line = (
            f"{p.iteration:>{len(str(total))}}/{total}  train {train_loss:.4f}  val {val}  "
            f"{self.speed:>9,.0f} tokens/s  {time_left}"
        )
        if self.is_terminal:
            end = "" if val_loss is None else "\n"
            print(f"\r\033[K{line}", end=end, flush=True)
        elif val_loss is not None or p.iteration == 1:
            print(line, flush=True)


def describe(config: RunConfig, model: LanguageModel) -> str:
    c = config.model
    shape = f"bigram table {c.vocab_size} x {c.vocab_size}"
    if isinstance(c, GPTConfig):
        shape = f"GPT, {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels"
    return f"{shape}, blocks of {c.block_size}, {model.num_parameters():,} parameters"


def configure(preset: str, flags: dict[str, Any], resume: bool) -> RunConfig:
    """The preset's configuration, or that of the run to resume, with what the flags change.

    The vocabulary's size is not known before the text is: it is 1.

    Raises:
        InputError: a value makes no sense, or a flag is not one of this model's.
    """
    folder = Path(flags.get("out_dir") or f"runs/{preset}")
    if resume:
        base = checkpoint.load_config(folder)
    else:
        chosen = PRESETS[preset]
        base = RunConfig(preset, model_config({**chosen.model, "vocab_size": 1}), chosen.train)
    train_fields = {f.name for f in dataclasses.fields(TrainConfig)}
    train_flags = {n: v for n, v in flags.items() if n in train_fields}
    model_flags = {n: v for n, v in flags.items() if n not in train_fields}
    for name, value in model_flags.items():
        if not hasattr(base.model, name):
            raise InputError(f"the {base.preset} model has no {name}; leave out that flag")
        if resume and value != getattr(base.model, name):
            raise InputError(
                f"{name} is {getattr(base.model, name)} in {folder}, not {value}; "
                "a resumed run keeps its model"
            )
    return RunConfig(
        base.preset,
        dataclasses.replace(base.model, **model_flags),
        dataclasses.replace(base.train, **{**train_flags, "out_dir": str(folder)}),
    )


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    presets = "\n".join(f"  {name:<8} {preset.purpose}" for name, preset in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tinygpt.train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains a GPT on a text, on the CPU or any device that tinygrad drives.",
        epilog=f"presets:\n{presets}\n\n"
        "A run is stopped with Ctrl-C, which saves it, and continued with --resume.\n"
        "Defaults are the preset's; those of `micro` are in tinygpt/config.py.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="micro", help="see below; micro")
    parser.add_argument("--device", help="CPU, METAL, CUDA, GPU (OpenCL), ... (default: $DEV)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in out-dir")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run that out-dir holds"
    )
    add_flags(parser, "the training recipe", TrainConfig)
    add_flags(parser, "the model", GPTConfig, "vocab_size")
    args = parser.parse_args(argv)
    flags = dict(vars(args))
    for name in ("preset", "device", "resume", "overwrite"):
        del flags[name]
    return args, flags


def main(argv: list[str] | None = None) -> int:
    args, flags = parse_arguments(argv)
    config = configure(args.preset, flags, args.resume)
    folder = Path(config.train.out_dir)
    if not (args.resume or args.overwrite):
        checkpoint.check_free(folder)
    select_device(args.device)
    text = load_corpus(config.train.data, max_bytes=config.train.max_download_mb * 10**6)
    if args.resume:
        tokenizer = CharTokenizer.load(folder / checkpoint.TOKENIZER)
    else:
        tokenizer = CharTokenizer.from_text(text)
    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, model=model)
    tokens = np.array(tokenizer.encode(text), np.int32)
    summary = train(config, tokens, tokenizer, resume=args.resume)
    if "signal" in summary:
        print(f"stopped at iteration {summary['iterations']}; add --resume to the command to go on")
        return 128 + int(summary["signal"])
    print(
        f"val loss {summary['val_loss']:.4f} nats per token over the whole val split, in blocks "
        f"of {config.model.block_size}\n{folder}/ holds the run; for more text:\n"
        f"  python -m tinygpt.generate --run {folder}"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
