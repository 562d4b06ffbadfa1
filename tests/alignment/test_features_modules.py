"""What modules return is given again, or computed again where that would not be the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hera_trainer.alignment.features import ImageFeatures


class Tower(nn.Module):
    """Returns what it is told to."""

    def __init__(self, returns):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.returns, self.calls = returns, 0

    def forward(self, x, **kwargs):
        self.calls += 1
        return self.returns(self.linear(x))


class Model(nn.Module):
    def __init__(self, returns=lambda h: h, read=lambda h: h, scale=None):
        super().__init__()
        self.towers = nn.ModuleList([Tower(returns)])
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.requires_grad_(False)
        self.read, self.scale = read, scale

    def forward(self, x, **kwargs):
        h = self.read(self.towers[0](x if self.scale is None else x * self.scale, **kwargs))
        for layer in self.layers:
            h = layer(h)
        return h


def two_passes(model, batches, limit=2**20, again=None, **kwargs):
    """Outputs of the training pass, and how often the tower ran in it."""
    features = ImageFeatures(model, model.layers, limit)
    with torch.no_grad(), features.first_pass():
        for batch in batches:
            with features.recorded():
                model(batch)
    torch.manual_seed(0)
    assert model.towers[0].calls == len(batches)
    outputs = []
    for position, batch in enumerate(batches if again is None else again):
        with features.reused(position):
            outputs.append(model(batch, **kwargs))
    return outputs, model.towers[0].calls - len(batches)


BATCHES = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
RETURNS = {
    "a tensor": (lambda h: h, lambda h: h),
    "a view": (lambda h: h, lambda h: h[:, :2].repeat(1, 2)),
    "nested": (lambda h: {"a": (h * 2, [h + 1], None), "b": 3}, lambda out: out["a"][1][0] * out["b"]),
    "changed containers": (lambda h: {"a": h}, lambda out: out.update(a=out["a"] + 1) or out["a"]),
}


@pytest.mark.parametrize("name", RETURNS)
def test_outputs_are_given_again(name):
    model = Model(*RETURNS[name])
    expected = [model(batch) for batch in BATCHES]
    model.towers[0].calls = 0
    outputs, calls = two_passes(model, BATCHES)
    assert calls == 0
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


class Opaque:
    def __init__(self, h):
        self.h = h


AGAIN = {
    "written to in place": (lambda h: h, lambda h: h.mul_(2)),
    "an object that is not known": (Opaque, lambda out: out.h),
    "random": (lambda h: h + torch.rand(1), lambda h: h),
}


@pytest.mark.parametrize("name", AGAIN)
def test_what_is_computed_again(name):
    model = Model(*AGAIN[name])
    outputs, calls = two_passes(model, BATCHES)
    assert calls == 3
    torch.manual_seed(0)
    assert all(torch.equal(a, model(batch)) for a, batch in zip(outputs, BATCHES, strict=True))


@pytest.mark.parametrize("opaque", [False, True])
def test_a_module_that_runs_again_is_given_what_it_was_given(opaque):
    """Though nothing else looks at it. The output of the first of two modules that both rest is not kept."""
    model = Model()
    behind = Tower(Opaque if opaque else lambda h: h).requires_grad_(False)
    model.towers.append(behind)
    model.read = lambda h: behind(h).h if opaque else behind(h)
    expected = [model(batch) for batch in BATCHES]
    model.towers[0].calls = behind.calls = 0
    outputs, calls = two_passes(model, BATCHES)
    assert (calls, behind.calls) == (0, 6 if opaque else 3)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    features = ImageFeatures(model, model.layers, 2**20)
    with torch.no_grad(), features.first_pass(), features.recorded():
        model(BATCHES[0])
    assert features.device_bytes == 3 * 4 * 4


@pytest.mark.parametrize(
    ("again", "kwargs"), [([batch[:2] for batch in BATCHES], {}), (BATCHES, {"output_hidden_states": True})]
)
def test_other_arguments_are_computed_anew(again, kwargs):
    model = Model()
    expected = [model(batch) for batch in again]
    model.towers[0].calls = 0
    outputs, calls = two_passes(model, BATCHES, again=again, **kwargs)
    assert calls == 3
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_gradient_flows_through_a_frozen_module_to_what_is_trained_before_it():
    model = Model(scale=nn.Parameter(torch.ones(4)))
    outputs, calls = two_passes(model, BATCHES)
    assert calls == 3
    sum(output.sum() for output in outputs).backward()
    assert model.scale.grad.any()


def test_modules_that_all_processes_must_run_alike():
    class Divided(nn.Parameter):
        ds_status = "of a parameter of DeepSpeed ZeRO-3"

    divided, synchronized = Model(), Model()
    divided.towers[0].linear.weight = Divided(torch.randn(4, 4), requires_grad=False)
    synchronized.towers[0].norm = nn.SyncBatchNorm(4)
    synchronized.towers[0].requires_grad_(False)
    for model in (divided, synchronized):
        assert two_passes(model, BATCHES)[1] == 3


def test_nothing_is_left_after_an_error():
    def broken(h):
        raise KeyError("broken")

    model = Model(read=broken)
    features = ImageFeatures(model, model.layers, 2**20)
    with pytest.raises(KeyError), torch.no_grad(), features.first_pass(), features.recorded():
        model(BATCHES[0])
    assert not torch.overrides._get_current_function_mode_stack()
    assert "forward" not in model.towers[0].__dict__
    model.read = lambda h: h
    with features.reused(1):  # of a micro-batch that the first pass never came to
        model(BATCHES[0])
    assert model.towers[0].calls == 2
