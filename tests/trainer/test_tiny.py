"""The test models are what the other tests take them for: real processors, real losses, loadable from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FAMILIES, build_vlm, image_dataset, save_tiny_dinov2, save_vlm, sft_args
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

# Idefics2's processor expands its image placeholder without telling where, so the mask of assistant tokens that
# transformers derives from the unexpanded text is shifted.
FAMILIES_WITH_ASSISTANT_MASK = tuple(family for family in FAMILIES if family != "idefics2")


def collate(processor: ProcessorMixin, fmt: str = "prompt_completion") -> dict[str, torch.Tensor]:
    """Collate three rows so that the labels cover what the assistant says."""
    answers_only = "completion_only_loss" if fmt == "prompt_completion" else "assistant_only_loss"
    return DataCollatorForVisionLanguageModeling(processor, **{answers_only: True})(list(image_dataset(3, fmt)))


def answer_text(processor: ProcessorMixin, batch: dict[str, torch.Tensor], row: int) -> str:
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != -100])


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_cross_entropy_of_the_answer(family: str) -> None:
    model, processor = build_vlm(family)
    batch = collate(processor)
    completions = [row["completion"][0]["content"] for row in image_dataset(3)]
    assert [answer_text(processor, batch, row) for row in range(3)] == [f"{text}<|im_end|>\n" for text in completions]

    with torch.no_grad():
        output = model(**batch)
    losses = []
    for row, position in (batch["labels"] != -100).nonzero().tolist():
        log_probs = torch.log_softmax(output.logits[row, position - 1].double(), dim=-1)
        losses.append(-log_probs[batch["labels"][row, position]])
    torch.testing.assert_close(output.loss.double(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES_WITH_ASSISTANT_MASK)
def test_chat_template_marks_what_the_assistant_says(family: str) -> None:
    _, processor = build_vlm(family, num_hidden_layers=1)
    batch = collate(processor, "messages")
    answers = [row["messages"][1]["content"] for row in image_dataset(3, "messages")]
    assert [answer_text(processor, batch, row) for row in range(3)] == [f"{text}<|im_end|>" for text in answers]


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_through_the_auto_classes(family: str, tmp_path: Path) -> None:
    model, processor = build_vlm(family, seed=1)
    path = save_vlm(family, tmp_path, seed=1)
    loaded_model = AutoModelForImageTextToText.from_pretrained(path)
    loaded_processor = AutoProcessor.from_pretrained(path)
    assert type(loaded_model) is type(model)
    assert type(loaded_processor) is type(processor)
    assert loaded_processor.chat_template == processor.chat_template

    batch, loaded_batch = collate(processor), collate(loaded_processor)
    assert batch.keys() == loaded_batch.keys()
    for name, tensor in batch.items():
        assert torch.equal(tensor, loaded_batch[name]), name
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded_model(**loaded_batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_depend_on_the_image(family: str) -> None:
    model, processor = build_vlm(family)
    batch = collate(processor)
    with torch.no_grad():
        logits = model(**batch).logits
        negative = model(**{**batch, "pixel_values": -batch["pixel_values"]}).logits
    answer = batch["labels"] != -100
    assert (logits - negative)[answer].abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_overrides_widen_every_linear_layer(family: str) -> None:
    model, processor = build_vlm(family, hidden_size=64)
    narrow = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.in_features < 64}
    assert narrow == set()
    with torch.no_grad():
        assert torch.isfinite(model(**collate(processor)).loss)


def test_heads_of_qwen3_vl_do_not_add_up_to_the_hidden_size() -> None:
    for hidden_size in (32, 64):
        model, _ = build_vlm("qwen3_vl", hidden_size=hidden_size)
        projection = model.model.language_model.layers[0].self_attn.o_proj
        assert (projection.in_features, projection.out_features) == (2 * hidden_size, hidden_size)


def test_attention_bias_is_set_where_it_exists() -> None:
    model, _ = build_vlm("llava", attention_bias=True)
    assert model.model.language_model.layers[0].self_attn.o_proj.bias is not None
    with pytest.raises(ValueError, match="attention_bias"):
        build_vlm("qwen2_vl", attention_bias=True)


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = (build_vlm("llava", seed=seed)[0].lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("fmt", "columns"),
    [
        ("prompt_completion", ["images", "prompt", "completion"]),
        ("messages", ["images", "messages"]),
        ("image", ["image", "messages"]),
        ("text", ["text"]),
    ],
)
def test_image_dataset(fmt: str, columns: list[str]) -> None:
    dataset = image_dataset(24, fmt, with_features=6)
    assert dataset.column_names == [*columns, "teacher_features"]
    assert dataset.features["teacher_features"].feature.dtype == "float32"
    assert np.asarray(dataset["teacher_features"]).shape == (24, 6)
    assert dataset.to_dict() == image_dataset(24, fmt, with_features=6).to_dict()
    assert dataset.to_dict() != image_dataset(24, fmt, with_features=6, seed=1).to_dict()
    if fmt == "image":
        assert len({image.tobytes() for image in dataset["image"]}) == 24
        assert len({image.size for image in dataset["image"]}) == 6
        assert len({messages[1]["content"] for messages in dataset["messages"]}) == 24


def test_tiny_dinov2_loads_with_the_auto_classes(tmp_path: Path) -> None:
    path = save_tiny_dinov2(tmp_path)
    model, processor = AutoModel.from_pretrained(path), AutoImageProcessor.from_pretrained(path)
    pixels = processor(images=list(image_dataset(2, "image")["image"]), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 28, 28)
    with torch.no_grad():
        assert model(pixels).last_hidden_state.shape == (2, 5, 16)


def test_sft_args_make_a_config(tmp_path: Path) -> None:
    args = SFTConfig(**sft_args(tmp_path, seed=7))
    assert (args.seed, args.max_length, args.device.type) == (7, None, "cpu")
