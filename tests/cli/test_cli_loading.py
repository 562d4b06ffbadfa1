"""Models and data as they are named on the command line."""

from __future__ import annotations

import base64
import json
import shutil

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import build_vlm, image_dataset, save_vlm
from transformers import LlamaConfig, LlamaForCausalLM

from hera_trainer.cli.loading import load_model
from hera_trainer.cli.rows import load_rows, open_rows


@pytest.fixture(scope="module")
def rows():
    return image_dataset(n=12, fmt="messages")


@pytest.fixture(scope="module")
def stored(tmp_path_factory, rows):
    """The same rows in every form that can be named."""
    folder = tmp_path_factory.mktemp("data")
    rows.save_to_disk(folder / "disk")
    datasets.DatasetDict(train=rows.select(range(8)), test=rows.select(range(8, 12))).save_to_disk(folder / "dict")
    rows.to_parquet(folder / "rows.parquet")
    (folder / "pictures").mkdir()
    with (folder / "rows.jsonl").open("w") as lines, (folder / "one.jsonl").open("w") as singles:
        for index, row in enumerate(rows):
            row["images"][0].save(folder / "pictures" / f"{index}.png")
            path = f"pictures/{index}.png"
            lines.write(json.dumps({"images": [path], "messages": row["messages"]}) + "\n")
            singles.write(json.dumps({"photo": path, "image": None, "caption": "a block"}) + "\n")
    with (folder / "written.jsonl").open("w") as lines:  # a path, a data URI, base64
        for index, row in enumerate(rows):
            content = base64.b64encode((folder / "pictures" / f"{index}.png").read_bytes()).decode()
            forms = [f"pictures/{index}.png", f"data:image/png;base64,{content}", content]
            lines.write(json.dumps({"images": [forms[index % 3]], "messages": row["messages"]}) + "\n")
    (folder / "photos").mkdir()
    with (folder / "photos" / "metadata.jsonl").open("w") as lines:
        for index, row in enumerate(rows):
            row["images"][0].save(folder / "photos" / f"{index}.png")
            lines.write(json.dumps({"file_name": f"{index}.png", "messages": row["messages"]}) + "\n")
    (folder / "broken.jsonl").write_text('{"image": "a.png"\n')
    (folder / "lost.jsonl").write_text('{"image": "lost.png"}\n')
    return folder


def pixels(row):
    return [image.tobytes() for image in (row["images"] if "images" in row else [row["image"]])]


@pytest.mark.parametrize("name", ["disk", "rows.parquet", "rows.jsonl", "written.jsonl", "photos"])
def test_every_form_gives_the_same_rows(stored, rows, name):
    loaded = load_rows(stored / name)
    assert [pixels(row) for row in loaded] == [pixels(row) for row in rows]
    assert loaded["messages"][:] == rows["messages"][:]


@pytest.mark.parametrize("name", ["disk", "rows.parquet", "rows.jsonl", "written.jsonl"])
def test_streams(stored, rows, name):
    stream = open_rows(stored / name, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert [pixels(row) for row in stream] == [pixels(row) for row in rows]


def test_fingerprints_stay(stored):
    """Caches of vectors and rankings are found by them."""
    for name in ("disk", "rows.jsonl"):
        assert load_rows(stored / name)._fingerprint == load_rows(stored / name)._fingerprint
    assert load_rows(stored / "disk")._fingerprint == datasets.load_from_disk(stored / "disk")._fingerprint


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("dict", "test", range(8, 12)),
        ("dict", "train[:25%]+test[1:2]", [0, 1, 9]),
        ("disk", "train[-2:]", [10, 11]),
        ("rows.jsonl", "train[4:6]", [4, 5]),
    ],
)
def test_splits(stored, rows, name, split, expected):
    assert [pixels(row) for row in load_rows(stored / name, split=split)] == [pixels(rows[i]) for i in expected]


class TestFolders:
    """A data file in a folder, with its images beside it, is what the folder is named for."""

    def copy(self, stored, folder, *names):
        shutil.copytree(stored / "pictures", folder / "pictures")
        for name in names:
            shutil.copy(stored / "rows.jsonl", folder / name)
        return folder

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("names", [["data.jsonl"], ["train.jsonl", "more.jsonl"]])
    def test_its_data_file(self, stored, rows, tmp_path, names, streaming):
        folder = self.copy(stored, tmp_path / ("a [v2]" if len(names) > 1 else "a"), *names)
        loaded = open_rows(folder, split="train", streaming=streaming)
        assert [pixels(row) for row in loaded] == [pixels(row) for row in rows]

    @pytest.mark.parametrize("beside", ["metadata", "classes", "nothing"])
    def test_a_file_that_names_no_images_is_no_data(self, stored, tmp_path, beside):
        folder = tmp_path / "folder"
        if beside == "metadata":
            shutil.copytree(stored / "photos", folder)
        else:
            shutil.copytree(stored / "pictures", folder / "cats" if beside == "classes" else folder)
        expected = load_rows(folder)
        (folder / "stats.json").write_text('{"mean": [0.5')
        (folder / "labels.csv").touch()
        assert load_rows(folder).features == expected.features

    def test_of_another_split(self, stored, tmp_path):
        folder = self.copy(stored, tmp_path / "folder", "my_test.jsonl")
        with pytest.raises(ValueError, match="Unknown split"):
            load_rows(folder)

    def test_several(self, stored, tmp_path):
        folder = self.copy(stored, tmp_path / "folder", "one.jsonl", "two.jsonl")
        with pytest.raises(ValueError, match=r"several data files that name them: `one\.jsonl`, `two\.jsonl`"):
            load_rows(folder)

    def test_a_name_is_no_pattern(self, stored, rows, tmp_path):
        (tmp_path / "train1.jsonl").write_text('{"a": "wrong"}\n')
        self.copy(stored, tmp_path, "train[1].jsonl")
        assert [pixels(row) for row in load_rows(tmp_path / "train[1].jsonl")] == [pixels(row) for row in rows]

    def test_images_in_a_folder_with_brackets(self, stored, tmp_path):
        shutil.copytree(stored / "photos", tmp_path / "photos [v2]")
        with pytest.raises(ValueError, match="Rename it"):
            load_rows(tmp_path / "photos [v2]")


def test_limit_and_columns(stored, rows):
    loaded = load_rows(stored / "one.jsonl", limit=3, image_columns=("photo",))
    assert [row["photo"].tobytes() for row in loaded] == [pixels(row)[0] for row in rows.select(range(3))]
    assert loaded.features["photo"] == datasets.Image()


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("disk", {"split": "test"}, "Unknown split"),
        ("rows.jsonl", {"split": "test"}, "Unknown split"),
        ("disk", {"limit": 0}, "no rows"),
        ("nothing.jsonl", {}, "no file or folder"),
        ("photos/0.png", {}, "Data files end in"),
        ("broken.jsonl", {}, "can't be read"),
        ("lost.jsonl", {}, "names the image 'lost.png'"),
        ("empty.jsonl", {}, "is empty"),
    ],
)
def test_data_that_cannot_be_loaded(stored, name, kwargs, words):
    (stored / "empty.jsonl").touch()
    with pytest.raises((OSError, ValueError), match=words):
        load_rows(stored / name, **kwargs)


# --- Models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_vlm("qwen2_5_vl", tmp_path_factory.mktemp("model") / "base", hidden_size=64)


def adapted(base, seed=0, **settings):
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    config = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False, **settings)
    return get_peft_model(AutoModelForImageTextToText.from_pretrained(base), config).eval()


def batch(processor):
    text = processor.apply_chat_template(image_dataset(n=1, fmt="messages")[0]["messages"], tokenize=False)
    return processor(text=[text], images=None, return_tensors="pt")


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def test_full_model(base):
    model, processor = load_model(base)
    original, own = build_vlm("qwen2_5_vl", hidden_size=64)
    assert type(model) is type(original) and type(processor) is type(own) and not model.training
    torch.testing.assert_close(logits(model, batch(processor)), logits(original, batch(own)))


def test_adapter_on_its_base(base, tmp_path):
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    loaded, processor = load_model(tmp_path / "adapter")
    assert isinstance(loaded, PeftModel) and not loaded.training
    inputs = batch(processor)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs))
    with loaded.disable_adapter():
        assert not torch.allclose(logits(loaded, inputs), logits(model, inputs), atol=1e-3)


@pytest.mark.parametrize("newer", ["adapter", "model", None])
def test_of_two_runs_in_a_folder_the_newer_is_taken(base, tmp_path, newer):
    adapted(base).save_pretrained(tmp_path)
    load_model(base)[0].save_pretrained(tmp_path)
    if newer is None:
        with pytest.raises(ValueError, match=r"of two runs\. Remove the files of the one that is not meant"):
            load_model(tmp_path)
        return
    files = {"adapter": ["adapter_config.json", "adapter_model.safetensors"], "model": ["config.json"]}[newer]
    (tmp_path / "hera_run.json").write_text(json.dumps({"files": files}))
    model, processor = load_model(base)
    processor.save_pretrained(tmp_path)
    if newer == "model":
        with pytest.raises(ValueError, match=r"of an earlier run, an adapter .*Remove the adapter's files"):
            load_model(tmp_path)
        for path in tmp_path.glob("adapter_*"):
            path.unlink()
        inputs = batch(processor)
        torch.testing.assert_close(logits(load_model(tmp_path)[0], inputs), logits(model, inputs))
    else:
        assert isinstance(load_model(tmp_path)[0], PeftModel)


def test_processor_beside_the_adapter_is_taken(base, tmp_path):
    adapted(base).save_pretrained(tmp_path)
    _, processor = load_model(base)
    processor.chat_template = "own template"
    processor.save_pretrained(tmp_path)
    assert load_model(tmp_path)[1].chat_template == "own template"


def test_tokenizer_beside_the_adapter_of_a_language_model_is_taken(tmp_path):
    tokenizer = build_vlm("llava")[1].tokenizer
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "base")
    tokenizer.chat_template = "template of the base"
    tokenizer.save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "adapter"))
    assert load_model(tmp_path / "adapter")[1].chat_template == "template of the base"
    tokenizer.chat_template = "template that was trained with"
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert load_model(tmp_path / "adapter")[1].chat_template == "template that was trained with"


def test_base_model_that_moved(base, tmp_path):
    model = adapted(base)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "away")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"says that its base model is .*away.*--base-model"):
        load_model(tmp_path / "adapter")
    loaded, processor = load_model(tmp_path / "adapter", base_model=base)
    torch.testing.assert_close(logits(loaded, batch(processor)), logits(model, batch(processor)))


def test_adapter_of_another_model(base, tmp_path):
    other = save_vlm("qwen2_5_vl", tmp_path / "other", hidden_size=32)
    adapted(other).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit"):
        load_model(tmp_path / "adapter", base_model=base)


def test_data_types(base):
    assert load_model(base, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_model(base, dtype=torch.float16)[0].dtype == torch.float16
    assert load_model(base)[0].dtype == torch.float32


def test_four_bit(base):
    pytest.importorskip("bitsandbytes")
    model, _ = load_model(base, load_in_4bit=True)
    projection = model.model.language_model.layers[0].self_attn.o_proj
    assert type(projection).__name__ == "Linear4bit" and projection.weight.quant_state.quant_type == "nf4"


def test_four_bit_under_an_adapter_with_whole_modules(base, tmp_path):
    """Modules that the adapter trained in full are not quantized: they are taken from it as they are."""
    pytest.importorskip("bitsandbytes")
    model = adapted(base, modules_to_save=["merger"])
    with torch.no_grad():
        for parameter in model.base_model.model.model.visual.merger.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, base_model=base, load_in_4bit=True)
    expected = model.base_model.model.model.visual.merger.modules_to_save.state_dict()
    found = loaded.base_model.model.model.visual.merger.modules_to_save.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), expected[name].float()) for name in expected)
    projection = loaded.base_model.model.model.language_model.layers[0].self_attn.o_proj
    assert type(projection.base_layer).__name__ == "Linear4bit"
    assert type(loaded.base_model.model.lm_head) is torch.nn.Linear


def test_language_model_without_vision(base, tmp_path):
    _, processor = build_vlm("llava")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=400
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    assert tokenizer("red")["input_ids"] == processor.tokenizer("red")["input_ids"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("./nowhere", "no file or folder"), ("someone/nothing", "'someone/nothing' can't be loaded"), (None, "neither")],
)
def test_models_that_cannot_be_loaded(tmp_path, name, words):
    with pytest.raises((OSError, ValueError), match=words):
        load_model(tmp_path if name is None else name)
