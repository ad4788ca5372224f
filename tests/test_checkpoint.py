"""What a run leaves on disk: read back exactly, refused when damaged, never half written."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor

from tinygpt import CharTokenizer, GPTConfig, InputError
from tinygpt.checkpoint import (
    BEST,
    LAST,
    Progress,
    append_metrics,
    check_free,
    load_config,
    load_run,
    load_state,
    load_tensors,
    newest_run,
    read_metrics,
    save_state,
    save_tensors,
    start_run,
    training_state,
)
from tinygpt.config import BigramConfig, ModelConfig, RunConfig, TrainConfig
from tinygpt.model import build_model
from tinygpt.optimizer import AdamW, moments_by_name

GPT_CONFIG = GPTConfig(block_size=4, vocab_size=3, n_layer=1, n_head=1, n_embd=4, bias=True)
TOKENIZER = CharTokenizer.from_text("abc")


def state_of(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    built = build_model(model, seed)
    optimizer = AdamW(built.parameters(), TrainConfig())
    moments = moments_by_name(optimizer.m, optimizer.v)
    return training_state(built.parameters(), moments)


def values(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in state.items()}


@pytest.mark.parametrize("model", [GPT_CONFIG, BigramConfig(4, 3)])
def test_a_run_is_read_back_exactly(tmp_path: Path, model: ModelConfig) -> None:
    config = RunConfig("micro", model, TrainConfig(out_dir=str(tmp_path)))
    start_run(tmp_path, config, TOKENIZER, Progress())
    assert load_config(tmp_path) == config
    state, progress = state_of(model, seed=1), Progress(7, 1.5, 0.5, val_loss=2.0)
    save_state(tmp_path, state, progress)
    assert progress.best_val_loss == 2.0
    other = state_of(model, seed=2)
    assert load_state(tmp_path, other) == progress
    for name, value in values(state).items():
        assert (other[name].numpy() == value).all(), name
    loaded, tokenizer = load_run(tmp_path)
    assert tokenizer.encode("cab") == [2, 0, 1]
    for name, p in loaded.parameters().items():
        assert (p.numpy() == state[name].numpy()).all(), name


def test_the_newest_run_is_found(tmp_path: Path) -> None:
    for seconds, name in ((20, "older"), (30, "newest"), (10, "oldest")):
        (tmp_path / name).mkdir()
        (tmp_path / name / LAST).write_bytes(b"")
        os.utime(tmp_path / name / LAST, (seconds, seconds))
    assert newest_run(tmp_path) == tmp_path / "newest"


def test_best_keeps_the_lowest_val_loss(tmp_path: Path) -> None:
    state = state_of(GPT_CONFIG)
    progress = Progress(1, val_loss=2.0)
    save_state(tmp_path, state, progress)
    best = (tmp_path / BEST).read_bytes()
    state["wte.weight"].assign(state["wte.weight"] + 1).realize()
    progress.iteration, progress.val_loss = 2, 2.5
    save_state(tmp_path, state, progress)
    assert (tmp_path / BEST).read_bytes() == best
    assert load_tensors(tmp_path / LAST)[1]["iteration"] == 2
    progress.iteration, progress.val_loss = 3, 1.5
    save_state(tmp_path, state, progress)
    assert load_tensors(tmp_path / BEST)[1]["iteration"] == 3
    assert not any(name.startswith("optimizer.") for name in load_tensors(tmp_path / BEST)[0])


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, keep: int) -> None:
    state = state_of(GPT_CONFIG)
    save_state(tmp_path, state, Progress())
    path = tmp_path / LAST
    path.write_bytes(path.read_bytes()[:keep])
    before = values(state)
    with pytest.raises(InputError, match="is damaged or was not written by tinygpt"):
        load_state(tmp_path, state)
    assert all((before[name] == value).all() for name, value in values(state).items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (GPTConfig(4, 3, 2, 1, 4, bias=True), "lacks h.1"),
        (GPTConfig(4, 3, 1, 1, 4), "this one has no h.0"),
        (GPTConfig(4, 5, 1, 1, 4, bias=True), r"wte.weight is float32 \(3, 4\), not"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, other: GPTConfig, message: str
) -> None:
    save_state(tmp_path, state_of(GPT_CONFIG), Progress())
    state = state_of(other)
    before = values(state)
    with pytest.raises(InputError, match=f"of another model: .*{message}"):
        load_state(tmp_path, state)
    assert all((before[name] == value).all() for name, value in values(state).items())


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no trained model in .*; train one"):
        newest_run(tmp_path)
    with pytest.raises(InputError, match=r"holds no run: there is no config\.json"):
        load_run(tmp_path)
    with pytest.raises(InputError, match=r"checkpoint.safetensors does not exist"):
        load_tensors(tmp_path / LAST)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"preset": 1}', '{"model": {"a": 1}}'])
def test_a_damaged_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError):
        load_config(tmp_path)


def test_a_tokenizer_of_another_run_is_refused(tmp_path: Path) -> None:
    start_run(tmp_path, RunConfig("micro", GPT_CONFIG, TrainConfig()), TOKENIZER, Progress())
    save_state(tmp_path, state_of(GPT_CONFIG), Progress())
    CharTokenizer.from_text("abcd").save(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="has 4 tokens, the run's model 3"):
        load_run(tmp_path)


def test_metrics_survive_a_torn_line_and_are_cut_on_resume(tmp_path: Path) -> None:
    for i in (10, 20, 30):
        append_metrics(tmp_path, {"iteration": i})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4')
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [10, 20, 30]
    config = RunConfig("micro", GPT_CONFIG, TrainConfig())
    start_run(tmp_path, config, TOKENIZER, Progress(iteration=20))
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [10, 20]
    start_run(tmp_path, config, TOKENIZER, Progress())
    assert read_metrics(tmp_path) == []


def test_a_folder_with_a_run_is_not_free(tmp_path: Path) -> None:
    check_free(tmp_path)
    check_free(tmp_path / "missing")
    save_state(tmp_path, state_of(GPT_CONFIG), Progress())
    with pytest.raises(InputError, match="holds a run that was stopped; add --resume"):
        check_free(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(InputError, match="holds a finished run"):
        check_free(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writing fails half-way."""
    save_tensors(tmp_path / LAST, {"w": Tensor([1.0, 2.0])}, {"iteration": 1})
    before = (tmp_path / LAST).read_bytes()
    script = f"""
import resource, signal
from pathlib import Path
import numpy as np
import tinygpt
from tinygrad import Tensor
from tinygpt.checkpoint import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
w = Tensor(np.zeros(100_000, np.float32)).realize()
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
save_tensors(Path({str(tmp_path / LAST)!r}), {{"w": w}}, {{"iteration": 2}})
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "InputError: could not write" in run.stderr
    assert (tmp_path / LAST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


def test_infinite_losses_are_stored(tmp_path: Path) -> None:
    save_state(tmp_path, state_of(GPT_CONFIG), Progress())
    assert load_state(tmp_path, state_of(GPT_CONFIG)).best_val_loss == math.inf
