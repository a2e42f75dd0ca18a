"""Shared by all tests: one thread, so that parallel workers do not fight, and fixed seeds."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    torch.set_num_threads(1)
    torch.manual_seed(0)
