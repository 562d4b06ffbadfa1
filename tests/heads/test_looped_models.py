"""Models that go through some of their layers several times in a forward pass: heads are those of the first pass."""

from __future__ import annotations

import pytest
import torch
from model_zoo import MAPPING, build, text_inputs, tiny_config
from torch import Tensor, nn

from hera_trainer.common.processes import Team
from hera_trainer.heads.capture import HeadCapture, pool_heads
from hera_trainer.heads.checks import check_trainable
from hera_trainer.heads.head import AttentionHead
from hera_trainer.heads.observer import Observer, run_text
from hera_trainer.heads.projection import project_heads
from hera_trainer.heads.registry import get_head_accessor
from hera_trainer.planning.compute import ImageShape, operations
from hera_trainer.planning.model import find_parts, meta_model

TYPE = "inkling2_loop"
HEADS = [AttentionHead(0, 1), AttentionHead(1, 2), AttentionHead(2, 3), AttentionHead(3, 0)]
pytestmark = pytest.mark.skipif(TYPE not in MAPPING, reason=f"{TYPE} came with transformers 5.24")


def projection_inputs(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[int, list[Tensor]], Tensor]:
    """What the output projection of each layer reads, pass by pass, and the logits."""
    accessor = get_head_accessor(model)
    read: dict[int, list[Tensor]] = {layer: [] for layer in accessor.layers_with_heads}
    handles = [
        accessor.projection(i).register_forward_pre_hook(lambda m, args, i=i: read[i].append(args[0])) for i in read
    ]
    logits = model(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return read, logits


def test_how_often_layers_are_gone_through() -> None:
    model = build(TYPE)
    accessor = get_head_accessor(model)
    read, _ = projection_inputs(model, text_inputs(TYPE, model))
    assert [accessor.passes(layer) for layer in range(4)] == [len(read[layer]) for layer in range(4)] == [1, 3, 3, 1]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_gradient_is_that_of_the_first_pass(reentrant: bool | None) -> None:
    """Checkpointing runs the passes through a layer again, from the last to the first."""
    model = build(TYPE)
    accessor, inputs = get_head_accessor(model), text_inputs(TYPE, model)
    mask = inputs["attention_mask"].bool()
    weight = torch.linspace(-1, 1, len(HEADS) * len(mask) * 32).reshape(len(HEADS), len(mask), 32)

    read, logits = projection_inputs(model, inputs)
    vectors = []
    for layer, head in HEADS:
        pooled = pool_heads(read[layer][0], mask, accessor.num_heads(layer), [head])
        vectors.append(project_heads(accessor.projection(layer), pooled, [head])[:, 0])
    (logits.square().mean() + (torch.stack(vectors) * weight).sum()).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
    capture = HeadCapture(accessor, HEADS, TYPE)
    with capture.attached():
        capture.start(mask)
        loss = model(**inputs, use_cache=False).logits.square().mean()
        (loss + (capture.vectors() * weight).sum()).backward()
        torch.testing.assert_close(capture.vectors(), torch.stack(vectors), rtol=1e-4, atol=1e-5)
        capture.stop()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def test_heads_are_ranked_by_their_first_pass() -> None:
    model = build(TYPE)
    observer = Observer(get_head_accessor(model), Team(False))
    texts = [torch.arange(8, 14), torch.arange(20, 25), torch.arange(30, 37)]
    handles = observer.attach()
    run_text(
        observer,
        observer.accessor.decoder,
        [(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in texts],
        2,
        progress=False,
    )
    for handle in handles:
        handle.remove()
    samples, layers = observer.gather()
    assert samples == [0, 1, 2]
    pooled = {layer: heads for layer, _, heads in layers}
    for sample, ids in enumerate(texts):
        read, _ = projection_inputs(model, {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]})
        for layer, passes in read.items():
            torch.testing.assert_close(pooled[layer][sample].flatten(), passes[0].mean(1)[0], rtol=1e-4, atol=1e-5)


def test_what_is_trained_above_a_head_does_not_reach_its_first_pass() -> None:
    model = build(TYPE)
    accessor = get_head_accessor(model)
    model.requires_grad_(False)
    accessor.layers[2].requires_grad_(True)
    check_trainable(model, accessor, [AttentionHead(2, 0), AttentionHead(3, 0)])
    with pytest.raises(ValueError, match="No trainable parameter influences attention head L1H0"):
        check_trainable(model, accessor, [AttentionHead(1, 0), AttentionHead(3, 0)])


def test_each_pass_is_planned() -> None:
    work = operations(find_parts(meta_model(tiny_config(TYPE))), ImageShape(0, 0, 0), text_tokens=10)
    first, second, third, last = work.layers
    trained = {"vision": False, "projector": False, "language": True}
    step = 3 * (first + 3 * second + 3 * third + last) + 4 * work.lm_head + work.vision + work.projector
    assert work.step(trained, adapters=False, checkpointing=False) == pytest.approx(step)
    assert work.first_pass(2) == pytest.approx(first + second + work.attentions[2])
    assert work.first_pass(3) == pytest.approx(first + 3 * second + 3 * third + work.attentions[3])
