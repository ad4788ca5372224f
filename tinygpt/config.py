"""What can be set: the model's shape, the training recipe, and the presets that name good choices.

The command line is made from these dataclasses: a field is a flag, its help text stands beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

Activation = Literal["gelu_tanh", "gelu", "relu", "relu2"]
Position = Literal["learned", "rotary"]
Norm = Literal["layer", "rms"]
OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear"]


class InputError(ValueError):
    """Input that cannot be used; its message is one sentence for the person who gave it."""


def _setting(help: str, **default: Any) -> Any:
    return field(metadata={"help": help}, **default)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise InputError(message)


def _check_whole(config: Any, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        _check(
            is_whole and value >= minimum,
            f"{name} is {value!r}; it must be a whole number, {minimum} or more",
        )


def _check_choices(config: Any, **kinds: Any) -> None:
    for name, kind in kinds.items():
        value, choices = getattr(config, name), get_args(kind)
        _check(value in choices, f"{name} is {value!r}; it must be one of {', '.join(choices)}")


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT. Raises InputError for shapes that cannot be built.

    The defaults make a GPT-2 (Radford et al. 2019). The fields from `position` on are what small
    models have learned to do better since; each stands alone.
    """

    block_size: int = _setting("longest context, in tokens")
    vocab_size: int = _setting("number of different tokens")
    n_layer: int = _setting("number of transformer blocks")
    n_head: int = _setting("attention heads per block; must divide n_embd")
    n_embd: int = _setting("channels of the residual stream")
    dropout: float = _setting(
        "probability of zeroing an activation while training, 0 to below 1", default=0.0
    )
    bias: bool = _setting("biases in the linear layers and layer norms, as in GPT-2", default=False)
    tie_weights: bool = _setting(
        "use the token embedding as the output layer's weight too", default=True
    )
    activation: Activation = _setting(
        "the MLP's nonlinearity: gelu_tanh (GPT-2), gelu (exact, nanoGPT), relu (the lecture) or "
        "relu2 (its square)",
        default="gelu_tanh",
    )
    attn_dropout: float | None = _setting(
        "probability of zeroing an attention weight while training (default: dropout)", default=None
    )
    position: Position = _setting(
        "where a token stands: learned (a vector for each position) or rotary (queries and keys "
        "are turned by an angle that grows with it)",
        default="learned",
    )
    norm: Norm = _setting(
        "layer (layer norm) or rms (root mean square, without weights, after the embedding too)",
        default="layer",
    )
    qk_norm: bool = _setting("RMS norm of each query and key", default=False)

    def __post_init__(self) -> None:
        _check_whole(self, 1, "block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        _check(
            self.n_embd % self.n_head == 0,
            f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; "
            "every head needs the same number of channels",
        )
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"{name} is {value}; it must be at least 0 and below 1")
        _check_choices(self, activation=Activation, position=Position, norm=Norm)
        _check(
            self.position == "learned" or self.n_embd // self.n_head % 2 == 0,
            f"n_embd / n_head is {self.n_embd // self.n_head}; rotary positions turn pairs of "
            "channels, so it must be even",
        )

    @property
    def attention_dropout(self) -> float:
        return self.dropout if self.attn_dropout is None else self.attn_dropout

    def beyond_gpt2(self) -> list[str]:
        """The settings that GPT-2's own formats have no place for; dropout aside."""
        names = ("position", "norm", "qk_norm")
        defaults = {f.name: f.default for f in fields(self)}
        found = [n for n in names if getattr(self, n) != defaults[n]]
        return found + (["activation"] if self.activation == "relu2" else [])


@dataclass(frozen=True)
class BigramConfig:
    """Shape of the bigram model: one table of vocab_size x vocab_size logits."""

    block_size: int = _setting("tokens per training row; the model itself looks at one token only")
    vocab_size: int = _setting("number of different tokens")

    def __post_init__(self) -> None:
        _check_whole(self, 1, "block_size", "vocab_size")


ModelConfig = GPTConfig | BigramConfig


@dataclass(frozen=True)
class TrainConfig:
    """The training recipe, by nanoGPT's names. Raises InputError where a value makes no sense."""

    data: str = _setting(
        "what to learn: tinyshakespeare, a UTF-8 text file, an http(s) URL of one, or a folder "
        "that `python -m tinygpt.prepare` or nanoGPT has made",
        default="tinyshakespeare",
    )
    tokenizer: Literal["char", "gpt2"] = _setting(
        "what a token is: a character, or one of GPT-2's 50,257 subwords", default="char"
    )
    init_from: str = _setting(
        "weights to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a run, or a folder or file "
        "of Hugging Face's or nanoGPT's making (default: random ones)",
        default="",
    )
    out_dir: str = _setting("folder of the run (default: runs/<preset>)", default="")
    max_iters: int = _setting("training steps", default=2000)
    batch_size: int = _setting("rows per step, each of block_size tokens", default=12)
    optimizer: OptimizerName = _setting(
        "adamw, or muon: Muon for the matrices of the blocks, AdamW for everything else",
        default="adamw",
    )
    learning_rate: float = _setting("peak learning rate", default=1e-3)
    embedding_lr: float | None = _setting(
        "the same of the token and position embedding (default: learning_rate)", default=None
    )
    head_lr: float | None = _setting(
        "the same of an untied output layer (default: learning_rate)", default=None
    )
    schedule: Schedule = _setting(
        "decay of the learning rates: cosine (from the warm-up on) or linear (over the last "
        "warmdown_iters steps)",
        default="cosine",
    )
    min_lr: float | None = _setting(
        "learning_rate at the end of the decay, the others in proportion (default: a tenth)",
        default=None,
    )
    warmup_iters: int = _setting(
        "steps over which the learning rate rises from 0 to its peak", default=100
    )
    lr_decay_iters: int | None = _setting(
        "step at which the decay reaches min_lr (default: max_iters)", default=None
    )
    warmdown_iters: int | None = _setting(
        "steps of the linear decay (default: three quarters of lr_decay_iters)", default=None
    )
    weight_decay: float = _setting(
        "decoupled weight decay of matrices; biases and norms have none", default=0.1
    )
    momentum: float = _setting("Muon's decay rate of past gradients", default=0.95)
    beta1: float = _setting("AdamW's decay rate of the first moment", default=0.9)
    beta2: float = _setting("AdamW's decay rate of the second moment", default=0.99)
    grad_clip: float = _setting("largest global norm of the gradients, 0 for no limit", default=1.0)
    eval_interval: int = _setting("steps between two evaluations, each saved", default=250)
    eval_iters: int = _setting("batches of the val split per evaluation", default=20)
    log_interval: int = _setting("steps between two lines of metrics.jsonl", default=10)
    devices: int = _setting(
        "how many CPU cores share each batch, 0 for all of them; must divide batch_size", default=0
    )
    seed: int = _setting("fixes weights, batches and dropout", default=1337)
    max_download_mb: int = _setting("largest download accepted, in megabytes", default=1024)

    def __post_init__(self) -> None:
        _check_whole(
            self, 1, "max_iters", "batch_size", "eval_interval", "eval_iters", "log_interval",
            "max_download_mb",
        )  # fmt: skip
        _check_whole(self, 0, "warmup_iters", "seed", "devices")
        for name in ("lr_decay_iters", "warmdown_iters"):
            if getattr(self, name) is not None:
                _check_whole(self, 1, name)
        _check_choices(self, optimizer=OptimizerName, schedule=Schedule)
        for name in (
            "learning_rate", "embedding_lr", "head_lr", "final_lr", "weight_decay", "grad_clip",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                _check(
                    0 <= value < math.inf, f"{name} is {value}; it must be 0 or more, and finite"
                )
        _check(
            self.final_lr <= self.learning_rate,
            f"min_lr {self.final_lr} is above learning_rate {self.learning_rate}; it must not be",
        )
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"{name} is {value}; it must be at least 0 and below 1")

    @property
    def final_lr(self) -> float:
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    @property
    def final_share(self) -> float:
        """What is left of every learning rate at the end of the decay."""
        return self.final_lr / self.learning_rate if self.learning_rate else 1.0

    @property
    def decay_iters(self) -> int:
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def linear_iters(self) -> int:
        if self.warmdown_iters is not None:
            return self.warmdown_iters
        return max(1, self.decay_iters * 3 // 4)


@dataclass(frozen=True)
class Preset:
    """A model and a recipe that go together; a model without n_layer is the bigram model."""

    purpose: str
    model: dict[str, Any]
    train: TrainConfig


# What small models have learned since GPT-2, and a recipe that goes with it; both much as in
# Jordan's modded-nanogpt, whose speed records found most of it.
MODERN: dict[str, Any] = dict(
    activation="relu2", tie_weights=False, position="rotary", norm="rms", qk_norm=True,
    attn_dropout=0.0,
)  # fmt: skip
MUON = TrainConfig(
    optimizer="muon", learning_rate=0.02, embedding_lr=0.02, head_lr=0.004, schedule="linear",
    min_lr=0.0004, warmup_iters=50, grad_clip=0.0,
)  # fmt: skip

PRESETS = {
    "bigram": Preset(
        "the lecture's first model, a table of 65 x 65 logits",
        dict(block_size=64),
        TrainConfig(
            max_iters=1500, batch_size=64, learning_rate=5e-2, min_lr=1e-4, weight_decay=0.0,
            eval_interval=250,
        ),
    ),
    "micro": Preset(
        "nanoGPT's CPU recipe, 0.8 million parameters",
        dict(block_size=64, n_layer=4, n_head=4, n_embd=128, activation="gelu"),
        TrainConfig(),
    ),
    "fast": Preset(
        "val loss 1.88, that of micro, as soon as possible",
        dict(block_size=64, n_layer=3, n_head=4, n_embd=128, **MODERN),
        replace(MUON, batch_size=24, max_iters=200, warmup_iters=20, warmdown_iters=110),
    ),
    "laptop": Preset(
        "the best text for about two minutes of two cores",
        dict(block_size=256, n_layer=3, n_head=4, n_embd=128, **MODERN),
        replace(MUON, batch_size=8, max_iters=900),
    ),
    "record": Preset(
        "below nanoGPT's best val loss on a GPU, 1.4697, in a quarter of an hour",
        dict(block_size=256, n_layer=4, n_head=6, n_embd=192, dropout=0.1, **MODERN),
        replace(MUON, batch_size=12, max_iters=2000),
    ),
    "baby": Preset(
        "nanoGPT's shakespeare_char, 10.6 million parameters, for a GPU or patience",
        dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2, activation="gelu"),
        TrainConfig(max_iters=5000, batch_size=64),
    ),
    "gpt2": Preset(
        "GPT-2's smallest model, 124 million parameters, for a GPU",
        dict(block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True),
        TrainConfig(
            max_iters=20000, batch_size=8, learning_rate=6e-4, warmup_iters=2000,
            beta2=0.95, eval_interval=1000, tokenizer="gpt2",
        ),
    ),
    "finetune": Preset(
        "a trained model learns another text, GPT-2 or what --init-from names",
        dict(block_size=256, n_layer=12, n_head=12, n_embd=768, bias=True),
        TrainConfig(
            init_from="gpt2", max_iters=200, batch_size=4, learning_rate=3e-5, warmup_iters=10,
            eval_interval=50,
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """All that decides what a run does; its folder's config.json holds it."""

    preset: str
    model: ModelConfig
    train: TrainConfig

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> RunConfig:
        """Raises InputError for what is not a run's configuration."""
        try:
            model = model_config(content["model"])
            return cls(content["preset"], model, TrainConfig(**content["train"]))
        except (KeyError, TypeError) as error:
            raise InputError(f"not the configuration of a run: {error}") from None


def model_config(settings: dict[str, Any]) -> ModelConfig:
    """The configuration with these fields: a GPT's if it has layers, else a bigram model's."""
    return GPTConfig(**settings) if "n_layer" in settings else BigramConfig(**settings)
