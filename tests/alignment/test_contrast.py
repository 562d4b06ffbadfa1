"""Pools of samples: which samples are compared, and what is reported about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor

from hera_trainer.alignment.contrast import Contrast, PoolLoss, repeated, spread
from hera_trainer.alignment.eval_pools import EvalPools
from hera_trainer.alignment.meter import AlignmentMeter
from hera_trainer.data.batch import TeacherBatch
from hera_trainer.objectives.cka import CKALoss
from hera_trainer.objectives.contrastive import HeRALoss
from hera_trainer.objectives.feature import FeatureLoss
from hera_trainer.objectives.objective import AlignmentObjective
from hera_trainer.objectives.queue import SampleQueue
from hera_trainer.objectives.uniformity import UniformityLoss


def batch_of(size: int, seed: int = 0, without_image: tuple[int, ...] = (), without_token: tuple[int, ...] = ()):
    """Head vectors `[2, B, 6]`, teacher batch and pooling mask `[B, 4]` of random samples."""
    generator = torch.Generator().manual_seed(seed)
    present, mask = torch.ones(size, dtype=torch.bool), torch.ones(size, 4, dtype=torch.bool)
    present[list(without_image)] = False
    mask[list(without_token)] = False
    vectors = torch.randn(size, 5, generator=generator).masked_fill(~present[:, None], 0.0)
    return torch.randn(2, size, 6, generator=generator), TeacherBatch(vectors, present), mask


def gradients(criterion: HeRALoss, heads: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients at heads and log temperature, by plain autograd."""
    leaf = heads.clone().requires_grad_()
    loss = criterion(leaf, *arguments)
    return loss.detach(), *torch.autograd.grad(loss, [leaf, criterion.log_temperature])


# --- One pool --------------------------------------------------------------------------------------------------------


def test_which_samples_can_take_part() -> None:
    _, teacher, mask = batch_of(9, without_image=(1, 4), without_token=(4, 6))
    mask[2] = torch.tensor([False, False, True, False])  # one token is enough
    assert teacher.valid(mask).tolist() == [i in (0, 2, 3, 5, 7, 8) for i in range(9)]


@pytest.mark.parametrize("criterion", [HeRALoss(num_neighbors=3), CKALoss(), UniformityLoss()])
def test_hooks_of_activation_offloading_see_nothing_of_it(criterion: AlignmentObjective) -> None:
    """Its backward within the step's forward would be taken for the step's first."""
    packed: list[Tensor] = []
    heads, teacher, mask = batch_of(9)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        pool = Contrast(criterion)(heads.requires_grad_(), teacher.vectors, teacher.valid(mask))
    assert not packed and pool.heads_grad.abs().max() > 0


@pytest.mark.parametrize("left_out", [(), (1, 4, 6)])
def test_a_pool_is_compared_with_itself(left_out: tuple[int, ...]) -> None:
    heads, teacher, mask = batch_of(9, without_image=left_out)
    criterion = HeRALoss(num_neighbors=3)
    pool = Contrast(criterion)(heads.requires_grad_(), teacher.vectors, teacher.valid(mask))
    members = [i for i in range(9) if i not in left_out]
    loss, grad, temperature_grad = gradients(criterion, heads.detach()[:, members], teacher.vectors[members])
    assert torch.equal(pool.value, loss)
    assert torch.equal(pool.heads_grad[:, members], grad)
    assert torch.equal(pool.heads_grad[:, list(left_out)], torch.zeros(2, len(left_out), 6))
    assert torch.equal(pool.parameter_grads[0], temperature_grad)
    assert [float(x) for x in (pool.samples, pool.left_out, pool.skipped, pool.not_finite)] == [
        len(members),
        len(left_out),
        0.0,
        0.0,
    ]
    assert heads.grad is None and criterion.log_temperature.grad is None  # computed, not accumulated


def test_gradients_are_computed_where_none_are_recorded() -> None:
    heads, teacher, mask = batch_of(8)
    criterion = HeRALoss(num_neighbors=3)
    with torch.no_grad():
        pool = Contrast(criterion)(heads, teacher.vectors, teacher.valid(mask))
    assert torch.equal(pool.heads_grad, gradients(criterion, heads, teacher.vectors)[1])


@pytest.mark.parametrize(("missing", "skipped"), [((), False), ((0, 3), False), ((0, 3, 5), True), (range(7), True)])
def test_a_pool_is_skipped_below_k_plus_two(missing: Sequence[int], skipped: bool) -> None:
    heads, teacher, mask = batch_of(7, without_image=tuple(missing))
    pool = Contrast(HeRALoss(num_neighbors=3))(heads, teacher.vectors, teacher.valid(mask))
    zero = [bool((x == 0).all()) for x in (pool.value, pool.heads_grad, *pool.parameter_grads, pool.samples)]
    assert zero == [skipped] * 4
    assert (float(pool.skipped), float(pool.left_out), float(pool.not_finite)) == (float(skipped), len(missing), 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_pool_that_is_not_finite_is_skipped_and_counted(value: float) -> None:
    heads, teacher, mask = batch_of(8)
    heads[1, 2, 0] = value
    queue = SampleQueue(size=20)
    pool = Contrast(HeRALoss(num_neighbors=3), queue=queue)(heads, teacher.vectors, teacher.valid(mask))
    for x in (pool.value, pool.heads_grad, *pool.parameter_grads, pool.samples):
        assert (x == 0).all()
    assert (float(pool.skipped), float(pool.not_finite)) == (1.0, 1.0)
    assert len(queue) == 7
    assert queue.heads.isfinite().all()


def test_a_temperature_that_is_not_learned() -> None:
    heads, teacher, mask = batch_of(8)
    learned, fixed = HeRALoss(num_neighbors=3), HeRALoss(num_neighbors=3, learn_temperature=False)
    pool = Contrast(fixed)(heads, teacher.vectors, teacher.valid(mask))
    assert pool.parameter_grads == []
    assert torch.equal(pool.heads_grad, gradients(learned, heads, teacher.vectors)[1])


@pytest.mark.parametrize("cuts", [(8,), (4, 4), (1, 5, 2)])
def test_carriers_of_micro_batches_add_up_to_the_pool(cuts: tuple[int, ...]) -> None:
    heads, teacher, mask = batch_of(8)
    criterion = HeRALoss(num_neighbors=3)
    pool = Contrast(criterion)(heads, teacher.vectors, teacher.valid(mask))
    loss, grad, temperature_grad = gradients(criterion, heads, teacher.vectors)
    total, start, found = 0.0, 0, []
    for size in cuts:
        leaf = (heads[:, start : start + size] + 1.0).requires_grad_()  # their values do not count
        carrier = pool.carrier(leaf, [criterion.log_temperature], start, share=1 / len(cuts))
        assert carrier.item() == pytest.approx(loss.item() / len(cuts), rel=1e-6)
        (3.0 * carrier).backward()  # whatever scales the loss scales both gradients
        total, start = total + carrier.item(), start + size
        found.append(leaf.grad)
    assert total == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(torch.cat(found, dim=1), 3.0 * grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(criterion.log_temperature.grad, 3.0 * temperature_grad, rtol=1e-6, atol=1e-7)


def test_the_queue_holds_the_last_valid_samples() -> None:
    criterion, queue = HeRALoss(num_neighbors=3), SampleQueue(size=6)
    contrast = Contrast(criterion, queue=queue)
    first, teacher, mask = batch_of(5, seed=1, without_image=(2,))
    contrast(first, teacher.vectors, teacher.valid(mask))
    keep = [0, 1, 3, 4]
    assert torch.equal(queue.heads, first[:, keep])
    assert torch.equal(queue.teacher, teacher.vectors[keep])
    second, teacher_2, mask = batch_of(3, seed=2)
    pool = contrast(second, teacher_2.vectors, teacher_2.valid(mask))
    before = SampleQueue(size=6)
    before.push(first[:, keep], teacher.vectors[keep])
    loss, grad, _ = gradients(criterion, second, teacher_2.vectors, None, before)
    assert torch.equal(pool.value, loss)
    assert torch.equal(pool.heads_grad, grad)
    assert float(pool.samples) == 3 + 4
    assert len(queue) == 6  # the oldest is forgotten
    assert torch.equal(queue.heads, torch.cat([first[:, [1, 3, 4]], second], dim=1))


# --- Evaluation pools ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool_size", [5, 7, 12])
@pytest.mark.parametrize("sizes", [(4, 4, 4, 4, 4, 1), (20, 3), (1,) * 23, (30,), (2,)])
def test_pools_are_consecutive_valid_samples(sizes: tuple[int, ...], pool_size: int) -> None:
    criterion = HeRALoss(num_neighbors=3)
    pools = EvalPools(criterion, pool_size)
    heads: list[Tensor] = []
    vectors: list[Tensor] = []
    for seed, size in enumerate(sizes):
        # In every batch of three and more, the second sample has no image and the third nothing to pool.
        missing = {"without_image": (1,), "without_token": (2,)} if size >= 3 else {}
        batch_heads, teacher, mask = batch_of(size, seed, **missing)
        pools.add(batch_heads, teacher, mask)
        keep = [i for i in range(size) if size < 3 or i not in (1, 2)]
        heads += [batch_heads[:, i] for i in keep]
        vectors += [teacher.vectors[i] for i in keep]
    full = len(vectors) // pool_size
    expected = 0.0
    for start in range(0, full * pool_size, pool_size):
        members = slice(start, start + pool_size)
        expected += criterion(torch.stack(heads[members], dim=1), torch.stack(vectors[members])).item()
    assert pools.pools == full
    assert pools.left_out == len(vectors) % pool_size
    assert sum(pools.totals.values()) == pytest.approx(expected, rel=1e-6)


def test_pools_keep_no_graph_and_no_values_of_old_pools() -> None:
    pools = EvalPools(HeRALoss(num_neighbors=3), pool_size=5)
    assert (pools.totals, pools.pools, pools.left_out) == ({}, 0, 0)
    for seed in range(4):
        heads, teacher, mask = batch_of(4, seed)
        pools.add(heads.requires_grad_(), teacher, mask)
    assert (pools.pools, pools.left_out) == (3, 1)
    assert sum(part.shape[1] for part in pools._heads) == 1
    assert not any(part.requires_grad for part in pools._heads)


def test_pools_that_are_not_finite_are_left_out_and_counted() -> None:
    """As in training."""
    criterion, (heads, teacher, mask) = HeRALoss(num_neighbors=3), batch_of(18, 0)
    heads[0, 7, 0] = torch.inf  # of the second of three pools
    pools = EvalPools(criterion, pool_size=6)
    pools.add(heads, teacher, mask)
    parts = [slice(0, 6), slice(12, 18)]
    expected = sum(criterion(heads[:, part], teacher.vectors[part]).item() for part in parts) / 2
    found = pools.metrics()
    assert found["alignment_loss"] == pytest.approx(expected, rel=1e-6) and found["alignment_not_finite"] == 1
    assert pools.left_out == 0
    none = EvalPools(criterion, pool_size=6)
    none.add(torch.full_like(heads, torch.nan), teacher, mask)
    assert math.isnan(none.metrics()["alignment_loss"])  # by which a step may be chosen


# --- What is logged --------------------------------------------------------------------------------------------------


def pool_of(value: float, samples: int, left_out: int, skipped: bool = False, not_finite: bool = False) -> PoolLoss:
    numbers = [torch.tensor(float(x)) for x in (samples, left_out, skipped, not_finite, 0 if skipped else 3)]
    spread = torch.tensor([0.25, 0.75]) * (not skipped)
    parts = {name: torch.tensor(share * value) for name, share in (("near", 0.25), ("far", 0.75))}
    return PoolLoss(torch.tensor(value), torch.zeros(2, 3, 4), [], *numbers, spread, parts)


def fill(meter: AlignmentMeter) -> None:
    """Two optimizer steps of two micro-batches each, every micro-batch a pool; one was too small, one not finite."""
    for lm_loss in (1.5, 0.5, 1.0, 2.0):
        meter.add_micro_batch(torch.tensor(lm_loss, requires_grad=True), share=0.5)
    meter.add_pool(pool_of(2.0, samples=8, left_out=0))
    meter.add_pool(pool_of(3.0, samples=6, left_out=2))
    meter.add_pool(pool_of(0.0, samples=0, left_out=6, skipped=True))
    meter.add_pool(pool_of(0.0, samples=0, left_out=1, skipped=True, not_finite=True))


EXPECTED = {
    "lm_loss": (1.5 + 0.5 + 1.0 + 2.0) / 2,  # per optimizer step
    "alignment_loss": (2.0 + 3.0) / 2,  # per pool that gave a loss
    "alignment_loss/near": 0.25 * (2.0 + 3.0) / 2,
    "alignment_loss/far": 0.75 * (2.0 + 3.0) / 2,
    "alignment_spread": 0.5,
    "alignment_pool": (8 + 6) / 4,  # a skipped pool took part with no sample
    "alignment_repeated": (3 + 3) / 4,
    "alignment_skipped": 2.0,
    "alignment_left_out": 2 + 6 + 1,
    "alignment_not_finite": 1.0,
}
CPU = torch.device("cpu")


def test_meter_arithmetic() -> None:
    meter = AlignmentMeter()
    fill(meter)
    sums = meter.as_tensor(CPU)
    assert not sums.requires_grad
    assert meter.drain(sums) == pytest.approx(EXPECTED)


def test_sums_of_two_processes_that_share_their_pools() -> None:
    first, second = AlignmentMeter(), AlignmentMeter()
    fill(first)
    fill(second)
    sums = first.as_tensor(CPU) + second.as_tensor(CPU)
    # Each process counts its own samples that were left out, and both the same pools.
    assert first.drain(sums, num_processes=2) == pytest.approx({**EXPECTED, "alignment_left_out": 18.0})


def test_draining_starts_afresh() -> None:
    meter = AlignmentMeter()
    assert meter.drain(meter.as_tensor(CPU)) == {}
    for _ in range(2):
        fill(meter)
        assert meter.drain(meter.as_tensor(CPU)) == pytest.approx(EXPECTED)
    fill(meter)
    meter.reset()
    assert meter.drain(meter.as_tensor(CPU)) == {}


def test_no_alignment_loss_is_reported_where_every_pool_was_skipped() -> None:
    meter = AlignmentMeter()
    meter.add_micro_batch(torch.tensor(3.0), share=1.0)
    meter.add_pool(pool_of(0.0, samples=0, left_out=1, skipped=True))
    metrics = meter.drain(meter.as_tensor(CPU))
    assert "alignment_loss" not in metrics
    assert (metrics["lm_loss"], metrics["alignment_pool"], metrics["alignment_skipped"]) == (3.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("skipped", "not_finite", "cut", "is_said"),
    [(26, False, 1, True), (25, False, 1, False), (26, False, 4, True), (50, True, 1, False), (0, False, 4, False)],
)
def test_first_steps_that_mostly_went_without_alignment_are_said_once(
    skipped: int, not_finite: bool, cut: int, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """50 steps of `cut` micro-batches, each a pool, some of which are skipped; and as many steps again."""
    PartialState()  # of accelerate, whose logger asks for it
    meter = AlignmentMeter()
    for step in [*range(50), *range(50)]:
        assert not caplog.records or len(caplog.records) == 1
        for _ in range(cut):
            meter.add_micro_batch(torch.tensor(1.0), share=1 / cut)
            meter.add_pool(pool_of(0.0, 0, 1, skipped=step < skipped, not_finite=not_finite))
        meter.drain(meter.as_tensor(CPU))  # logging does not forget the steps before it
    messages = [record.message for record in caplog.records]
    assert len(messages) == is_said
    assert all(f"in {skipped * cut} of {50 * cut} pools" in message for message in messages)


def test_a_pool_of_past_samples_alone_is_skipped() -> None:
    """A queue that is large enough makes no loss where the step itself has no image."""
    criterion, queue = HeRALoss(num_neighbors=3), SampleQueue(size=20)
    contrast = Contrast(criterion, queue=queue)
    heads, teacher = torch.randn(2, 20, 5), torch.randn(20, 4)
    contrast(heads, teacher, torch.ones(20, dtype=torch.bool))
    pool = contrast(torch.randn(2, 4, 5), torch.randn(4, 4), torch.zeros(4, dtype=torch.bool))
    assert (pool.skipped, pool.samples, pool.value, pool.not_finite) == (1, 0, 0, 0)
    one = torch.tensor([False, True, False, False])
    pool = contrast(torch.randn(2, 4, 5), torch.randn(4, 4), one)
    assert (pool.skipped, pool.samples) == (0, 21) and pool.value > 0


def test_low_precision_losses_are_summed_in_float32() -> None:
    meter = AlignmentMeter()
    for _ in range(300):  # in bfloat16 the sum would stall at 256
        meter.add_micro_batch(torch.tensor(1.0, dtype=torch.bfloat16), share=1.0)
        meter.add_pool(pool_of(1.0, samples=4, left_out=0))
    metrics = meter.drain(meter.as_tensor(CPU))
    assert (metrics["lm_loss"], metrics["alignment_loss"], metrics["alignment_pool"]) == (1.0, 1.0, 4.0)


# --- What a pool says of its heads, and terms by name ----------------------------------------------------------------


@pytest.mark.parametrize("left_out", [(), (1, 4, 6), tuple(range(1, 9)), tuple(range(9))])
def test_spread_is_one_minus_the_mean_cosine_of_pairs(left_out: tuple[int, ...]) -> None:
    heads, _, _ = batch_of(9)
    valid = torch.tensor([i not in left_out for i in range(9)])
    members = [i for i in range(9) if valid[i]]
    heads[:, ~valid] = math.nan  # what does not take part does not count
    found = spread(heads, valid)
    for head, value in zip(heads, found, strict=True):
        pairs = [(i, j) for i in members for j in members if i != j]
        cosines = [torch.cosine_similarity(head[i], head[j], dim=0).item() for i, j in pairs]
        expected = 1 - sum(cosines) / len(cosines) if cosines else 1.0
        assert value.item() == pytest.approx(expected, abs=1e-5)


class TwoTerms(AlignmentObjective):
    """An objective of a user: two terms, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = torch.nn.Parameter(torch.tensor([2.0, 3.0])), torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, heads, teacher, valid=None, queue=None):
        heads, teacher = heads[:, valid], teacher[valid]
        return {
            "square": (self.scale[:, None, None] * heads).square().mean(),
            "teacher": (heads.mean(-1) + self.shift - teacher.mean(-1)).abs().mean(),
        }


def test_terms_and_parameters_of_an_objective() -> None:
    heads, teacher, mask = batch_of(8, without_image=(2,))
    criterion, valid = TwoTerms(), teacher.valid(mask)
    contrast = Contrast(criterion)
    pool = contrast(heads, teacher.vectors, valid)
    leaf = heads.clone().requires_grad_()
    terms = criterion(leaf, teacher.vectors, valid)
    loss = terms["square"] + terms["teacher"]
    grad, *parameter_grads = torch.autograd.grad(loss, [leaf, criterion.scale, criterion.shift])
    assert pool.value.item() == pytest.approx(loss.item(), rel=1e-6)
    assert pool.parts.keys() == terms.keys()
    assert all(pool.parts[name].item() == term.item() for name, term in terms.items())
    torch.testing.assert_close(pool.heads_grad, grad)
    torch.testing.assert_close(pool.parameter_grads, parameter_grads)
    # Over micro-batches, whatever scales the loss.
    for start, size in ((0, 3), (3, 5)):
        leaf = heads[:, start : start + size].clone().requires_grad_()
        (2.0 * pool.carrier(leaf, contrast.parameters, start, share=0.5)).backward()
    torch.testing.assert_close([criterion.scale.grad, criterion.shift.grad], [2.0 * grad for grad in parameter_grads])
    contrast.reset()
    assert criterion.scale.grad is None and criterion.shift.grad is None


def test_pools_are_never_too_small_for_a_loss() -> None:
    """In training, a queue may owe a small step the samples that it lacks."""
    criterion = HeRALoss(num_neighbors=3)
    pools = EvalPools(criterion, pool_size=4)
    heads, teacher, mask = batch_of(11)
    pools.add(heads, teacher, mask)
    expected = [criterion(heads[:, i : i + 5], teacher.vectors[i : i + 5]).item() for i in (0, 5)]
    assert (pools.pools, pools.left_out) == (2, 1) and min(expected) > 0
    assert pools.metrics()["alignment_loss"] == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_terms_keep_their_names_in_evaluation() -> None:
    class Terms(AlignmentObjective):
        least_samples = 2

        def forward(self, heads: Tensor, teacher: Tensor, valid: Tensor | None = None, queue: object = None) -> dict:
            return {"near": heads.sum(), "far": teacher.square().sum()}

    pools = EvalPools(Terms(), pool_size=4)
    heads, teacher, mask = batch_of(9)
    pools.add(heads, teacher, mask)
    near = [heads[:, i : i + 4].sum().item() for i in (0, 4)]
    far = [teacher.vectors[i : i + 4].square().sum().item() for i in (0, 4)]
    assert pools.metrics() == pytest.approx(
        {
            "alignment_loss": (sum(near) + sum(far)) / 2,
            "alignment_loss/near": sum(near) / 2,
            "alignment_loss/far": sum(far) / 2,
            "alignment_repeated": 0,
            "alignment_left_out": 1,
        },
        rel=1e-5,
    )


def test_samples_of_the_same_image_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 6, generator=generator)
    shown = torch.tensor([0, 1, 0, 2, 0, 3, 1, 1, 2])
    valid = torch.tensor([True, True, True, True, True, True, True, False, False])
    found = repeated(images[shown], valid)
    kept = shown[valid].tolist()
    assert found.item() == len(kept) - len(set(kept)) == 3
    assert repeated(images, torch.ones(4, dtype=torch.bool)).item() == 0
    pool = Contrast(HeRALoss(num_neighbors=3))(torch.randn(2, 9, 5, generator=generator), images[shown], valid)
    assert pool.repeated.item() == 3


class Plain(AlignmentObjective):
    """As a user may write it: products of the representations, nothing said of autocast."""

    least_samples = 2

    def forward(
        self, heads: Tensor, teacher: Tensor, valid: Tensor | None = None, queue: SampleQueue | None = None
    ) -> Tensor:
        return (heads @ heads.transpose(1, 2)).square().mean()


@pytest.mark.parametrize("make", [HeRALoss, FeatureLoss, CKALoss, UniformityLoss, Plain])
def test_autocast_around_the_pool_rounds_nothing(make: type[AlignmentObjective]) -> None:
    """As the first pass of a step has it: the gradient must not depend on how a step is cut."""
    criterion = make()
    criterion.prepare(2, 6, 5, seed=0)
    heads, teacher, mask = batch_of(20)
    arguments = (heads, teacher.vectors, teacher.valid(mask))
    expected = Contrast(criterion)(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Contrast(criterion)(*arguments)
    assert torch.equal(found.value, expected.value) and float(found.value) != 0
    assert torch.equal(found.heads_grad, expected.heads_grad) and float(found.heads_grad.abs().sum()) > 0
    assert len(found.parameter_grads) == len(expected.parameter_grads)
    for ours, theirs in zip(found.parameter_grads, expected.parameter_grads, strict=True):
        assert torch.equal(ours, theirs)
