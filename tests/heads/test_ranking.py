"""Head ranking against its definition: one text at a time, full-width vectors, neighbours as Python sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value, concatenate_datasets
from peft import LoraConfig, get_peft_model
from rankings import (
    HEADS,
    K,
    answers,
    assert_ranking,
    fed_texts,
    mutual_knn_by_definition,
    neighbor_sets,
    rank,
    text_decoder,
    text_samples,
    vectors_of,
    watched,
)
from tiny import build_vlm, image_dataset, save_tiny_dinov2
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import VisionTeacher, add_teacher_features
from hera_trainer.data.collator import TEACHER_COLUMN, TeacherCollator
from hera_trainer.heads.head import AttentionHead
from hera_trainer.heads.rank import rank_heads


def hooks_of(model: nn.Module) -> list[tuple[str, int]]:
    """All forward hooks. After its first forward, transformers leaves some of its own on a vision tower."""
    return [
        (name, key)
        for name, module in model.named_modules()
        for key in (*module._forward_hooks, *module._forward_pre_hooks)
    ]


# --- Scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "qwen3_5"])
def test_scores_are_those_of_the_definition(family: str) -> None:
    model, processor = build_vlm(family)
    dataset = image_dataset(24, with_features=5)
    vectors = vectors_of(model, text_samples(model, processor.tokenizer, answers(dataset)))
    if family != "qwen3_5":
        assert {key for key in vectors if not isinstance(key, int)} == {(i, j) for i in range(3) for j in range(HEADS)}
    for batch_size in (1, 8):
        ranking = rank(model, processor, dataset, batch_size=batch_size)
        assert_ranking(ranking, vectors, dataset[TEACHER_COLUMN])
        assert ranking.context == "text"
    if family == "qwen3_5":  # only the last layer is softmax attention
        assert ranking.scores[:3].isnan().all()
        assert ranking.heads() == [AttentionHead(3, head) for head in range(HEADS)]


def test_layer_scores_are_those_of_the_hidden_states() -> None:
    model, processor = build_vlm("llava")
    dataset = image_dataset(20, with_features=5)
    pooled: list[list[Tensor]] = [[] for _ in range(3)]
    for text in answers(dataset):
        ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = text_decoder(model)(input_ids=ids, output_hidden_states=True).hidden_states
        for layer in range(2):  # the last one of `hidden_states` has been through the final norm
            pooled[layer].append(states[layer + 1][0].double().mean(0))
    ranking = rank(model, processor, dataset)
    teacher = [torch.tensor(vector).double() for vector in dataset[TEACHER_COLUMN]]
    for layer in range(2):
        expected = mutual_knn_by_definition(pooled[layer], teacher, K, True)
        assert ranking.layer_scores[layer].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("k", [3, 10])
@pytest.mark.parametrize("normalize", [True, False])
def test_neighbors_and_normalization(k: int, normalize: bool) -> None:
    model, processor = build_vlm("llava")
    dataset = image_dataset(20, with_features=5)
    vectors = vectors_of(model, text_samples(model, processor.tokenizer, answers(dataset)))
    ranking = rank(model, processor, dataset, k=k, normalize=normalize)
    assert_ranking(ranking, vectors, dataset[TEACHER_COLUMN], k, normalize)


def test_the_settings_of_the_paper_are_the_defaults() -> None:
    model, processor = build_vlm("llava", num_hidden_layers=1)
    dataset = image_dataset(14, with_features=5)
    default = rank_heads(model, processor, dataset)
    explicit = rank_heads(model, processor, dataset, k=10, num_samples=1000, seed=0, normalize=True)
    assert torch.equal(default.scores, explicit.scores)
    assert (default.k, default.num_samples, default.seed) == (10, 14, 0)


def test_a_bias_of_the_projection_belongs_to_no_head() -> None:
    model, processor = build_vlm("llava", attention_bias=True)
    for layer in text_decoder(model).layers:
        nn.init.normal_(layer.self_attn.o_proj.bias, generator=torch.Generator().manual_seed(0))
    dataset = image_dataset(20, with_features=5)
    vectors = vectors_of(model, text_samples(model, processor.tokenizer, answers(dataset)))
    assert_ranking(rank(model, processor, dataset), vectors, dataset[TEACHER_COLUMN])


def test_special_tokens_are_fed_but_not_pooled() -> None:
    model, processor = build_vlm("llava")
    tokenizer = processor.tokenizer
    dataset = image_dataset(20, with_features=5)
    without = rank(model, processor, dataset)
    special = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    with fed_texts(model, tokenizer) as texts:
        ranking = rank(model, processor, dataset)
    assert sorted(texts) == sorted(f"<s>{text}" for text in answers(dataset))
    vectors = vectors_of(model, text_samples(model, tokenizer, answers(dataset), num_special=1))
    assert_ranking(ranking, vectors, dataset[TEACHER_COLUMN])
    assert not torch.equal(ranking.scores, without.scores)


@pytest.mark.parametrize(
    ("family", "placeholder"),
    [("llava", "<image>\n"), ("qwen2_5_vl", "<|vision_start|><|image_pad|><|vision_end|>")],
)
def test_placeholders_of_plain_texts_are_not_fed(family: str, placeholder: str) -> None:
    model, processor = build_vlm(family)
    dataset = image_dataset(20, with_features=5)
    captions = dataset.select_columns([TEACHER_COLUMN])
    plain = captions.add_column("text", [f"{placeholder}{text}" for text in answers(dataset)])
    with fed_texts(model, processor.tokenizer) as texts:
        ranking = rank(model, processor, plain)
    assert sorted(texts) == sorted(answers(dataset))
    assert torch.equal(ranking.scores, rank(model, processor, dataset).scores)


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(autocast: bool) -> None:
    """Only the model computes in bfloat16 (by its weights or by autocast), never the comparison of its vectors."""
    model, processor = build_vlm("llava")
    if not autocast:
        model.bfloat16()
    dataset = image_dataset(24, with_features=5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        samples = text_samples(model, processor.tokenizer, answers(dataset))
        ranking = rank(model, processor, dataset, batch_size=1)  # one by one, so that the model rounds alike
        with watched(text_decoder(model)) as (inputs, _):
            samples[0][0]()
    assert inputs[0].dtype == torch.bfloat16

    def in_autocast(forward: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                forward()

        return run

    vectors = vectors_of(model, [(in_autocast(forward), positions) for forward, positions in samples])
    assert_ranking(ranking, vectors, dataset[TEACHER_COLUMN])


def test_processor_or_tokenizer_and_every_format() -> None:
    model, processor = build_vlm("llava")
    scores = rank(model, processor, image_dataset(20, with_features=5)).scores
    assert torch.equal(rank(model, processor.tokenizer, image_dataset(20, with_features=5)).scores, scores)
    for fmt in ("messages", "image"):
        assert torch.equal(rank(model, processor, image_dataset(20, fmt, with_features=5)).scores, scores)
    bare = image_dataset(20, with_features=5).remove_columns("images")  # vectors do instead of images
    assert torch.equal(rank(model, processor, bare).scores, scores)


# --- Samples ---------------------------------------------------------------------------------------------------------


def with_vectors(dataset: Dataset, vectors: list[Any]) -> Dataset:
    dataset = dataset.remove_columns(TEACHER_COLUMN)
    return dataset.add_column(TEACHER_COLUMN, vectors, feature=List(Value("float32")))


def assert_ranking_of_fed_texts(
    model: nn.Module, processor: Any, dataset: Dataset, count: int, **settings: Any
) -> list[str]:
    """The scores are those of the texts that were fed, whichever were drawn; each brings its own row's vector."""
    with fed_texts(model, processor.tokenizer) as texts:
        ranking = rank(model, processor, dataset, **settings)
    vector_of = dict(zip(answers(dataset), dataset[TEACHER_COLUMN], strict=True))
    teacher = [vector_of[text] for text in texts]
    assert len(texts) == len(set(texts)) == count
    assert len({tuple(vector) for vector in teacher}) == count
    assert_ranking(ranking, vectors_of(model, text_samples(model, processor.tokenizer, texts)), teacher)
    return texts


def test_a_draw_of_samples() -> None:
    model, processor = build_vlm("llava")
    dataset = image_dataset(40, with_features=5)
    draws = [
        assert_ranking_of_fed_texts(model, processor, dataset, 16, num_samples=16, seed=seed) for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1]
    assert set(draws[0]) != set(draws[2])


def test_the_same_for_the_same_seed_and_for_nobody_elses() -> None:
    model, processor = build_vlm("llava")
    dataset = image_dataset(40, with_features=5)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = rank(model, processor, dataset, num_samples=16, seed=3)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]
    torch.manual_seed(77)
    second = rank(model, processor, dataset, num_samples=16, seed=3)
    other = rank(model, processor, dataset, num_samples=16, seed=4)
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.layer_scores, second.layer_scores)
    assert not torch.equal(first.scores, other.scores)
    assert (first.seed, other.seed) == (3, 4)


def test_the_same_image_counts_once() -> None:
    model, processor = build_vlm("llava")
    dataset = image_dataset(36, with_features=5)
    vectors = list(dataset[TEACHER_COLUMN])
    again = with_vectors(dataset, vectors[:12] * 3)  # each image in three dialogues with three answers
    assert_ranking_of_fed_texts(model, processor, again, 12)
    with pytest.raises(ValueError, match="11 samples with distinct images"):
        rank(model, processor, with_vectors(dataset, vectors[:11] + vectors[:11] * 2 + vectors[:3]), k=10)


def test_rows_without_vector_or_text_are_passed_over() -> None:
    model, processor = build_vlm("llava")
    dataset = image_dataset(20, with_features=5)
    vectors = [None if i in (0, 7, 19) else vector for i, vector in enumerate(dataset[TEACHER_COLUMN])]
    texts = ["" if i in (3, 7, 8) else text for i, text in enumerate(answers(dataset))]
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    gaps = with_vectors(dataset.remove_columns("completion").add_column("completion", turns), vectors)
    keep = [i for i in range(20) if i not in (0, 3, 7, 8, 19)]
    ranking = rank(model, processor, gaps)
    expected = vectors_of(model, text_samples(model, processor.tokenizer, answers(dataset.select(keep))))
    assert_ranking(ranking, expected, dataset.select(keep)[TEACHER_COLUMN])


def test_selections_and_concatenations_of_data_sets() -> None:
    model, processor = build_vlm("llava")
    dataset = image_dataset(30, with_features=5)
    view = concatenate_datasets([dataset.select(range(20, 30)), dataset.select(range(0, 8))]).shuffle(seed=1)
    assert_ranking_of_fed_texts(model, processor, view, 18)


def test_too_few_samples() -> None:
    model, processor = build_vlm("llava", num_hidden_layers=1)
    dataset = image_dataset(12, with_features=5)
    assert rank(model, processor, dataset, k=10).num_samples == 12
    with pytest.raises(ValueError, match=r"11 samples .*12 are needed for 10 neighbours.*`num_neighbors`"):
        rank(model, processor, dataset.select(range(11)), k=10)
    with pytest.raises(ValueError, match=r"`num_samples` \(11\) must be at least k \+ 2 = 12"):
        rank(model, processor, dataset, k=10, num_samples=11)
    with pytest.raises(ValueError, match=r"no `teacher_features` column.*add_teacher_features"):
        rank(model, processor, image_dataset(12))
    assert hooks_of(model) == []


# --- With the image in context ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["prompt_completion", "messages"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_with_the_image_in_context(family: str, fmt: str) -> None:
    model, processor = build_vlm(family)
    dataset = image_dataset(14, fmt, with_features=5)
    collator = DataCollatorForVisionLanguageModeling(processor)
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>" if family.startswith("qwen") else "<image>")
    samples = []
    for row in dataset.remove_columns(TEACHER_COLUMN):
        batch = collator([row])
        pooled = (batch["labels"][0] != -100) & (batch["input_ids"][0] != image)
        samples.append((lambda batch=batch: model(**batch), pooled))
    vectors = vectors_of(model, samples)
    for batch_size in (1, 5):
        ranking = rank(model, processor, dataset, batch_size=batch_size, data_collator=collator)
        assert_ranking(ranking, vectors, dataset[TEACHER_COLUMN])
        assert ranking.context == "image"
    assert torch.equal(
        rank(model, processor, dataset, data_collator=TeacherCollator(collator, 5)).scores, ranking.scores
    )
    assert not torch.equal(rank(model, processor, dataset).scores, ranking.scores)


# --- The model is left as it was -------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_images", [False, True])
def test_the_model_is_left_as_it_was(with_images: bool) -> None:
    model, processor = build_vlm("llava", attention_dropout=0.5)
    dataset = image_dataset(14, with_features=5)
    settings = {"data_collator": DataCollatorForVisionLanguageModeling(processor)} if with_images else {}
    expected = rank(model, processor, dataset, **settings)
    model.train()
    model.model.language_model.layers[1].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    flags, hooks = [module.training for module in model.modules()], hooks_of(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranking = rank(model, processor, dataset, **settings)
    assert torch.equal(ranking.scores, expected.scores)  # eval mode: no dropout
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    grads = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert grads == ["lm_head.weight"]
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert hooks_of(model) == hooks
    assert torch.is_grad_enabled()


def test_hooks_and_flags_are_restored_after_an_error() -> None:
    model, processor = build_vlm("llava")
    model.train()

    def fail(rows: list[dict[str, Any]]) -> dict[str, Any]:
        raise RuntimeError("cannot collate")

    with pytest.raises(RuntimeError, match="cannot collate"):
        rank(model, processor, image_dataset(14, with_features=5), data_collator=fail)
    assert all(module.training for module in model.modules())
    assert hooks_of(model) == []


def test_adapter_on_and_off() -> None:
    base, processor = build_vlm("llava")
    dataset = image_dataset(20, with_features=5)
    without = rank(base, processor, dataset)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.5))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    model.train()
    vectors = vectors_of(model.eval(), text_samples(model, processor.tokenizer, answers(dataset)))
    model.train()
    on = rank(model, processor, dataset)
    assert_ranking(on, vectors, dataset[TEACHER_COLUMN])
    with model.disable_adapter():
        off = rank(model, processor, dataset)
    assert torch.equal(off.scores, without.scores)
    assert not torch.equal(on.scores, without.scores)
    assert on.scores.shape == without.scores.shape == (3, HEADS)


# --- What to hold scores against -------------------------------------------------------------------------------------


def test_null_is_that_of_one_head() -> None:
    """500 permuted pairs, dealt out over the 12 heads, each head's own scores; of the definition in sets."""
    model, processor = build_vlm("llava")
    dataset = image_dataset(20, with_features=5)
    ranking = rank(model, processor, dataset, seed=3)
    order = np.random.default_rng(3).permutation(20).tolist()  # of the draw, which permutations go by
    drawn = dataset.select(order)
    vectors = vectors_of(model, text_samples(model, processor.tokenizer, answers(drawn)))
    teacher = neighbor_sets([torch.tensor(vector).double() for vector in drawn[TEACHER_COLUMN]], K, True)
    generator, scores = torch.Generator().manual_seed(3), []
    for head in ranking.heads():
        own = neighbor_sets(vectors[head], K, True)
        for _ in range(-(-500 // 12)):
            moved = torch.randperm(20, generator=generator).tolist()
            others = {moved[i]: {moved[j] for j in near} for i, near in enumerate(teacher)}
            scores.append(sum(len(own[i] & others[i]) for i in range(20)) / (20 * K))
    # A neighbour that flips by rounding would move one of 504 scores by 1 / (N k).
    assert ranking.null_mean == pytest.approx(np.mean(scores), abs=1e-6)
    assert ranking.null_p95 == pytest.approx(np.quantile(scores, 0.95), abs=1e-6)
    assert ranking.null_mean == pytest.approx(ranking.chance, rel=0.03) and ranking.chance == K / 19
    assert ranking.null_p95 > ranking.null_mean


@pytest.mark.parametrize("with_images", [False, True])
def test_ceiling_is_the_second_encoders_score(tmp_path: Path, with_images: bool) -> None:
    model, processor = build_vlm("llava")
    rows = image_dataset(24)
    teacher, second = (VisionTeacher.from_pretrained(save_tiny_dinov2(tmp_path / str(i), seed=i)) for i in (1, 2))
    dataset = add_teacher_features(rows, teacher)
    settings = {"data_collator": DataCollatorForVisionLanguageModeling(processor)} if with_images else {}
    ranking = rank(model, processor, dataset, num_samples=15, seed=1, ceiling=second, **settings)
    drawn = np.random.default_rng(1).permutation(24)[:15]
    a, b = (torch.tensor(add_teacher_features(rows, each)[TEACHER_COLUMN][:])[drawn] for each in (teacher, second))
    assert ranking.ceiling == pytest.approx(mutual_knn_by_definition(a.double(), b.double(), K, True), abs=1e-6)
    assert 0 < ranking.ceiling < 1
    assert ranking.ceiling_model == second.name and second.model.training is False
    plain = rank(model, processor, dataset, num_samples=15, seed=1, **settings)
    assert torch.equal(plain.scores, ranking.scores)
    assert (plain.ceiling, plain.ceiling_model) == (None, "")


def test_ceiling_without_images(tmp_path: Path) -> None:
    model, processor = build_vlm("llava", num_hidden_layers=1)
    encoder = save_tiny_dinov2(tmp_path / "encoder")
    dataset = image_dataset(14, with_features=5)
    with pytest.raises(ValueError, match="no image column"):
        rank(model, processor, dataset.remove_columns("images"), ceiling=encoder)
    gap = dataset.map(lambda row, i: {"images": row["images"] if i != 3 else []}, with_indices=True)
    with pytest.raises(ValueError, match=r"Row 3 has `teacher_features` but no image.*Leave `ceiling` out"):
        rank(model, processor, gap, ceiling=encoder)


@pytest.mark.parametrize("normalize", [True, False])
def test_clipped_spaces(normalize: bool) -> None:
    """Heads, layers and teacher are clipped in their own full width, each at its own threshold."""
    model, processor = build_vlm("llava")
    with torch.no_grad():  # a dimension of huge values, as language models have
        for layer in text_decoder(model).layers:
            layer.self_attn.o_proj.weight[3] *= 30
    dataset = image_dataset(24, with_features=5)
    found = vectors_of(model, text_samples(model, processor.tokenizer, answers(dataset)))

    def clipped(space: list[Tensor], quantile: float) -> list[Tensor]:
        threshold = np.mean([np.quantile(np.abs(vector.numpy()), quantile) for vector in space])
        return [torch.from_numpy(np.clip(vector.numpy(), -threshold, threshold)) for vector in space]

    plain = rank(model, processor, dataset, normalize=normalize)
    ranking = rank(model, processor, dataset, normalize=normalize, clip_quantile=0.9)
    vectors = {key: clipped(space, 0.9) for key, space in found.items()}
    teacher = clipped([torch.tensor(vector).double() for vector in dataset[TEACHER_COLUMN]], 0.9)
    assert_ranking(ranking, vectors, teacher, normalize=normalize)
    assert not torch.equal(ranking.scores, plain.scores)
    assert (ranking.clip_quantile, plain.clip_quantile) == (0.9, None)
    with pytest.raises(ValueError, match="`clip_quantile` must be above 0 and below 1, got 95"):
        rank(model, processor, dataset, clip_quantile=95)


def test_centred_spaces() -> None:
    """Heads, layers and teacher without the mean over the samples, whatever dimensions they are scored in."""
    model, processor = build_vlm("llava")
    dataset = image_dataset(24, with_features=5)
    found = vectors_of(model, text_samples(model, processor.tokenizer, answers(dataset)))

    def centred(space: list[Tensor]) -> list[Tensor]:
        mean = torch.stack(space).mean(0)
        return [vector - mean for vector in space]

    ranking = rank(model, processor, dataset, center=True)
    teacher = centred([torch.tensor(vector).double() for vector in dataset[TEACHER_COLUMN]])
    assert_ranking(ranking, {key: centred(space) for key, space in found.items()}, teacher)
    assert ranking.center and "centred" in ranking.scale
    by_dots = rank(model, processor, dataset, normalize=False)
    assert not by_dots.normalize and by_dots.scale.endswith(", by dot products") and ranking.normalize
    with pytest.raises(ValueError, match="by dot products"):
        by_dots.plot(before=rank(model, processor, dataset))
    assert not torch.equal(ranking.scores, rank(model, processor, dataset).scores)
