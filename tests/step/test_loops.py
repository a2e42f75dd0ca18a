"""Training loops that people already have work unchanged around a compiled module.

The measure is always the same step by plain autograd (``plain_step``): detached modules, the sum of their
losses, one backward. In float32 the gradients are equal bit for bit unless a test says why not.
"""

import copy
import gc
import io
import math
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loops_ddp
import pytest
import torch
import torch.nn.functional as F
from loops_ddp import EXAMPLE, GROUPS, Net, batch, build, gradients, plain_step, weights
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import glcan_fx
from glcan_fx import InputGradientWarning, LocalModel, SmallExampleWarning, UnsupportedError, UnusedGradientsWarning
from glcan_fx.models import retinanet
from glcan_fx.step.unstepped import watched


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    """The same names, and the same values: bit for bit without a tolerance."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **(tolerance or {"rtol": 0, "atol": 0}),
                                   msg=lambda text, name=name: f"{name}: {text}")


def assert_same_step(
    loop: Callable[[LocalModel, Callable[..., Any]], None], make: Callable[[], LocalModel] = build,
    **tolerance: float,
) -> LocalModel:
    """Run a loop with a compiled module's own step, and with plain autograd on its twin: all is equal."""
    local, twin = make(), make()
    loop(local, local)
    loop(twin, lambda *inputs: plain_step(twin, *inputs))
    assert gradients(local)
    assert_equal(gradients(local), gradients(twin), **tolerance)
    assert_equal(dict(local.state_dict()), dict(twin.state_dict()), **tolerance)
    return local


# ------------------------------------------------------------ the plain loop


def test_plain_loop():
    def loop(local, step):
        optimizer = torch.optim.SGD(local.parameters(), lr=0.1, momentum=0.9)
        for iteration in range(3):
            result = step(*batch(seed=iteration))
            optimizer.zero_grad()
            result.loss.backward()
            optimizer.step()

    local = assert_same_step(loop)
    assert gradients(local).keys() == weights(local).keys()


def test_step_equals_local_learning_written_by_hand():
    """Without the compiler's graph: blocks by name, detached by hand, each with its own local loss."""
    local, twin = build(), build()
    images, labels = batch()
    result = local(images, labels)
    result.loss.backward()

    value, losses = images, []
    for index, block in enumerate([twin.stem, twin.block1, twin.block2]):
        value = block(value)
        losses.append(F.cross_entropy(twin.aux.get_submodule(f"{index}.network")(value), labels))
        value = value.detach()
    output = twin.fc(twin.pool(twin.block3(value)).flatten(1))
    losses.append(F.cross_entropy(output, labels))
    sum(losses).backward()

    assert_equal(gradients(local), gradients(twin))
    assert_equal(dict(local.state_dict()), dict(twin.state_dict()))
    assert result.losses == tuple(losses) and torch.equal(result.output, output)
    assert not result.output.requires_grad
    torch.testing.assert_close(result.loss, sum(losses), rtol=1e-6, atol=0)


def test_one_local_module_is_plain_backpropagation():
    local, (images, labels) = build(k=1), batch()
    torch.manual_seed(0)
    model = Net()
    local(images, labels).loss.backward()
    F.cross_entropy(model(images), labels).backward()
    assert_equal(gradients(local.original), gradients(model))
    assert_equal(dict(local.original_state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("when", ["before forward", "between forward and backward"])
def test_zero_grad(when, set_to_none):
    def loop(local, step):
        optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
        for iteration in range(2):
            if when == "before forward":
                optimizer.zero_grad(set_to_none)
            loss = step(*batch(seed=iteration)).loss
            if when == "between forward and backward":
                optimizer.zero_grad(set_to_none)
            loss.backward()
            optimizer.step()

    assert_same_step(loop)


def test_gradient_accumulation():
    def loop(local, step):
        images, labels = (part.chunk(4) for part in batch())
        for micro in zip(images, labels, strict=True):
            (step(*micro).loss / 4).backward()

    assert_same_step(loop)


def test_two_forward_passes_one_backward():
    def loop(local, step):
        (step(*batch(seed=1)).loss + 3 * step(*batch(seed=2)).loss).backward()

    assert_same_step(loop, rtol=1e-4, atol=1e-6)  # the order of the sum differs


def test_every_local_loss_can_be_weighted():
    def loop(local, step):
        losses = step(*batch()).losses
        sum(weight * loss for weight, loss in zip([0.0, 0.5, 1.0, 2.0], losses, strict=True)).backward()

    assert_same_step(loop)


def test_clip_grad_norm():
    norms = []

    def loop(local, step):
        step(*batch()).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(local.parameters(), 0.1))

    local = assert_same_step(loop)
    assert norms[0] == norms[1] > 0.1
    clipped = torch.stack([gradient.norm() for gradient in gradients(local).values()]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.1), rtol=1e-4, atol=0)


def test_inputs_by_keyword():
    def loop(local, step):
        step(*batch()).loss.backward()

    local = assert_same_step(loop)
    again, (images, labels) = build(), batch()
    again(x=images, targets=labels).loss.backward()
    assert_equal(gradients(again), gradients(local))


def test_parameters_frozen_after_the_transform_get_no_gradient():
    def loop(local, step):
        local.stem.requires_grad_(False)
        local.aux.get_submodule("0").requires_grad_(False)  # nothing left to train in the first local module
        local.block2.requires_grad_(False)  # only the auxiliary network is left in the third
        step(*batch()).loss.backward()

    local = assert_same_step(loop)
    assert {name for name, p in local.named_parameters() if p.grad is None} == {
        name for name in weights(local) if name.startswith(("stem.", "aux.0.", "block2."))}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_models_in_other_types_are_compiled_and_trained(dtype):
    def make():
        torch.manual_seed(0)
        return glcan_fx.transform(Net().to(dtype), k="natural", task="classification", example_inputs=EXAMPLE.to(dtype))

    def loop(local, step):
        images, labels = batch()
        step(images.to(dtype), labels).loss.backward()

    local = assert_same_step(loop, make)
    assert {gradient.dtype for gradient in gradients(local).values()} == {dtype}


class SharedGradient(nn.Module):
    """Autograd hands one tensor to both summands: scaling it twice would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(1, 8, 8, 8))
        self.offset = nn.Parameter(torch.zeros(1, 8, 8, 8))
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x) + (self.place + self.offset))
        return self.fc(torch.relu(self.body(x)).mean((2, 3)))


def shared_gradient() -> LocalModel:
    torch.manual_seed(0)
    return glcan_fx.transform(SharedGradient(), k="natural", task="classification", example_inputs=EXAMPLE)


def test_parameters_that_share_one_gradient_are_scaled_once():
    def loop(local, step):
        (step(*batch()).loss / 4).backward()

    assert_same_step(loop, shared_gradient)


def test_parameters_that_share_one_gradient_are_unscaled_once_under_float16():
    local, twin = shared_gradient(), shared_gradient()
    for model, step in ((local, local), (twin, lambda *inputs: plain_step(twin, *inputs))):
        with torch.autocast("cpu", torch.float16):
            loss = step(*batch()).loss
        loss.backward()
        assert torch.equal(model.place.grad, model.offset.grad)
    torch.testing.assert_close(local.place.grad, twin.place.grad, rtol=1e-2, atol=1e-4)


class WithOffset(nn.Module):
    """A criterion whose parameters' gradient is one expanded number."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(3))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + self.offset.sum()


def test_expanded_gradients():
    def loop(local, step):
        (step(*batch()).loss / 2).backward()

    local = assert_same_step(loop, lambda: build(criterion=WithOffset()))
    assert local.task.criterion.offset.grad.tolist() == [2.0] * 3  # four local losses, halved


class Conditioned(Net):
    """Images with a class each, looked up in an embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8, sparse=True)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.stem(x) + self.embedding(condition)[:, :, None, None]
        return self.fc(self.pool(self.block3(self.block2(self.block1(x)))).flatten(1))


def test_sparse_gradients():
    def make():
        torch.manual_seed(0)
        return glcan_fx.transform(Conditioned(), k="natural", task="classification",
                                  example_inputs=(EXAMPLE, torch.zeros(2, dtype=torch.int64)))

    local, twin = make(), make()
    images, labels = batch()
    (local(images, labels.flip(0), labels).loss / 2).backward()
    (plain_step(twin, images, labels.flip(0), labels).loss / 2).backward()
    assert local.embedding.weight.grad.is_sparse
    assert torch.equal(local.embedding.weight.grad.to_dense(), twin.embedding.weight.grad.to_dense())


# ------------------------------------------------------------ mixed precision


def test_autocast_bfloat16():
    def loop(local, step):
        with torch.autocast("cpu", torch.bfloat16):
            loss = step(*batch()).loss
        loss.backward()

    local = assert_same_step(loop)
    assert {gradient.dtype for gradient in gradients(local).values()} == {torch.float32}


def weighted(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: F.cross_entropy(outputs, targets) * factor


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> float:
    names = [name for name in expected if name.startswith(prefix)]
    difference = torch.stack([(actual[name] - expected[name]).norm() for name in names]).norm()
    return float(difference / torch.stack([expected[name].norm() for name in names]).norm())


def scaled_step(
    local: LocalModel, optimizer: Any, scaler: Any, inputs: tuple[Tensor, Tensor], step: Any = None
) -> dict[str, Tensor]:
    """PyTorch's reference loop for float16; returns the unscaled gradients."""
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = (step or local)(*inputs).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    unscaled = gradients(local)
    scaler.step(optimizer)
    scaler.update()
    return unscaled


def test_autocast_float16_with_a_gradient_scaler():
    local, twin = build(), build()
    before = weights(local)
    actual, expected = (
        scaled_step(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu"), batch(),
                    step)
        for model, step in ((local, None), (twin, lambda *inputs: plain_step(twin, *inputs)))
    )
    for module in ("stem", "block1", "block2", "block3", "fc", "aux"):
        assert relative_error(actual, expected, module) < 1e-3
    expected = {name: before[name] - 0.1 * actual[name] for name in before}
    assert_equal(weights(local), expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(weights(local)["stem.0.weight"], before["stem.0.weight"])


def test_gradients_too_small_for_float16_survive():
    """The cross-entropy's own gradients are about 1e-7 here, where float16 has two or three values left."""
    def gradient_errors(local_scale: float | None) -> list[float]:
        local, twin = (build(criterion=weighted(1e-6)) for _ in range(2))
        if local_scale is not None:
            local.aux.scale.scale.fill_(local_scale)
        optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
        actual = scaled_step(local, optimizer, torch.amp.GradScaler("cpu"), batch())
        plain_step(twin, *batch()).loss.backward()
        expected = gradients(twin)
        return [relative_error(actual, expected, module) for module in ("stem", "block1", "block2", "block3")]

    assert max(gradient_errors(None)) < 0.1
    assert min(gradient_errors(1.0)) > 0.5  # so the local scale is what saved them


def test_overflow_in_a_local_loss_skips_the_step_and_shrinks_the_local_scale():
    local = build(criterion=weighted(1e3))
    optimizer = torch.optim.SGD(local.parameters(), lr=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    start, before = local.aux.scale.scale.clone(), weights(local)

    actual = scaled_step(local, optimizer, scaler, batch())
    assert not all(gradient.isfinite().all() for gradient in actual.values())
    assert_equal(weights(local), before)
    assert scaler.get_scale() == 0.5
    assert local.aux.scale.scale < start

    for iteration in range(20):
        actual = scaled_step(local, optimizer, scaler, batch(seed=iteration))
        if all(gradient.isfinite().all() for gradient in actual.values()):
            break
    else:
        pytest.fail("the local scale never became small enough")
    assert not torch.equal(weights(local)["stem.0.weight"], before["stem.0.weight"])


def test_one_overflow_halves_the_local_scale_once():
    """However many local losses overflow in the step, as GradScaler does."""
    local = build(criterion=weighted(1e6))
    start = float(local.aux.scale.scale)
    with torch.autocast("cpu", torch.float16):
        local(*batch())
    assert float(local.aux.scale.scale) == start / 2


def test_the_local_scale_doubles_after_a_number_of_steps():
    local = build()
    local.aux.scale.interval = 3
    start, seen = float(local.aux.scale.scale), []
    for _ in range(6):
        with torch.autocast("cpu", torch.float16):
            local(*batch()).loss.backward()
        seen.append(float(local.aux.scale.scale) / start)
    assert seen == [1, 1, 2, 2, 2, 4]


# ------------------------------------------------------------ detection


def detector(dtype: torch.dtype = torch.float32) -> LocalModel:
    torch.manual_seed(0)
    model = retinanet(depth=18, num_classes=3, fpn_channels=32, extra_levels=False,
                      anchor_sizes=((8,), (16,), (32,)), min_size=64, max_size=64).to(dtype)
    return glcan_fx.transform(model, task="detection", k=["backbone.body.layer1", "backbone.body.layer3"],
                              example_inputs=torch.empty(2, 3, 64, 64, dtype=dtype))


def detection_batch(seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 64, 64, generator=generator) for _ in range(2)]
    corners = torch.rand(2, 2, 2, generator=generator) * 24
    boxes = torch.cat([corners, corners + 24], dim=2)
    return images, [{"boxes": boxes[i], "labels": torch.tensor([i, 2])} for i in range(2)]


def test_reference_detection_loop_of_torchvision():
    """references/detection/engine.py, train_one_epoch: a warm-up scheduler, and zero_grad behind forward."""
    def loop(local, step):
        optimizer = torch.optim.SGD(local.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0 / 1000, total_iters=2)
        local.train()
        for iteration in range(3):
            images, targets = detection_batch(iteration)
            with torch.amp.autocast("cpu", enabled=False):
                loss_dict = step(list(images), [dict(target) for target in targets])
                losses = sum(loss for loss in loss_dict.values())
            with torch.no_grad():  # utils.reduce_dict
                reduced = torch.stack([loss_dict[key] for key in sorted(loss_dict)]).sum()
            assert math.isfinite(reduced.item())
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            scheduler.step()

    local = assert_same_step(loop, detector)
    keys = {"loss_local_0", "loss_local_1", "classification", "bbox_regression"}
    assert set(local(*detection_batch(0))) == keys
    predictions = local.eval()(detection_batch(0)[0])
    assert [set(prediction) for prediction in predictions] == [{"boxes", "scores", "labels"}] * 2


def test_detectors_in_float64():
    local = detector(dtype=torch.float64)
    images, targets = detection_batch(0)
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    losses = local([image.double() for image in images], targets)
    sum(losses.values()).backward()
    assert {loss.dtype for loss in losses.values()} == {torch.float64}
    assert {gradient.dtype for gradient in gradients(local).values()} == {torch.float64}


# ------------------------------------------------------------ two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What two gloo processes saw (loops_ddp.py): one run serves all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    script = [sys.executable, "-W", "ignore", loops_ddp.__file__]
    processes = [subprocess.Popen([*script, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
                 for rank in range(2)]
    try:
        errors = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    first, second = (torch.load(folder / f"rank{rank}.pt") for rank in range(2))
    return first, second


def single_process(norm: Callable[[int], nn.Module], iterations: int, halves: bool = False) -> LocalModel:
    """The same training in one process, on the whole batch, or on the mean of its halves' gradients."""
    local = build(norm)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for iteration in range(iterations):
        optimizer.zero_grad()
        images, labels = batch(seed=iteration)
        if halves:
            for part in zip(images.chunk(2), labels.chunk(2), strict=True):
                (plain_step(local, *part).loss / 2).backward()
        else:
            plain_step(local, images, labels).loss.backward()
        optimizer.step()
    return local


@pytest.mark.parametrize(("name", "norm", "halves"),
                         [("groups", GROUPS, False), ("batch norm", nn.BatchNorm2d, True)],
                         ids=["groups", "batch"])
def test_distributed_data_parallel(ranks, name, norm, halves):
    """Without flags: gradients are those of the whole batch, or with batch norm the mean over ranks."""
    for iteration in range(3):
        assert_equal(ranks[0][f"{name}: gradients {iteration}"], ranks[1][f"{name}: gradients {iteration}"])
        expected = gradients(single_process(norm, iteration + 1, halves))
        assert_equal(ranks[0][f"{name}: gradients {iteration}"], expected, rtol=1e-3, atol=1e-5)
    assert_equal(ranks[0][f"{name}: weights"], ranks[1][f"{name}: weights"])


@pytest.mark.parametrize("name", loops_ddp.METHODS)
def test_distributed_data_parallel_with_every_kind_of_method(ranks, name):
    """Averages that follow the model's weights move on every rank alike."""
    assert_equal(ranks[0][f"{name}: weights"], ranks[1][f"{name}: weights"])
    if name in ("hpff", "sgr"):  # batch statistics, and a term of the whole batch: those of a rank's part
        return
    assert_equal(ranks[0][f"{name}: buffers"], ranks[1][f"{name}: buffers"])
    local = build(GROUPS, method=loops_ddp.METHODS[name])
    loops_ddp.train(local)
    assert_equal(ranks[0][f"{name}: weights"], weights(local), rtol=1e-3, atol=1e-5)
    assert_equal(ranks[0][f"{name}: buffers"], dict(local.named_buffers()), rtol=1e-3, atol=1e-5)


def test_averages_of_sharded_weights_are_refused(ranks):
    for rank in ranks:
        assert rank["man: sharded"].startswith("UnsupportedError: method='man' has averages")


def test_distributed_accumulation_with_no_sync(ranks):
    local = build(GROUPS)
    plain_step(local, *batch()).loss.backward()
    for rank in ranks:
        assert_equal(rank["no_sync: after"], gradients(local), rtol=1e-4, atol=1e-6)
    difference = [rank["no_sync: before"]["fc.weight"] for rank in ranks]
    assert not torch.equal(*difference)  # nothing was exchanged yet


def test_fully_shard_on_the_compiled_module(ranks):
    local = single_process(GROUPS, 2)
    for rank in ranks:
        assert_equal(rank["fsdp: gradients"], gradients(local), rtol=1e-3, atol=1e-5)
        assert_equal(rank["fsdp: weights"], weights(local), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(rank["fsdp: evaluation"], local.eval()(batch()[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["fsdp: sub-module", "fsdp: sub-module and root"])
def test_fully_shard_on_a_sub_module_is_refused(ranks, name):
    for rank in ranks:
        assert rank[name].startswith("UnsupportedError: parameter 'block2.conv1.weight' is sharded")
        assert "fully_shard(local)" in rank[name]


# ------------------------------------------------------------ wrappers


def compiled(backend: str | Callable[..., Any], **tolerance: float) -> None:
    torch._dynamo.reset()
    local, twin = build(k=2), build(k=2)
    step = torch.compile(local, backend=backend)
    for iteration in range(2):
        step(*batch(seed=iteration)).loss.backward()
        plain_step(twin, *batch(seed=iteration)).loss.backward()
    assert_equal(gradients(local), gradients(twin), **tolerance)
    torch._dynamo.reset()


def test_torch_compile():
    backend = CompileCounterWithBackend("aot_eager")
    with warnings.catch_warnings(record=True) as seen:
        compiled(backend)
    calls = [[str(node.target) for node in graph.graph.nodes] for graph in backend.graphs]
    found = sum(any("conv2d" in call for call in graph) for graph in calls)
    assert found == 3  # two local modules, an auxiliary network
    assert not [warning for warning in seen if "Dynamo does not know how to trace" in str(warning.message)]


@pytest.mark.slow  # compiles C++ kernels: half a minute to a minute without a warm cache
def test_torch_compile_with_inductor():
    compiled("inductor", rtol=1e-4, atol=1e-5)


def test_averaged_model():
    local, twin = build(), build()
    averaged = AveragedModel(local)
    history = []
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for iteration in range(3):
        optimizer.zero_grad()
        local(*batch(seed=iteration)).loss.backward()
        optimizer.step()
        averaged.update_parameters(local)
        history.append(weights(local))
    mean = {name: torch.stack([entry[name] for entry in history]).mean(0) for name in history[0]}
    assert_equal(weights(averaged.module), mean, rtol=1e-5, atol=1e-6)

    twin.load_state_dict(averaged.module.state_dict())
    images, _ = batch()
    assert torch.equal(averaged.eval()(images), twin.original.eval()(images))
    assert torch.equal(copy.deepcopy(averaged)(images), twin.original(images))


def test_update_bn_of_the_averaged_model():
    """The last step of stochastic weight averaging: images alone, training mode, no gradients."""
    averaged, twin = AveragedModel(build()), build()
    loader = [batch(seed=seed) for seed in range(3)]
    update_bn(loader, averaged)
    update_bn(loader, twin.original)
    assert_equal(dict(averaged.module.original_state_dict()), dict(twin.original_state_dict()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda local: load(save(local))],
                         ids=["deepcopy", "save"])
def test_copies_train_alike_and_share_nothing(duplicate):
    local = build(criterion=Temperature())
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.add_(0.01)
    torch.manual_seed(99)
    other = duplicate(local)
    assert_equal(dict(other.state_dict()), dict(local.state_dict()))
    before, owned = weights(local), {tensor.data_ptr() for tensor in local.state_dict().values()}
    local(*batch()).loss.mul(2).backward()
    other(*batch()).loss.mul(2).backward()
    assert_equal(gradients(other), gradients(local))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert_equal(weights(local), before)
    assert not owned & {tensor.data_ptr() for tensor in other.state_dict().values()}


def save(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def load(file: io.BytesIO) -> Any:
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_around_it(use_reentrant):
    local, twin = build(), build()
    images, labels = batch()
    checkpointed = checkpoint(lambda x, y: local(x, y).loss, images.requires_grad_(), labels,
                              use_reentrant=use_reentrant)
    (checkpointed / 2).backward()
    (plain_step(twin, *batch()).loss / 2).backward()
    assert_equal(gradients(local), gradients(twin))


def test_save_on_cpu_around_it():
    def loop(local, step):
        with torch.autograd.graph.save_on_cpu():
            loss = step(*batch()).loss
        loss.backward()

    assert_same_step(loop)


# ------------------------------------------------------------ backward passes


def test_retain_graph_accumulates():
    def loop(local, step):
        loss = step(*batch()).loss
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        (loss / 2).backward()

    local = assert_same_step(loop)
    once = build()
    once(*batch()).loss.backward()
    expected = {name: 2.5 * value for name, value in gradients(once).items()}
    assert_equal(gradients(local), expected, rtol=1e-5, atol=1e-6)


def test_second_backward_without_retain_graph():
    result = build()(*batch())
    result.loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        result.loss.backward()


def test_second_backward_of_one_local_loss():
    loss = build()(*batch()).losses[0]
    loss.backward()
    with pytest.raises(RuntimeError, match="second time through a local loss.*retain_graph=True"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_create_graph_is_refused():
    loss = build()(*batch()).loss
    with pytest.raises(UnsupportedError, match="create_graph=True.*second-order.*original model"):
        loss.backward(create_graph=True)
    local = build()
    with pytest.raises(UnsupportedError, match="create_graph=True.*second-order.*original model"):
        torch.autograd.grad(local(*batch()).loss, list(local.parameters()), create_graph=True)


def test_autograd_grad_instead_of_backward():
    local, twin = build(), build()
    actual = torch.autograd.grad(local(*batch()).loss, list(local.parameters()))
    plain_step(twin, *batch()).loss.backward()
    assert_equal(dict(zip(weights(local), actual, strict=True)), gradients(twin))
    assert not gradients(local)


def test_detect_anomaly():
    def loop(local, step):
        with torch.autograd.set_detect_anomaly(True):
            step(*batch()).loss.backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_step(loop)


def test_post_accumulate_hooks_fire_once_per_parameter_in_backward():
    local, fired = build(), Counter()
    for name, parameter in local.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.update([name]))
    loss = local(*batch()).loss
    assert not fired
    loss.backward()
    assert fired == dict.fromkeys(weights(local), 1)


def test_optimizer_in_backward():
    """The recipe that frees gradients at once: a step per parameter, inside its post-accumulate hook."""
    def loop(local, step):
        for parameter in local.parameters():
            optimizer = torch.optim.SGD([parameter], lr=0.1)

            def hook(_, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(hook)
        for iteration in range(2):
            step(*batch(seed=iteration)).loss.backward()

    local, twin = build(), build()
    loop(local, local)
    loop(twin, lambda *inputs: plain_step(twin, *inputs))
    assert_equal(weights(local), weights(twin))
    assert not gradients(local)


def test_gradient_hooks_of_parameters_apply_once():
    """``p.register_hook``: masks, layer-wise scales; they see what reaches .grad and nothing else."""
    fired: Counter[str] = Counter()

    def loop(local, step):
        fired.clear()
        for name, parameter in local.named_parameters():
            parameter.register_hook(lambda gradient, name=name: fired.update([name]) or gradient * 0.5)
        loss = step(*batch()).loss
        assert not fired
        loss.backward()
        assert fired == dict.fromkeys(weights(local), 1)

    local, whole = assert_same_step(loop), build()
    whole(*batch()).loss.backward()
    assert_equal(gradients(local), {name: 0.5 * value for name, value in gradients(whole).items()})


def test_no_grad_around_a_training_mode_forward_leaves_nothing():
    local, alive = build(), []
    local.block1.conv1.register_forward_hook(lambda *args: alive.append(weakref.ref(args[-1])))
    with torch.no_grad():
        result = local(*batch())
    assert not result.loss.requires_grad and not any(loss.requires_grad for loss in result.losses)
    assert not gradients(local)
    assert local.stem[1].num_batches_tracked == 1  # as for any model in training mode
    del result
    gc.collect()
    assert [reference() for reference in alive] == [None]


def test_gradients_are_dropped_with_an_abandoned_loss():
    local, alive = build(), []
    local.aux.get_submodule("0.backward").register_forward_hook(
        lambda *args: alive.append(weakref.ref(args[-1].grad_fn)))
    local(*batch())
    assert alive[0]() is None
    assert not gradients(local)


def test_local_losses_that_never_reach_backward_are_reported():
    """A loop that leaves out some of the losses trains only a part of the model: say so at the next step."""
    local = build()
    result = local(*batch())
    (result.losses[0] + result.losses[-1]).backward()
    del result
    with pytest.warns(UnusedGradientsWarning, match="only 2 of 4 local losses.*Minimise the sum"):
        local(*batch())


@pytest.mark.parametrize("loop", ["one by one", "two forwards", "no_grad", "evaluation between"])
def test_complete_loops_are_not_reported(loop):
    local = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedGradientsWarning)
        for seed in range(2):
            if loop == "no_grad":
                with torch.no_grad():
                    local(*batch())
            loss = local(*batch(seed=seed)).loss
            if loop == "two forwards":
                loss = loss + local(*batch(seed=5)).loss
            loss.backward()
            if loop == "evaluation between":
                local.eval()(batch()[0])
                local.train()


def test_an_input_that_wants_backpropagations_gradient_is_reported():
    """Once: what made it would be trained by the first local loss alone."""
    images, labels = batch(8)
    local = build()
    with pytest.warns(InputGradientWarning, match="'x' requires a gradient, and with 4 local modules"):
        local(images.requires_grad_(), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputGradientWarning)
        local(images, labels)
        build(k=1)(images, labels).loss.backward()
    assert images.grad is not None


def test_batches_much_larger_than_the_example_are_reported():
    """Once: k and auxiliary networks were chosen for the example."""
    said = r"\(10x3x8x8\) is 5 times as large as the example that it was planned for \(2x3x8x8\)"
    with warnings.catch_warnings():
        warnings.simplefilter("error", SmallExampleWarning)
        build()(*batch(8))  # four times
        local = build()
        local.eval()(batch(10)[0])
        local.train()
        with pytest.warns(SmallExampleWarning, match=said):
            local(*batch(10))
        local(*batch(10))
    model = retinanet(18, num_classes=3, fpn_channels=32, min_size=64, max_size=64)
    detector = glcan_fx.transform(model, k=2, task="detection", example_inputs=torch.empty(1, 3, 64, 64)).train()
    targets = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    with pytest.warns(SmallExampleWarning, match=r"\(5 images\) is 5 times"):
        detector([torch.rand(3, 64, 64)] * 5, [targets] * 5)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_older_than_the_auxiliary_networks_is_reported(fused):
    """Once, at the user's line: the model is trained by losses of networks that stay as they were initialised."""
    local = build()
    optimizer = torch.optim.SGD(local.original.parameters(), lr=0.01, fused=fused)
    for iteration in range(9):
        local(*batch(seed=iteration)).loss.backward()
        optimizer.step()
    with pytest.warns(UnusedGradientsWarning, match="10 optimizer steps changed .* Net, .*after transform()") as seen:
        optimizer.step()
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedGradientsWarning)
        for _ in range(20):
            optimizer.step()


OPTIMIZERS = {
    "groups": lambda own, others: [torch.optim.Adam([{"params": own}, {"params": others, "lr": 0.1}])],
    "two optimizers": lambda own, others: [torch.optim.SGD(own, lr=0.1), torch.optim.AdamW(others, fused=True)],
    "seldom": lambda own, others: [torch.optim.SGD(own, lr=0.1), torch.optim.SGD(others, lr=0.1)],
    "of another model": lambda own, others: [torch.optim.SGD(Net().parameters(), lr=0.1)],
    "frozen": lambda own, others: [torch.optim.SGD(own, lr=0.1)],
    "k=1": lambda own, others: [torch.optim.SGD(own, lr=0.1)],
    "checkpoints": lambda own, others: [],
}


@pytest.mark.parametrize("loop", OPTIMIZERS)
def test_loops_that_step_everything_are_not_reported(loop):
    local = build(**({"k": 1} if loop == "k=1" else {}))
    own = list(local.original.parameters())
    others = [p for p in local.parameters() if id(p) not in set(map(id, own))]
    optimizers = OPTIMIZERS[loop](own, others)
    if loop == "frozen":
        local.aux.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnusedGradientsWarning)
        for iteration in range(16):
            local(*batch(seed=iteration)).loss.backward()
            for optimizer in optimizers[:1 if loop == "seldom" and iteration % 4 else 2]:
                optimizer.step()
            if loop == "checkpoints":
                local.original.load_state_dict(local.original_state_dict())


def test_what_watches_optimizers_goes_with_the_model():
    """And does not keep it alive, decided or not."""
    local = build()
    alive = weakref.ref(local)
    torch.optim.SGD(local.original.parameters(), lr=0.1).step()
    assert local in watched
    del local
    gc.collect()
    assert alive() is None
    local = build()
    torch.optim.SGD(local.parameters(), lr=0.1).step()
    assert local not in watched


# ------------------------------------------------------------ parameters, modes


class Temperature(nn.Module):
    """A criterion with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"entropy": F.cross_entropy(outputs * self.log_scale.exp(), targets),
                "penalty": 0.1 * (self.log_scale - 1) ** 2}


def test_a_criterion_with_parameters_is_trained():
    def loop(local, step):
        optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            step(*batch()).loss.backward()
            optimizer.step()

    local = assert_same_step(loop, lambda: build(criterion=Temperature()), rtol=1e-5, atol=1e-6)
    criterion = local.task.criterion
    assert sum(parameter is criterion.log_scale for parameter in local.parameters()) == 1
    assert criterion.log_scale.grad != 0 and criterion.log_scale != 0


@pytest.mark.parametrize("k", ["natural", 1])
def test_parameter_groups(k):
    local = build(k=k, criterion=Temperature())
    own, other = local.parameter_groups(lr=0.1, aux_lr=0.01)
    assert (own["lr"], other["lr"]) == (0.1, 0.01)
    assert {id(p) for p in own["params"]} == {id(p) for p in local.original.parameters()}
    grouped = [id(p) for p in own["params"] + other["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in local.parameters()}
    assert [group["lr"] for group in local.parameter_groups(lr=0.3)] == [0.3, 0.3]

    before = weights(local)
    optimizer = torch.optim.SGD(local.parameter_groups(lr=0.1, aux_lr=0.01))
    local(*batch()).loss.backward()
    optimizer.step()
    for name, parameter in local.named_parameters():
        rate = 0.01 if name.startswith("aux.") else 0.1
        torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad)


@pytest.mark.parametrize("k", ["natural", 2, 1])
def test_parameters_by_module(k):
    local = build(k=k)
    by_module = local.parameters_by_module()
    assert list(by_module) == [module.name for module in local.plan.modules]
    assert sorted(map(id, sum(by_module.values(), []))) == sorted(map(id, local.original.parameters()))
    for module in local.plan.modules:
        assert sum(p.numel() for p in by_module[module.name]) == module.parameters


def test_the_optimizer_moves_the_users_model():
    torch.manual_seed(0)
    model = Net()
    local = glcan_fx.transform(model, k="natural", task="classification", example_inputs=EXAMPLE)
    before = weights(model)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    local(*batch()).loss.backward()
    optimizer.step()
    assert local.original is model
    assert all(parameter is local.get_parameter(name) for name, parameter in model.named_parameters())
    assert not any(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    model.zero_grad()
    assert not gradients(model)


def test_train_and_eval_switch_the_original():
    local = build()
    for mode in (False, True, False):
        local.train(mode)
        assert {part.training for part in [*local.modules(), *local.original.modules()]} == {mode}
    assert local.eval() is local and local.train() is local


class FrozenNorm(Net):
    """The usual way to freeze batch norm: a train() of one's own."""

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        return self


class FrozenBlock(loops_ddp.Block):
    def train(self, mode: bool = True) -> "FrozenBlock":
        super().train(mode)
        self.norm1.eval()
        return self


def test_a_models_own_train_method_is_respected():
    torch.manual_seed(0)
    local = glcan_fx.transform(FrozenNorm(), k="natural", task="classification", example_inputs=EXAMPLE)
    local.eval()
    local.train()
    local(*batch()).loss.backward()
    assert local.training and local.original.block1.training
    moved = {name: value for name, value in local.original_state_dict().items() if "num_batches" in name}
    assert moved and not any(moved.values())


def test_a_sub_modules_own_train_method_is_respected():
    torch.manual_seed(0)
    model = Net()
    model.block2 = FrozenBlock(8, 16, 2, nn.BatchNorm2d)
    local = glcan_fx.transform(model, k="natural", task="classification", example_inputs=EXAMPLE)
    local.eval()
    local.train()
    local(*batch()).loss.backward()
    assert model.block2.norm1.num_batches_tracked == 0
    assert model.block2.norm2.num_batches_tracked == 1


# ------------------------------------------------------------ checkpoints


def dropout_net() -> Net:
    model = Net()
    model.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 5))
    return model


def trainer(seed: int) -> tuple[LocalModel, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    local = glcan_fx.transform(dropout_net(), k="natural", task="classification", example_inputs=EXAMPLE)
    return local, torch.optim.Adam(local.parameter_groups(lr=1e-2, aux_lr=1e-3))


def run(local: LocalModel, optimizer: torch.optim.Optimizer, iterations: range) -> None:
    for iteration in iterations:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=iteration % 2 == 0):
            loss = local(*batch(seed=iteration)).loss
        loss.backward()
        optimizer.step()


def test_a_checkpoint_resumes_bit_for_bit():
    """Weights, batch statistics, auxiliary networks, optimizer, dropout's random numbers, the local scale."""
    local, optimizer = trainer(seed=0)
    local.aux.scale.interval = 2
    run(local, optimizer, range(5))
    file = save({"model": local.state_dict(), "optimizer": optimizer.state_dict(),
                 "random": torch.get_rng_state()})
    run(local, optimizer, range(5, 8))

    resumed, optimizer = trainer(seed=123)
    resumed.aux.scale.interval = 2
    state = torch.load(file)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    run(resumed, optimizer, range(5, 8))
    assert_equal(dict(resumed.state_dict()), dict(local.state_dict()))
    assert resumed.aux.scale.scale == local.aux.scale.scale > 2.0**12


def test_a_checkpoint_of_the_original_model_loads(tmp_path: Path):
    torch.manual_seed(3)
    torch.save(Net().state_dict(), tmp_path / "original.pt")
    local = build()
    aux = {name: value.clone() for name, value in local.aux.state_dict().items()}
    local.load_state_dict(torch.load(tmp_path / "original.pt"))
    assert_equal(dict(local.original_state_dict()), torch.load(tmp_path / "original.pt"))
    assert_equal(dict(local.aux.state_dict()), aux)
