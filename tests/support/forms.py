"""What the tests of data forms share: data sets of every form, and a trainer that keeps what it pools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import transformers as tf
from datasets import Dataset, Features, Image, List, Value
from tiny import build_vlm, sft_args
from tiny_teachers import noise_image
from transformers import AutoImageProcessor, AutoModel
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import HeRAConfig, HeRATrainer
from hera_trainer.data.collator import TEACHER_COLUMN

ROWS = 6
TEXT = {"role": Value("string"), "content": Value("string")}
VISION = "<|vision_start|><|vision_end|>"  # the placeholder between them is never pooled


def hand_vector(teacher: str) -> Callable[..., torch.Tensor]:
    """What the teacher says of images, by hand: the mean direction and norm, if there are many."""
    processor, model = AutoImageProcessor.from_pretrained(teacher), AutoModel.from_pretrained(teacher).eval()

    def of(*images: PIL.Image.Image) -> torch.Tensor:
        with torch.no_grad():
            vectors = [
                model(**processor(images=image, return_tensors="pt")).last_hidden_state[0, 0] for image in images
            ]
        if len(vectors) == 1:
            return vectors[0]
        mean = torch.stack([v / v.norm() for v in vectors]).mean(0)
        return mean / mean.norm() * torch.stack([v.norm() for v in vectors]).mean()

    return of


class Recorder(HeRATrainer):
    """Keeps, of every sample that is trained on, the tokens that are pooled and the teacher vector."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        vectors, ids = inputs[TEACHER_COLUMN].clone(), inputs["input_ids"]
        self.pixels = {name: value for name, value in inputs.items() if "pixel" in name}
        start = self.alignment.capture.start
        masks: list[torch.Tensor] = []
        self.alignment.capture.start = lambda mask, train: (masks.append(mask), start(mask, train))
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.alignment.capture.start = start
            self.samples = {tuple(row[keep].tolist()): v for row, keep, v in zip(ids, masks[0], vectors, strict=True)}


def run(
    tmp_path: Path,
    teacher: str,
    dataset: Dataset,
    family: str = "qwen2_5_vl",
    data_collator: Callable | None = None,
    has_baseline: bool = True,
    **kwargs: Any,
) -> Recorder:
    """Trains with alignment and, if there is a baseline, a first step of it, whose language-model loss is the same."""
    kwargs.setdefault("aligned_heads", ["L3H0", "L3H2"] if family == "qwen3_5" else ["L1H0", "L1H2"])
    args = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1, "max_steps": 2, "num_neighbors": 2}

    def made(trainer_class: type[HeRATrainer], **others: Any) -> Any:
        model, processor = build_vlm(family)
        settle(processor)
        return trainer_class(
            model,
            HeRAConfig(**sft_args(tmp_path, **{**args, **kwargs, **others}), teacher_model_name_or_path=teacher),
            data_collator=data_collator,
            train_dataset=dataset,
            processing_class=processor,
        )

    trainer = made(Recorder)
    trainer.train()
    assert trainer.state.global_step == 2
    losses = [entry["alignment_loss"] for entry in trainer.state.log_history if "alignment_loss" in entry]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    if not has_baseline:
        return trainer
    baseline = made(HeRATrainer, alignment_weight=0.0, max_steps=1)
    baseline.train()
    first, alone = trainer.state.log_history[0]["lm_loss"], baseline.state.log_history[0]["loss"]
    assert first == pytest.approx(alone, rel=1e-6)
    return trainer


def settle(processor: tf.ProcessorMixin) -> None:
    """Makes the tiny template render videos and calls of tools, and the video processor make few tokens."""
    video = "<|vision_start|><|video_pad|><|vision_end|>" if "<|vision" in processor.chat_template else "<video>"
    calls = "(message.tool_calls|tojson if message.tool_calls else '')"
    for old, new in (
        ("part['type'] == 'image'", "part['type'] == 'image' or 'image' in part"),  # as the templates of Qwen2-VL ask
        ("{%- elif part['type'] == 'text'", "{%- elif part['type'] == 'video' -%}" + video + "{%- elif 'text' in part"),
        ("render(message['content'])", "render(message['content'] or '') + " + calls),
    ):
        assert old in processor.chat_template
        processor.chat_template = processor.chat_template.replace(old, new)
    size = {"Qwen": {"shortest_edge": 256, "longest_edge": 2048}, "SmolVLM": {"longest_edge": 32}}
    for name, edges in size.items():
        if type(processor).__name__.startswith(name):
            processor.video_processor.size = processor.video_processor.max_image_size = edges


def check(trainer: Recorder, expected: dict[str, torch.Tensor | None]) -> None:
    """Compares with the pooled text and the vector of each row, both written down by hand."""
    tokenizer = trainer.processing_class.tokenizer
    wanted = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]): v for text, v in expected.items()}
    assert len(wanted) == len(trainer.samples) == ROWS
    assert trainer.samples.keys() == wanted.keys()
    for ids, found in trainer.samples.items():
        if wanted[ids] is None:
            assert found.isnan().all()
        else:
            torch.testing.assert_close(found, wanted[ids], rtol=1e-5, atol=1e-5)


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def chat(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"what {number}"}, {"role": "assistant", "content": f"red {number}"}]


def photos(number: int, count: int = 1) -> list[PIL.Image.Image]:
    return [noise_image(10 * number + i, (32 + 4 * (i % 2), 36)) for i in range(count)]


def of_rows(rows: list[dict[str, Any]], **features: Any) -> Dataset:
    """A data set whose columns have the features given, by default those of plain chats with a list of images."""
    known = {"images": List(Image()), "image": Image(), "messages": List(TEXT)}
    known |= {"prompt": List(TEXT), "completion": List(TEXT), **features}
    return Dataset.from_list(rows, features=Features({name: known[name] for name in rows[0]}))


def vision_collator() -> Any:
    processor = build_vlm("qwen2_5_vl", num_hidden_layers=1)[1]
    settle(processor)
    return DataCollatorForVisionLanguageModeling(processor)
