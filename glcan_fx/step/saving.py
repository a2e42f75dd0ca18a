"""What is saved of a compiled model: its state dict says which plan it is of, and holds the plain model's."""

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch as safetensors
from torch import Tensor, nn

from glcan_fx.errors import LoadError, PlanError
from glcan_fx.files import write
from glcan_fx.plans.plan import Plan
from glcan_fx.plans.serialize import KEY, plan_to_tensor, prefix_in

if TYPE_CHECKING:
    from glcan_fx.step.local_model import LocalModel

MODEL, AUXILIARY, PLAN = "model.safetensors", "auxiliary.safetensors", "plan.json"


def remember_plan(local: "LocalModel") -> None:
    """Keep the plan in the state dict, where auxiliary networks are, so that any framework's checkpoint is complete."""
    if local.aux.state_dict():
        plan: Any = local.plan  # one that knows its model
        local.aux.register_buffer("plan", plan_to_tensor(plan.plan))


def plain_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """The plain model's state dict, in one that was saved of a compiled model, whatever that was wrapped in.

    state: ``local.state_dict()``, also of a wrapper around the compiled model (DistributedDataParallel, AveragedModel,
    a LightningModule): keys are the plain model's, without the wrapper's prefix. A state dict without auxiliary
    networks comes back as it is. Tensors are shared. Raises LoadError where two compiled models are in it.
    """
    prefix = prefix_in(state)
    if prefix is None:
        return dict(state)
    return {key[len(prefix):]: value for key, value in state.items()
            if key.startswith(prefix) and not key.startswith(f"{prefix}aux.")}


def before_loading(module: "LocalModel", state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint of the original model loads strictly: auxiliary networks keep their present values. Raises
    LoadError for one of another plan."""
    own = {f"{prefix}aux.{key}": value for key, value in module.aux.state_dict().items()}
    if not any(key.startswith(f"{prefix}aux.") for key in state):
        state.update(own)
        return
    mine = own.get(prefix + KEY)
    if mine is None and prefix + KEY not in state:
        return
    other = _other_plan(state, prefix)
    parts = {key: value for key, value in own.items() if key != prefix + KEY}
    if other is not None and (mine is None or any(
            key not in state or _shape(state[key]) != _shape(value) for key, value in parts.items())):
        raise LoadError(
            f"this checkpoint was saved by another plan of {other.model} ({_cut(other)}; this one has "
            f"{_cut(module.plan)}). Compile by the plan of the checkpoint: transform(model, "
            "plan=Plan.from_state_dict(state), ...). Or load its weights alone: "
            "local.load_state_dict(glcan_fx.plain_state_dict(state)).")
    if mine is not None:
        state[prefix + KEY] = mine


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _cut(plan: Plan) -> str:
    return f"{plan.k} local modules, cut behind {', '.join(plan.cuts)}" if plan.k > 1 else "1 local module"


def _other_plan(state: dict[str, Any], prefix: str) -> Plan | None:
    try:
        return Plan.from_state_dict({KEY: state[prefix + KEY]})
    except (KeyError, PlanError):
        return None


def refuse_closure(local: "LocalModel") -> None:
    """Raise PicklingError, with what to do, for a criterion that pickle cannot find by name."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_globals.get("__name__", "").startswith(("cloudpickle", "dill")):
            return  # they can
    try:
        pickle.dumps(local.task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise pickle.PicklingError(
            f"{error}. A compiled model is pickled with its criterion, which must be defined at the top level of a "
            "module, not as a lambda or inside a function. Or save what needs no criterion: "
            "torch.save(local.state_dict(), ...), local.save_pretrained(directory).") from error


def save(local: "LocalModel", directory: str | Path, options: Mapping[str, Any]) -> None:
    """See ``LocalModel.save_pretrained``."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    own = getattr(local.original, "save_pretrained", None)
    if own is not None:
        own(directory, **options)
    elif options:
        raise TypeError(f"{local.plan.model} has no save_pretrained() of its own, which would take "
                        f"{', '.join(options)}")
    else:
        write_weights(folder / MODEL, local.original.state_dict())
    save_auxiliary(local, folder)


def save_auxiliary(local: "LocalModel", directory: str | Path) -> None:
    """Write what is needed to go on training beside the plain model: auxiliary networks, and the plan to read."""
    folder = Path(directory)
    write_weights(folder / AUXILIARY, local.aux.state_dict())
    write(folder / PLAN, local.plan.to_json())


def read_plan(directory: str | Path) -> Plan:
    """The plan that lies beside saved auxiliary networks. Raises LoadError where there is none."""
    path = Path(directory) / PLAN
    if not path.is_file():
        raise LoadError(f"'{path}' is not there: '{directory}' was not written by save_pretrained() of a compiled "
                        "model")
    return Plan.from_json(path.read_text(encoding="utf-8"))


def check_plan_of(local: "LocalModel", directory: str | Path) -> None:
    """Raise LoadError where a folder's auxiliary networks are none, or of another plan."""
    other = read_plan(directory)
    if other.cuts != local.plan.cuts or other.method != local.plan.method:
        raise LoadError(f"'{directory}' was saved by another plan of {other.model} ({_cut(other)}; this one has "
                        f"{_cut(local.plan)}). Give the same k and method, or glcan_fx.Plan.from_json of its {PLAN} as "
                        "plan=.")


def load_auxiliary(local: "LocalModel", directory: str | Path) -> None:
    """Read the auxiliary networks that ``save_auxiliary`` wrote. Raises LoadError where they are another plan's."""
    check_plan_of(local, directory)
    _read(local.aux, Path(directory) / AUXILIARY)


def load_weights(model: nn.Module, directory: str | Path) -> None:
    """Read the plain model's weights. Raises LoadError where they are another model's; it stays as it was then."""
    _read(model, Path(directory) / MODEL)


def write_weights(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors, whole or not at all; a tensor under two names twice, as plain models want."""
    alone = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    write(path, safetensors.save(alone, {"format": "pt"}))


def _read(module: nn.Module, path: Path) -> None:
    state, own = safetensors.load_file(path), module.state_dict()
    wrong = sorted({*own} ^ {*state}) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise LoadError(f"'{path}' holds other tensors than this {type(module).__name__}: {', '.join(wrong[:3])}"
                        f"{', …' if len(wrong) > 3 else ''}. Nothing was loaded.")
    module.load_state_dict(state)
