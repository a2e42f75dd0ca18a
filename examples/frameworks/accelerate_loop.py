"""A loop with accelerate. ``python examples/frameworks/accelerate_loop.py --k 3``"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import mobilenet_v2

import glcan_fx


def main() -> tuple[torch.nn.Module, list[float]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--k", type=int)
    parser.add_argument("--out", default="runs/accelerate")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    images = torch.randn(10 * options.batch, 3, options.size, options.size)
    labels = torch.arange(len(images)) % 4
    model = mobilenet_v2(num_classes=4, dropout=0.0)
    if options.k:
        model = glcan_fx.transform(model, k=options.k, criterion=F.cross_entropy, example_inputs=images[:options.batch])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model, optimizer, data = accelerator.prepare(
        model, optimizer, DataLoader(TensorDataset(images, labels), batch_size=options.batch))

    losses, start = [], 0
    if options.resume:
        accelerator.load_state(options.out)
        start = 6
    for step, (x, y) in enumerate(data):
        if step < start:
            continue
        with accelerator.accumulate(model):
            loss = model(x, y).loss if options.k else F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step == 5:
            accelerator.save_state(options.out)
    return accelerator.unwrap_model(model), losses


if __name__ == "__main__":
    print(*(f"{loss:.3f}" for loss in main()[1]))
