"""Inputs that are not the data (labels, masks, prompts) are context: they may join anywhere without hiding blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx


def blocks(count: int, width: int = 8) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU()) for _ in range(count))


class Attention(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.qkv, self.mlp = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.mlp(x).relu()


class Masked(nn.Module):
    """A mask of any type is made into a bias once, and read by every block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.blocks = nn.ModuleList(Attention() for _ in range(4))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x, bias = self.embed(ids), (1.0 - mask[:, None].float()) * -1e4
        for block in self.blocks:
            x = block(x, bias)
        return self.out(x)


class OwnLoss(nn.Module):
    """Computes its loss from labels among its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5), blocks(4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits = self.fc(x.mean((2, 3)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Prompted(nn.Module):
    """A prompt with layers of its own joins ``late``, or in every block, which halves the resolution."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late, self.stem = late, nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = blocks(4)
        self.prompt, self.head = nn.Linear(2, 8), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor, point: Tensor) -> Tensor:
        x, prompt = self.stem(x), None if self.late else self.prompt(point)[:, :, None, None]
        for block in self.blocks:
            x = block(x) if prompt is None else F.max_pool2d(block(x + prompt), 2)
        return self.head(x + (self.prompt(point)[:, :, None, None] if prompt is None else prompt))


class Graph(nn.Module):
    """Node features and a list of edges, which every block reads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])).relu()
        return self.out(x)


def same_size_mse(output: Tensor, target: Tensor) -> Tensor:
    assert output.shape == target.shape  # of auxiliary networks, too
    return F.mse_loss(output, target)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], Any, Any, int]] = {
    "mask-int": (Masked, lambda: (torch.randint(50, (2, 8)), torch.ones(2, 8, dtype=torch.long)),
                 lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()), torch.zeros(2, 8).long(), 5),
    "mask-bool": (Masked, lambda: (torch.randint(50, (2, 8)), torch.ones(2, 8, dtype=torch.bool)),
                  lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()), torch.zeros(2, 8).long(), 5),
    "own-loss": (OwnLoss, lambda: (torch.randn(4, 3, 16, 16), torch.arange(4)), lambda out, _: out["loss"],
                 torch.zeros(4), 5),
    "prompt-late": (lambda: Prompted(True), lambda: (torch.randn(2, 3, 16, 16), torch.randn(2, 2)), F.mse_loss,
                    torch.zeros(2, 1, 16, 16), 5),
    "prompt-everywhere": (lambda: Prompted(False), lambda: (torch.randn(2, 3, 16, 16), torch.randn(2, 2)),
                          same_size_mse, torch.zeros(2, 1, 1, 1), 5),
    "edges": (Graph, lambda: (torch.randn(6, 8), torch.randint(6, (2, 12))), F.cross_entropy,
              torch.arange(6) % 3, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_context_does_not_hide_the_network(name: str) -> None:
    make, inputs, criterion, targets, k = CASES[name]
    model, values = make(), inputs()
    local = glcan_fx.transform(model, k="natural", criterion=criterion, example_inputs=inputs()).train()
    assert local.plan.k >= k

    out = local(*values, targets)
    torch.testing.assert_close(out.output, model.train()(*values))
    out.loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still
    local.eval()
    for found, expected in zip(tensors_of(local(*values)), tensors_of(model.eval()(*values)), strict=True):
        assert torch.equal(found, expected)


def tensors_of(value: Any) -> list[Tensor]:
    return list(value.values()) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("joined", ["beside each other", "difference", "frames"])
def test_images_of_one_batch_that_become_one_value(joined: str) -> None:
    """Two images that are compared, or frames, run through the blocks as one batch; the auxiliary networks put them
    together as the model does."""
    class Compares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(i, 8, 3, 2, 1), nn.ReLU()) for i in (3, 8, 8)))
            self.out = nn.Conv2d(16 if joined == "beside each other" else 8, 1, 1)

        def forward(self, pair: Tensor) -> Tensor:
            x = self.blocks(pair.flatten(0, 1) if joined == "frames" else torch.cat([pair[:, 0], pair[:, 1]]))
            if joined == "frames":
                return self.out(x.unflatten(0, (-1, 2)).mean(1))
            a, b = x.chunk(2)
            return self.out(torch.cat([a, b], 1) if joined == "beside each other" else (a - b).abs())

    example = torch.empty(4, 2, 3, 16, 16)
    local = glcan_fx.transform(Compares(), k=3, criterion=F.mse_loss, example_inputs=example).train()
    out = local(torch.randn(4, 2, 3, 16, 16), torch.randn(4, 1, 2, 2))
    out.loss.backward()
    assert len(out.losses) == 3 and all(p.grad is not None for p in local.original.parameters())
