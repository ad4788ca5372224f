"""Plants faults in a copy of the package, one at a time, and shows that the suite catches each.

    python -m tests.mutations [WORD ...]        only the faults whose names hold one of the words

A test that cannot fail proves nothing. Each fault is a small change of the source that a person
might make, and names the tests that must notice it; these run on the copy and have to fail, after
they have passed on a copy without a fault. Exits with 1 if a fault survives. Takes some minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

LINEAR = "test_operations.py::test_linear"
LAYER_NORM = "test_operations.py::test_layer_norm"
ACTIVATION = "test_operations.py::test_activation"
ATTENTION = "test_operations.py::test_attention"
CROSS_ENTROPY = "test_operations.py::test_cross_entropy"
TINY = "test_models.py::test_gpt[tiny]"
ONE_DEVICE = "test_training.py::test_steps[untied, biases]"
TWO_CORES = "test_training.py::test_steps[untied, biases, two cores]"
WHOLE_RUN = "test_training.py::test_whole_run"
DROPOUT = "test_dropout.py"
CACHE = "test_generation.py::test_cached_logits"
CHOOSING = "test_generation.py::test_choosing"


class Fault(NamedTuple):
    """`old`, which stands once in tinygpt/`file`, becomes `new`; `caught_by` must then fail."""

    name: str
    caught_by: str
    file: str
    old: str
    new: str


FAULTS = [
    # The model
    Fault("mask off by one: the next token is seen", ATTENTION, "model.py", ".tril()", ".tril(1)"),
    Fault(
        "missing 1 / sqrt(head size)", ATTENTION, "model.py",
        "k.transpose(-2, -1) / math.sqrt(q.shape[-1])", "k.transpose(-2, -1)",
    ),
    Fault(
        "layer norm's eps is 1e-6", LAYER_NORM, "model.py",
        "eps: float = 1e-5", "eps: float = 1e-6",
    ),
    Fault(
        "layer norm divides the variance by C - 1", LAYER_NORM, "model.py",
        "centred.square().mean(axis=-1, keepdim=True)",
        "centred.square().sum(axis=-1, keepdim=True) / (x.shape[-1] - 1)",
    ),
    Fault(
        "layer norm does not take off the mean", LAYER_NORM, "model.py",
        "centred = x - x.mean(axis=-1, keepdim=True)", "centred = x",
    ),
    Fault(
        "the two GELUs are swapped", ACTIVATION, "model.py",
        'activation == "gelu_tanh"', 'activation == "gelu"',
    ),
    Fault(
        "the loss is a sum, not a mean", CROSS_ENTROPY, "model.py",
        ".sum(axis=-1).mean()", ".sum(axis=-1).sum()",
    ),
    Fault(
        "no residual around attention", TINY, "model.py",
        "x = x + self.attn(", "x = self.attn(",
    ),
    Fault(
        "the first norm is used twice", TINY, "model.py",
        "self.mlp(self.ln_2(x))", "self.mlp(self.ln_1(x))",
    ),
    Fault(
        "q, k, v are stacked in the order q, v, k", TINY, "model.py",
        "q, k, v = (parts", "q, v, k = (parts",
    ),
    Fault(
        "q, k, v are stacked by head", TINY, "model.py",
        "reshape(B, T, 3, self.n_head, C3 // (3 * self.n_head)).permute(2, 0, 3, 1, 4)",
        "reshape(B, T, self.n_head, 3, C3 // (3 * self.n_head)).permute(3, 0, 2, 1, 4)",
    ),
    Fault(
        "heads are merged without putting them side by side", TINY, "model.py",
        "y.transpose(1, 2).reshape(B, T, C)", "y.reshape(B, T, C)",
    ),
    Fault(
        "positions are counted backwards", TINY, "model.py",
        "+ wpe[: idx.shape[1]]", "+ wpe[: idx.shape[1]].flip(0)",
    ),
    Fault(
        "the tied table gets no gradient from the logits", TINY, "model.py",
        "linear(x, self.wte.weight)", "linear(x, self.wte.weight.detach())",
    ),
    Fault(
        "the bias is added twice", LINEAR, "model.py",
        "y = x @ weight.T\n    if bias is not None:\n        y = y + bias",
        "y = x @ weight.T\n    if bias is not None:\n        y = y + bias + bias",
    ),
    Fault(
        "no dropout on the attention weights", DROPOUT, "model.py",
        "weights.dropout(dropout)", "weights",
    ),
    Fault(
        "dropout after the activation, too", DROPOUT, "model.py",
        "self.c_proj(hidden)", "self.c_proj(hidden.dropout(self.dropout))",
    ),
    Fault(
        "dropout is off in training", DROPOUT, "train.py",
        "@Context(TRAINING=1)", "@Context(TRAINING=0)",
    ),
    # Training
    Fault("weight decay on biases", ONE_DEVICE, "optimizer.py", "p.ndim >= 2", "p.ndim >= 1"),
    Fault(
        "first moment without bias correction", ONE_DEVICE, "optimizer.py",
        "(m * correction1)", "m",
    ),
    Fault(
        "second moment without bias correction", ONE_DEVICE, "optimizer.py",
        "(v * correction2)", "v",
    ),
    Fault(
        "weight decay goes through the moments", ONE_DEVICE, "optimizer.py",
        "gradients[name], self.m", "gradients[name] + c.weight_decay * p, self.m",
    ),
    Fault(
        "eps inside the square root", ONE_DEVICE, "optimizer.py",
        "(v * correction2).sqrt() + EPS", "(v * correction2 + EPS).sqrt()",
    ),
    Fault(
        "the second moment fades as the first does", ONE_DEVICE, "optimizer.py",
        "c.beta2 * v", "c.beta1 * v",
    ),
    Fault(
        "the learning rate is frozen when the step is compiled", ONE_DEVICE, "optimizer.py",
        "correction2 = rates[0]", "correction2 = learning_rate(1, c)",
    ),
    Fault("clipping also stretches", ONE_DEVICE, "optimizer.py", ".minimum(1.0)", ""),
    Fault(
        "warm-up begins one step late", ONE_DEVICE, "optimizer.py",
        "* (iteration + 1) /", "* iteration /",
    ),
    Fault(
        "the cosine ends at zero", ONE_DEVICE, "optimizer.py",
        "return config.final_lr + cosine", "return cosine",
    ),
    Fault(
        "the cores' gradients are added up, not averaged", TWO_CORES, "parallel.py",
        ") / cores\n", ")\n",
    ),
    Fault(
        "each core clips by the norm of its own part", TWO_CORES, "parallel.py",
        "global_norm([norms])", "global_norm([norm])",
    ),
    Fault("labels are not shifted", WHOLE_RUN, "batches.py", "rows[:, 1:]", "rows[:, :-1]"),
    # Generation
    Fault(
        "cached generation takes every position for the first", CACHE, "model.py",
        "self.wpe.weight[position : position + 1]", "self.wpe.weight[0:1]",
    ),
    Fault(
        "past block_size the first tokens are seen, not the last", CACHE, "model.py",
        "tokens[:, -self.block_size :]", "tokens[:, : self.block_size]",
    ),
    Fault(
        "temperature multiplies", CHOOSING, "sampling.py",
        "scores / temperature", "scores * temperature",
    ),
    Fault(
        "top-k keeps one too many", CHOOSING, "sampling.py",
        "np.partition(scores, -top_k, axis=-1)[..., -top_k, None]",
        "np.partition(scores, -top_k - 1, axis=-1)[..., -top_k - 1, None]",
    ),
    Fault(
        "top-p leaves out the token that reaches it", CHOOSING, "sampling.py",
        "before < top_p", "before + ranked < top_p",
    ),
]  # fmt: skip


def copy_package(folder: Path) -> None:
    for name in ("tinygpt", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def plant(fault: Fault, folder: Path) -> None:
    path = folder / "tinygpt" / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        sys.exit(f"{fault.name}: {fault.old!r} is {text.count(fault.old)} times in {path.name}")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def run_tests(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    paths = [f"tests/parity/{test}" for test in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
    # The faults are in plain Tensor code; what stands in for it on a CPU is left out.
    environment = os.environ | {"TINYGPT_KERNELS": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def complaint(output: str) -> str:
    """The most telling line of a failed run: a tensor that differs, or else the error."""
    lines = re.findall(r"^E +(.*)", output, re.MULTILINE)
    return next((line for line in lines if "worst at" in line), lines[0] if lines else "")


def survives(fault: Fault) -> bool:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_package(folder)
        plant(fault, folder)
        run = run_tests(folder, fault.caught_by)
    if run.returncode not in (0, 1):  # neither passed nor failed: the tests could not run
        sys.exit(f"{fault.name}: pytest ended with {run.returncode}\n{run.stdout}{run.stderr}")
    caught = run.returncode == 1
    print(f"{'caught  ' if caught else 'SURVIVED'}  {fault.name}")
    if caught:
        print(f"          {fault.caught_by}: {complaint(run.stdout)}"[:160], flush=True)
    return not caught


def main(words: list[str]) -> int:
    faults = [f for f in FAULTS if not words or any(word in f.name for word in words)]
    with tempfile.TemporaryDirectory() as name:
        copy_package(Path(name))
        run = run_tests(Path(name), *sorted({f.caught_by for f in faults}))
    if run.returncode != 0:
        sys.exit(f"the tests fail without any fault:\n{run.stdout}")
    survivors = sum([survives(fault) for fault in faults])
    print(f"{len(faults) - survivors} of {len(faults)} faults caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
