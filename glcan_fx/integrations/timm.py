"""timm: a training task for compiled models (tried with timm 1.0.31)."""

from collections.abc import Iterable
from typing import Any

from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from glcan_fx.errors import PlanError
from glcan_fx.step.local_model import LocalModel
from glcan_fx.step.saving import plain_state_dict


class LocalTask(ClassificationTask):
    """timm's classification task for a model that trains by local modules.

        model = glcan_fx.transform(model, k=3, criterion=loss_fn, example_inputs=images)
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1)
        task = glcan_fx.integrations.timm.LocalTask(model)         # instead of ClassificationTask(model, loss_fn)
        saver = CheckpointSaver(model, optimizer, task=task)

    The "state_dict" and "state_dict_ema" of its checkpoints are the plain model's, which ``timm.create_model(...,
    checkpoint_path=...)`` loads; auxiliary networks are the task's own state, and go on with it.

    local: what ``glcan_fx.transform`` returned, with its criterion. Raises PlanError for anything else.
    """

    def __init__(self, local: nn.Module, **options: Any) -> None:
        if not isinstance(local, LocalModel) or not local.task.takes_targets:
            raise PlanError("LocalTask takes a model that glcan_fx.transform(model, criterion=...) has compiled")
        super().__init__(local, criterion=local.task.loss, **options)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The sum of the local losses, and the model's own output, detached."""
        out = self.trainable_module(input, target)
        return {"loss": out.loss, "output": out.output}

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterable[nn.Parameter]:
        """exclude_head: without the last layer of the model, which timm takes to be its last two parameters."""
        local = unwrap_model(self.get_trainable_module())
        last = {id(p) for p in list(local.original.parameters())[-2:]} if exclude_head else set()
        return [p for p in local.parameters() if id(p) not in last]

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = unwrap_model) -> dict[str, Any]:
        state = super().get_checkpoint_state(ema, unwrap_fn)
        return {key: plain_state_dict(value) if key.startswith("state_dict") else value for key, value in state.items()}

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        return {"auxiliary": self._local(module, ema).aux.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        if state:
            self._local(module, ema).aux.load_state_dict(state["auxiliary"], strict=strict)

    def _local(self, module: nn.Module | None, ema: bool) -> LocalModel:
        return unwrap_model(module or self.get_trainable_module(ema=ema))
