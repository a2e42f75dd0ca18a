"""Sequences: recurrent readers behind convolutions, texts with padding, and where to look."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx


def conv(channels: int, out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU())


class Reader(nn.Module):
    """Convolutions, then a recurrent layer over the columns of their map (CRNN)."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.c = nn.Sequential(conv(1, 8), nn.MaxPool2d(2), conv(8, 16), nn.MaxPool2d(2), conv(16, 16))
        self.r, self.h = nn.LSTM(16 * 8, 16, 2, bidirectional=True, batch_first=order == "batch"), nn.Linear(32, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        if self.order == "batch":
            return self.h(self.r(x.permute(0, 3, 1, 2).flatten(2))[0]).log_softmax(-1)
        b, c, h, w = x.size()
        y, _ = self.r(x.view(b, c * h, w).permute(2, 0, 1))
        t, b, d = y.size()
        return self.h(y.view(t * b, d)).view(t, b, -1).log_softmax(2)


@pytest.mark.parametrize("order", ["batch", "time"])
def test_columns_are_the_positions_of_a_reader(order: str) -> None:
    """What an auxiliary network predicts is a sequence as long as the model's, of logarithms of probabilities."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, 1, 32, 48), torch.randint(1, 11, (4, 5))

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        assert output.shape == ((4, 12, 11) if order == "batch" else (12, 4, 11))
        torch.testing.assert_close(output.logsumexp(-1), torch.zeros(output.shape[:2]))
        steps = output if order == "time" else output.transpose(0, 1)
        return F.ctc_loss(steps, target, torch.full((4,), 12), torch.full((4,), 5))

    model = Reader(order)
    local = glcan_fx.transform(model, k="natural", criterion=criterion, example_inputs=images,
                               options=glcan_fx.Options(verify=False)).train()
    assert local.plan.k == 5
    out = local(images, labels)
    assert all(2 < loss < 9 for loss in out.losses)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in local.parameters())


class Text(nn.Module):
    """A transformer that masks padding: the mask, and the weights of the mean, are made of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(50, 16, padding_idx=0), nn.Parameter(torch.randn(1, 12, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.t, self.h = nn.TransformerEncoder(layer, 4), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        x = self.t(self.embed(ids) + self.place[:, : ids.shape[1]], src_key_padding_mask=padding)
        weight = (~padding).float()[..., None]
        return self.h((x * weight).sum(1) / weight.sum(1).clamp(min=1))


class Series(nn.Module):
    """The same on measurements, of which those that are all 0 are padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.embed, self.t, self.h = nn.Linear(6, 16), nn.TransformerEncoder(layer, 4), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        padding = (x == 0).all(-1)
        y = self.t(self.embed(x), src_key_padding_mask=padding)
        weight = (~padding).float()[..., None]
        return self.h((y * weight).sum(1) / weight.sum(1).clamp(min=1))


@pytest.mark.parametrize("kind", [Text, Series])
def test_a_mask_made_of_the_data_is_context(kind: type[nn.Module]) -> None:
    """Auxiliary networks mask what the model masks: padding changes no prediction of theirs."""
    torch.manual_seed(0)
    x = torch.randint(1, 50, (4, 12)) if kind is Text else torch.randn(4, 12, 6)
    x[:, 8:] = 0
    labels, model, seen = torch.arange(4), kind(), list[Tensor]()

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        seen.append(output.detach())
        return F.cross_entropy(output, target)

    local = glcan_fx.transform(model, k="natural", criterion=criterion, example_inputs=x).train()
    assert local.plan.k == 5 and not any("no cut" in note for note in local.plan.notes)
    seen.clear()
    local(x, labels).loss.backward()
    assert not [name for name, p in local.named_parameters() if p.grad is None or not p.grad.any()]
    first = seen[-5:]
    seen.clear()
    local(x[:, :9], labels)
    for with_padding, with_less in zip(first, seen, strict=True):
        torch.testing.assert_close(with_padding, with_less, rtol=1e-4, atol=1e-5)
    assert torch.equal(local.eval()(x), model.eval()(x))


class Looks(nn.Module):
    """A spatial transformer: a small network says where the other one looks."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Sequential(conv(3, 8, 2), conv(8, 8, 2), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                                   nn.Linear(128, 6))
        self.blocks, self.fc = nn.Sequential(conv(3, 8, 2), conv(8, 8), conv(8, 16, 2)), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.where(x).view(-1, 2, 3) + torch.eye(2, 3, device=x.device)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        return self.fc(self.blocks(x).mean((2, 3)))


def test_where_to_look_is_no_network_of_its_own() -> None:
    torch.manual_seed(0)
    images, labels, model = torch.randn(4, 3, 32, 32), torch.arange(4), Looks()
    local = glcan_fx.transform(model, k="natural", task="classification", example_inputs=images).train()
    assert local.plan.cuts[-2:] == ("blocks.0", "blocks.1")
    local(images, labels).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in local.parameters())
