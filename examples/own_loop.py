"""Experts and their routers in somebody else's model and loop: plain torch, no trainer.

python examples/own_loop.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hakari.training as ht

ROWS, LENGTH, WIDTH, STEPS = 16, 40, 64, 60


class Bytes(nn.Module):
    """The next byte, from a recurrent layer with sparse experts beside it."""

    def __init__(self, router: str) -> None:
        super().__init__()
        moe = ht.MoE(experts=4, top_k=2, hidden=64, router=router)
        self.embed, self.memory = nn.Embedding(256, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.experts, self.head = ht.MixtureOfExperts(WIDTH, moe), nn.Linear(WIDTH, 256)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Logits; experts are drawn by the noise in training, the likeliest in evaluation."""
        h, _ = self.memory(self.embed(x))
        return self.head(h + self.experts(h, noise))


def train(text: Tensor, router: str) -> None:
    """Some steps; `begin` and `settle` let the loss of the load see the whole step."""
    torch.manual_seed(1)
    model = Bytes(router)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    index = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)  # of each token in the step
    for step in range(STEPS):
        rows = text[torch.randint(len(text) - LENGTH, (ROWS, 1)) + torch.arange(LENGTH + 1)]
        ht.balance.begin(model, tokens=index.numel())
        logits = model(rows[:, :-1], ht.token_keys(seed=1, step=step, index=index))
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten().long())
        ht.balance.settle(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (health,) = ht.examine(model)
    print(f"{router:10} {index.numel()} tokens made {sum(health.load)} visits to experts:", end=" ")
    print(f"{health.smallest:.2f} to {health.largest:.2f} of the mean; loss {loss:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    code = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)
    for router in ("gshard", "grin", "grin_star"):
        train(code.int(), router)
