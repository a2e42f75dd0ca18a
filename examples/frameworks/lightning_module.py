"""A LightningModule around a compiled model. ``python examples/frameworks/lightning_module.py --k 3``"""

import argparse

import lightning
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import mobilenet_v2

import glcan_fx


class Classifier(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: list, _: int) -> torch.Tensor:
        images, labels = batch
        local = isinstance(self.model, glcan_fx.LocalModel)
        loss = self.model(images, labels).loss if local else F.cross_entropy(self.model(images), labels)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list, _: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def main() -> Classifier:
    parser = argparse.ArgumentParser()
    parser.add_argument("--k", type=int)
    parser.add_argument("--out", default="runs/lightning")
    parser.add_argument("--resume")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    images = torch.randn(5 * options.batch, 3, options.size, options.size)
    labels = torch.arange(len(images)) % 4
    data = DataLoader(TensorDataset(images, labels), batch_size=options.batch)
    model = mobilenet_v2(num_classes=4, dropout=0.0)
    if options.k:
        model = glcan_fx.transform(model, k=options.k, criterion=F.cross_entropy, example_inputs=images[:options.batch])

    module = Classifier(model)
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(options.out, save_top_k=-1)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", callbacks=[checkpoints], logger=False,
                                enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, data, data, ckpt_path=options.resume)
    return module


if __name__ == "__main__":
    print(*(f"{loss:.3f}" for loss in main().losses))
