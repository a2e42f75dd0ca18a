"""The memory-lean losses must be torchvision's, keep only logits and ids, and run where values are unknown."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import sigmoid_focal_loss

from glcan_fx.errors import UnsupportedError
from glcan_fx.peak_memory import PeakMemory
from glcan_fx.tasks import focal_loss as losses
from glcan_fx.tasks.focal_loss import BACKGROUND, IGNORED, focal_loss

B, N, C = 3, 40, 7
FORMS = [(0.25, 2.0), (0.25, 0.0), (0.1, 1.5), (1.0, 2.0), (0.0, 2.0), (-1, 2.0), (-1, 1.0), (-1, 0.0)]


def example(dtype=torch.float64, scale=4.0):
    """Logits, ids with every kind of row, one weight per image."""
    logits = (torch.randn(B, N, C, dtype=torch.float64) * scale).to(dtype)
    classes = torch.randint(0, C, (B, N))
    classes[:, 5:25], classes[:, 25:32] = BACKGROUND, IGNORED
    return logits.requires_grad_(), classes, torch.tensor([[1.0], [0.3], [2.0]])


def reference(logits, classes, weight, alpha, gamma):
    """Loss and gradient by one-hot targets, in float64."""
    x = logits.detach().double().requires_grad_()
    target = F.one_hot(classes.clamp(min=0), C) * (classes >= 0)[..., None]
    each = sigmoid_focal_loss(x, target.double(), alpha, gamma, reduction="none").sum(-1)
    loss = (each * weight)[classes != IGNORED].sum()
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def ours(logits, classes, weight=None, **kwargs):
    loss = focal_loss(logits, classes, weight=weight, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize(("dtype", "rel", "atol"), [(torch.float32, 1e-6, 1e-6), (torch.float64, 1e-12, 1e-12)])
@pytest.mark.parametrize(("alpha", "gamma"), FORMS)
def test_equals_torchvision(alpha, gamma, dtype, rel, atol):
    logits, classes, weight = example(dtype, scale=8.0)  # to where softplus(x) - x is small, yet counts in float64
    loss, grad = ours(logits, classes, weight, alpha=alpha, gamma=gamma)
    expected, expected_grad = reference(logits, classes, weight, alpha, gamma)
    assert loss.dtype == grad.dtype == dtype and loss.dim() == 0
    torch.testing.assert_close(loss.double(), expected, rtol=rel, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=atol)


def test_confident_positives_cost_little_exactly():
    """Background costs of the positives, 1e5 times the loss, must not be added first and taken off afterwards."""
    logits = torch.full((500, C), -8.0).scatter(1, torch.arange(500)[:, None] % C, 8.0).requires_grad_()
    classes = torch.arange(500) % C
    torch.testing.assert_close(ours(logits, classes)[0].double(), reference(logits, classes, 1, 0.25, 2)[0],
                               rtol=1e-6, atol=0)


def test_binary_cross_entropy():
    logits, classes, _ = example()
    classes = classes.clamp(min=BACKGROUND)
    target = (classes[..., None] == torch.arange(C)).double()
    expected = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    torch.testing.assert_close(focal_loss(logits, classes, alpha=-1, gamma=0), expected, rtol=1e-12, atol=0)


def test_ignored_rows_contribute_nothing():
    logits, classes, weight = example()
    before, _ = ours(logits, classes, weight)
    with torch.no_grad():
        logits[:, 25:28], logits[:, 28:32] = float("inf"), float("nan")
    loss, grad = ours(logits, classes, weight)
    assert loss == before and (grad[:, 25:32] == 0).all() and (grad[:, :25] != 0).all()


@pytest.mark.parametrize("shape", [(), (1,), (B, 1), (N,), (B, N)])
def test_weights_broadcast(shape):
    logits, classes, _ = example()
    weight = torch.rand(shape)
    loss, grad = ours(logits, classes, weight)
    expected, expected_grad = reference(logits, classes, weight, 0.25, 2)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("alpha", "gamma"), FORMS)
@pytest.mark.parametrize("size", [50.0, 200.0])
def test_extreme_logits(size, alpha, gamma):
    logits = torch.tensor([[size, -size]] * 3, requires_grad=True)
    classes = torch.tensor([0, 1, BACKGROUND])
    loss, grad = ours(logits, classes, alpha=alpha, gamma=gamma)
    positive, background = (alpha, 1 - alpha) if alpha >= 0 else (1, 1)
    torch.testing.assert_close(loss, torch.tensor(size * (2.0 * background + positive)))
    torch.testing.assert_close(grad, torch.tensor([[0, 0], [background, -positive], [background, 0.0]]))


@pytest.mark.parametrize("chunk", [1, 10, 100, 500])
def test_chunks_change_nothing(chunk, monkeypatch):
    logits, classes, weight = example()
    assert logits.numel() <= losses._CHUNK
    loss, grad = ours(logits, classes, weight)
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    chunked, chunked_grad = ours(logits, classes, weight)
    torch.testing.assert_close(chunked, loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(chunked_grad, grad, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, classes, weight = example(dtype)
    expected, expected_grad = reference(logits, classes, weight, 0.25, 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grad = ours(logits, classes, weight)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5)])
def test_no_rows(shape):
    logits = torch.zeros(*shape, C, requires_grad=True)
    loss, grad = ours(logits, torch.zeros(shape, dtype=torch.int64))
    assert loss == 0 and grad.shape == logits.shape


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_one_row(chunk, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    logits, classes, _ = example()
    row = logits.detach()[0, 0].requires_grad_()
    assert torch.equal(ours(row, classes[0, 0])[1], ours(logits[:1, :1], classes[:1, :1])[1][0, 0])


@pytest.mark.parametrize("chunk", [64, 2**22])
@pytest.mark.parametrize("view", [lambda x: x.permute(0, 2, 3, 1), lambda x: x[:, :, ::2].permute(2, 0, 3, 1),
                                  lambda x: x[:1, :, :1].expand(4, C, 5, 6).permute(0, 2, 3, 1)])
def test_strided_logits(view, chunk, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    base = torch.randn(2, C, 4, 6, dtype=torch.float64, requires_grad=True)
    logits = view(base)
    classes = torch.randint(IGNORED, C, logits.shape[:-1])
    assert not logits.is_contiguous()
    expected, expected_grad = reference(logits, classes, 1, 0.25, 2)
    loss, grad = ours(logits, classes)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_autograd_keeps_logits_and_ids_only():
    logits, classes, weight = example(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = focal_loss(logits, classes, weight=weight)
    assert sum(t.untyped_storage().nbytes() for t in kept) == 4 * B * N * C + 8 * B * N + 4 * B
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (logits, classes, weight)}
    assert loss.grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.transpose(0, 1)])
def test_temporaries_are_chunks(view, dtype, monkeypatch):
    chunk = 2**12
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    logits = view(torch.randn(4, 256, 64, dtype=dtype)).requires_grad_()
    classes = torch.randint(IGNORED, 64, logits.shape[:-1])
    given = logits.nbytes + classes.nbytes
    small = 2 * chunk  # what has a row's length, and the sums
    with PeakMemory(logits, classes) as forward:
        loss = focal_loss(logits, classes)
    with PeakMemory(logits, classes) as backward:
        grad, = torch.autograd.grad(loss, logits)
    assert forward.bytes <= given + 2 * 4 * chunk + small
    assert backward.bytes <= given + grad.nbytes + 3 * 4 * chunk + small


@pytest.mark.parametrize(("alpha", "gamma"), FORMS)
def test_gradcheck(alpha, gamma, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", 8)
    logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([[0, 1, 2, BACKGROUND], [IGNORED, BACKGROUND, 2, 2]])
    assert torch.autograd.gradcheck(
        lambda x: focal_loss(x, classes, weight=torch.tensor([[0.5], [3.0]]), alpha=alpha, gamma=gamma) * 7, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors(dtype, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK", 100)
    with FakeTensorMode():
        logits = torch.empty(B, N, C, dtype=dtype, requires_grad=True)
        loss, grad = ours(logits, torch.empty(B, N, dtype=torch.int64), torch.empty(B, 1))
    assert loss.shape == () and loss.dtype == torch.float32
    assert grad.shape == logits.shape and grad.dtype == dtype


@pytest.mark.parametrize("scale", [torch.tensor(1.0), torch.tensor(2.0, requires_grad=True)])
def test_double_backward_is_refused(scale):
    logits, classes, _ = example()
    with pytest.raises(UnsupportedError, match="no second derivatives"):
        torch.autograd.grad(focal_loss(logits, classes) * scale, logits, create_graph=True)


@pytest.mark.parametrize(("logits", "classes", "weight"), [
    ((B, N, C), (B, N, C), None), ((B, N, C), (B, 1), None), ((B, N, 0), (B, N), None), ((), (), None),
    ((B, N, C), (B, N), (B,)), ((B, N, C), (B, N), (1, B, N)),
])
def test_shapes_that_do_not_fit(logits, classes, weight):
    with pytest.raises(ValueError, match="fit|broadcast"):
        focal_loss(torch.zeros(logits), torch.zeros(classes, dtype=torch.int64),
                   weight=None if weight is None else torch.ones(weight))


@pytest.mark.parametrize("wrong", [{"alpha": 1.5}, {"gamma": -1.0}])
def test_factors_out_of_range(wrong):
    with pytest.raises(ValueError, match="expected alpha"):
        focal_loss(torch.zeros(1, C), torch.zeros(1, dtype=torch.int64), **wrong)


def test_ids_of_c_and_above_raise():
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        focal_loss(torch.zeros(1, C), torch.tensor([C]))
