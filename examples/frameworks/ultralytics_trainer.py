"""ultralytics' trainer: one argument more. ``python examples/frameworks/ultralytics_trainer.py --k 3``

Trains a YOLO on red boxes that are drawn into noise; ``--data`` takes a data set of your own, as ultralytics reads it.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from ultralytics import YOLO

import glcan_fx.integrations.ultralytics


def draw(folder: Path, images: int = 16, size: int = 96) -> Path:
    """Write a data set in YOLO's format."""
    numbers = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(images):
            picture = numbers.integers(0, 80, (size, size, 3), dtype=np.uint8)
            (x, y), (width, height) = numbers.integers(5, size // 2, 2), numbers.integers(20, 40, 2)
            picture[y: y + height, x: x + width] = 220, 40, 40
            Image.fromarray(picture).save(folder / "images" / split / f"{index}.png")
            box = np.array([x + width / 2, y + height / 2, width, height]) / size
            (folder / "labels" / split / f"{index}.txt").write_text(f"0 {' '.join(map(str, box))}\n")
    path = folder / "data.yaml"
    path.write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames: {{0: box}}\n")
    return path


def main() -> YOLO:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="yolo11n.yaml", help="a model, or the last.pt of a run to go on with")
    parser.add_argument("--data")
    parser.add_argument("--k", type=int)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", default="runs/ultralytics")
    options = parser.parse_args()

    trainer = glcan_fx.integrations.ultralytics.trainer(k=options.k) if options.k else None
    yolo = YOLO(options.model)
    if options.model.endswith("last.pt"):
        yolo.train(trainer=trainer, resume=True)
    else:
        data = options.data or draw(Path(options.out) / "data")
        yolo.train(trainer=trainer, data=str(data), epochs=options.epochs, imgsz=options.size, batch=options.batch,
                   workers=0, plots=False, project=str(Path(options.out).resolve()), name="run", exist_ok=True,
                   seed=0, amp=False)
    return yolo


if __name__ == "__main__":
    main()
