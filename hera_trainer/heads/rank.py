"""Scoring every attention head by how well its neighbourhoods agree with the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..common.precision import exact_products
from ..common.processes import Team
from ..common.sharded import gathered_in_forward, part_of
from ..objectives.metrics import check_clip_quantile, nearest_neighbors, neighbor_overlap
from ..teacher.encoder import VisionTeacher
from .checks import check_device_map
from .modes import evaluating
from .observer import Observer, run_text, run_with_images
from .pooling import placeholder_token_ids
from .ranking import HeadRanking
from .registry import get_head_accessor, unwrap_model
from .samples import Samples, draw_samples, second_vectors
from .scoring import score_layers


def rank_heads(
    model: nn.Module,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    dataset: Dataset,
    k: int = 10,
    num_samples: int = 1000,
    batch_size: int = 16,
    seed: int = 0,
    normalize: bool = True,
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    teacher_name: str = "",
    progress: bool = True,
    distributed: bool = False,
    text_column: str | None = None,
    clip_quantile: float | None = None,
    ceiling: VisionTeacher | str | None = None,
    center: bool = False,
) -> HeadRanking:
    """Scores all attention heads of a language model by mutual k-NN with a vision teacher (eq. 3 of the
    [HeRA paper](https://huggingface.co/papers/2606.23885)).

    As in the paper, only text goes through the language model: each sample's answer or caption, without chat template
    and without image. Special tokens are fed but not pooled. The model is taken as it is: to rank the heads of a PEFT
    model without its adapter, call this inside `model.disable_adapter()`.

    Args:
        model (`nn.Module`):
            Model whose heads are ranked, in any wrapping that [`get_head_accessor`] understands.
        processing_class ([`~transformers.ProcessorMixin`] or tokenizer):
            Its processor.
        dataset ([`~datasets.Dataset`]):
            Rows with `teacher_features` and a text: the assistant turns of `messages`, `completion`, or `text`. Rows
            without a vector or without text are passed over, and an image that occurs in several rows counts once.
        k (`int`, *optional*, defaults to `10`):
            Number of neighbours.
        num_samples (`int`, *optional*, defaults to `1000`):
            Number of samples, drawn with `seed`; all there are if there are fewer.
        batch_size (`int`, *optional*, defaults to `16`):
            Samples in one forward pass.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
        normalize (`bool`, *optional*, defaults to `True`):
            L2-normalise both spaces first.
        data_collator (`Callable`, *optional*):
            If given, the whole model runs on the batches it makes, with the images in context, and the positions with
            labels are pooled, as in training. The ranking's `context` is then `"image"`.
        teacher_name (`str`, *optional*):
            Kept in the ranking.
        progress (`bool`, *optional*, defaults to `True`):
            Show a progress bar.
        distributed (`bool`, *optional*, defaults to `False`):
            Divide the forward passes among all processes of the run, each of which must then call this function alike.
            All get the same ranking, the one that a single process computes.
        text_column (`str`, *optional*):
            Column of the texts. By default the one that SFTTrainer trains on: `messages`, or `completion` beside a
            `prompt`, or `text`.
        clip_quantile (`float`, *optional*):
            Clamp the values of each space to this quantile first (see [`mutual_knn`]), 0.95 in the reference code of
            the metric. Each head is then scored in d_model dimensions instead of its own d_head, which takes
            d_model / d_head times the work of its products, a sort of each vector, and memory for one head's
            `[N, d_model]`.
        center (`bool`, *optional*, defaults to `False`):
            Take each space's mean over the samples away before vectors are normalised (see [`mutual_knn`]).
        ceiling ([`VisionTeacher`] or `str`, *optional*):
            A second vision encoder, or its name. What it scores with the teacher on the images of the same samples is
            kept in the ranking, as what two good views of the same images agree on. `dataset` needs the images.

    Returns:
        [`HeadRanking`]. The same for the same seed, model and data.

    Raises:
        `ValueError`: If fewer than `k + 2` samples can be used, the model type is unknown, its text decoder can't run
            on text alone, or a sample has no image for `ceiling` to look at.
    """
    check_clip_quantile(clip_quantile)
    check_device_map(model, "a ranking of heads")
    if data_collator is None:
        _check_text_alone(model)  # before a sample is looked at
    tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
    samples, second = draw_samples(dataset, tokenizer, k, num_samples, seed, text_column), None
    if ceiling is not None:
        device = get_head_accessor(model).device
        second = second_vectors(dataset, samples, ceiling, batch_size, distributed, device)
    ranking = rank_samples(
        model,
        processing_class,
        dataset,
        samples,
        k=k,
        batch_size=batch_size,
        normalize=normalize,
        data_collator=data_collator,
        teacher_name=teacher_name,
        progress=progress,
        distributed=distributed,
        clip_quantile=clip_quantile,
        center=center,
        second=second,
    )
    if ceiling is not None:
        ranking.ceiling_model = ceiling.name if isinstance(ceiling, VisionTeacher) else ceiling
    return ranking


def _check_text_alone(model: nn.Module) -> None:
    needs = get_head_accessor(model).needs
    if needs:
        raise ValueError(
            f"The text decoder of this {unwrap_model(model).config.model_type!r} model needs {needs}, so its heads "
            "cannot be ranked on text. Read them with `HeadCapture`, and compare with `mutual_knn`."
        )


def rank_samples(
    model: nn.Module,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    dataset: Dataset,
    samples: Samples,
    *,
    k: int,
    batch_size: int,
    normalize: bool,
    data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    teacher_name: str,
    progress: bool,
    distributed: bool,
    clip_quantile: float | None = None,
    center: bool = False,
    second: Tensor | None = None,
) -> HeadRanking:
    """Scores all attention heads on samples that were drawn. Arguments and result are those of [`rank_heads`]; `second`
    are the vectors `[N, d]` of the samples by the second encoder."""
    accessor, base = get_head_accessor(model), unwrap_model(model)
    if data_collator is None:
        _check_text_alone(model)
    team = Team(distributed)
    observer = Observer(accessor, team)
    handles = observer.attach()
    try:
        with evaluating(model):
            with team.together(), gathered_in_forward(model):
                if data_collator is None:
                    with part_of(model, accessor.decoder) as decoder:
                        run_text(observer, decoder, samples.tokens, batch_size, progress)
                else:
                    ids = placeholder_token_ids(base.config, processing_class)
                    rows = samples.indices
                    run_with_images(observer, model, dataset, rows, data_collator, ids, batch_size, progress)
            pooled, layers = observer.gather()
            if len(pooled) < k + 2:
                raise ValueError(
                    f"Only {len(pooled)} samples have a label outside of their images, but {k + 2} are needed for {k} "
                    "neighbours. Use more data, or a smaller k."
                )
            teacher = samples.teacher[pooled].to(observer.device)
            with exact_products(teacher.device):
                targets = nearest_neighbors(teacher, k, normalize, clip_quantile, center)
                scores, layer_scores, null = score_layers(
                    accessor, layers, targets, normalize, clip_quantile, samples.seed, center
                )
                ceiling = None
                if second is not None:
                    others = nearest_neighbors(second[pooled].to(targets.device), k, normalize, clip_quantile, center)
                    ceiling = neighbor_overlap(others, targets)
            # Another device may round a tie to the other side, and all processes must choose the same heads.
            scores, layer_scores = team.same(scores), team.same(layer_scores)
    finally:
        for handle in handles:
            handle.remove()
    return HeadRanking(
        scores=scores,
        layer_scores=layer_scores,
        k=k,
        num_samples=len(pooled),
        seed=samples.seed,
        context="text" if data_collator is None else "image",
        model=base.config.name_or_path,
        teacher=teacher_name,
        dataset_fingerprint=dataset._fingerprint,
        null_mean=null.mean,
        null_p95=null.p95,
        ceiling=ceiling,
        clip_quantile=clip_quantile,
        center=center,
        normalize=normalize,
    )
