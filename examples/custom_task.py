"""A task of your own: denoise handwritten digits with a small residual network, trained by local losses.

    python examples/custom_task.py          # about 20 seconds on a CPU

Subclass ``glcan_fx.Task`` and say what the loss is; everything else is the loop that you already have.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import glcan_fx


class Denoising(glcan_fx.Task):
    """Mean squared error of (N, 1, H, W) images."""

    name = "denoising"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Denoiser(nn.Module):
    """(N, 1, H, W) -> (N, 1, H, W); the network predicts the noise."""

    def __init__(self, channels: int = 32, blocks: int = 6) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.tail = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.tail(self.blocks(self.head(x)))


def main() -> None:
    torch.manual_seed(0)
    clean = torch.from_numpy(load_digits().images).float().div(16).unsqueeze(1)
    train, test = clean[:1500], clean[1500:]
    noisy_test = test + 0.3 * torch.randn_like(test)

    model = Denoiser()
    local = glcan_fx.transform(model, task=Denoising(), example_inputs=train[:2])
    print(local.plan)
    optimizer = torch.optim.Adam(local.parameters(), lr=2e-3)
    local.train()
    for step in range(400):
        batch = train[torch.randint(len(train), (64,))]
        out = local(batch + 0.3 * torch.randn_like(batch), batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss of the last module {out.losses[-1].item():.4f}")

    model.eval()  # the same parameters: this is what you deploy
    with torch.no_grad():
        restored = model(noisy_test)
    before, after = (10 * torch.log10(1 / F.mse_loss(x, test)) for x in (noisy_test, restored))
    print(f"PSNR on held-out digits: noisy {before:.2f} dB, restored {after:.2f} dB")


if __name__ == "__main__":
    main()
