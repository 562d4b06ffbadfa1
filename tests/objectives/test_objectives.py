"""Objectives beside the paper's, against their definitions, and the names by which all are chosen."""

from __future__ import annotations

import math

import pytest
import torch
from reference import cka_loss, feature_loss, uniformity_loss
from torch import Tensor

from hera_trainer import AlignmentObjective, HeRALoss, register_objective
from hera_trainer.objectives.cka import CKALoss
from hera_trainer.objectives.feature import FeatureLoss
from hera_trainer.objectives.registry import get_objective
from hera_trainer.objectives.uniformity import UniformityLoss


def inputs(batch: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 6, generator=generator), torch.randn(batch, 5, generator=generator)


def prepared(name: str) -> AlignmentObjective:
    objective = get_objective(name)()
    objective.prepare(num_heads=2, head_width=6, teacher_width=5, seed=1)
    return objective


def by_definition(objective: AlignmentObjective, heads: Tensor, teacher: Tensor) -> Tensor:
    if isinstance(objective, FeatureLoss):
        return feature_loss(heads, teacher, dict(objective.named_parameters()))
    return cka_loss(heads, teacher) if isinstance(objective, CKALoss) else uniformity_loss(heads)


@pytest.mark.parametrize("left_out", [(), (1, 4, 6)])
@pytest.mark.parametrize("name", ["feature", "cka", "uniformity"])
def test_values_and_gradients(name: str, left_out: tuple[int, ...]) -> None:
    objective = prepared(name)
    heads, teacher = inputs()
    valid = torch.tensor([i not in left_out for i in range(9)])
    own = list(objective.parameters())
    leaf = heads.clone().requires_grad_()
    expected = by_definition(objective, leaf[:, valid], teacher[valid])
    expected_grads = torch.autograd.grad(expected, [leaf, *own])
    heads[:, ~valid], teacher[~valid] = math.nan, math.nan  # what takes no part changes nothing
    leaf = heads.clone().requires_grad_()
    loss = objective(leaf, teacher, valid)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(torch.autograd.grad(loss, [leaf, *own]), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = leaf.bfloat16()
        assert torch.equal(objective(rounded.float(), teacher, valid), objective(rounded, teacher, valid))


def test_cka_of_a_head_that_says_the_same_of_all_samples() -> None:
    heads, teacher = inputs()
    heads[1] = 1 + 1e-5 * heads[1]
    leaf = heads.clone().requires_grad_()
    objective = prepared("cka")
    (grad,) = torch.autograd.grad(objective(leaf, teacher), leaf)
    alone = heads[:1].clone().requires_grad_()
    (expected,) = torch.autograd.grad(cka_loss(alone, teacher), alone)
    torch.testing.assert_close(grad[0], expected[0] / 2, rtol=1e-4, atol=1e-6)
    assert grad[1].norm() < grad[0].norm()
    spread = torch.tensor([0.5, 1e-8])
    assert "1 of 2 aligned heads" in objective.advice(spread) and objective.advice(spread[:1]) is None


@pytest.mark.parametrize("name", ["feature", "cka", "uniformity", "contrastive"])
def test_a_pool_that_is_too_small_gives_a_connected_zero(name: str) -> None:
    objective = prepared(name)
    heads, teacher = inputs(batch=13)
    for count in range(objective.least_samples):
        leaf = heads.clone().requires_grad_()
        loss = objective(leaf, teacher, torch.arange(13) < count)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert loss == 0 and torch.equal(grad, torch.zeros_like(heads))
    assert objective(heads, teacher, torch.arange(13) < objective.least_samples) != 0


def test_what_the_objectives_say_of_known_spaces() -> None:
    heads, teacher = inputs()
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2)))[0]
    same = 3.0 * teacher @ rotation + 1.0  # rotated, scaled and moved
    assert CKALoss()(same[None], teacher).item() == pytest.approx(0.0, abs=1e-5)
    assert CKALoss()(heads, teacher) > 0.2
    assert UniformityLoss()(torch.ones(1, 9, 6), teacher).item() == pytest.approx(0.0, abs=1e-5)  # its largest value
    corners = torch.cat([torch.eye(6), -torch.eye(6)])[None]  # cosines of 0 and -1
    expected = math.log((10 * math.exp(-4) + math.exp(-8)) / 11)
    assert UniformityLoss()(corners, torch.zeros(12, 5)).item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(UniformityLoss()(heads, teacher), UniformityLoss()(heads, -teacher))  # no teacher


def test_projectors_are_drawn_alike_in_every_process_and_apart_for_every_head() -> None:
    first, second = prepared("feature"), prepared("feature")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a[0], a[1])
    assert [tuple(p.shape) for p in first.parameters()] == [(2, 6, 5), (2, 1, 5), (2, 5, 5), (2, 1, 5)]
    with pytest.raises(RuntimeError, match="`prepare` makes the projectors"):
        FeatureLoss()(*inputs())
    with pytest.raises(ValueError, match="teacher_width"):
        FeatureLoss().prepare(2, 8, 0, seed=0)


def test_names() -> None:
    assert get_objective("contrastive") is HeRALoss
    with pytest.raises(ValueError, match=r"must be one of 'cka', 'contrastive', .*got 'none'.*register_objective"):
        get_objective("none")
    with pytest.raises(TypeError, match="derived from `AlignmentObjective`"):
        register_objective("wrong")(dict)

    @register_objective("of a test")
    class Mine(AlignmentObjective):
        pass

    assert get_objective("of a test") is Mine
