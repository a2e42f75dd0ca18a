"""Data parallel, sharded, both with pipelines, checkpoints, and ranks that end."""

from typing import Any

import pytest
import ranks
import torch
from test_pipeline import assert_same


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Any:
    """What several processes saw, of each part of ranks.py; every one runs once."""
    known: dict[str, Any] = {}

    def of(what: str, count: int = 2) -> list[dict[str, Any]]:
        if what not in known:
            known[what] = ranks.run(what, count, tmp_path_factory.mktemp(what))
        return known[what]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("name", ranks.NETWORKS)
def test_the_losses_of_50_steps_are_those_of_one_process(seen, name):
    expected = ranks.in_one_process(name, steps=50)["losses"]
    first, second = (rank[name] for rank in seen("curves"))
    for step in range(50):
        assert_same(first[step] | second[step], expected[step], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["plain", "overlap"])
@pytest.mark.parametrize("name", ranks.NETWORKS)
def test_data_parallel(seen, name, way):
    expected = ranks.in_one_process(name)
    for rank in seen("data_parallel"):
        for step in range(2):
            assert_same(rank[f"{name}, {way}: gradients {step}"], expected[f"gradients {step}"])


@pytest.mark.parametrize("name", ranks.NETWORKS)
def test_overlap_sends_in_the_forward_pass(seen, name):
    """What the local modules but the last train."""
    own = list(ranks.build(name).parameters_by_module().values())
    for rank in seen("data_parallel"):
        assert rank[f"{name}, plain: sent"] == 0
        assert rank[f"{name}, overlap: sent"] > sum(p.numel() for part in own[:-1] for p in part)


@pytest.mark.parametrize("way", ["plain", "overlap"])
def test_accumulation_without_synchronisation(seen, way):
    local = ranks.build("resnet")
    first, second = seen("accumulated")
    for step in range(2):
        images, labels = ranks.batch_of("resnet", step)
        for index in range(4):
            (local(images[index:index + 1], labels[index:index + 1]).loss / 4).backward()
        assert not torch.equal(first[f"{way}: before {step}"]["conv1.weight"],
                               second[f"{way}: before {step}"]["conv1.weight"])
        for rank in (first, second):
            assert_same(rank[f"{way}: after {step}"], ranks.gradients(local), rtol=1e-5, atol=1e-6)


def test_uneven_inputs(seen):
    for rank in seen("uneven"):
        assert_same(rank["overlap: weights"], rank["plain: weights"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", ["stages", "whole"])
@pytest.mark.parametrize("name", ranks.NETWORKS)
def test_sharded(seen, name, way):
    expected = ranks.in_one_process(name)
    for rank in seen("sharded"):
        for step in range(2):
            assert_same(rank[f"{name}, {way}: gradients {step}"], expected[f"gradients {step}"])


def test_sharded_in_mixed_precision(seen):
    local = ranks.regression()
    local(*ranks.regression_batch()).loss.backward()
    for rank in seen("sharded"):
        assert rank["mixed: targets"] == [torch.float32] * 3  # features are rounded, targets are not
        for name, grad in ranks.gradients(local).items():
            error = (rank["mixed: gradients"][name] - grad).norm() / grad.norm()
            assert 0 < error < 0.05, name
        total = torch.stack([grad.norm() for grad in rank["mixed: gradients"].values()]).norm()
        torch.testing.assert_close(rank["mixed: norm"], total)
        clipped = torch.stack([grad.norm() for grad in rank["mixed: clipped"].values()]).norm()
        torch.testing.assert_close(clipped, torch.tensor(1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ranks.SINGLE)
def test_pipelines_side_by_side(seen, name):
    expected = ranks.in_one_process(name, parts=4)
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
