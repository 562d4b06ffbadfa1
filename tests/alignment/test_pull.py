"""How strongly the alignment loss pulls at the heads, against plain autograd, and the weight that holds it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from reference import Recorder, alignment_loss, base_model, language_model_loss, num_labels, pooled_positions
from runs import logged
from test_window import CUTS, lora_config, make_trainer
from torch import Tensor

from hera_trainer.alignment.pull import MAX_WEIGHT, MIN_WEIGHT, Pull
from hera_trainer.data.collator import TEACHER_COLUMN
from hera_trainer.heads.registry import get_head_accessor


def head_vectors(model, batch, heads: list[tuple[int, int]]) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Logits, head vectors `[m, B, d_model]`, for each head the variable of zeros that is added to what it writes to
    the residual stream and to its vector, and the pooled positions."""
    accessor = get_head_accessor(model)
    added: list[Tensor] = [torch.empty(0)] * len(heads)
    inputs: dict[int, Tensor] = {}

    def hook(module, args, out, layer):
        inputs[layer] = args[0]
        for number, head in enumerate(heads):
            if head[0] == layer:
                added[number] = torch.zeros_like(out, requires_grad=True)
                out = out + added[number]
        return out

    layers = {layer for layer, _ in heads}
    handles = [accessor.projection(layer).register_forward_hook(partial(hook, layer=layer)) for layer in layers]
    names = {name: value for name, value in batch.items() if name not in ("labels", TEACHER_COLUMN)}
    logits = base_model(model)(**names, use_cache=False).logits
    for handle in handles:
        handle.remove()
    mask, vectors = pooled_positions(batch, model), []
    for (layer, head), variable in zip(heads, added, strict=True):
        projection, x = accessor.projection(layer), inputs[layer]
        width = x.shape[-1] // accessor.num_heads(layer)
        part = torch.zeros_like(x)
        part[..., head * width : (head + 1) * width] = x[..., head * width : (head + 1) * width]
        written = projection(part) - projection(torch.zeros_like(part)) + variable
        vectors.append(torch.stack([written[b][mask[b]].mean(0) for b in range(len(mask))]))
    return logits, torch.stack(vectors), added, mask


def layer_vectors(model, batch, layers: list[tuple[int]]) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """The same of whole layers: what is added to and read is the residual stream that leaves each."""
    added: list[Tensor] = [torch.empty(0)] * len(layers)
    left: list[Tensor] = [torch.empty(0)] * len(layers)

    def hook(module, args, out, number):
        stream = out[0] if isinstance(out, tuple) else out
        added[number] = torch.zeros_like(stream, requires_grad=True)
        left[number] = stream + added[number]
        return (left[number], *out[1:]) if isinstance(out, tuple) else left[number]

    modules = get_head_accessor(model).layers
    handles = [modules[layer].register_forward_hook(partial(hook, number=n)) for n, (layer,) in enumerate(layers)]
    names = {name: value for name, value in batch.items() if name not in ("labels", TEACHER_COLUMN)}
    logits = base_model(model)(**names, use_cache=False).logits
    for handle in handles:
        handle.remove()
    mask = pooled_positions(batch, model)
    vectors = [torch.stack([stream[b][mask[b]].mean(0) for b in range(len(mask))]) for stream in left]
    return logits, torch.stack(vectors), added, mask


def pull_by_autograd(recorder: Recorder, weight: float, heads: list[tuple[int, ...]], read=head_vectors) -> float:
    """The definition: gradients with respect to what each head adds to the residual stream at the pooled positions, of
    the weighted alignment loss at this head alone, and of everything else."""
    model, k = recorder.model.train(), recorder.trainer.args.num_neighbors
    total = sum(num_labels(batch) for batch in recorder.batches)
    log_temperature = recorder.parameters["log_temperature"]
    passes = [read(model, batch, heads) for batch in recorder.batches]
    lm = sum(
        language_model_loss(logits, batch["labels"], "sum") / total
        for (logits, *_), batch in zip(passes, recorder.batches, strict=True)
    )
    z = torch.cat([vectors for _, vectors, _, _ in passes], dim=1)
    teacher = torch.cat([batch[TEACHER_COLUMN] for batch in recorder.batches])
    leaf = z.detach().requires_grad_()
    (own,) = torch.autograd.grad(weight * alignment_loss(leaf, teacher, k, log_temperature), leaf)  # [m, N, d_model]
    everything = lm + weight * alignment_loss(z, teacher, k, log_temperature)
    pulled = held = 0.0
    start = 0
    for _, _, added, mask in passes:
        grads = torch.autograd.grad(everything, added, retain_graph=True)
        for number, grad in enumerate(grads):
            for b in range(len(mask)):
                at_each = own[number, start + b] / mask[b].sum()
                pulled += float(mask[b].sum() * at_each.square().sum())
                held += float((grad[b][mask[b]] - at_each).square().sum())
        start += len(mask)
    return (pulled / held) ** 0.5


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("cut", [CUTS[0], CUTS[2], CUTS[4]], ids=str)
def test_the_pull_is_that_of_plain_autograd_in_every_cut(tmp_path, cut, checkpointing):
    trainer = make_trainer(tmp_path, "llava", cut, lora_config(), checkpointing, logging_steps=1)
    recorder = Recorder(trainer)
    trainer.train()
    heads = [tuple(head) for head in trainer.aligned_heads]
    expected = pull_by_autograd(recorder, trainer.args.alignment_weight, heads)
    assert logged(trainer, "alignment_pull") == [pytest.approx(expected, rel=1e-3)]
    assert expected > 1e-3


@pytest.mark.parametrize("checkpointing", [None, True], ids=["none", "reentrant"])
@pytest.mark.parametrize("cut", [CUTS[0], CUTS[2]], ids=str)
def test_the_pull_at_whole_layers(tmp_path, cut, checkpointing):
    """The lower one's gradient from above holds what the upper one sends down."""
    settings = {"alignment_granularity": "layer", "aligned_heads": ["L1", "L0"], "logging_steps": 1}
    trainer = make_trainer(tmp_path, "llava", cut, lora_config(), checkpointing, **settings)
    recorder = Recorder(trainer)
    trainer.train()
    layers = [tuple(layer) for layer in trainer.aligned_heads]
    expected = pull_by_autograd(recorder, trainer.args.alignment_weight, layers, layer_vectors)
    assert logged(trainer, "alignment_pull") == [pytest.approx(expected, rel=1e-3)]
    assert expected > 1e-3


def test_a_weight_of_twice_as_much_pulls_twice_as_much(tmp_path):
    """At the deepest aligned head, above which there is no alignment."""
    pulls = []
    for weight in (1.0, 2.0):
        settings = {"alignment_weight": weight, "aligned_heads": ["L1H3"], "logging_steps": 1}
        trainer = make_trainer(tmp_path / str(weight), "llava", (4, 4), lora_config(), **settings)
        trainer.train()
        pulls += logged(trainer, "alignment_pull")
    assert pulls[1] == pytest.approx(2 * pulls[0], rel=1e-4)


# --- A weight that follows -------------------------------------------------------------------------------------------


def step(pull: Pull, strength: float) -> None:
    """An optimizer step in which a loss of weight 1 would pull with `strength`."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    above = torch.full((1, 4, 2), 1.0)
    own = torch.full((1, 1, 2), 4.0 * strength * float(pull.weight))
    pull.observe(above, own, mask)
    pull.before_step()


def test_the_weight_holds_the_pull():
    pull = Pull(0.01, target=0.3)
    assert pull.weight == 0.01
    step(pull, 0.5)
    assert float(pull.weight) == pytest.approx(0.6)  # the running mean of one value is the value
    for _ in range(100):
        step(pull, 2.0)
    assert float(pull.weight) == pytest.approx(0.15, rel=1e-3)
    metrics = pull.metrics(pull.take_logged(torch.device("cpu")))
    assert metrics["alignment_weight"] == float(pull.weight) and "alignment_pull" in metrics


def test_the_weight_is_bounded_and_waits_where_nothing_is_said():
    pull = Pull(0.01, target=0.3)
    pull.before_step()  # no aligned layer was seen
    step(pull, 0.0)
    step(pull, float("inf"))
    assert float(pull.weight) == pytest.approx(0.01)
    step(pull, 1e-9)
    assert float(pull.weight) == MAX_WEIGHT
    for _ in range(3):
        step(pull, 1e9)
    assert float(pull.weight) == pytest.approx(MIN_WEIGHT)


def test_a_fixed_weight_stays():
    pull = Pull(0.01)
    step(pull, 5.0)
    assert pull.weight == 0.01 and pull.state_dict() == {}
    assert set(pull.metrics(pull.take_logged(torch.device("cpu")))) == {"alignment_pull"}


def test_the_state_goes_on_where_it_was():
    first, second = Pull(0.01, target=0.3), Pull(0.01, target=0.3)
    for strength in (0.5, 1.5, 0.7):
        step(first, strength)
    second.load_state_dict(first.state_dict(), torch.device("cpu"))
    for strength in (2.0, 0.1):
        step(first, strength)
        step(second, strength)
    assert float(first.weight) == pytest.approx(float(second.weight), rel=1e-6)


def test_training_towards_a_target(tmp_path):
    """The pull that is logged comes to the target, and a resumed run goes on with the weight."""
    settings = {"target_pull": 0.2, "alignment_weight": 1e-3, "logging_steps": 1, "save_strategy": "steps"}
    whole = make_trainer(tmp_path / "whole", "llava", (8, 2), lora_config(), max_steps=8, save_steps=4, **settings)
    whole.train()
    pulls, weights = logged(whole, "alignment_pull"), logged(whole, "alignment_weight")
    assert pulls[0] < 0.02 and all(pull == pytest.approx(0.2, rel=0.5) for pull in pulls[3:])
    resumed = make_trainer(tmp_path / "whole", "llava", (8, 2), lora_config(), max_steps=8, save_steps=4, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert logged(resumed, "alignment_weight")[-4:] == pytest.approx(weights[-4:], rel=1e-4)


def test_a_step_that_overflowed_hides_no_other():
    pull, mask = Pull(1.0), torch.ones(1, 4, dtype=torch.bool)
    for above in (float("inf"), 2.0, float("nan")):
        pull.observe(torch.full((1, 4, 2), above), torch.full((1, 1, 2), 4.0), mask)
        pull.before_step()
    # At each of four positions a quarter of the gradient, two numbers of 1, beside two of 2.
    assert pull.metrics(pull.take_logged(torch.device("cpu")))["alignment_pull"] == pytest.approx(0.5)


def test_steps_in_which_nothing_was_compared_are_left_out(tmp_path, caplog):
    """A queue that is filling: there is no pull to log, and none to warn of."""
    settings = {"max_steps": 4, "logging_steps": 1, "queue_size": 12, "num_neighbors": 4, "alignment_weight": 1e-4}
    run = make_trainer(tmp_path, "llava", (4, 1), lora_config(), **settings)
    run.train()
    steps = [entry for entry in run.state.log_history if "lm_loss" in entry]
    pulls = [entry.get("alignment_pull") for entry in steps]
    assert [entry["alignment_skipped"] for entry in steps] == [1.0, 0.0, 0.0, 0.0]
    assert pulls[0] is None and all(pulls[1:])
    assert f"pulls at the aligned heads with {pulls[1]:.2g} of the strength" in caplog.text


def test_processes_that_pooled_nothing_add_up_too():
    """Otherwise the others would wait for them, or add up what belongs to something else."""

    class Accelerator:
        device = torch.device("cpu")
        reduced: list[Tensor] = []

        def reduce(self, squares, reduction):
            assert reduction == "sum"
            self.reduced.append(squares)
            return squares + torch.tensor([4.0, 1.0])  # of another process

    pull = Pull(0.1, 0.5, Accelerator())
    pull.before_step()
    assert [squares.tolist() for squares in Accelerator.reduced] == [[0.0, 0.0]]
    assert float(pull.weight) == pytest.approx(0.1 * 0.5 / 2.0)
    assert pull.metrics(pull.take_logged(torch.device("cpu"))).keys() == {"alignment_weight"}
