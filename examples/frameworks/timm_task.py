"""timm's task, optimizer, average and checkpoints. ``python examples/frameworks/timm_task.py --k 3``"""

import argparse
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

import glcan_fx.integrations.timm


def main() -> tuple[ClassificationTask, list[float]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--k", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/timm"))
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(10, options.batch, 3, options.size, options.size)
    labels = torch.randint(4, (10, options.batch))
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    model = timm.create_model("mobilenetv2_100", num_classes=4)

    if options.k:
        model = glcan_fx.transform(model, k=options.k, criterion=loss, example_inputs=images[0])
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    task = glcan_fx.integrations.timm.LocalTask(model) if options.k else ClassificationTask(model, loss)
    task.setup_ema(decay=0.9)
    options.out.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(options.out))

    start = 0
    if options.resume:
        saved = torch.load(options.resume)
        task.load_checkpoint_state(saved["state_dict"], saved.get("task_state"))
        task.load_checkpoint_state(saved["state_dict_ema"], saved.get("task_state_ema"), ema=True)
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["epoch"] + 1
    losses = []
    for step in range(start, len(images)):
        task.train()
        optimizer.zero_grad()
        result = task(images[step], labels[step])
        result["loss"].backward()
        optimizer.step()
        task.update_ema(step=step)
        losses.append(result["loss"].item())
        if step in (4, 9):
            saver.save_checkpoint(step, metric=-losses[-1])
    return task, losses


if __name__ == "__main__":
    print(*(f"{loss:.3f}" for loss in main()[1]))
