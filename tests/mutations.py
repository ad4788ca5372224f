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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

EMBEDDING = "test_operations.py::test_embedding"
LINEAR = "test_operations.py::test_linear"
LAYER_NORM = "test_operations.py::test_layer_norm"
RMS_NORM = "test_operations.py::test_rms_norm"
PLACED = "test_operations.py::test_causal_attention"
ORTHOGONALIZE = "test_operations.py::test_orthogonalize"
ACTIVATION = "test_operations.py::test_activation"
ATTENTION = "test_operations.py::test_attention"
ATTENTION_LAYER = "test_operations.py::test_attention_layer"
CROSS_ENTROPY = "test_operations.py::test_cross_entropy"
TINY = "test_models.py::test_gpt[tiny]"
MODERN = "test_models.py::test_gpt[all that came after GPT-2]"
WIDE = "test_models.py::test_gpt[wide, no size a multiple of a vector]"
ONE_DEVICE = "test_training.py::test_steps[untied, biases]"
TWO_CORES = "test_training.py::test_steps[untied, biases, two cores]"
MUON = "test_training.py::test_steps[Muon]"
MUON_ON_TWO_CORES = "test_training.py::test_steps[Muon, two cores]"
RATES = "test_training.py::test_learning_rate[linear]"
WHOLE_RUN = "test_training.py::test_whole_run"
DROPOUT = "test_dropout.py"
CACHE = "test_generation.py::test_cached_logits"
MODERN_CACHE = "test_generation.py::test_cached_logits[modern]"
CHOOSING = "test_generation.py::test_choosing"


class Fault(NamedTuple):
    """`old`, which stands once in tinygpt/`file`, becomes `new`; `caught_by` must then fail."""

    name: str
    caught_by: str
    file: str
    old: str
    new: str
    by_kernels: bool = False  # is there only where kernels run, as those in kernels.py


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
        "x = (x[:, -1:] if only_last else x) + y", "x = y",
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
        "reshape(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)",
        "reshape(B, T, n_head, 3, C3 // (3 * n_head)).permute(3, 0, 2, 1, 4)",
    ),
    Fault(
        "heads are merged without putting them side by side", TINY, "model.py",
        "y.transpose(1, 2).reshape(B, q.shape[2]", "y.reshape(B, q.shape[2]",
    ),
    Fault(
        "positions are counted backwards", TINY, "model.py",
        "+ wpe[: idx.shape[1]]", "+ wpe[: idx.shape[1]].flip(0)",
    ),
    Fault(
        "the tied table gets no gradient from the logits", TINY, "model.py",
        "self.wte.weight if self.config", "self.wte.weight.detach() if self.config",
    ),
    Fault(
        "the bias is added twice", LINEAR, "model.py",
        "y = x @ weight.T\n    if bias is not None:\n        y = y + bias",
        "y = x @ weight.T\n    if bias is not None:\n        y = y + bias + bias",
    ),
    Fault(
        "no dropout on the attention weights", DROPOUT, "model.py",
        "(drop(weights, dropout) @ v)", "(weights @ v)",
    ),
    Fault(
        "dropout after the activation, too", DROPOUT, "model.py",
        "self.c_fc(x, self.activation)", "self.c_fc(x, self.activation, self.dropout)",
    ),
    Fault(
        "RMS norm's eps is 1e-5", RMS_NORM, "model.py",
        "eps: float = 1e-6", "eps: float = 1e-5",
    ),
    Fault(
        "no norm after the embedding", MODERN, "model.py",
        'x = rms_norm(x) if self.config.norm == "rms" else x', "x = x",
    ),
    Fault(
        "only half of each pair is rotated", PLACED, "model.py",
        "a * sin + b * cos", "b",
    ),
    Fault(
        "queries and keys are rotated each by another's angle", PLACED, "model.py",
        "-2 * np.arange(head_size // 2) / head_size", "-np.arange(head_size // 2) / head_size",
    ),
    Fault(
        "dropout is off in training", DROPOUT, "trainer.py",
        "@Context(TRAINING=1)", "@Context(TRAINING=0)",
    ),
    # Training
    Fault("weight decay on biases", ONE_DEVICE, "optimizer.py", ".ndim >= 2", ".ndim >= 1"),
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
        "        g = g * scale\n", "        g = g * scale + c.weight_decay * p\n",
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
        "correction2 = rates[index]", "correction2 = learning_rate(1, c)",
    ),
    Fault("clipping also stretches", ONE_DEVICE, "optimizer.py", ".minimum(1.0)", ""),
    Fault(
        "warm-up begins one step late", ONE_DEVICE, "optimizer.py",
        "* (iteration + 1) /", "* iteration /",
    ),
    Fault(
        "the cosine ends at zero", ONE_DEVICE, "optimizer.py",
        "return lowest + cosine", "return cosine",
    ),
    Fault(
        "the linear decay takes as long as the whole run", RATES, "optimizer.py",
        "left / c.linear_iters", "left / c.decay_iters",
    ),
    Fault(
        "the embedding has the other parameters' learning rate", MUON, "optimizer.py",
        '"wte": "embedding_lr"', '"wte": "learning_rate"',
    ),
    Fault(
        "Muon does not look a step ahead", MUON, "optimizer.py",
        "ahead = g + c.momentum * m", "ahead = m * 1.0",
    ),
    Fault(
        "Muon's updates of tall matrices are too small", MUON, "optimizer.py",
        "math.sqrt(max(1.0, ", "math.sqrt(min(1.0, ",
    ),
    Fault(
        "Muon takes queries, keys and values for one matrix", MUON, "optimizer.py",
        "3 if name.endswith", "1 if name.endswith",
    ),
    Fault(
        "a step of Newton and Schulz is left out", ORTHOGONALIZE, "optimizer.py",
        "NEWTON_SCHULZ_STEPS = 5", "NEWTON_SCHULZ_STEPS = 4",
    ),
    Fault(
        "two cores update the first core's matrices", MUON_ON_TWO_CORES, "parallel.py",
        "self.cores))[core]", "self.cores))[0]",
    ),
    Fault(
        "the cores' gradients are added up, not averaged", TWO_CORES, "parallel.py",
        ") / count) for", ")) for",
    ),
    Fault(
        "all cores read the first core's part of a batch", TWO_CORES, "launch.py",
        "starts.get(start, start) - start", "0",
    ),
    Fault(
        "each core clips by the norm of its own part", TWO_CORES, "parallel.py",
        "global_norm([norms])", "global_norm([norm])",
    ),
    Fault(
        "every use of dropout drops the same", DROPOUT, "kernels.py",
        "seed = hashed(seed + 0x9E3779B9)", "seed = hashed(seed)",
    ),
    Fault("labels are not shifted", WHOLE_RUN, "batches.py", "rows[:, 1:]", "rows[:, :-1]"),
    # Generation
    Fault(
        "cached generation takes every position for the first", CACHE, "model.py",
        "self.wpe.weight[position : position + 1]", "self.wpe.weight[0:1]",
    ),
    Fault(
        "cached generation rotates every token as the first", MODERN_CACHE, "model.py",
        "self.rotary[:, position : position + 1]", "self.rotary[:, 0:1]",
    ),
    Fault(
        "past block_size the first tokens are seen, not the last", CACHE, "model.py",
        "tokens[:, -self.block_size :]", "tokens[:, : self.block_size]",
    ),
    Fault(
        "past block_size the last block goes on with the first token", CACHE, "model.py",
        "x = (x[:, -1:] if", "x = (x[:, :1] if",
    ),
    Fault(
        "past block_size the last block's attention is the first token's", CACHE, "kernels.py",
        "size, first=T - 1)", "size, first=0)",
    ),
    Fault(
        "past block_size a second text is read with the weights of the first", CACHE, "model.py",
        "self.weights and not self.sliding", "self.weights and not self.packed", by_kernels=True,
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
    # The kernels that stand in for the model's operations on a CPU
    Fault(
        "kernel: mask off by one", ATTENTION_LAYER, "kernels.py",
        ")).where(score, -math.inf)", ") + 1).where(score, -math.inf)",
    ),
    Fault(
        "kernel: mask off by one on the way back", ATTENTION_LAYER, "kernels.py",
        ").where(exp2(power)", " + 1).where(exp2(power)",
    ),
    Fault(
        "kernel: missing 1 / sqrt(head size) on the way back", ATTENTION_LAYER, "kernels.py",
        "(1 / math.sqrt(D))", "1.0",
    ),
    Fault(
        "kernel: attention weights change without the others", ATTENTION_LAYER, "kernels.py",
        " - deltas[m]", "",
    ),
    Fault(
        "kernel: a long product keeps only its last part", WIDE, "kernels.py",
        "s.eq(0).where(0.0, out[", "s.eq(0).where(0.0, 0.0 * out[",
    ),
    Fault(
        "kernel: layer norm's gradient keeps its mean", LAYER_NORM, "kernels.py",
        "slope[c] - mean - ", "slope[c] - ",
    ),
    Fault(
        "kernel: wrong slope of GELU", ACTIVATION, "kernels.py",
        "math.sqrt(2 * math.pi)", "math.sqrt(math.pi)",
    ),
    Fault(
        "kernel: the loss' own gradient is taken for 1", CROSS_ENTROPY, "kernels.py",
        " * dloss[0] *", " *",
    ),
    Fault(
        "kernel: only the last row of a batch trains a position", EMBEDDING, "kernels.py",
        "dwpe[t, c] += ", "dwpe[t, c] = ",
    ),
    Fault(
        "kernel: the gradient is not clipped", TWO_CORES, "kernels.py",
        "g = gradient[i] * scale[0]", "g = gradient[i]",
    ),
    Fault(
        "kernel: the learning rate does not scale the decay", TWO_CORES, "kernels.py",
        "(1.0 - rates[rate] * weight_decay)", "(1.0 - weight_decay)",
    ),
    Fault(
        "kernel: dropout forgets on the way back what it dropped", DROPOUT, "kernels.py",
        "mask(dy[m, n], m * outs + n)", "mask(dy[m, n], m * outs + n + 1)",
    ),
    Fault(
        "kernel: rotation is not undone on the way back", PLACED, "kernels.py",
        "sin = -sin if backward else sin", "sin = sin * 1.0",
    ),
    Fault(
        "kernel: QK norm's gradient is too long", PLACED, "kernels.py",
        "(scale * scale * along)", "(scale * along)",
    ),
    Fault(
        "kernel: keys are taken for values", PLACED, "kernels.py",
        "out[b, t, 2, h, d] = source[b, t, 2, h, d]", "out[b, t, 2, h, d] = source[b, t, 1, h, d]",
    ),
    Fault(
        "kernel: RMS norm's gradient grows with x", RMS_NORM, "kernels.py",
        "(dy[i, c] - x[i, c] * along)", "dy[i, c]",
    ),
    Fault(
        "kernel: half of a symmetric product is missing", ORTHOGONALIZE, "kernels.py",
        "out[m, n] = out[m.minimum(n), m.maximum(n)]", "out[m, n] = 0.0 + out[m, n]",
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


def run_tests(folder: Path, kernels: bool, *tests: str) -> subprocess.CompletedProcess[str]:
    """On a CPU, whose kernels stand in for the model's plain Tensor code unless told not to."""
    paths = [f"tests/parity/{test}" for test in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
    environment = os.environ | {"DEV": "CPU", "TINYGPT_KERNELS": str(int(kernels))}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def complaint(output: str) -> str:
    """The most telling line of a failed run: a tensor that differs, or else the error."""
    lines = re.findall(r"^E +(.*)", output, re.MULTILINE)
    return next((line for line in lines if "worst at" in line), lines[0] if lines else "")


def in_kernels(fault: Fault) -> bool:
    return fault.by_kernels or fault.file == "kernels.py"


def check_sound(kernels: bool, *tests: str) -> None:
    """Ends the program if these tests fail on a copy without a fault."""
    with tempfile.TemporaryDirectory() as name:
        copy_package(Path(name))
        run = run_tests(Path(name), kernels, *tests)
    if run.returncode != 0:
        sys.exit(f"the tests fail without any fault:\n{run.stdout}{run.stderr}")


def try_fault(fault: Fault) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as name:
        copy_package(Path(name))
        plant(fault, Path(name))
        return run_tests(Path(name), in_kernels(fault), fault.caught_by)


def report(fault: Fault, run: subprocess.CompletedProcess[str]) -> bool:
    """Prints what became of the fault; True if the tests caught it."""
    if run.returncode not in (0, 1):  # neither passed nor failed: the tests could not run
        sys.exit(f"{fault.name}: pytest ended with {run.returncode}\n{run.stdout}{run.stderr}")
    caught = run.returncode == 1
    print(f"{'caught  ' if caught else 'SURVIVED'}  {fault.name}")
    if caught:
        print(f"          {fault.caught_by}: {complaint(run.stdout)}"[:160], flush=True)
    return caught


def main(words: list[str]) -> int:
    faults = [f for f in FAULTS if not words or any(word in f.name for word in words)]
    for kernels in (False, True):
        if tests := {f.caught_by for f in faults if in_kernels(f) == kernels}:
            check_sound(kernels, *sorted(tests))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(try_fault, faults)
        caught = [report(fault, run) for fault, run in zip(faults, runs, strict=True)]
    print(f"{sum(caught)} of {len(faults)} faults caught")
    return int(not all(caught))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
