"""Operators that run once for the same values: the same results, whatever is written to in between."""
import pytest
import torch

from glcan_fx.peak_memory import PeakMemory
from glcan_fx.repeats import Repeats

aten = torch.ops.aten


def grid():
    return torch.arange(40.0)[:, None] * torch.arange(50.0) - 7


def written_in_a_view(x):
    y = x + 1
    before = y * 2
    y[3:5].mul_(2)
    return before, y * 2, x * 2


def written_through_data(x):
    y = x.clamp(min=0)
    before = y * 2
    y.data.add_(3)
    return before, y * 2


def written_to_results(x):
    found, where = x.max(1, keepdim=True)
    found.zero_()
    return found, where, *x.max(1, keepdim=True)


def indexed(x):
    keep = torch.where(x > 3)
    x = x.clone()
    x[keep] = x[keep] - 1
    return x.sum(0), keep


FUNCTIONS = {"views": lambda x: (x[:, 1:] * x[:, :-1], x.t() + 1, x.reshape(-1)[5:] / 2), "a view": written_in_a_view,
             "data": written_through_data, "results": written_to_results, "indices": indexed,
             "numbers": lambda x: ((x > 0) * 2, (x > 0) * 2.0, x.int() // 2, x.int() / 2),
             "half": lambda x: (x.bfloat16() + 1, x.double() + 1)}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_repeated_operators_give_what_they_gave(what):
    found = []
    for repeats in (False, True):
        with PeakMemory(repeats=repeats) as memory:
            made = []
            for turn in range(3):
                x = grid()
                made.append(FUNCTIONS[what](x))
                made.append(FUNCTIONS[what](x.add_(1 if turn else 0)))
        found.append((made, memory.log.live(), memory.work))
    torch.testing.assert_close(*(made for made, _, _ in found), rtol=0, atol=0)
    assert found[0][1:] == found[1][1:]


def test_the_same_is_computed_once_and_written_to_alone():
    repeats, x = Repeats(), torch.ones(2)
    first = repeats.run(aten.expand_copy.default, (x, (2000, 2)), {})
    one, other = (repeats.run(aten.mul.Tensor, (first, 3), {}) for _ in range(2))
    assert len(repeats._results) == 2  # and not three
    assert other.untyped_storage()._cdata != one.untyped_storage()._cdata
    assert torch._C._is_cow_tensor(other)
    repeats.run(aten.zero_.default, (other,), {})
    assert not other.any() and one.eq(3).all() and repeats.run(aten.mul.Tensor, (first, 3), {}).eq(3).all()
    repeats.run(aten.zero_.default, (first,), {})
    assert not repeats.run(aten.mul.Tensor, (first, 3), {}).any()


def test_random_numbers_are_new_ones():
    with PeakMemory(repeats=True):
        x = torch.ones(2000).mul(1)
        assert not torch.equal(torch.rand_like(x), torch.rand_like(x))
        assert not torch.equal(torch.dropout(x, 0.5, True), torch.dropout(x, 0.5, True))
