"""Writing text with a trained model, and `python -m tinygpt.generate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinygpt.checkpoint import load_run, newest_run
from tinygpt.cli import run_command
from tinygpt.config import InputError
from tinygpt.device import device_name, select_device
from tinygpt.interop import load_pretrained
from tinygpt.sampling import Decoder, Tokens, sample_tokens
from tinygpt.tokenizer import Tokenizer


def stream_text(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    sample: int = 0,
) -> Iterator[str]:
    """Yields the characters that follow `prompt`, as they are made; `sample` counts variations.

    An empty prompt starts after a newline, or after the first token where there is no newline.

    Raises:
        InputError: the prompt has a character that the model has never seen; an option is out of
            its range.
    """
    tokens = np.array([tokenizer.encode(prompt) or start_of_text(tokenizer)], np.int32)

    def known_tokens(tokens: Tokens) -> NDArray[np.float32]:
        return decoder(tokens)[:, : tokenizer.vocab_size]  # the model's vocabulary may be padded

    waiting: list[int] = []
    for token in sample_tokens(
        known_tokens, tokens, max_new_tokens, temperature, top_k, top_p, seed, first_row=sample
    ):
        waiting += token.tolist()
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd"):  # else the last bytes may be half a character
            yield text
            waiting = []
    if waiting:
        yield tokenizer.decode(waiting)


def start_of_text(tokenizer: Tokenizer) -> list[int]:
    try:
        return tokenizer.encode("\n")
    except InputError:
        return [0]


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt_file is None:
        return str(args.prompt)
    try:
        if args.prompt_file == "-":
            return sys.stdin.read()
        return Path(args.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompt cannot be read from {args.prompt_file}: {error}") from None


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinygpt.generate",
        description="Writes text with a trained model, token by token.",
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--run", type=Path, help="folder of the run (default: the newest in runs/)")
    model.add_argument(
        "--weights",
        help="instead of a run: gpt2, gpt2-medium, gpt2-large or gpt2-xl, or weights of Hugging "
        "Face's or nanoGPT's making, a folder or file",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to go on from")
    prompt.add_argument("--prompt-file", help="file with that text; - is standard input")
    parser.add_argument(
        "--max-new-tokens", type=int, default=500, help="length of a sample (default: %(default)s)"
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        help="how many, one after the other (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8,
        help="0 takes the likeliest token, 1 draws as the model predicts, more is wilder "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument(
        "--top-p", type=float, help="draw from the likeliest tokens that hold this probability"
    )
    parser.add_argument(
        "--seed", type=int, default=1337, help="same seed, same text (default: %(default)s)"
    )
    parser.add_argument("--device", help="CPU, METAL, CUDA, GPU (OpenCL), ... (default: $DEV)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    prompt = read_prompt(args)
    select_device(args.device)
    source = args.weights or args.run or newest_run()
    model, tokenizer = load_pretrained(source) if args.weights else load_run(source)
    print(f"{source}, {model.num_parameters():,} parameters, {device_name()}", file=sys.stderr)
    decoder = model.decoder(batch_size=1)
    for sample in range(args.num_samples):
        if sample:
            print("-" * 20)
        print(prompt, end="", flush=True)
        for text in stream_text(
            decoder, tokenizer, prompt, args.max_new_tokens, args.temperature, args.top_k,
            args.top_p, args.seed, sample,
        ):  # fmt: skip
            print(text, end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    run_command(main)
