"""The commands, as a user runs them: real processes, real signals, real files."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tinygrad import Device

from tests.text import SONNETS
from tinygpt import GPTConfig, TrainConfig
from tinygpt.config import RunConfig
from tinygpt.sampling import Tokens
from tinygpt.trainer import OneDevice, choose_trainer, exact_loss

SMALL = "--block-size 8 --batch-size 4 --eval-interval 40 --eval-iters 2 --warmup-iters 5"
TINY_GPT = "--n-layer 1 --n-head 1 --n-embd 8 --dropout 0.2"
GPT_RUNS = {
    "AdamW": f"--preset micro {SMALL} {TINY_GPT}",
    "Muon": f"--preset fast {SMALL} {TINY_GPT}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in, with text.txt in it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text.txt").write_text(SONNETS)
    return folder


def command(module: str, flags: str) -> list[str]:
    return [sys.executable, "-m", f"tinygpt.{module}", *flags.split()]


def run(
    folder: Path, module: str, flags: str, input: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(module, flags), cwd=folder, capture_output=True, text=True, timeout=600, input=input
    )


def train(folder: Path, flags: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "train", f"--data text.txt {flags}")


def fails(result: subprocess.CompletedProcess[str], message: str) -> None:
    """One sentence on standard error, no traceback, a status that is not 0."""
    assert result.returncode == 1, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def bigram(folder: Path) -> Path:
    """A finished run of the bigram model, to be read by several tests."""
    flags = f"--preset bigram {SMALL} --max-iters 100 --learning-rate 0.1 --out-dir runs/bigram"
    result = train(folder, flags)
    assert result.returncode == 0, result.stderr
    assert "val loss" in result.stdout and "runs/bigram" in result.stdout
    assert "\r" not in result.stdout and "\033" not in result.stdout  # it is not a terminal
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if "tokens/s" in line)
    return folder / "runs/bigram"


def test_what_a_run_leaves(bigram: Path) -> None:
    files = {path.name for path in bigram.iterdir()}
    expected = {"config.json", "tokenizer.json", "checkpoint.safetensors", "best.safetensors",
                "metrics.jsonl", "samples.jsonl", "summary.json", "report.html",
                "sample.txt"}  # fmt: skip
    assert expected <= files <= expected | {"loss.png"}
    rows = [json.loads(line) for line in (bigram / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, *range(10, 101, 10)]
    assert {row["iteration"] for row in rows if row["val_loss"] is not None} == {40, 80, 100}
    assert all(row["tokens"] == row["iteration"] * 32 for row in rows)
    assert set(rows[0]) == {"iteration", "tokens", "seconds", "train_loss", "val_loss",
                            "learning_rate", "tokens_per_second"}  # fmt: skip
    assert rows[0]["train_loss"] > rows[-1]["train_loss"]
    summary = json.loads((bigram / "summary.json").read_text())
    assert summary["iterations"] == 100
    assert summary["best_val_loss"] == min(row["val_loss"] for row in rows if row["val_loss"])
    v = len(set(SONNETS))
    assert summary["parameters"] == v * v
    assert len((bigram / "sample.txt").read_text()) == 501


def test_the_summary_has_the_exact_loss_of_the_whole_val_split(bigram: Path) -> None:
    table = load_file(bigram / "checkpoint.safetensors")["wte.weight"].astype(np.float64)
    characters = sorted(set(SONNETS))
    ids = np.array([characters.index(c) for c in SONNETS])
    val = ids[int(0.9 * len(ids)) :]
    rows = table[val[:-1]]
    nll = np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(rows)), val[1:]]
    summary = json.loads((bigram / "summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(nll.mean(), rel=1e-5)  # float32 against float64


def test_generate(bigram: Path) -> None:
    folder = bigram.parent.parent
    base = "--run runs/bigram --max-new-tokens 30"
    result = run(folder, "generate", f"{base} --prompt Let")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Let") and len(result.stdout) == 3 + 30 + 1
    assert run(folder, "generate", "--max-new-tokens 30 --prompt Let").stdout == result.stdout
    other = run(folder, "generate", f"{base} --prompt Let --seed 5").stdout
    assert other != result.stdout
    two = run(folder, "generate", f"{base} --prompt Let --num-samples 2").stdout
    assert two.startswith(result.stdout) and len(two) == 2 * (3 + 30 + 1) + 21
    piped = run(folder, "generate", f"{base} --prompt-file -", input="Let")
    assert piped.stdout == result.stdout
    (folder / "prompt.txt").write_text("Let")
    assert run(folder, "generate", f"{base} --prompt-file prompt.txt").stdout == result.stdout
    greedy = [run(folder, "generate", f"{base} --temperature 0 --seed {s}").stdout for s in (1, 2)]
    assert greedy[0] == greedy[1]


def test_generate_says_what_is_wrong(bigram: Path, tmp_path: Path) -> None:
    folder = bigram.parent.parent
    fails(run(folder, "generate", "--prompt a7"), "character '7' at position 1")
    fails(run(folder, "generate", "--top-k 0"), "top_k is 0")
    fails(run(folder, "generate", "--run runs/none"), "holds no run")
    fails(run(folder, "generate", "--prompt-file none"), "cannot be read")
    fails(run(tmp_path, "generate", ""), "train one with")


def test_a_run_is_not_overwritten_unasked(bigram: Path) -> None:
    folder, before = bigram.parent.parent, (bigram / "checkpoint.safetensors").read_bytes()
    again = f"--preset bigram {SMALL} --max-iters 100"
    fails(train(folder, again), "holds a finished run; add --resume")
    fails(train(folder, f"{again} --overwrite --n-layer 2"), "bigram model has no n_layer")
    fails(
        train(folder, f"{again} --resume --block-size 9"), "block_size is 8 in runs/bigram, not 9"
    )
    fails(run(folder, "train", f"{again} --overwrite --data none.txt"), "no file none.txt")
    assert (bigram / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n-head 3 --n-embd 8", "n_embd 8 is not divisible by n_head 3"),
        ("--block-size 200", "its val split has"),
        ("--max-iters 0", "max_iters is 0"),
        ("--device FOO", "'FOO' is not a device"),
        ("--resume --out-dir runs/none", "holds no run"),
        ("--learning-rate nan", "learning_rate is nan"),
    ],
)
def test_train_says_what_is_wrong(folder: Path, flags: str, message: str) -> None:
    result = train(folder, f"--out-dir runs/wrong {flags}" if "out-dir" not in flags else flags)
    fails(result, message)
    assert not (folder / "runs/wrong").exists()


def test_a_loss_that_explodes_ends_the_run(folder: Path) -> None:
    flags = f"--preset bigram {SMALL} --out-dir runs/nan --learning-rate 1e38 --warmup-iters 0"
    fails(train(folder, flags), "the loss is")


def test_help_names_every_flag() -> None:
    for module, flag in (("train", "--learning-rate"), ("generate", "--top-k")):
        result = subprocess.run(command(module, "--help"), capture_output=True, text=True)
        assert result.returncode == 0 and flag in result.stdout and "None" not in result.stdout


def interrupt(folder: Path, flags: str, number: int, after: str) -> int:
    """Starts a run and sends the signal once `after` stands in its metrics; the status."""
    process = subprocess.Popen(
        command("train", f"--data text.txt {flags}"), cwd=folder, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = folder / flags.split()[-1] / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and after in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, number)
    return process.wait(timeout=300)


@pytest.mark.parametrize("optimizer", GPT_RUNS)
def test_stopped_and_resumed_is_as_if_never_stopped(folder: Path, optimizer: str) -> None:
    flags = f"{GPT_RUNS[optimizer]} --max-iters 300"
    names = [f"runs/{optimizer}-{kind}" for kind in ("straight", "stopped")]
    assert train(folder, f"{flags} --out-dir {names[0]}").returncode == 0
    straight = load_file(folder / names[0] / "checkpoint.safetensors")
    resume = f"--resume --out-dir {names[1]}"
    flags = f"{flags} --out-dir {names[1]}"
    assert interrupt(folder, flags, signal.SIGKILL, '"iteration": 60,') == -signal.SIGKILL
    assert interrupt(folder, resume, signal.SIGINT, '"iteration": 150,') == 130
    half_way = load_file(folder / names[1] / "checkpoint.safetensors")
    assert any((half_way[name] != value).any() for name, value in straight.items())
    assert not (folder / names[1] / "summary.json").exists()
    result = train(folder, resume)
    assert result.returncode == 0, result.stderr
    stopped = load_file(folder / names[1] / "checkpoint.safetensors")
    for name, value in straight.items():  # weights and moments
        assert (stopped[name] == value).all(), name
    rows = [
        [json.loads(line) for line in (folder / name / "metrics.jsonl").open()] for name in names
    ]
    same = ("iteration", "train_loss", "val_loss", "learning_rate")
    assert [[a[k] for k in same] for a in rows[0]] == [[b[k] for k in same] for b in rows[1]]


def test_resume_before_the_first_checkpoint_starts_again(folder: Path) -> None:
    flags = f"--preset bigram {SMALL} --max-iters 1000 --eval-interval 1000 --out-dir runs/early"
    assert interrupt(folder, flags, signal.SIGKILL, '"iteration": 10,') == -signal.SIGKILL
    result = train(folder, "--resume --out-dir runs/early --max-iters 50")
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "runs/early/summary.json").read_text())["iterations"] == 50


def test_exact_loss_counts_every_target_once() -> None:
    class TargetsAsLoss(OneDevice):
        def __init__(self) -> None: ...
        def evaluate(self, x: Tokens, y: Tokens) -> float:
            return float(np.where(y >= 0, y, 0).mean())

    data = np.arange(23, dtype=np.int32)
    assert math.isclose(exact_loss(TargetsAsLoss(), data, 2, 4), data[1:].mean())


def test_cores_must_share_the_batch(folder: Path) -> None:
    flags = f"--preset bigram {SMALL} --devices 3 --out-dir runs/three"
    fails(train(folder, flags), "devices 3 do not divide batch_size 4")


@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="for the cores of a CPU")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_number_of_cores_changes_only_the_rounding(optimizer: Any) -> None:
    model = GPTConfig(8, 11, n_layer=1, n_head=2, n_embd=8, bias=True)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 11, (2, 4, 8), np.int32) for _ in range(5)]
    results = []
    for cores in (1, 2):
        recipe = TrainConfig(batch_size=4, devices=cores, warmup_iters=0, optimizer=optimizer)
        trainer = choose_trainer(RunConfig("micro", model, recipe))
        losses = []
        for i, (x, y) in enumerate(batches):
            trainer.step(x, y, i)
            losses.append(trainer.train_loss())
        results.append([*losses, trainer.evaluate(*batches[0])])
    # sums of float32 in another order, over five steps
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)
