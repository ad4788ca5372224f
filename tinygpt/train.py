"""The training loop, and `python -m tinygpt.train`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tinygpt import checkpoint
from tinygpt.batches import check_lengths, sample_blocks
from tinygpt.checkpoint import Progress
from tinygpt.cli import add_flags, run_command
from tinygpt.config import (
    PRESETS,
    GPTConfig,
    InputError,
    ModelConfig,
    RunConfig,
    TrainConfig,
    model_config,
)
from tinygpt.device import device_name, select_device
from tinygpt.generate import stream_text
from tinygpt.interop import load_pretrained
from tinygpt.model import LanguageModel
from tinygpt.optimizer import learning_rate
from tinygpt.prepare import load_data
from tinygpt.profile import profile
from tinygpt.report import draw_pages
from tinygpt.sampling import Decoder
from tinygpt.tokenizer import (
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    model_vocab_size,
)
from tinygpt.trainer import choose_trainer, estimated_loss, exact_loss

DEFAULT_PRESET = "laptop"
SAMPLE_LENGTH = 500  # characters in sample.txt, at least
SHORT_SAMPLE_LENGTH = 100  # characters of each text in samples.jsonl, at least


def train(
    config: RunConfig,
    train_data: NDArray[np.integer],
    val_data: NDArray[np.integer],
    tokenizer: Tokenizer,
    resume: bool = False,
    pretrained: LanguageModel | None = None,
) -> dict[str, Any]:
    """Trains config.model on tokens (N,) and leaves the run's files in config.train.out_dir.

    It starts from the weights of `pretrained`, whose positions and blocks may be longer ones.

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
    check_lengths(train_data, val_data, block_size)

    trainer = choose_trainer(config)
    c = dataclasses.replace(c, devices=len(trainer.devices))  # a resumed run keeps the number
    config, model = dataclasses.replace(config, train=c), trainer.model
    if pretrained:
        weights = pretrained.parameters()
        for name, tensor in model.parameters().items():
            tensor.assign(weights[name][: tensor.shape[0]].to(tensor.device)).realize()
    state = trainer.state
    saved = resume and (folder / checkpoint.LAST).exists()  # no: stopped before the first save
    progress = checkpoint.load_state(folder, state) if saved else Progress()
    checkpoint.start_run(folder, config, tokenizer, progress)
    print(f"text    {len(train_data):,} tokens to train on, {len(val_data):,} to validate on")
    print(f"model   {describe(config, model)}")
    cores = f", {len(trainer.devices)} cores" if len(trainer.devices) > 1 else ""
    print(f"device  {device_name()}{cores}; compiling the first step", flush=True)

    log, decoder = Log(folder, config, progress), model.decoder(1)
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
                val_loss = None
                if evaluating:
                    val_loss = estimated_loss(trainer, val_data, config)
                    text = write_sample(decoder, tokenizer, SHORT_SAMPLE_LENGTH, c.seed)
                    checkpoint.append_sample(folder, done, text)
                log.write(train_loss, val_loss)
            if evaluating:
                checkpoint.save_state(folder, state, progress)
    if progress.iteration < c.max_iters:  # a signal stopped it
        checkpoint.save_state(folder, state, progress)
        return {"iterations": progress.iteration, "signal": signals[0]}

    sample = write_sample(decoder, tokenizer, SAMPLE_LENGTH, c.seed)
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
    draw_pages(folder, val_data)
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


def write_sample(decoder: Decoder, tokenizer: Tokenizer, length: int, seed: int) -> str:
    """A new text of so many characters, or a token more, drawn with the numbers of `seed` alone."""
    text = ""
    for piece in stream_text(decoder, tokenizer, "", length, seed=seed):
        text += piece
        if len(text) >= length:
            break
    return text


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


def finetuned(
    model: GPTConfig, wanted: ModelConfig, flags: dict[str, Any], source: str
) -> GPTConfig:
    """A trained model's shape, with the dropout that is wanted, and blocks that may be shorter.

    Raises:
        InputError: a flag wants another shape.
    """
    for name in {field.name for field in dataclasses.fields(GPTConfig)} & flags.keys():
        value, theirs = flags[name], getattr(model, name)
        if name == "block_size" and value > theirs:
            raise InputError(f"block_size is {theirs} in {source}; {value} is longer")
        if name not in ("block_size", "dropout", "attn_dropout") and value != theirs:
            raise InputError(f"{name} is {theirs} in {source}, not {value}; leave out that flag")
    block_size = min(wanted.block_size, model.block_size)
    model = dataclasses.replace(model, block_size=block_size, dropout=0.0, attn_dropout=None)
    if not isinstance(wanted, GPTConfig):
        return model
    return dataclasses.replace(model, dropout=wanted.dropout, attn_dropout=wanted.attn_dropout)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    presets = "\n".join(f"  {name:<8} {preset.purpose}" for name, preset in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tinygpt.train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains a GPT on a text, on the CPU or any device that tinygrad drives.",
        epilog=f"presets:\n{presets}\n\n"
        "A run is stopped with Ctrl-C, which saves it, and continued with --resume.\n"
        "Defaults are the preset's; they are in tinygpt/config.py.",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help=f"see below (default: {DEFAULT_PRESET}, or finetune with --init-from)",
    )
    parser.add_argument("--device", help="CPU, METAL, CUDA, GPU (OpenCL), ... (default: $DEV)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in out-dir")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run that out-dir holds"
    )
    parser.add_argument(
        "--profile", action="store_true", help="only show where the time of one step goes (CPU)"
    )
    add_flags(parser, "the training recipe", TrainConfig)
    add_flags(parser, "the model", GPTConfig, "vocab_size")
    args = parser.parse_args(argv)
    flags = dict(vars(args))
    for name in ("preset", "device", "resume", "overwrite", "profile"):
        del flags[name]
    return args, flags


def main(argv: list[str] | None = None) -> int:
    args, flags = parse_arguments(argv)
    preset = args.preset or ("finetune" if "init_from" in flags else DEFAULT_PRESET)
    config = configure(preset, flags, args.resume)
    folder = Path(config.train.out_dir)
    if not (args.resume or args.overwrite or args.profile):
        checkpoint.check_free(folder)
    select_device(args.device)
    model, pretrained = config.model, None
    tokenizer: Tokenizer | None = None
    if config.train.init_from and not (args.resume and (folder / checkpoint.LAST).exists()):
        source = config.train.init_from
        pretrained, tokenizer = load_pretrained(source)
        model = finetuned(pretrained.config, model, flags, source)
    elif args.resume:
        tokenizer = load_tokenizer(folder / checkpoint.TOKENIZER)
    train_data, val_data, tokenizer = load_data(config.train, tokenizer)
    kind: Literal["char", "gpt2"] = "char" if isinstance(tokenizer, CharTokenizer) else "gpt2"
    if flags.get("tokenizer", kind) != kind:
        raise InputError(f"--tokenizer {flags['tokenizer']} does not go with tokens of {kind}")
    if model.vocab_size not in (tokenizer.vocab_size, model_vocab_size(tokenizer)):
        model = dataclasses.replace(model, vocab_size=model_vocab_size(tokenizer))
    recipe = dataclasses.replace(config.train, tokenizer=kind)
    config = dataclasses.replace(config, model=model, train=recipe)
    if args.profile:
        print(profile(choose_trainer(config), config))
        return 0
    summary = train(config, train_data, val_data, tokenizer, args.resume, pretrained)
    if "signal" in summary:
        print(f"stopped at iteration {summary['iterations']}; add --resume to the command to go on")
        return 128 + int(summary["signal"])
    print(
        f"val loss {summary['val_loss']:.4f} nats per token over the whole val split, in blocks "
        f"of {config.model.block_size}\n{folder}/ holds the run, {checkpoint.REPORT} in it shows "
        "it; for more text:\n"
        f"  python -m tinygpt.generate --run {folder}"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
