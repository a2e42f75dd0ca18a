"""Local modules on several ranks train as they do in one process."""

from typing import Any

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


@pytest.fixture(scope="module", params=[2, 3])
def pipelines(request, tmp_path_factory) -> list[dict[str, Any]]:
    return ranks.run("pipelines", request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ranks.NETWORKS)
def test_gradients_and_weights_are_those_of_one_process(pipelines, name):
    expected = ranks.in_one_process(name)
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
