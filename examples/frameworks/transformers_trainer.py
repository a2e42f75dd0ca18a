"""transformers' Trainer: one line more. ``python examples/frameworks/transformers_trainer.py --k 3``"""

import argparse

import torch
from torch.utils.data import Dataset, Subset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import glcan_fx.integrations.transformers


class Images(Dataset):
    """Noise, brighter by class."""

    def __len__(self) -> int:
        return 640

    def __getitem__(self, index: int) -> dict:
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": noise + index % 4, "labels": index % 4}


def main() -> Trainer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--k", type=int)
    parser.add_argument("--out", default="runs/transformers")
    parser.add_argument("--resume")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(
        hidden_size=48, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8,
        num_labels=4))
    arguments = TrainingArguments(
        options.out, max_steps=10, per_device_train_batch_size=options.batch, eval_strategy="steps", eval_steps=5,
        save_steps=5, logging_steps=1, load_best_model_at_end=True, report_to=[], disable_tqdm=True)

    kind = glcan_fx.integrations.transformers.trainer(k=options.k) if options.k else Trainer
    trainer = kind(
        model=model, args=arguments, train_dataset=Images(), eval_dataset=Subset(Images(), range(32)),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())})
    trainer.train(resume_from_checkpoint=options.resume)
    return trainer


if __name__ == "__main__":
    main()
