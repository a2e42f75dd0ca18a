"""What is saved goes on training as if it had not been, and the plain model loads without any of it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import glcan_fx
from glcan_fx import LoadError, Plan, PlanError

X, Y = torch.randn(6, 3, 32, 32), torch.arange(6) % 4


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


class Tied(Net):
    """One tensor under two names, and weights that are stored in another order."""

    def __init__(self):
        super().__init__()
        self.again = self.head
        self.to(memory_format=torch.channels_last)


def compiled(model, k=3, **options):
    return glcan_fx.transform(model, k=k, criterion=F.cross_entropy, example_inputs=X, **options)


def train(local, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        local.train()(X, Y).loss.backward()
        optimizer.step()
    return [value.clone() for value in local.state_dict().values()]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", [Net, Tied])
def test_a_saved_run_goes_on_with_the_same_numbers(kind, k, tmp_path):
    local = compiled(kind(), k=k)
    train(local, torch.optim.SGD(local.parameters(), lr=0.1))
    local.save_pretrained(tmp_path / "saved")
    again = glcan_fx.load_pretrained(kind(), tmp_path / "saved", criterion=F.cross_entropy)
    assert again.plan == local.plan
    expected = train(local, torch.optim.SGD(local.parameters(), lr=0.1))
    for found, value in zip(train(again, torch.optim.SGD(again.parameters(), lr=0.1)), expected, strict=True):
        assert torch.equal(found, value)


@pytest.mark.parametrize("kind", [Net, Tied])
def test_the_saved_weights_are_the_plain_models(kind, tmp_path):
    local = compiled(kind())
    local.save_pretrained(tmp_path)
    plain = kind()
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(plain.eval()(X), local.eval()(X))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["auxiliary.safetensors", "model.safetensors", "plan.json"]


def test_a_model_that_saves_itself_does(tmp_path):
    class Library(Net):
        def save_pretrained(self, directory, note=""):
            torch.save({**self.state_dict(), "note": note}, f"{directory}/own.bin")

        @classmethod
        def from_pretrained(cls, directory):
            model = cls()
            state = torch.load(f"{directory}/own.bin")
            assert state.pop("note") == "mine"
            model.load_state_dict(state)
            return model

    local = compiled(Library())
    train(local, torch.optim.SGD(local.parameters(), lr=0.1))
    local.save_pretrained(tmp_path, note="mine")
    assert not (tmp_path / "model.safetensors").exists()
    again = glcan_fx.load_pretrained(Library.from_pretrained(tmp_path), tmp_path, criterion=F.cross_entropy)
    for name, value in local.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_nothing_is_loaded_of_another_model(tmp_path):
    compiled(Net()).save_pretrained(tmp_path)
    other = Net(width=8)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises((LoadError, PlanError)):
        glcan_fx.load_pretrained(other, tmp_path, criterion=F.cross_entropy)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(LoadError, match="was not written by save_pretrained"):
        glcan_fx.load_pretrained(Net(), tmp_path / "elsewhere", criterion=F.cross_entropy)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.metric = model, nn.BatchNorm1d(2)


@pytest.mark.parametrize("wrap", [lambda local: local, Wrapper, AveragedModel, nn.DataParallel,
                                  lambda local: Wrapper(Wrapper(local)), copy.deepcopy])
def test_any_frameworks_checkpoint_holds_the_plain_model_and_the_plan(wrap, tmp_path):
    local = compiled(Net())
    torch.save(wrap(local).state_dict(), tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt")
    plain = Net()
    plain.load_state_dict(glcan_fx.plain_state_dict(state))
    assert torch.equal(plain.eval()(X), local.eval()(X))
    assert Plan.from_state_dict(state) == local.plan


def test_a_plain_state_dict_stays_as_it_is_even_with_a_part_called_aux():
    model = Net()
    model.first.aux = nn.BatchNorm2d(16)
    state = model.state_dict()
    assert glcan_fx.plain_state_dict(state) == state
    local = compiled(model)
    assert set(glcan_fx.plain_state_dict(local.state_dict())) == set(state)
    with pytest.raises(PlanError, match="no plan in this state dict"):
        Plan.from_state_dict(state)
    with pytest.raises(LoadError, match="2 compiled models"):
        glcan_fx.plain_state_dict(nn.ModuleList([local, compiled(Net())]).state_dict())


def test_one_local_module_has_the_plain_models_keys():
    local = compiled(Net(), k=1)
    assert set(local.state_dict()) == set(Net().state_dict())


def test_a_checkpoint_of_another_plan_says_so_and_loads_nothing():
    state = compiled(Net(), k=2).state_dict()
    local = compiled(Net(), k=3)
    before = copy.deepcopy(local.state_dict())
    with pytest.raises(LoadError, match=r"another plan of Net \(2 local modules, cut behind .*Plan.from_state_dict"):
        local.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in local.state_dict().items())
    again = glcan_fx.transform(Net(), plan=Plan.from_state_dict(state), criterion=F.cross_entropy)
    again.load_state_dict(state)
    local.load_state_dict(glcan_fx.plain_state_dict(state))


def test_a_closure_as_criterion_is_refused_by_pickle_with_what_to_do(tmp_path):
    local = glcan_fx.transform(Net(), k=2, criterion=lambda out, y: F.cross_entropy(out, y), example_inputs=X)
    with pytest.raises(pickle.PicklingError, match=r"lambda.*top level of a module.*save_pretrained"):
        torch.save(local, tmp_path / "whole.pt")
    torch.save(compiled(Net(), k=2), tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert len(train(again, torch.optim.SGD(again.parameters(), lr=0.1))) == len(again.state_dict())


def test_a_whole_checkpoint_is_no_state_dict():
    state = {"model": compiled(Net()).state_dict(), "epoch": 3}
    for read in (glcan_fx.plain_state_dict, Plan.from_state_dict):
        with pytest.raises(LoadError, match=r"pass checkpoint\['model'\]"):
            read(state)


def test_one_local_module_refuses_the_checkpoint_of_more():
    with pytest.raises(LoadError, match=r"another plan of Net \(3 local modules.*this one has 1 local module"):
        compiled(Net(), k=1).load_state_dict(compiled(Net()).state_dict())


def test_a_folder_of_another_plan_says_so(tmp_path):
    from glcan_fx.step.saving import load_auxiliary

    compiled(Net(), k=2).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"another plan of Net \(2 local modules.*Give the same k"):
        load_auxiliary(compiled(Net()), tmp_path)


def test_an_average_over_buffers_loads_and_says_that_its_plan_is_none():
    local = compiled(Net())
    averaged = AveragedModel(local, avg_fn=lambda old, new, _: old * 0.999 + new * 0.001, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(local)
    state = averaged.state_dict()
    assert set(glcan_fx.plain_state_dict(state)) == set(Net().state_dict())
    local.load_state_dict(averaged.module.state_dict())
    assert Plan.from_state_dict(local.state_dict()) == local.plan
