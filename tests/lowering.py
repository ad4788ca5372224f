"""`python -m tests.lowering`: lowers and compiles training and generation for DEV=NULL:...

A NULL device runs nothing, so the values mean nothing; but every kernel goes through the target's
renderer and compiler. Printed as JSON are how many kernels a training step and a generation step
have, and on which devices they are.
"""

import json
import os
import sys
import types

if os.environ["DEV"].startswith("NULL:METAL"):  # its compiler is macOS's: lower, do not compile
    from tinygrad.device import Compiler

    metal = types.ModuleType("tinygrad.runtime.ops_metal")
    metal.MetalCompiler = Compiler  # type: ignore[attr-defined]  # gives the source as it is
    sys.modules[metal.__name__] = metal

import numpy as np
from tinygrad import Tensor, TinyJit, UOp

from tinygpt import GPT, GPTConfig
from tinygpt.config import TrainConfig
from tinygpt.optimizer import AdamW, step_rates, step_seed
from tinygpt.trainer import training_step

config = GPTConfig(16, 65, n_layer=1, n_head=2, n_embd=32, dropout=0.1, bias=True)
model, recipe = GPT(config), TrainConfig()
optimizer = AdamW(model.parameters(), recipe)
tokens = np.zeros((2, 16), np.int32)
step = training_step(model, optimizer, grad_clip=1.0)
for i in range(3):
    changing = step_rates(i, recipe), step_seed(i, recipe)
    step(Tensor(tokens), Tensor(tokens), *map(Tensor, changing))

caches, position = model.empty_caches(1), UOp.variable("position", 0, config.block_size - 1)
decode = TinyJit(lambda idx, at: model.decode(idx, caches, at).realize())
for i in range(3):
    decode(Tensor(tokens[:1, :1]), position.bind(i))


def calls(jit: TinyJit) -> list[UOp]:  # type: ignore[valid-type]
    """The kernels, also those that the device groups into graphs."""
    found = []
    for call in jit.captured.linear.src:  # type: ignore[attr-defined]
        function = call.src[0]
        grouped = function.op.name == "CUSTOM_FUNCTION" and function.arg == "graph"
        found += list(function.src[0].src) if grouped else [call]
    return found


kernels = {name: calls(jit) for name, jit in (("training", step), ("generation", decode))}
print(
    json.dumps(
        {
            "kernels": {name: len(found) for name, found in kernels.items()},
            "devices": sorted(
                {
                    str(b.device)
                    for found in kernels.values()
                    for c in found
                    for b in c.src[1:]
                    if not b.is_bound_var
                }
            ),
        }
    )
)
