"""ultralytics: a trainer whose model trains by local modules (tried with ultralytics 8.4.190; YOLOv8, 11 and 26)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.detect import DetectionTrainer

from glcan_fx.api import transform
from glcan_fx.config import Options
from glcan_fx.errors import UnsupportedError
from glcan_fx.step.saving import load_auxiliary, read_plan, save_auxiliary


class _Loss:
    """The model's own criterion on a batch; ``items`` are the parts of the last one, which is the model's own."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.items = model, None

    def __call__(self, outputs: Any, batch: Any) -> Tensor:
        model: Any = self.model
        if getattr(model, "criterion", None) is None:
            model.criterion = model.init_criterion()
        loss, self.items = model.criterion(outputs, batch)
        return loss.sum()


def trainer(base: type[BaseTrainer] = DetectionTrainer, **options: Any) -> type[BaseTrainer]:
    """A trainer, of detection or of another task, that compiles its model by ``glcan_fx.transform``.

        trainer = glcan_fx.integrations.ultralytics.trainer(k=3)
        YOLO("yolo11n.yaml").train(trainer=trainer, data="coco8.yaml", epochs=100)

    options: those of ``transform``. What is evaluated, averaged, saved and exported is the plain model, as ever;
    auxiliary networks lie beside its weights, in auxiliary.safetensors, with the plan in plan.json, and ``resume=True``
    (with such a trainer) reads them. ``trainer.local`` is the compiled model. Refused with UnsupportedError: several
    GPUs, ``compile``, distillation.
    """

    class LocalTrainer(base):
        def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = {"several GPUs": self.world_size > 1, "compile=": self.args.compile,
                     "distill_model=": getattr(self.args, "distill_model", None)}
            if refused := [name for name, value in given.items() if value]:
                raise UnsupportedError(f"{', '.join(refused)} cannot train by local modules in this trainer")
            self.loss_of_local = _Loss(model)
            size = (self.batch_size, self.data["channels"], self.args.imgsz, self.args.imgsz)
            decided = {"example_inputs": torch.empty(size, device=self.device), **options}
            if self.resume:  # its plan decides all but how it is simulated and verified
                plan = read_plan(Path(self.args.model).parent)
                decided = {"plan": plan, "options": options.get("options", Options())}
            self.local = transform(model, criterion=self.loss_of_local, **decided)
            vars(model).pop("criterion", None)  # made anew: it holds class weights, which are not known yet
            return super().build_optimizer(self.local, *args, **kwargs)

        def resume_training(self, ckpt: Any) -> None:
            super().resume_training(ckpt)
            if self.resume:
                load_auxiliary(self.local, Path(self.args.model).parent)

        def _model_train(self) -> None:
            self.local.train()
            super()._model_train()
            self.model.__dict__["loss"] = self._local_loss

        def _local_loss(self, batch: Any, preds: Any = None) -> tuple[Tensor, Any]:
            return self.local(batch["img"], batch).loss, self.loss_of_local.items

        def run_callbacks(self, event: str) -> None:
            if event == "on_train_epoch_end":
                self.model.__dict__.pop("loss", None)  # what follows is the plain model's
            super().run_callbacks(event)

        def _load_checkpoint_state(self, ckpt: Any) -> None:
            self.model.__dict__.pop("loss", None)
            super()._load_checkpoint_state(ckpt)

        def save_model(self) -> Any:
            saved = super().save_model()
            save_auxiliary(self.local, self.wdir)
            return saved

    LocalTrainer.__name__ = LocalTrainer.__qualname__ = f"Local{base.__name__}"
    return LocalTrainer
