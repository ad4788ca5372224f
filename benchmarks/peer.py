"""The same GPT on PyTorch's own layers, to measure against: what a user of nanoGPT has."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name everybody gives it)

from tinygpt.config import GPTConfig, TrainConfig
from tinygpt.optimizer import learning_rate


class Block(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = c.n_head, c.dropout
        self.approximate = "tanh" if c.activation == "gelu_tanh" else "none"
        self.ln_1 = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.attn_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.ln_2 = nn.LayerNorm(c.n_embd, bias=c.bias)
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.mlp_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """past: the keys and values of the tokens before, to which this token's are added."""
        B, T, C = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(past, (k, v), strict=True))
            past[:] = k, v
        dropout, causal = self.dropout if self.training else 0.0, past is None
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        y = self.attn_proj(y.transpose(1, 2).reshape(B, T, C))
        x = x + F.dropout(y, self.dropout, self.training)
        hidden = F.gelu(self.c_fc(self.ln_2(x)), approximate=self.approximate)
        return x + F.dropout(self.mlp_proj(hidden), self.dropout, self.training)


class PeerGPT(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.config = c
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.h = nn.ModuleList([Block(c) for _ in range(c.n_layer)])
        self.ln_f = nn.LayerNorm(c.n_embd, bias=c.bias)
        for p in self.parameters():
            if p.ndim >= 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe.weight[: idx.shape[1]]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)

    def decode(self, idx: Tensor, pasts: list[list[Tensor]], position: int) -> Tensor:
        """One token (B, 1) at `position`; pasts, one per block, are empty at position 0."""
        c = self.config
        if position == 0:
            empty = torch.empty(idx.shape[0], c.n_head, 0, c.n_embd // c.n_head)
            pasts[:] = [[empty, empty] for _ in self.h]
        x = self.wte(idx) + self.wpe.weight[position]
        for block, past in zip(self.h, pasts, strict=True):
            x = block(x, past)
        return F.linear(self.ln_f(x), self.wte.weight)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(idx).flatten(0, 1), targets.flatten())


class PeerTrainer:
    """Forward, backward, clipping, AdamW (fused), as nanoGPT's train.py does them."""

    def __init__(self, config: GPTConfig, recipe: TrainConfig, compiled: bool = False):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = PeerGPT(config)
        self.loss = torch.compile(self.model.loss) if compiled else self.model.loss
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        free = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay},
             {"params": free, "weight_decay": 0.0}],
            lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), fused=True,
        )  # fmt: skip

    def step(self, x: Tensor, y: Tensor, iteration: int) -> float:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(iteration, self.recipe)
        loss = self.loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    @torch.no_grad()
    def total_loss(self, x: Tensor, y: Tensor) -> float:
        """Sum of the losses of the targets, which are -1 where there is none."""
        self.model.eval()
        logits = self.model(x).flatten(0, 1)
        loss = F.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction="sum")
        return float(loss.item())

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> float:
        self.model.eval()
        return float(self.model.loss(x, y).item())
