"""Fake tensors that answer from memory: the same as torch's own, to the last stride."""
import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import glcan_fx
from glcan_fx.fakes import Fakes
from glcan_fx.peak_memory import PeakMemory

MASK, INDEX, ROW = torch.tensor([True, False, True, False]), torch.zeros(2, 4, 1, dtype=torch.int64), torch.ones(4)
OPERATORS = {
    "a view of a view": lambda x: x.transpose(1, 2)[:, 1:].unflatten(1, (3, 1)),
    "pieces": lambda x: x.split(2, 1)[1] * 2,
    "a list of views": lambda x: torch.stack(x.unbind(0)),
    "numbers and types": lambda x: (x * 2, x.int() * 2, x.int() * 2.0, x > 1),
    "written in place": lambda x: x.clone().mul_(2).clamp_(0),
    "written in a view": lambda x: (y := x.clone(), y[0].zero_(), y)[2],
    "transposed in place": lambda x: x.clone().t_() if x.dim() == 2 else x.clone().transpose_(0, 1),
    "a convolution": lambda x: F.conv1d(x, x.new_ones(4, x.shape[1], 3), padding=1).relu(),
    "channels last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2) + 1,
    "expanded": lambda x: x[:1].expand(3, -1, -1) * 2,
    "several results": lambda x: x.max(1),
    "nothing left": lambda x: x[:, :0].sum(1),
    "complex": lambda x: torch.fft.rfft(x).conj().imag,
    "random": lambda x: F.dropout(x, 0.5),
    "a view that no schema tells": lambda x: torch.ops.aten._unsafe_view(x, (4, 8)),
    "copied": lambda x: torch.empty_like(x).copy_(x[:1]),
    "real ones among them": lambda x: (torch.where(MASK, x, -x), x.masked_fill(MASK, 0), x.gather(-1, INDEX), ROW * x,
                                       x.clone().scatter_(-1, INDEX, x), x.double() * ROW, x.int() * ROW),
    "a real number among them": lambda x: x.half() * torch.tensor(2.0),
    "a real one in front": lambda x: ROW.double().mul(x),
}


def layout(value):
    """All that there is to a fake result, and which of its tensors share memory."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    assert all(isinstance(leaf, FakeTensor) for leaf in leaves)
    storages = [leaf.untyped_storage()._cdata for leaf in leaves]
    return [(leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device, leaf.requires_grad,
             leaf.untyped_storage().nbytes(), storages.index(leaf.untyped_storage()._cdata)) for leaf in leaves]


@pytest.mark.parametrize("what", OPERATORS)
def test_the_second_answer_is_the_first_and_torchs(what):
    found = []
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), Fakes()):
        for grad in (False, True, True):
            with mode:
                x = torch.ones(2, 4, 4, requires_grad=grad)
                made = OPERATORS[what](x)
                gradient = [torch.autograd.grad(part.sum(), x, allow_unused=True) for part in [made]
                            if isinstance(part, torch.Tensor) and part.requires_grad and part.is_floating_point()]
            found.append((grad, layout([x, made]), layout(gradient)))
    plain, own = found[:3], found[3:]
    assert plain == own


def test_a_view_shares_memory_and_other_results_do_not():
    mode = Fakes()
    for _ in range(3):
        with mode:
            x = torch.ones(4, 4)
            view, new = x[1:], x + 1
        same = x.untyped_storage()._cdata
        assert view.untyped_storage()._cdata == same and new.untyped_storage()._cdata != same
        version = x._version
        with mode:
            assert view.add_(1) is view
        assert x._version == version + 1


def test_constants_keep_their_values():
    with Fakes():
        for number in (2, 3):
            assert int(torch.tensor(number) + 1) == number + 1


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(3, 9)), min_size=1, max_size=4),
       momentum=st.sampled_from([0.0, 0.9]))
def test_a_step_takes_the_memory_that_it_takes_with_torchs_own(sizes, momentum):
    def peak(mode):
        live = []
        for batch, channels, side in [*sizes, *sizes]:
            with mode:
                net = torch.nn.Sequential(torch.nn.Conv2d(channels, 8, 3, padding=1), torch.nn.BatchNorm2d(8),
                                          torch.nn.ReLU(True), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
                x = torch.ones(batch + 1, channels, side, side)
            sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum)
            with PeakMemory(net, x) as memory:
                net(x).sum().backward()
                sgd.step()
            live.append((memory.log.live(), memory.flops))
        return live

    assert peak(FakeTensorMode()) == peak(Fakes())


def test_nothing_recorded_outlives_the_compiled_model():
    """Tensors kept for backward are kept by graphs that keep them: such a circle is never collected."""
    def fakes() -> int:
        gc.collect()
        return sum(type(value) is FakeTensor for value in gc.get_objects())

    before = fakes()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Sigmoid(), nn.Flatten(),
                          nn.LazyLinear(3))
    model(torch.rand(2, 3, 8, 8))
    local = glcan_fx.transform(model, k=2, task="classification", example_inputs=(torch.rand(2, 3, 8, 8),))
    local(torch.rand(2, 3, 8, 8), torch.tensor([0, 1])).loss.backward()
    del local, model
    assert fakes() == before
