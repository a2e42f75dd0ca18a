"""transformers: a Trainer whose model trains by local modules (tried with transformers 5.24)."""

from typing import Any

import torch
from transformers import Trainer

from glcan_fx.api import transform
from glcan_fx.capture.random_numbers import kept_python_random
from glcan_fx.errors import UnsupportedError
from glcan_fx.step.local_model import LocalModel
from glcan_fx.step.saving import check_plan_of, load_auxiliary, plain_state_dict, save_auxiliary


def trainer(base: type[Trainer] = Trainer, **options: Any) -> type[Trainer]:
    """A ``Trainer``, or a subclass of your own, that compiles its model by ``glcan_fx.transform``.

        Trainer = glcan_fx.integrations.transformers.trainer(k=3)
        Trainer(model=model, args=args, train_dataset=train, eval_dataset=val).train()

    options: those of ``transform``; the example is the first batch. Checkpoints are the plain model's, as its own
    library writes them, with auxiliary networks beside it in auxiliary.safetensors and the plan in plan.json; training
    resumes from them. ``trainer.model.original`` is the plain model.
    """

    class LocalTrainer(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.model_init is not None:
                raise UnsupportedError("model_init= makes models after the Trainer: pass model= instead")
            if self.train_dataset is None:
                return  # to evaluate only
            with kept_python_random(), torch.random.fork_rng():  # the run's order and augmentation stay what they were
                batch = self._prepare_inputs(next(iter(self.get_train_dataloader())))
            local = transform(self.model, example_inputs=dict(batch), **options)
            self.model: Any = local
            self.model_wrapped = local
            self.model_accepts_loss_kwargs = False  # losses are means over a batch

        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            local: Any = self.model
            if not isinstance(local, LocalModel):
                super()._save(output_dir, state_dict)
                return
            try:
                self.model = local.original  # which the library knows how to save
                super()._save(output_dir, None if state_dict is None else plain_state_dict(state_dict))
            finally:
                self.model = local
            if self.args.should_save:
                save_auxiliary(local, output_dir or self.args.output_dir)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            if isinstance(self.model, LocalModel):
                check_plan_of(self.model, resume_from_checkpoint)  # before anything is loaded
            if not self._load_plain(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            if isinstance(self.model, LocalModel):
                load_auxiliary(self.model, resume_from_checkpoint)

        def _load_best_model(self) -> None:
            if not self._load_plain(self.state.best_model_checkpoint):
                super()._load_best_model()

        def _load_plain(self, folder: str) -> bool:
            """As ``from_pretrained`` does, which knows the names that weights have in files."""
            plain: Any = self.model.original if isinstance(self.model, LocalModel) else None
            if plain is None or not hasattr(plain, "from_pretrained"):
                return False
            plain.load_state_dict(type(plain).from_pretrained(folder).state_dict())
            return True


    LocalTrainer.__name__ = LocalTrainer.__qualname__ = f"Local{base.__name__}"
    return LocalTrainer
