"""Progress: on terminals, after two seconds, and nothing else."""
import gc
import io

import pytest
import torch
from torch import nn

import glcan_fx
from glcan_fx import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "seconds", "shown"), [
    (Terminal, 0.0, True), (Terminal, 60.0, False), (io.StringIO, 0.0, False)], ids=["late", "soon", "in a log"])
def test_what_takes_long_is_shown_on_terminals(monkeypatch, stream, seconds, shown):
    monkeypatch.setattr(progress, "_SECONDS", seconds)
    monkeypatch.setattr("sys.stderr", stderr := stream())
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    glcan_fx.transform(net, task="classification", example_inputs=torch.ones(2, 3, 8, 8), k="natural")
    text = stderr.getvalue()
    assert ("compiling Sequential" in text) == shown and "planning" not in text  # which is a part of it
    assert bool(text) == shown
    assert text.endswith("\r") and not text.split("\r")[-2].strip() or not shown  # the line is empty again


def test_progress_ends_with_an_error(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    monkeypatch.setattr("sys.stderr", stderr := Terminal())

    @progress.progress("one")
    def fails():
        progress.advance()
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    with progress.progress("another"):
        progress.advance()
    assert "one" in stderr.getvalue() and "another" in stderr.getvalue()


def test_planning_leaves_garbage_collection_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def fails():
        with pytest.raises(glcan_fx.GlcanFxError):
            glcan_fx.plan(net, task="classification", example_inputs=torch.ones(2, 5, 8, 8), k=1)

    fails()
    assert gc.isenabled()
    gc.disable()
    fails()
    assert not gc.isenabled()
    gc.enable()
