"""Model types from images to a published adapter, each with its real processor and, where TRL ships it, its own chat
template."""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from families import ALL_FAMILIES, FAULTS, REFUSED, build_family
from peft import LoraConfig, PeftModel
from reference import Recorder, assert_gradients_equal, base_model, pooled_positions, step_gradients
from runs import config, watch_passes
from tiny import image_dataset, sft_args
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import HeRATrainer

BATCH, ACCUMULATION, WEIGHT = 2, 2, 5.0
# SFTTrainer scales the logits of these by what their text model's configuration says; their own forward does not.
LOGIT_SCALED = ("aya_vision", "cohere2_vision")
LORA = {"glm4v_moe": {"lora_dropout": 0.0}}  # PEFT adapts its experts without dropout only
FORMS = [
    (family, form)
    for family in ALL_FAMILIES
    for form in ("prompt_completion", "messages")
    if (family, form) != ("paligemma", "messages")
]


@lru_cache(maxsize=1)  # the tests of one family follow each other
def parts(family):
    return build_family(family)


@lru_cache
def rows(form, plain=False, count=4):
    """Every other row has two images. Plain text is for PaliGemma, which has no chat template."""
    images = image_dataset(2 * count, "image")["image"]
    found = []
    for i, row in enumerate(image_dataset(count, form, with_features=8)):
        several = [images[i], *(images[count + i : count + i + 1] if i % 2 else [])]
        if plain:
            row |= {name: row[name][0]["content"] for name in ("prompt", "completion")}
        found.append({**row, "images": several})
    return Dataset.from_list(found)


def collator_of_the_docs(family, processor):
    """What the page on data hands in where SFTTrainer's own collator can't batch a type."""
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?class \w+Collator.*?)```", text, re.DOTALL):
        exec(block.rpartition("```python\n")[2], names)
    return names["PaliGemmaCollator" if family == "paligemma" else "WholeTextCollator"](processor)


def make_trainer(tmp_path, family, form):
    model, processor = copy.deepcopy(parts(family))
    args = config(
        tmp_path,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=1,
        max_grad_norm=0.0,
        num_neighbors=2,
        alignment_weight=WEIGHT,
        **({"router_aux_loss_coef": 0.0} if family in FAULTS else {}),
    )
    settings = {"r": 4, "lora_dropout": 0.1, "init_lora_weights": False, **LORA.get(family, {})}
    lora = LoraConfig(target_modules="all-linear", **settings)
    return HeRATrainer(
        model,
        args,
        train_dataset=rows(form, plain=family == "paligemma"),
        data_collator=collator_of_the_docs(family, processor) if (family, form) in REFUSED else None,
        processing_class=processor,
        peft_config=lora,
    )


def image_positions(model, batch):
    """Where the decoder's first layer is given something of the images, `[B, T]` bool."""
    seen = []
    first = base_model(model.eval()).get_decoder().layers[0]
    handle = first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "teacher_features")}
    with torch.no_grad():
        for factor in (1, -1):
            model(**{**inputs, "pixel_values": factor * inputs["pixel_values"]})
    handle.remove()
    return (seen[0] != seen[1]).any(-1).reshape(-1, *batch["input_ids"].shape).any(0)  # of Gemma 3n's four streams


@pytest.mark.parametrize(("family", "form"), FORMS)
def test_from_images_to_adapter(tmp_path, monkeypatch, family, form):
    passes = watch_passes(monkeypatch)
    trainer = make_trainer(tmp_path / "run", family, form)
    recorder = Recorder(trainer)
    trainer.train()
    assert len(passes) == ACCUMULATION and max(passes) < 1e-6
    scale = trainer.model.config.get_text_config().logit_scale if family in LOGIT_SCALED else 1.0
    expected = step_gradients(recorder, WEIGHT, "step", recorder.seeds, logit_scale=scale)
    assert_gradients_equal(recorder.gradients, expected, tolerance=5e-4)
    check_images_are_not_pooled(recorder)
    if form == "prompt_completion":
        check_adapter(tmp_path, family, trainer)


def check_images_are_not_pooled(recorder):
    for batch in recorder.batches:
        pooled = pooled_positions(batch, recorder.model, recorder.trainer.processing_class)
        images = image_positions(recorder.model, batch)
        assert pooled.any(1).all() and not (pooled & images).any()
        # Llama 3.2 Vision attends to its images from within the layers.
        assert images.any(1).all() or recorder.model.config.model_type == "mllama"


def question(family, processor):
    """What the processor makes of one question about two images."""
    images = list(image_dataset(2, "image")["image"])
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "what is in this image?"}]
    if family == "paligemma":
        prompt = "<image><image>what is in this image?"
    else:
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[prompt], images=[images], return_tensors="pt")


def look(model, inputs):
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        return logits, model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def check_adapter(tmp_path, family, trainer):
    """The saved adapter, opened with PEFT alone, answers as the trained model does."""
    base = parts(family)[0]
    base.save_pretrained(tmp_path / "base")
    trainer.save_model(str(tmp_path / "adapter"))
    if family == "fast_vlm":  # statistics of its BatchNorm move in training, and no adapter holds them
        base_model(trainer.model).load_state_dict(dict(base.named_buffers()), strict=False)
    inputs = question(family, trainer.processing_class)
    expected = look(trainer.model, inputs)
    processor = AutoProcessor.from_pretrained(tmp_path / "adapter")
    assert type(processor) is type(trainer.processing_class)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    inputs = question(family, processor)
    untrained = look(base, inputs)[0]
    found = look(PeftModel.from_pretrained(base, tmp_path / "adapter"), inputs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], expected[1])
    assert (untrained - expected[0]).abs().max() > 0.1


@pytest.mark.parametrize(("family", "form"), REFUSED)
def test_collators_of_the_docs_label_the_answers(family, form):
    data = rows(form, plain=family == "paligemma")
    processor = parts(family)[1]
    labels = collator_of_the_docs(family, processor)(list(data))["labels"]
    for row, labelled in zip(data, labels, strict=True):
        text = processor.tokenizer.decode(labelled[labelled != -100])
        answer = row["completion"] if family == "paligemma" else row["completion"][0]["content"] + "<|im_end|>"
        assert text.startswith(answer) and len(text) < len(answer) + 8  # the end of the sequence, or a line break


STOPS = {**REFUSED, **{(family, "messages"): fault[:2] for family, fault in FAULTS.items()}}


@pytest.mark.parametrize(("family", "form"), STOPS)
def test_where_sft_trainer_stops(tmp_path, family, form):
    """Itself, with its own collator and settings."""
    error, message = STOPS[family, form]
    model, processor = copy.deepcopy(parts(family))
    args = SFTConfig(**sft_args(tmp_path, max_steps=1, per_device_train_batch_size=2))
    trainer = SFTTrainer(model, args, train_dataset=image_dataset(4, form), processing_class=processor)
    with pytest.raises(error, match=re.escape(message)):
        trainer.train()


def test_sft_trainer_lets_paligemma_see_its_answers():
    """With `messages`: every position depends on the last token of the answer."""
    model, processor = parts("paligemma")
    batch = DataCollatorForVisionLanguageModeling(processor)(list(image_dataset(1, "messages")))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -1] += 1
    with torch.no_grad():
        logits = [model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in (batch, other)]
    assert (logits[0] != logits[1]).any(-1).all()
