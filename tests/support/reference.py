"""The total loss of one optimizer step, written without hooks and without the package: what gradients must equal."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from hera_trainer import HeRATrainer
from hera_trainer.data.collator import TEACHER_COLUMN, TeacherCollator


class Recorder(TrainerCallback):
    """Keeps, for a training run of one optimizer step, its batches and the gradients before the optimizer."""

    def __init__(self, trainer: HeRATrainer) -> None:
        trainer.prepare_alignment()
        self.trainer = trainer
        self.batches: list[dict[str, Any]] = []
        self.gradients: dict[str, Tensor] = {}
        self.model = copy.deepcopy(trainer.model)  # as it is before the step
        # TRL's patched forward is a closure over the original model: the copy runs its class's own.
        base_model(self.model).__dict__.pop("forward", None)
        self.parameters = {name: p.detach().clone() for name, p in trainer.criterion.named_parameters()}
        trainer.data_collator = _RecordingCollator(trainer.data_collator, self.batches)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches.clear()  # rows are collated, too, to look at them before training

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gradients:
            self.batches = self.batches[: args.gradient_accumulation_steps]  # data loaders collate one batch ahead
            self.gradients = {n: p.grad.clone() for n, p in self.trainer.model.named_parameters() if p.grad is not None}
            window = self.trainer.alignment.window
            self.seeds = None if window is None else window.seeds
            own = self.trainer.criterion.named_parameters()
            self.gradients.update({n: p.grad.clone() for n, p in own if p.grad is not None})


class _RecordingCollator(TeacherCollator):
    """The trainer's collator, which keeps a copy of each batch."""

    def __init__(self, collator: TeacherCollator, batches: list[dict[str, Any]]) -> None:
        super().__init__(collator.inner, collator.width, collator.prepare)
        self.batches = batches

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = super().__call__(rows)
        self.batches.append({k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()})
        return batch


class _Recording(nn.Module):
    """Stands in for an output projection and keeps what goes in, graph and all."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return self.projection(x)


def base_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def recorded_projections(model: nn.Module) -> Iterator[dict[int, _Recording]]:
    layers = base_model(model).get_decoder().layers
    recordings = {}
    attentions = [layer.self_attn if hasattr(layer, "self_attn") else None for layer in layers]
    names = ["out_proj" if hasattr(attention, "out_proj") else "o_proj" for attention in attentions]
    for i, attention in enumerate(attentions):
        if attention is not None:
            recordings[i] = _Recording(getattr(attention, names[i]))
            setattr(attention, names[i], recordings[i])
    try:
        yield recordings
    finally:
        for i, recording in recordings.items():
            setattr(attentions[i], names[i], recording.projection)


def effective_weight(projection: nn.Module) -> Tensor:
    """Weight `[d_model, in_features]` of a linear layer, its LoRA update added and 4-bit weights unpacked by hand."""
    if not hasattr(projection, "lora_A"):
        return projection.weight
    (name,) = projection.active_adapters
    update = projection.lora_B[name].weight.float() @ projection.lora_A[name].weight.float()
    base = projection.base_layer.weight
    if getattr(base, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        base = dequantize_4bit(base.data, base.quant_state).float()
    return base + projection.scaling[name] * update


def pooled_positions(batch: dict[str, Any], model: nn.Module, processor: Any = None) -> Tensor:
    """Positions with a label that are no placeholders, as the model's config or its processor name them."""
    names = ("image_token_id", "image_token_index", "video_token_id")
    mask = batch["labels"] != -100
    for token in [getattr(owner, name, None) for owner in (model.config, processor) for name in names]:
        if token is not None:
            mask = mask & (batch["input_ids"] != token)
    return mask


@contextmanager
def recorded_stream(model: nn.Module) -> Iterator[_Recording]:
    """What the final norm is given: the output of the last layer, which the model tells normalised only."""
    decoder = base_model(model).get_decoder()
    decoder.norm = recording = _Recording(decoder.norm)
    try:
        yield recording
    finally:
        decoder.norm = recording.projection


def layer_vectors(model: nn.Module, batch: dict[str, Any], layers: list[int]) -> Any:
    """Output of a forward pass, and what leaves whole layers: `[T, d_model]` of each sample, by the definition."""
    with recorded_stream(model) as final:
        out = model(**batch, use_cache=False, output_hidden_states=True)
    leaving = [*out.hidden_states[1:-1], final.x]  # the first is what the embeddings give
    return out, [leaving[layer] for layer in layers]


def outputs_and_vectors(
    model: nn.Module,
    batch: dict[str, Any],
    heads: list[tuple[int, ...]],
    num_heads: int,
    processor: Any = None,
    **kwargs: Any,
) -> tuple[Any, Tensor]:
    """All that a forward pass puts out, and the head representations z `[m, B, d_model]`, by the definition. A layer is
    given as `(layer,)`."""
    inputs = {**{k: v for k, v in batch.items() if k not in ("labels", TEACHER_COLUMN)}, **kwargs}
    if all(len(head) == 1 for head in heads):
        out, written = layer_vectors(model, inputs, [layer for (layer,) in heads])
    else:
        with recorded_projections(model) as recordings:
            out = model(**inputs, use_cache=False)
        written = []
        for layer, head in heads:
            x = recordings[layer].x  # [B, T, H * d]
            width = x.shape[-1] // num_heads
            columns = slice(head * width, (head + 1) * width)
            written.append(x[..., columns] @ effective_weight(recordings[layer].projection)[:, columns].T)
    mask = pooled_positions(batch, model, processor)
    means = [[w[mask[b]].mean(0) if mask[b].any() else w.sum(0) * 0 for b, w in enumerate(each)] for each in written]
    return out, torch.stack([torch.stack(samples) for samples in means])


def head_vectors(model: nn.Module, batch: dict[str, Any], heads: list[tuple[int, ...]], num_heads: int) -> Any:
    """Logits of a forward pass and the head representations."""
    out, vectors = outputs_and_vectors(model, batch, heads, num_heads)
    return out.logits, vectors


def made_similar(x: Tensor, similarity: str) -> Tensor:
    """Vectors `[..., N, d]` whose dot products are compared."""
    if similarity == "centered_cosine":
        x = x - x.mean(-2, keepdim=True)
    return x if similarity == "dot" else x / x.norm(dim=-1, keepdim=True)


def alignment_loss(
    z: Tensor,
    teacher: Tensor,
    k: int,
    log_temperature: Tensor,
    similarity: str = "centered_cosine",
    teacher_similarity: str = "cosine",
) -> Tensor:
    """Eq. 4 and 8, sample by sample."""
    z, teacher = made_similar(z, similarity), made_similar(teacher, teacher_similarity)
    nearness = teacher @ teacher.T
    total = z.new_zeros(())
    for i in range(len(teacher)):
        others = [j for j in range(len(teacher)) if j != i]
        nearest = sorted(others, key=lambda j: -nearness[i, j].item())[:k]
        for head in z:
            logits = torch.stack([head[i] @ head[j] for j in others]) / log_temperature.exp()
            target = torch.tensor([1.0 / k if j in nearest else 0.0 for j in others])
            total = total - (target * F.log_softmax(logits, dim=0)).sum()
    return total / (len(teacher) * len(z))


def feature_loss(z: Tensor, teacher: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """One minus the cosine of each head's projected representation and the teacher vector, sample by sample."""
    total = z.new_zeros(())
    for h, head in enumerate(z):
        first, second = ((parameters[f"{n}_weight"][h], parameters[f"{n}_bias"][h, 0]) for n in ("first", "second"))
        for x, target in zip(head, teacher, strict=True):
            x = x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt()
            hidden = first[0].T @ x + first[1]
            projected = second[0].T @ (hidden * hidden.sigmoid()) + second[1]
            total = total + 1 - projected @ target / (projected.norm() * target.norm())
    return total / (len(z) * len(teacher))


def cka_loss(z: Tensor, teacher: Tensor) -> Tensor:
    """One minus linear CKA, by the definition with centring matrices."""
    center = torch.eye(len(teacher)) - 1.0 / len(teacher)

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        return torch.trace(a @ a.T @ center @ b @ b.T @ center)

    cka = [hsic(head, teacher) / (hsic(head, head) * hsic(teacher, teacher)).sqrt() for head in z]
    return 1 - sum(cka) / len(z)


def uniformity_loss(z: Tensor) -> Tensor:
    """Logarithm of the mean Gaussian potential (t = 2) over pairs of different samples."""
    z, count = made_similar(z, "cosine"), z.shape[1]
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    potentials = [sum((-2 * (head[i] - head[j]).square().sum()).exp() for i, j in pairs) for head in z]
    return sum((potential / len(pairs)).log() for potential in potentials) / len(z)


def objective_loss(trainer: HeRATrainer, z: Tensor, teacher: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """The objective that a trainer's configuration names."""
    args = trainer.args
    if args.alignment_objective == "feature":
        return feature_loss(z, teacher, parameters)
    if args.alignment_objective == "cka":
        return cka_loss(z, teacher)
    if args.alignment_objective == "uniformity":
        return uniformity_loss(z)
    settings = (args.num_neighbors, parameters["log_temperature"], args.similarity, args.teacher_similarity)
    return alignment_loss(z, teacher, *settings)


def language_model_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction=reduction
    )


def num_labels(batch: dict[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def gradients_of(model: nn.Module, loss: Tensor, parameters: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    named.update(parameters or {})
    values = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, values, strict=True) if g is not None}


def assert_gradients_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> float:
    """Every gradient within `tolerance` of its tensor's largest expected value. Returns the largest deviation.

    Values below 1e-6 of the largest gradient of all are rounding: the bias of a key projection, for one, has an exact
    gradient of zero.
    """
    worst, floor = 0.0, 1e-6 * max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        scale = max(value.abs().max().item(), floor / tolerance)
        assert name in actual or value.abs().max() == 0, f"{name} got no gradient"
        if name in actual:
            deviation = (actual[name].float() - value.float()).abs().max().item() / scale
            assert deviation <= tolerance, f"{name}: deviates by {deviation:.2e} of its largest value {scale:.2e}"
            worst = max(worst, deviation)
    assert not set(actual) - set(expected), f"unexpected gradients: {set(actual) - set(expected)}"
    return worst


def step_gradients(
    recorder: Recorder, weight: float, scope: str, seeds: list[int], num_heads: int = 4, logit_scale: float = 1.0
) -> Any:
    """Gradients of one optimizer step: the language-model loss as SFTTrainer scales it, with the router's share in a
    mixture of experts, plus the alignment loss over all samples of the step or, with scope "micro_batch", each
    micro-batch's with its share of the weight."""
    trainer, model = recorder.trainer, recorder.model
    heads = [tuple(head) for head in trainer.aligned_heads]
    parameters = {name: value.requires_grad_() for name, value in recorder.parameters.items()}
    total_labels = sum(num_labels(batch) for batch in recorder.batches)
    model.train()
    processor = trainer.processing_class
    router = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
    loss, vectors, teachers = 0.0, [], []
    for batch, seed in zip(recorder.batches, seeds, strict=True):
        torch.manual_seed(seed)
        out, z = outputs_and_vectors(model, batch, heads, num_heads, processor, **router)
        logits = logit_scale * out.logits
        if router:
            loss = loss + trainer.router_aux_loss_coef * out.aux_loss / len(recorder.batches)
        if trainer.model_accepts_loss_kwargs:
            loss = loss + language_model_loss(logits, batch["labels"], "sum") / total_labels
        else:
            loss = loss + language_model_loss(logits, batch["labels"], "mean") / len(recorder.batches)
        present = ~batch[TEACHER_COLUMN].isnan().any(-1) & pooled_positions(batch, model, processor).any(1)
        vectors.append(z[:, present])
        teachers.append(batch[TEACHER_COLUMN][present])
    if scope == "step":
        vectors, teachers = [torch.cat(vectors, dim=1)], [torch.cat(teachers)]
    for z, teacher in zip(vectors, teachers, strict=True):
        align = objective_loss(trainer, z, teacher, parameters)
        loss = loss + weight * align / len(vectors)
    return gradients_of(model, loss, parameters)
