"""The loops of torchvision's reference scripts. ``python examples/frameworks/torchvision_loops.py detection --k 3``

Detection stays as it is: a compiled detector takes images and targets, and returns a dict of losses. In the loops of
classification and segmentation the loss comes from the model: ``model(image, target).loss``.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torchvision.models import mobilenet_v2
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.segmentation import fcn_resnet50

import glcan_fx


def criterion_of_segmentation(outputs: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """As in the reference: the auxiliary classifier's loss counts half."""
    losses = {name: F.cross_entropy(value, target, ignore_index=255) for name, value in outputs.items()}
    return losses["out"] + 0.5 * losses["aux"] if "aux" in losses else losses["out"]


def train_one_epoch(
    model: torch.nn.Module, criterion: Any, optimizer: torch.optim.Optimizer, batches: list, detection: bool
) -> list[float]:
    model.train()
    found = []
    for image, target in batches:
        if detection:
            loss = sum(model(image, target).values())
        elif isinstance(model, glcan_fx.LocalModel):
            loss = model(image, target).loss
        else:
            loss = criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> tuple[torch.nn.Module, list[float]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=["classification", "detection", "segmentation"])
    parser.add_argument("--k", type=int)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.rand(options.steps, options.batch, 3, options.size, options.size)
    if options.task == "detection":
        model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=options.size,
                                       max_size=options.size)
        target = [{"boxes": torch.tensor([[5.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}] * options.batch
        batches, given = [(list(x), target) for x in images], {"task": "detection", "example_inputs": list(images[0])}
        criterion = None
    elif options.task == "segmentation":
        model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
        criterion = criterion_of_segmentation
        batches = [(x, torch.randint(3, (options.batch, options.size, options.size))) for x in images]
        given = {"task": "segmentation", "criterion": criterion, "example_inputs": images[0]}
    else:
        model, criterion = mobilenet_v2(num_classes=3), torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        batches = [(x, torch.randint(3, (options.batch,))) for x in images]
        given = {"criterion": criterion, "example_inputs": images[0]}

    if options.k:
        model = glcan_fx.transform(model, k=options.k, **given)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001, momentum=0.9)
    return model, train_one_epoch(model, criterion, optimizer, batches, options.task == "detection")


if __name__ == "__main__":
    print(*(f"{loss:.3f}" for loss in main()[1]))
