"""Train a RetinaNet, a YOLO or GSO-YOLO by any method, on a COCO-format or VOC-format folder.

    python examples/train_detection.py --data DIR --method glcan --depth 34

DIR holds COCO as it is downloaded (annotations/instances_train2017.json, train2017/, val2017/), or instances_train.json
and instances_val.json with the images in images/ or beside them, or a Pascal VOC folder (Annotations/, JPEGImages/,
ImageSets/Main/train.txt and val.txt). AP, AP50 and AP75 are pycocotools'.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from models.gso_yolo import gso_yolo
from torch import nn
from torchvision.models.detection.retinanet import RetinaNetHead
from training import Experiment, add_arguments, refusing, run

from glcan_fx.demo.data import CocoFolder, average_precision, collate, detected
from glcan_fx.demo.train import anchors_for_any_object
from glcan_fx.models import retinanet, yolo
from glcan_fx.models.yolo import COCO_ANCHORS

RATIOS = (0.5, 1.0, 2.0)
RECIPES: dict[str, dict[str, Any]] = {
    # the paper's models and k (arXiv 2406.00446, section 4); sizes and schedule are torchvision's, as it gives none
    **{f"retinanet-r{depth}-coco-k{k}": {"depth": depth, "k": str(k), "size": 1066, "short": 800, "channels": 256,
                                         "epochs": 12.0, "batch_size": 8, "lr": 1e-4, "stock": True}
       for depth, k in ((34, 17), (50, 17), (101, 34), (152, 51))},
}


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    if args.model != "retinanet":
        scale = args.size / 416  # what the anchors are for
        anchors = [[[side * scale for side in sides] for sides in level] for level in COCO_ANCHORS]
        make = yolo if args.model == "yolo" else gso_yolo
        return make(args.depth, num_classes=classes, image_size=args.size, anchors=anchors)
    if args.stock:  # torchvision's own anchors, levels P3 to P7 and head
        return retinanet(args.depth, num_classes=classes, min_size=args.short, max_size=args.size)
    anchors = anchors_for_any_object(args.size)
    head = RetinaNetHead(args.channels, len(anchors[0]) * len(RATIOS), classes, norm_layer=partial(nn.GroupNorm, 32))
    return retinanet(
        args.depth, num_classes=classes, fpn_channels=args.channels, extra_levels=False, anchor_sizes=anchors,
        aspect_ratios=RATIOS, min_size=args.short or args.size, max_size=args.size, head=head, fg_iou_thresh=0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, epochs=12, batch_size=8, lr=1e-3)
    parser.add_argument("--recipe", choices=RECIPES, help="the paper's settings; prints what they are")
    parser.add_argument("--model", choices=("retinanet", "yolo", "gso-yolo"), default="retinanet", help="(%(default)s)")
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101, 152), default=18, help="(%(default)s)")
    parser.add_argument("--size", type=int, default=320, metavar="PX", help="longer side (%(default)s)")
    parser.add_argument("--short", type=int, metavar="PX", help="shorter side, at most (as --size)")
    parser.add_argument("--channels", type=int, default=128, help="of the pyramid (%(default)s)")
    parser.set_defaults(stock=False)
    args = parser.parse_args()
    if args.recipe:
        vars(args).update(RECIPES[args.recipe])
        print(f"{args.recipe}: " + ", ".join(f"{key} {value}" for key, value in RECIPES[args.recipe].items()))
    with refusing():
        train = CocoFolder(args.data, "train", image_size=args.size, flip=True, limit=args.limit)
        held = CocoFolder(args.data, "val", image_size=args.size)
    print(train.summary(), held.summary(), sep="\n", file=sys.stderr)

    def evaluate(model: nn.Module, device: torch.device) -> dict[str, float]:
        return average_precision(held, detected(model, held, args.batch_size, device))

    height, width = (args.short or args.size * 3 // 4), args.size
    experiment = Experiment(
        task="detection", build=lambda: build(args, len(train.classes)), example=(args.batch_size, 3, height, width),
        train=train, evaluate=evaluate, collate=collate,
        optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.05))
    run(experiment, args)


if __name__ == "__main__":
    main()
