"""HeRALoss against eq. 4 and 8 of the method, written as loops over anchors and candidates in float64."""

from __future__ import annotations

import math

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor

import hera_trainer.objectives.contrastive as loss_module
from hera_trainer.alignment.contrast import spread
from hera_trainer.objectives.contrastive import MIN_TEMPERATURE, HeRALoss
from hera_trainer.objectives.queue import SampleQueue


def inputs(m: int, batch: int, d_model: int = 6, d_teacher: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(m, batch, d_model, generator=generator)
    teacher = (
        torch.randn(batch, d_teacher, generator=generator) * torch.rand(batch, 1, generator=generator).mul(3).exp()
    )
    return heads, teacher


SIMILARITIES = ["dot", "cosine", "centered_cosine"]


def made_similar(vectors: dict[int, Tensor], similarity: str) -> dict[int, Tensor]:
    """Vectors whose dot products are compared."""
    if similarity == "dot":
        return vectors
    if similarity == "centered_cosine":
        mean = sum(vectors.values()) / len(vectors)
        vectors = {i: vector - mean for i, vector in vectors.items()}
    return {i: vector / vector.pow(2).sum().sqrt() for i, vector in vectors.items()}


def loss_by_loops(
    heads: Tensor,
    teacher: Tensor,
    log_temperature: Tensor,
    k: int,
    similarity: str,
    valid: list[bool] | None = None,
    teacher_similarity: str = "cosine",
) -> Tensor:
    """Eq. 4: a target of 1/k on each of the teacher's k nearest others. Eq. 8: cross-entropy, its mean over all."""
    members = [i for i in range(len(teacher)) if valid is None or valid[i]]
    tau = log_temperature.exp()
    teacher_of = made_similar({i: teacher[i].detach() for i in members}, teacher_similarity)
    losses = []
    for head in heads:
        z = made_similar({i: head[i] for i in members}, similarity)
        for i in members:
            others = [j for j in members if j != i]
            positives = sorted(others, key=lambda j, i=i: -float((teacher_of[i] * teacher_of[j]).sum()))[:k]
            partition = sum(((z[i] * z[j]).sum() / tau).exp() for j in others)
            losses.append(sum(partition.log() - (z[i] * z[j]).sum() / tau for j in positives) / k)
    return torch.stack(losses).mean()


def value_and_gradients(
    criterion: HeRALoss, heads: Tensor, teacher: Tensor, valid: Tensor | None = None, autocast: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    heads = heads.clone().requires_grad_()
    criterion.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = criterion(heads, teacher, valid)
    loss.backward()
    return loss.detach(), heads.grad, criterion.log_temperature.grad


def assert_equals_the_loops(
    criterion: HeRALoss, heads: Tensor, teacher: Tensor, valid: list[bool] | None = None
) -> None:
    mask = None if valid is None else torch.tensor(valid)
    loss, grad, temperature_grad = value_and_gradients(criterion, heads, teacher, mask)
    exact_heads = heads.double().requires_grad_()
    exact_log = criterion.log_temperature.detach().double().requires_grad_()
    settings = (criterion.num_neighbors, criterion.similarity, valid, criterion.teacher_similarity)
    expected = loss_by_loops(exact_heads, teacher.double(), exact_log, *settings)
    expected_grad, expected_temperature_grad = torch.autograd.grad(expected, [exact_heads, exact_log])
    # float32 against float64; logits are up to 1 / tau, so an error of one rounding is 1e-6 of the loss.
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-5 * expected_grad.abs().max().item())
    torch.testing.assert_close(temperature_grad.double(), expected_temperature_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("m", "k", "batch"), [(1, 1, 3), (1, 3, 8), (2, 3, 8), (3, 2, 9), (2, 6, 8), (1, 10, 12)])
def test_value_and_gradients(m: int, k: int, batch: int, similarity: str) -> None:
    criterion = HeRALoss(num_neighbors=k, temperature=2.0 if similarity == "dot" else 0.07, similarity=similarity)
    assert_equals_the_loops(criterion, *inputs(m, batch))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_similarities_of_the_teacher(similarity: str) -> None:
    heads, teacher = inputs(2, 9)
    teacher = teacher + 3.0  # a common part, which decides who is near by dot products
    losses = [HeRALoss(3, teacher_similarity=other)(heads, teacher).item() for other in SIMILARITIES]
    assert len(set(losses)) == 3
    assert_equals_the_loops(HeRALoss(3, teacher_similarity=similarity), heads, teacher)


@pytest.mark.parametrize(("similarity", "temperature"), [("dot", 1.0), ("cosine", 0.07), ("centered_cosine", 0.3)])
def test_each_similarity_begins_at_a_temperature_of_its_own(similarity: str, temperature: float) -> None:
    assert HeRALoss(similarity=similarity).temperature == pytest.approx(temperature)
    assert HeRALoss(similarity=similarity, temperature=0.5).temperature == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["similarity", "teacher_similarity"])
def test_unknown_similarities_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be one of \('dot', 'cosine', 'centered_cosine'\), got 'l2'"):
        HeRALoss(**{name: "l2"})


def test_what_all_samples_share_does_not_count_when_centered() -> None:
    """Nearly parallel vectors are as good as any others; uncentred, their loss says nothing and is warned of."""
    heads, teacher = inputs(2, 12)
    parallel = heads + 30 * torch.nn.functional.normalize(torch.ones(6), dim=0)
    centered, plain = HeRALoss(3), HeRALoss(3, similarity="cosine")
    torch.testing.assert_close(centered(parallel, teacher), centered(heads, teacher), rtol=1e-4, atol=0)
    assert plain(parallel, teacher).item() == pytest.approx(math.log(11), abs=0.02)
    valid = torch.ones(12, dtype=torch.bool)
    flat, spread_out = spread(parallel, valid), spread(heads, valid)
    assert "Set `similarity='centered_cosine'`" in plain.advice(flat)
    assert "of 2 of 2 aligned heads" in plain.advice(flat)
    assert plain.advice(spread_out) is None and centered.advice(flat) is None


def test_a_head_that_says_the_same_of_all_samples_has_no_more_gradient_than_others() -> None:
    """Vectors of norm 1 or so that differ by 1e-5 in a common part of 1: by autograd of the loss with the differences
    divided by a hundredth of the mean norm. Other heads are what they are without it."""
    heads, teacher = inputs(2, 12)
    heads[1] = torch.nn.functional.normalize(torch.ones(6), dim=0) + 1e-5 * heads[1]
    criterion = HeRALoss(3)
    loss, grad, _ = value_and_gradients(criterion, heads, teacher)
    alone, alone_grad, _ = value_and_gradients(criterion, heads[:1], teacher)
    torch.testing.assert_close(grad[0], alone_grad[0] / 2)
    leaf = heads[1:].clone().double().requires_grad_()
    differences = (leaf - leaf.mean(1, keepdim=True)) / (0.01 * leaf.norm(dim=-1).mean().detach())
    expected = loss_by_loops(differences, teacher.double(), torch.tensor(math.log(0.3)).double(), 3, "dot")
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    assert loss.item() == pytest.approx((alone.item() + expected.item()) / 2, rel=1e-6)
    torch.testing.assert_close(
        grad[1].double(), expected_grad[0] / 2, rtol=1e-2, atol=1e-2 * grad[1].abs().max().item()
    )
    assert grad[1].norm() < 10 * grad[0].norm()
    valid = torch.ones(12, dtype=torch.bool)
    assert "1 of 2 aligned heads give all samples the same" in criterion.advice(spread(heads, valid))
    assert criterion.advice(spread(heads[:1], valid)) is None


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_temperatures(temperature: float) -> None:
    assert_equals_the_loops(HeRALoss(3, temperature=temperature), *inputs(2, 8))


@pytest.mark.parametrize("left_out", [(), (1, 6), (0, 6, 7, 8)])
def test_samples_that_are_not_valid_are_neither_anchors_nor_candidates(left_out: tuple[int, ...]) -> None:
    heads, teacher = inputs(2, 9)
    valid = [i not in left_out for i in range(9)]
    criterion = HeRALoss(num_neighbors=3)
    assert_equals_the_loops(criterion, heads, teacher, valid)
    # Whatever stands in their place, they change nothing and get no gradient.
    mask = torch.tensor(valid)
    clean = value_and_gradients(criterion, heads, teacher, mask)
    heads[:, ~mask], teacher[~mask] = math.nan, math.inf
    dirty = value_and_gradients(criterion, heads, teacher, mask)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(dirty[1][:, ~mask], torch.zeros(2, int((~mask).sum()), 6))


def test_a_mask_equals_leaving_the_samples_out() -> None:
    heads, teacher = inputs(2, 9)
    mask = torch.tensor([True, False, True, True, True, True, False, True, True])
    criterion = HeRALoss(num_neighbors=3)
    assert torch.equal(criterion(heads, teacher, mask), criterion(heads[:, mask], teacher[mask]))


def test_the_uniform_value() -> None:
    """Equal representations give a uniform softmax over the B - 1 others, whatever the teacher says."""
    _, teacher = inputs(1, 9)
    heads = torch.ones(3, 9, 6)
    assert HeRALoss(num_neighbors=4)(heads, teacher).item() == pytest.approx(math.log(8), abs=1e-6)


def test_the_smallest_pool_that_counts() -> None:
    heads, teacher = inputs(2, 6)
    assert_equals_the_loops(HeRALoss(num_neighbors=4), heads, teacher)
    assert HeRALoss(num_neighbors=4)(heads, teacher) > 0
    assert HeRALoss(num_neighbors=5)(heads, teacher) == 0  # every other sample would be a positive


@pytest.mark.parametrize("content", ["numbers", "nan", "inf"])
@pytest.mark.parametrize("num_valid", [0, 1, 2, 4])
def test_a_pool_that_is_too_small_gives_a_connected_zero(num_valid: int, content: str) -> None:
    heads, teacher = inputs(2, 8)
    if content != "numbers":
        heads[:] = float(content)
        teacher[:] = float(content)
    mask = torch.arange(8) < num_valid
    criterion = HeRALoss(num_neighbors=3)
    for arguments in ((heads, teacher, mask), (heads[:, :num_valid], teacher[:num_valid])):
        loss, grad, temperature_grad = value_and_gradients(criterion, *arguments)
        assert (loss.shape, loss.dtype, loss.item()) == ((), torch.float32, 0.0)
        assert torch.equal(grad, torch.zeros_like(arguments[0]))
        assert temperature_grad.item() == 0.0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computed_in_float32_whatever_comes_in(dtype: torch.dtype, autocast: bool) -> None:
    heads, teacher = (x.to(dtype) for x in inputs(2, 8))
    criterion = HeRALoss(num_neighbors=3)
    loss, grad, temperature_grad = value_and_gradients(criterion, heads.float(), teacher.float())
    given = value_and_gradients(criterion, heads, teacher, autocast=autocast)
    assert given[0].dtype == torch.float32
    assert torch.equal(given[0], loss)
    assert torch.equal(given[1], grad.to(dtype))
    assert torch.equal(given[2], temperature_grad)


@pytest.mark.parametrize("autocast", [False, True])
def test_too_small_pools_in_low_precision(autocast: bool) -> None:
    heads, teacher = (x.bfloat16() for x in inputs(2, 4))
    loss, grad, _ = value_and_gradients(HeRALoss(num_neighbors=3), heads, teacher, autocast=autocast)
    assert loss.dtype == torch.float32
    assert torch.equal(grad, torch.zeros_like(heads))


def test_the_teacher_gets_no_gradient() -> None:
    heads, teacher = inputs(1, 8)
    heads.requires_grad_()
    teacher.requires_grad_()
    HeRALoss(num_neighbors=3)(heads, teacher).backward()
    assert heads.grad.abs().sum() > 0
    assert teacher.grad is None


def test_the_log_temperature_is_the_only_state() -> None:
    criterion = HeRALoss()
    assert [name for name, _ in criterion.named_parameters()] == ["log_temperature"]
    assert list(criterion.state_dict()) == ["log_temperature"]
    assert criterion.log_temperature.shape == ()
    assert criterion.log_temperature.dtype == torch.float32
    assert criterion.log_temperature.item() == pytest.approx(math.log(0.3), rel=1e-6)
    assert criterion.temperature == pytest.approx(0.3, rel=1e-6)
    assert (criterion.num_neighbors, criterion.teacher_similarity) == (10, "cosine")
    assert criterion.similarity == "centered_cosine"


def test_a_temperature_that_is_not_learned() -> None:
    criterion = HeRALoss(num_neighbors=3, learn_temperature=False)
    assert not criterion.log_temperature.requires_grad
    for batch in (8, 4):  # a loss, and a pool that is too small
        heads, teacher = inputs(1, batch)
        _, grad, temperature_grad = value_and_gradients(criterion, heads, teacher)
        assert temperature_grad is None
        assert (grad.abs().sum() > 0) == (batch == 8)
    learned = HeRALoss(num_neighbors=3)
    assert torch.equal(criterion(*inputs(1, 8)), learned(*inputs(1, 8)))


def test_clamping_happens_in_place_and_not_in_the_forward() -> None:
    criterion = HeRALoss(num_neighbors=3)
    parameter = criterion.log_temperature
    criterion.after_step()
    assert criterion.temperature == pytest.approx(0.3, rel=1e-6)

    with torch.no_grad():
        parameter.fill_(math.log(0.005))
    assert_equals_the_loops(criterion, *inputs(1, 8))  # below the floor, and with a gradient
    assert parameter.grad.abs() > 0
    criterion.after_step()
    assert criterion.log_temperature is parameter
    assert criterion.temperature == pytest.approx(MIN_TEMPERATURE, rel=1e-6) == 0.01
    assert parameter.requires_grad


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_neighbors", 0),
        ("num_neighbors", -3),
        ("temperature", 0.0),
        ("temperature", 0.009),
        ("temperature", math.nan),
    ],
)
def test_refused_settings(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{setting}` must be at least .*{value}"):
        HeRALoss(**{setting: value})


def test_a_step_against_the_gradient_lowers_the_loss() -> None:
    heads, teacher = inputs(2, 10)
    criterion = HeRALoss(num_neighbors=3)
    loss, grad, _ = value_and_gradients(criterion, heads, teacher)
    assert criterion(heads - 0.01 * grad, teacher) < loss
    assert "num_neighbors=3" in repr(criterion)


# --- With past samples among the candidates --------------------------------------------------------------------------


def loss_with_queue_by_loops(
    heads: Tensor,
    teacher: Tensor,
    past_heads: Tensor,
    past_teacher: Tensor,
    log_temperature: Tensor,
    k: int,
    similarity: str,
) -> Tensor:
    """Anchors are the B samples; candidates the others and the past samples of other images than the anchor's."""
    batch, tau = len(teacher), log_temperature.exp()
    vectors = [vector / vector.norm() for vector in torch.cat([teacher, past_teacher])]
    losses = []
    for head in torch.cat([heads, past_heads], dim=1):
        z = made_similar(dict(enumerate(head)), similarity)
        for i in range(batch):
            others = [j for j in range(batch) if j != i]
            others += [batch + q for q in range(len(past_teacher)) if not torch.equal(past_teacher[q], teacher[i])]
            if len(others) <= k:
                continue
            positives = sorted(others, key=lambda j, i=i: -float(vectors[i] @ vectors[j]))[:k]
            partition = sum(((z[i] @ z[j]) / tau).exp() for j in others)
            losses.append(sum(partition.log() - (z[i] @ z[j]) / tau for j in positives) / k)
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("batch", "past", "k"), [(6, 5, 3), (2, 9, 4), (1, 6, 4), (3, 4, 5)])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_past_samples_are_candidates_and_no_anchors(batch: int, past: int, k: int, similarity: str) -> None:
    heads, teacher = inputs(2, batch)
    past_heads, past_teacher = inputs(2, past, seed=1)
    past_teacher[1] = teacher[0]  # the first anchor's own image, seen before
    queue = SampleQueue(size=past)
    queue.push(past_heads, past_teacher)
    criterion = HeRALoss(num_neighbors=k, similarity=similarity)
    leaf = heads.clone().requires_grad_()
    loss = criterion(leaf, teacher, queue=queue)
    grad, temperature_grad = torch.autograd.grad(loss, [leaf, criterion.log_temperature])
    exact, log = heads.double().requires_grad_(), criterion.log_temperature.detach().double().requires_grad_()
    others = (teacher.double(), past_heads.double(), past_teacher.double())
    expected = loss_with_queue_by_loops(exact, *others, log, k, similarity)
    expected_grad, expected_temperature_grad = torch.autograd.grad(expected, [exact, log])
    torch.testing.assert_close(loss.double(), expected.detach().double(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-5 * expected_grad.abs().max().item())
    torch.testing.assert_close(temperature_grad.double(), expected_temperature_grad, rtol=1e-5, atol=1e-5)


def test_an_empty_queue_is_none() -> None:
    heads, teacher = inputs(2, 8)
    criterion = HeRALoss(num_neighbors=3)
    assert torch.equal(criterion(heads, teacher, queue=SampleQueue(4)), criterion(heads, teacher))


def test_an_image_is_known_again_when_its_vector_was_rounded_otherwise() -> None:
    heads, teacher = inputs(2, 6)
    queue = SampleQueue(size=6)
    queue.push(heads, teacher * (1 + 2e-6 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(0))))
    assert not torch.equal(queue.teacher, teacher)
    assert torch.equal(queue.same_image(teacher), torch.eye(6, dtype=torch.bool))


def test_a_queue_of_the_anchors_own_images_gives_a_connected_zero() -> None:
    heads, teacher = inputs(2, 2)
    queue = SampleQueue(size=9)
    queue.push(*(x.repeat_interleave(4, dim=-2) for x in inputs(2, 1, seed=1)))
    queue.push(inputs(2, 2, seed=2)[0], teacher)
    queue.teacher[:4] = teacher[0]  # five past samples, all of the first anchor's image
    leaf = heads.clone().requires_grad_()
    loss = HeRALoss(num_neighbors=4)(leaf[:, :1], teacher[:1], queue=queue)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


# --- Some heads and anchors at a time --------------------------------------------------------------------------------


def queue_of(m: int, past: int, teacher: Tensor) -> SampleQueue:
    queue = SampleQueue(past)
    past_heads, past_teacher = inputs(m, past, seed=1)
    past_teacher[1] = teacher[0]  # an anchor's own image
    queue.push(past_heads, past_teacher)
    return queue


@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("bound", [1, 40, 250, 700])  # an anchor; some; two heads; three
def test_the_bound_on_logits_changes_nothing_but_memory(
    monkeypatch: pytest.MonkeyPatch, bound: int, similarity: str, past: int
) -> None:
    heads, teacher = inputs(5, 11)
    criterion = HeRALoss(3, temperature=2.0 if similarity == "dot" else 0.07, similarity=similarity)
    queue = queue_of(5, past, teacher) if past else None

    def run() -> tuple[Tensor, ...]:
        leaf = heads.clone().requires_grad_()
        loss = criterion(leaf, teacher, queue=queue)
        return loss, *torch.autograd.grad(3.0 * loss, [leaf, criterion.log_temperature])

    whole = run()
    monkeypatch.setattr(loss_module, "MAX_LOGITS", bound)
    with LargestTensor() as seen:
        parts = run()
    # The inputs, and one row of logits where the bound is smaller than that.
    assert seen.largest <= max(bound, 5 * (11 + past) * 6)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(criterion(heads, teacher, queue=queue), parts[0])


def test_large_pools_hold_no_square_of_all_heads() -> None:
    m, batch = 3, 2304  # a head's logits are more than the bound
    assert batch**2 > loss_module.MAX_LOGITS
    heads, teacher = inputs(m, batch)
    heads.requires_grad_()
    criterion = HeRALoss(10)
    with LargestTensor() as seen:
        loss = criterion(heads, teacher)
        grad, temperature_grad = torch.autograd.grad(loss, [heads, criterion.log_temperature])
    assert seen.largest <= batch**2  # the teacher's similarities; the logits of all heads would be three times that
    exact, log = heads.detach().double().requires_grad_(), criterion.log_temperature.detach().double().requires_grad_()
    z = torch.nn.functional.normalize(exact - exact.mean(1, keepdim=True), dim=-1)
    logits = (z @ z.transpose(1, 2) / log.exp()).masked_fill(torch.eye(batch, dtype=torch.bool), -math.inf)
    unit = torch.nn.functional.normalize(teacher, dim=-1)
    positives = (unit @ unit.T).fill_diagonal_(-math.inf).topk(10).indices.expand(m, -1, -1)
    expected = -logits.log_softmax(-1).gather(-1, positives).mean()
    expected_grad, expected_temperature_grad = torch.autograd.grad(expected, [exact, log])
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-5 * expected_grad.abs().max().item())
    torch.testing.assert_close(temperature_grad.double(), expected_temperature_grad, rtol=1e-5, atol=0)


def test_a_head_of_zeros_gets_a_finite_gradient() -> None:
    heads, teacher = inputs(2, 8)
    heads[1] = 0.0
    _, grad, _ = value_and_gradients(HeRALoss(3), heads, teacher)
    assert torch.equal(grad[1], torch.zeros(8, 6))
    assert grad[0].abs().sum() > 0


def test_the_gradient_of_the_temperature_alone_and_of_the_heads_alone() -> None:
    heads, teacher = inputs(2, 9)
    criterion = HeRALoss(3)
    _, grad, temperature_grad = value_and_gradients(criterion, heads, teacher)
    (alone,) = torch.autograd.grad(criterion(heads, teacher), criterion.log_temperature)
    assert torch.equal(alone, temperature_grad)
    criterion.log_temperature.requires_grad_(False)
    leaf = heads.clone().requires_grad_()
    (alone,) = torch.autograd.grad(criterion(leaf, teacher), leaf)
    assert torch.equal(alone, grad)
