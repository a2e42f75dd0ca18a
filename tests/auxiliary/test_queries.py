"""Query decoders: auxiliary networks look at the trunk's end with the queries of one decoder layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx


class Layer(nn.Module):
    """Self-attention of queries, attention to the image, a perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(width, 2, batch_first=True)
        self.image = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        queries = queries + self.own(queries, queries, queries, need_weights=False)[0]
        queries = queries + self.image(queries, memory, memory, need_weights=False)[0]
        return queries + self.mlp(queries)


class Detector(nn.Module):
    """A backbone, an encoder, and ``layers`` of a decoder; with ``every`` predictions behind each of them (deep
    supervision)."""

    def __init__(self, layers: int, every: bool) -> None:
        super().__init__()
        width = 16
        self.backbone = nn.Sequential(*[
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in ((3, 8), (8, width))])
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 16, 0.0, batch_first=True) for _ in range(2))
        self.queries = nn.Parameter(torch.randn(5, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.classify = nn.Linear(width, 3)
        self.every = every

    def forward(self, image: Tensor) -> Tensor:
        memory = self.backbone(image).flatten(2).mT
        for layer in self.encoder:
            memory = layer(memory)
        queries = self.queries.expand(len(image), -1, -1)
        found = []
        for layer in self.layers:
            queries = layer(queries, memory)
            found.append(queries)
        return self.classify(torch.stack(found) if self.every else queries)


def loss(classes: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(classes.movedim(-1, 1), targets.expand(classes.shape[:-1]))


@pytest.mark.parametrize("every", [False, True])
def test_auxiliary_networks_have_one_layer_of_the_decoder(every):
    torch.manual_seed(0)
    model, images, targets = Detector(4, every), torch.rand(2, 3, 16, 16), torch.randint(0, 3, (2, 5))
    local = glcan_fx.transform(model, k="natural", criterion=loss, example_inputs=(images,))
    assert [module.name for module in local.plan.modules][2:4] == ["encoder.0", "encoder.1"]
    for index in range(4):
        names = [name for name, _ in local.aux.get_submodule(str(index)).named_parameters()]
        copied = {name.partition("layers.")[2].partition(".")[0] for name in names if ".layers." in name}
        assert copied == {"0"}, index

    out = local(images, targets)
    assert out.output.shape == model(images).shape
    out.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in local.parameters())
