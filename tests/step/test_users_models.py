"""What users do to models before and after compiling them, and what that must not change."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import glcan_fx
from glcan_fx.methods import GLCAN
from glcan_fx.models import retinanet, yolo

IMAGES, LABELS = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + self.skip(x))


class Net(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.a, self.b = Block(8, 8, act=act), Block(8, 16, 2, act=act)
        self.c, self.d = Block(16, 16, act=act), Block(16, 32, 2, act=act)
        self.fc = nn.Linear(32, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(self.stem(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def compiled(model: nn.Module, **options: object) -> glcan_fx.LocalModel:
    defaults = {"k": "natural", "criterion": F.cross_entropy, "example_inputs": IMAGES}
    return glcan_fx.transform(model, **(defaults | options)).train()


def step(local: nn.Module, images: Tensor = IMAGES, labels: Tensor = LABELS) -> None:
    local(images, labels).loss.backward()


def saved_and_loaded(local: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(local, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ------------------------------------------------------------------------- what the copies are made of


class Denormalise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3,), 0.5))
        self.register_buffer("std", torch.full((3,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.std[:, None, None] + self.mean[:, None, None]


class Upscale(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.c, self.d = Block(8, 8), Block(8, 8), Block(8, 8)
        self.up, self.shuffle, self.denormalise = nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2), Denormalise()

    def forward(self, x: Tensor) -> Tensor:
        return self.denormalise(self.shuffle(self.up(self.features(x))))


def test_buffers_that_are_no_statistics_keep_their_values() -> None:
    local = compiled(Upscale(), criterion=None, task="super_resolution")
    buffers = [b for name, b in local.aux.named_buffers() if name.endswith(("denormalise.mean", "denormalise.std"))]
    assert len(buffers) == 2 * (local.plan.k - 1)
    assert {b.mean().item() for b in buffers} == {0.5, 0.25}
    step(local, labels=torch.rand(4, 3, 32, 32))
    assert local.stem.weight.grad.abs().max() > 0


class Scale(nn.Module):
    """A layer scale: one value per channel, and no norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-5 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None]


@pytest.mark.parametrize("act", [nn.PReLU(1), None])
def test_the_stages_norm_is_a_norm(act: nn.Module | None) -> None:
    model = Net(act)
    for block in (model.a, model.b, model.c, model.d):
        channels = block.norm.num_features
        block.norm = nn.Sequential(block.norm, Scale(channels))
        if act is not None:
            block.act = nn.PReLU(channels)
    local = compiled(model)
    stage = local.aux.get_submodule("0.network.stage1")
    assert isinstance(stage.norm, nn.BatchNorm2d)


class NormAct(nn.BatchNorm2d):
    """A norm layer that holds its activation, and asks for its mode itself."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var = (self.running_mean, self.running_var)
        return self.act(self.drop(F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)))


class GroupNormAct(nn.GroupNorm):
    """The same in every mode."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(4, channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


class NormsAct(Block):
    """Two convolutions, each with a norm layer; the second one's activation may be none."""

    def __init__(self, norm: type[nn.Module], last: nn.Module, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, stride)
        self.norm, self.norm2 = norm(outputs, nn.SiLU(inplace=True)), norm(outputs, last)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm(self.conv(x)))) + self.skip(x)


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("last", [nn.Hardswish, nn.Identity])
@pytest.mark.parametrize("norm", [NormAct, GroupNormAct])
def test_a_norm_layer_that_holds_an_activation(norm: type[nn.Module], last: type[nn.Module], width: float) -> None:
    model = Net()
    for name, block in [("a", (8, 8)), ("b", (8, 16, 2)), ("c", (16, 16)), ("d", (16, 32, 2))]:
        setattr(model, name, NormsAct(norm, last(), *block))
    local = compiled(model, width=width)
    assert local.plan.cuts == ("stem", "a", "b", "c")
    assert local.plan.report.rung == 1
    stage = local.aux.get_submodule("0.network.stage1")
    assert isinstance(stage.norm, norm) and isinstance(stage.norm.act, last)
    assert stage.norm.weight.shape == (stage.conv.out_channels,) == (16 * width,)
    if last is nn.Identity:
        assert isinstance(stage.activation, nn.SiLU) and not stage.activation.inplace
    else:
        assert not hasattr(stage, "activation")
    step(local)
    assert all(p.grad is not None for p in local.parameters())


class PooledAttention(nn.Module):
    """Queries at full resolution, keys and values at half of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(channels), nn.Conv2d(channels, channels, 2, 2)
        self.q, self.kv, self.mlp = (nn.Linear(channels, n * channels) for n in (1, 2, 1))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        y = self.norm(x)
        pooled = self.reduce(y.transpose(1, 2).reshape(x.shape[0], -1, height, width)).flatten(2).transpose(1, 2)
        k, v = self.kv(pooled).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q(y), k, v))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + F.gelu(self.mlp(x))


class TokenStage(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(inputs, outputs, 3, 2, 1), nn.LayerNorm(outputs)
        self.blocks = nn.ModuleList(PooledAttention(outputs) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, height, width)
        return self.norm(x).reshape(x.shape[0], height, width, -1).permute(0, 3, 1, 2).contiguous()


class TokenPyramid(nn.Module):
    """Stages that turn maps into tokens and back, all read by the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([TokenStage(3, 8), TokenStage(8, 16), TokenStage(16, 24)])
        self.lateral = nn.ModuleList(nn.Conv2d(n, 8, 1) for n in (8, 16, 24))
        self.classifier = nn.Conv2d(24, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            maps.append(lateral(x))
        maps = [F.interpolate(part, size=maps[0].shape[2:]) for part in maps]
        return self.classifier(torch.cat(maps, 1))


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_stages_of_tokens_between_maps(width: float) -> None:
    """Attention to fewer places does not open its block; a map is synthesised at any image size."""
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(10, (2, 16, 16))
    local = compiled(TokenPyramid(), example_inputs=images, width=width)
    blocks = [f"stages.{stage}.blocks.{block}" for stage in range(3) for block in range(2)]
    assert [name for name in local.plan.cuts if "blocks" in name] == blocks
    assert all(note.startswith("auxiliary networks are large") for note in local.plan.notes)  # compute 2.5
    made = dict(local.aux.get_submodule("0.network").named_modules())
    assert not [name for name in made if "pool" in name]
    step(local, images, labels)
    assert all(p.grad is not None for p in local.parameters())
    step(local, torch.randn(3, 3, 64, 32), torch.randint(10, (3, 32, 16)))


class Leaky(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), 0.3)


def test_a_functional_activation_keeps_its_arguments() -> None:
    model = Net()
    model.b, model.d = Leaky(8, 16, 2), Leaky(16, 32, 2)
    local = compiled(model)
    assert "negative_slope = 0.3" in local.aux.get_submodule("0.network").code


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_auxiliary_layers_are_initialised(width: float) -> None:
    """Each weight is random, with the deviation that its fan-in asks for; biases and norms begin as the source's."""
    local = compiled(Net(), width=width)
    for name, parameter in local.aux.named_parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            assert 0.3 < parameter.std().item() * fan_in**0.5 < 2, name
        else:
            own = local.get_parameter("fc.bias") if "fc" in name else None
            expected = own if own is not None else torch.full_like(parameter, float("weight" in name))
            assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_priors_in_biases_are_copied(width: float) -> None:
    model = yolo(18, num_classes=3, image_size=128, neck_channels=(16, 32, 64))
    local = glcan_fx.transform(model, k=3, task="detection", example_inputs=torch.empty(2, 3, 128, 128),
                               method=GLCAN(width=width)).train()
    target = {"boxes": torch.tensor([[20.0, 20, 80, 90]]), "labels": torch.tensor([1])}
    losses = local([torch.rand(3, 128, 128)] * 2, [target] * 2)
    own = sum(loss.item() for name, loss in losses.items() if "local" not in name)
    assert losses["loss_local_0"] < 2 * own


def test_what_is_frozen_keeps_its_values() -> None:
    model = Net()
    model.fc.requires_grad_(False)
    tail = compiled(model, width=1.0).aux.get_submodule("0.network.tail.fc")
    assert torch.equal(tail.weight, model.fc.weight) and not tail.weight.requires_grad
    narrow = compiled(model, width=0.5).aux.get_submodule("0.network.tail.fc")
    assert narrow.weight.requires_grad


# ------------------------------------------------------------------------- changed after compiling


@pytest.mark.parametrize("change", ["prune", "weight_norm", "replaced"])
def test_parameters_added_later_are_trained(change: str) -> None:
    model = Net()
    local = compiled(model)
    if change == "prune":
        prune.l1_unstructured(model.a.conv, "weight", 0.5)
    elif change == "weight_norm":
        parametrizations.weight_norm(local.a.conv)
    else:
        local.a = Block(8, 8)
    step(local)
    assert all(p.grad is not None for p in model.a.parameters())
    if change == "replaced":
        assert model.a is local.a


def test_a_replaced_classifier_is_the_models() -> None:
    model = Net()
    local = compiled(model)
    local.fc = nn.Linear(32, 5)
    with pytest.warns(glcan_fx.ModelChangedWarning):
        local(IMAGES, LABELS % 5)
    assert local(IMAGES, LABELS % 5).output.shape == local.eval()(IMAGES).shape == model.eval()(IMAGES).shape == (4, 5)


@pytest.mark.parametrize("wrapped", [prune, spectral_norm, parametrizations])
def test_weights_made_by_hooks(wrapped: object) -> None:
    model = Net()
    if wrapped is prune:
        prune.l1_unstructured(model.fc, "weight", 0.5)
    elif wrapped is spectral_norm:
        spectral_norm(model.fc)
    else:
        parametrizations.weight_norm(model.fc)
    model(IMAGES)
    local = compiled(model)
    step(local)
    assert all(p.grad is not None for p in local.parameters())


def test_planned_before_the_head_was_changed() -> None:
    model = retinanet(18, num_classes=3, min_size=64, max_size=64, fpn_channels=16)
    plan = glcan_fx.plan(model, k=2, task="detection", example_inputs=torch.empty(2, 3, 64, 64))
    model.head = type(model.head)(16, model.head.classification_head.num_anchors, 7)
    target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([6])}
    losses = glcan_fx.transform(model, plan=plan).train()([torch.rand(3, 64, 64)] * 2, [target] * 2)
    assert all(loss.isfinite() for loss in losses.values())


def test_the_models_methods_and_conversions() -> None:
    class Counting(Net):
        moved = 0

        def _apply(self, fn: object, recurse: bool = True) -> nn.Module:
            self.moved += 1
            return super()._apply(fn, recurse)

        def no_decay(self) -> list[str]:
            return ["stem"]

    local = compiled(Counting())
    local.double()
    assert local.original.moved == 1 and local.no_decay() == ["stem"]
    assert {p.dtype for p in local.parameters()} == {torch.float64}


@pytest.mark.parametrize("change", ["bfloat16", "frozen", "partly frozen", "auxiliary frozen", "nothing"])
def test_saved_after_a_change(change: str) -> None:
    local = compiled(Net())
    if change == "bfloat16":
        local.bfloat16()
    elif change != "nothing":
        {"frozen": local, "partly frozen": local.d, "auxiliary frozen": local.aux}[change].requires_grad_(False)
    loaded = saved_and_loaded(local)
    before, after = dict(local.named_parameters()), dict(loaded.named_parameters())
    assert before.keys() == after.keys() and loaded.code == local.code
    assert all(torch.equal(p, after[name]) and p.requires_grad == after[name].requires_grad
               for name, p in before.items())
    images = IMAGES.to(next(local.parameters()).dtype)
    assert torch.equal(loaded.train()(images, LABELS).loss, local(images, LABELS).loss)


def test_shallow_copy_evaluates_as_the_model() -> None:
    local = compiled(Net())
    local.eval()
    assert torch.equal(copy.copy(local)(IMAGES), local(IMAGES))


# ------------------------------------------------------------------------- around the compiled model


def test_a_learned_stem_before_the_model_is_trained_by_the_first_module() -> None:
    local, before = compiled(Net()), nn.Conv2d(3, 3, 1)
    out = local(before(IMAGES), LABELS)
    out.loss.backward()
    expected = before.weight.grad.clone()
    before.weight.grad = None
    local.zero_grad()
    out = local(before(IMAGES), LABELS)
    out.losses[0].backward()
    assert torch.equal(before.weight.grad, expected) and expected.abs().max() > 0


class Perceptual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Dropout(0.5)).requires_grad_(False).eval()

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.net(outputs), targets)


def test_a_frozen_criterion_is_left_as_it_is() -> None:
    criterion = Perceptual()
    before = copy.deepcopy(criterion.state_dict())
    local = compiled(Net(), criterion=criterion)
    step(local)
    assert not criterion.net.training and all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())
    assert not any("net.1" in key for key in local.state_dict() if "task" in key)


def test_hooks_see_the_models_own_layers_once() -> None:
    model, seen = Net(), []
    model.fc.register_forward_hook(lambda module, inputs, output: seen.append(module))
    model.c.register_forward_hook(lambda *_: None)
    local = compiled(model)
    step(local)
    assert seen == [model.fc]


def test_integer_images() -> None:
    class Bytes(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float() / 255)

    images = torch.randint(0, 255, IMAGES.shape, dtype=torch.uint8)
    local = compiled(Bytes(), example_inputs=images)
    assert local.plan.k == 5
    step(local, images)


def test_dict_of_logits() -> None:
    class Named(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x)}

    local = compiled(Named(), criterion=None, task="classification")
    assert torch.isfinite(local(IMAGES, LABELS).loss)


class SqueezeExcitation(Block):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs, 256, 1), nn.ReLU(),
                                     nn.Conv2d(256, outputs, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.act(y * self.squeeze(y) + self.skip(x))


def test_synthesised_maps_have_the_sources_places() -> None:
    """The pooling of a squeeze-excitation, however many weights it has, is beside the main path."""
    model = Net()
    model.b, model.d = SqueezeExcitation(8, 16, 2), SqueezeExcitation(16, 32, 2)
    local, seen = compiled(model, width=1.0), []
    for index in range(local.plan.k - 1):
        network = local.aux.get_submodule(f"{index}.network")
        assert not any(isinstance(part, nn.AdaptiveAvgPool2d) for part in network.modules())
        network.tail.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    step(local)
    assert seen == [(4, 32)] * (local.plan.k - 1)


def test_linear_layers_keep_no_weights_for_backward() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 10))
    plan = glcan_fx.plan(model, k="natural", criterion=F.cross_entropy, example_inputs=IMAGES)
    assert plan.modules[0].aux_saved < 4 * 4096 * 10


def test_a_plan_for_another_width_is_refused() -> None:
    plan = glcan_fx.plan(Net(), k="natural", criterion=F.cross_entropy, example_inputs=IMAGES)
    wide = Net()
    wide.a = Block(8, 24)
    wide.b = Block(24, 16, 2)
    with pytest.raises(glcan_fx.PlanError, match="24"):
        glcan_fx.transform(wide, plan=plan)


@pytest.mark.parametrize(("options", "message"), [
    ({"k": "4"}, "did you mean k=4"),
    ({"k": ["down.1"]}, "is not a module"),
    ({"k": ["b.conv"]}, "inside a block"),
    ({"criterion": nn.CrossEntropyLoss}, "not the class"),
    ({"criterion": None, "task": glcan_fx.Task}, "not the class"),
    ({"example_inputs": (2, 3, 64, 64)}, "torch.empty"),
    ({"example_inputs": torch.empty(2, 4, 16, 16)}, "2x4x16x16"),
])
def test_likely_mistakes_are_understood(options: dict, message: str) -> None:
    with pytest.raises(glcan_fx.GlcanFxError, match=message):
        compiled(Net(), **options)
