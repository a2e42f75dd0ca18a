"""Several ranks train as one process does: pipelines, data parallel, sharded; checkpoints, and ranks that end."""

from collections.abc import Callable
from functools import cache
from typing import Any

import divided_networks as networks
import pytest
import ranks
import torch


def assert_same(a: dict[str, Any], b: dict[str, Any], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


SMALL = ("resnet", "retinanet")  # in the default run; all with -m slow
CASES = [pytest.param(name, marks=[] if name in SMALL else pytest.mark.slow) for name in networks.NETWORKS]
ALONE = [case for case in CASES if case.values[0] in networks.SINGLE]


TOGETHER = ("pipelines", "memory", "data_parallel", "accumulated", "uneven", "mixed", "checkpoints",
            "different", "random_numbers", "sharded_pipeline")  # in the same processes


@pytest.fixture(scope="module")
def seen(request, tmp_path_factory) -> Callable[..., list[dict[str, Any]]]:
    """What several processes saw, of each part of ranks.py; every one runs once, for the networks of the tests that
    are to run."""
    known: dict[Any, Any] = {}
    chosen = [name for name in networks.NETWORKS if name in SMALL or any(
        getattr(item, "callspec", None) is not None and item.callspec.params.get("name") == name
        for item in request.session.items)]

    def of(what: str, count: int = 2) -> list[dict[str, Any]]:
        parts = TOGETHER if what in TOGETHER and count == 2 else (what,)
        if (parts, count) not in known:
            known[parts, count] = ranks.run(",".join(parts), count, tmp_path_factory.mktemp(what), chosen)
        return [rank[what] for rank in known[parts, count]]

    return of


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_weights_are_those_of_one_process(seen, name, count):
    pipelines = seen("pipelines", count)
    expected = networks.in_one_process(name)
    for step in range(2):
        found: dict[str, Any] = {}
        for seen in pipelines:
            assert not found.keys() & seen[f"{name}: gradients {step}"].keys()
            found |= seen[f"{name}: gradients {step}"]
        assert_same(found, expected[f"gradients {step}"])
    for seen in pipelines:  # gathered on every rank
        assert_same(seen[f"{name}: weights"], expected["weights"])
    keys = sorted(key for seen in pipelines for key in seen[f"{name}: own"])
    assert keys == sorted(expected["weights"])


@pytest.mark.parametrize("name", ranks.COUNTED)
def test_the_memory_of_each_rank_is_what_the_plan_foretells(seen, name):
    planned = networks.build(name, devices=2).plan.on_ranks(4)
    for rank, counted in zip(planned, seen("memory"), strict=True):
        assert counted[name] == pytest.approx(rank.peak, rel=0.03)


@cache
def curve(name: str) -> torch.Tensor:
    """The losses of 50 steps in one process."""
    return torch.stack([sum(losses.values()) for losses in networks.in_one_process(name, steps=50)["losses"]])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pipeline", *ranks.WAYS])
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_losses_of_50_steps_are_those_of_one_process(seen, name, way):
    first, second = (rank[f"{name}, {way}"] for rank in seen("curves"))
    found = first + second if way == "pipeline" else (first + second) / 2
    torch.testing.assert_close(found, curve(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ranks.WAYS)
@pytest.mark.parametrize("name", CASES)
def test_data_parallel(seen, name, way):
    expected = networks.in_one_process(name)
    for rank in seen("data_parallel"):
        for step in range(2):
            assert_same(rank[f"{name}, {way}: gradients {step}"], expected[f"gradients {step}"])


@pytest.mark.parametrize("way", ranks.WAYS)
def test_a_checkpoint_is_one_of_the_plain_model(seen, way):
    expected = networks.in_one_process("resnet")["weights"]
    for rank in seen("data_parallel"):
        found = rank[f"{way}: plain"]
        assert_same(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("name", CASES)
def test_overlap_sends_in_the_forward_pass(seen, name):
    """What the local modules but the last train."""
    own = list(networks.build(name).parameters_by_module().values())
    for rank in seen("data_parallel"):
        assert rank[f"{name}, plain: sent"] == 0
        assert rank[f"{name}, overlap: sent"] > sum(p.numel() for part in own[:-1] for p in part)


@pytest.mark.parametrize("way", ["plain", "overlap"])
def test_accumulation_without_synchronisation(seen, way):
    local = networks.build("resnet")
    first, second = seen("accumulated")
    for step in range(2):
        images, labels = networks.batch_of("resnet", step)
        for index in range(4):
            (local(images[index:index + 1], labels[index:index + 1]).loss / 4).backward()
        assert not torch.equal(first[f"{way}: before {step}"]["conv1.weight"],
                               second[f"{way}: before {step}"]["conv1.weight"])
        for rank in (first, second):
            assert_same(rank[f"{way}: after {step}"], networks.gradients(local), rtol=1e-5, atol=1e-6)


def test_uneven_inputs(seen):
    for rank in seen("uneven"):
        assert_same(rank["overlap: weights"], rank["plain: weights"], rtol=1e-6, atol=1e-7)


def test_sharded_in_mixed_precision(seen):
    local = networks.regression()
    local(*networks.regression_batch()).loss.backward()
    for rank in seen("mixed"):
        assert rank["targets"] == [torch.float32] * 3  # features are rounded, targets are not
        for name, grad in networks.gradients(local).items():
            error = (rank["gradients"][name] - grad).norm() / grad.norm()
            assert 0 < error < 0.05, name
        total = torch.stack([grad.norm() for grad in rank["gradients"].values()]).norm()
        torch.testing.assert_close(rank["norm"], total)
        clipped = torch.stack([grad.norm() for grad in rank["clipped"].values()]).norm()
        torch.testing.assert_close(clipped, torch.tensor(1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ALONE)
def test_pipelines_side_by_side(seen, name):
    expected = networks.in_one_process(name, parts=4)
    for step in range(2):
        data = seen("both", 4)
        for pair in (data[:2], data[2:]):
            found = pair[0][f"{name}: gradients {step}"] | pair[1][f"{name}: gradients {step}"]
            assert_same(found, expected[f"gradients {step}"], rtol=1e-5, atol=1e-6)


def test_a_pipeline_goes_on_from_a_checkpoint(seen):
    for rank in seen("checkpoints"):
        assert_same(rank["resumed"], rank["straight"])


def test_a_rank_that_ends_is_named(seen):
    first = seen("deaths")[0]
    assert first["error"].startswith("rank 1 has ended")
    assert first["seconds"] < 60


def test_ranks_that_train_different_layers(seen):
    first, second = seen("different")
    assert_same(first["dropped, overlap"], second["dropped, overlap"])
    assert_same(first["dropped, overlap"], first["dropped, plain"], rtol=1e-6, atol=1e-7)
    assert first["average"] and second["average"]


def test_a_parameter_of_the_network_itself_is_sharded(seen):
    local = networks.token()
    for part in zip(*(tensor.chunk(2) for tensor in networks.batch_of("resnet", 0)), strict=True):
        (local(*part).loss / 2).backward()
    for rank in seen("different"):
        assert_same(rank["token"], networks.gradients(local), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("what", "said"), [
    ("weighted", "UnsupportedError: the loss is multiplied by 1 on one rank and by 2 on another"),
    ("late token", "UnsupportedError: parameter 'place' was sharded by fully_shard() on a local module, but belongs"),
    ("tied", "both train the parameter 'blocks.2.1.weight'. Shard the whole compiled model"),
    ("shared", "both train the parameter 'blocks.2.1.bias'. Shard the whole compiled model"),
    ("synchronised", "ValueError: SyncBatchNorm layers only work with GPU modules"),
    ("synchronised pipeline", "of class SyncBatchNorm synchronises with ranks that run other local modules"),
    ("replaced", "ModelChangedError: parameter '"),
    ("micro-batches", "UnsupportedError: the ranks were given different micro_batches"),
    ("no micro-batches", "UnsupportedError: micro_batches=0: a number"),
    ("float16", "UnsupportedError: float16 needs a GradScaler"),
    ("evaluation", "UnsupportedError: the compiled model is in evaluation mode"),
])
def test_what_cannot_work_is_refused_on_every_rank(seen, what, said):
    for rank in seen("different"):
        assert said in rank[what]


def test_every_rank_draws_its_own_random_numbers(seen):
    """As it would alone, with its own seed."""
    first, second = seen("random_numbers")
    for rank in (first, second):
        assert torch.equal(rank["parallel"], rank["parallel, alone"])
        assert rank["pipeline"] == rank["pipeline, alone"]
    assert not torch.equal(first["parallel"], second["parallel"])


def test_local_modules_of_a_pipeline_are_sharded(seen):
    found = seen("sharded_pipeline")
    expected = networks.in_one_process("resnet")["gradients 0"]
    assert_same(found[0]["gradients"] | found[1]["gradients"], expected)
    for rank in found:
        assert rank["gather"].startswith("gather() cannot bring together local modules that fully_shard() divides")


def test_a_pipeline_after_an_exception(seen):
    first, last = seen("different")
    assert first["packed targets"].startswith("TargetError: targets have a tensor whose first dimension is not")
    assert len(first["right"]) + len(last["right"]) == 3  # nothing was sent before
    assert "ZeroDivisionError" in last["fails"]
    assert last["behind a failure"].startswith("RankError: an exception ended a step of rank 1 half-way")
