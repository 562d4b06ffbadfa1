"""`hera merge`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from runs import config
from tiny import image_dataset, save_vlm
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from hera_trainer import HeRATrainer
from hera_trainer.cli import main
from hera_trainer.runs.control import mark_control, read_control


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_vlm("qwen2_5_vl", tmp_path_factory.mktemp("model") / "base", hidden_size=64)


def save_adapter(base, path, quantized=False, dtype=torch.float32, **settings):
    """An adapter with weights large enough to matter, and the model that it is on."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if quantized else None
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, quantization_config=quantization)
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False, **settings)
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return model


def inputs(path):
    row = image_dataset(n=1, fmt="messages")[0]
    processor = AutoProcessor.from_pretrained(path)
    content = [{"type": "image"}, {"type": "text", "text": row["messages"][0]["content"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[text], images=row["images"], return_tensors="pt")


@torch.no_grad()
def logits(model, path):
    return model(**inputs(path)).logits.float()


def merged_logits(path):
    """As an evaluation harness loads the model: with the auto classes, from the folder alone."""
    model, report = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return logits(model.eval(), path)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"use_rslora": True, "r": 4}, {"modules_to_save": ["lm_head"]}],
    ids=["lora", "dora", "rslora", "whole layers"],
)
def test_same_logits(base, tmp_path, settings, capsys):
    model = save_adapter(base, tmp_path / "adapter", **settings)
    expected = logits(model, base)
    assert not torch.allclose(expected, logits(AutoModelForImageTextToText.from_pretrained(base), base), atol=0.1)
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)
    assert "float32" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names and "adapter_config.json" not in names
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_without_this_package(base, tmp_path):
    """What is written is loaded in a process that never imports hera_trainer, and generates the same words."""
    model = save_adapter(base, tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    torch.save(dict(inputs(base)), tmp_path / "inputs.pt")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "folder = sys.argv[1]\n"
        "model = AutoModelForImageTextToText.from_pretrained(folder + '/merged')\n"
        "AutoProcessor.from_pretrained(folder + '/merged')\n"
        "inputs = torch.load(folder + '/inputs.pt')\n"
        "print(model.generate(**inputs, do_sample=False, max_new_tokens=8)[0].tolist())\n"
        "assert 'hera_trainer' not in sys.modules and 'peft' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True).stdout
    expected = model.generate(**inputs(base), do_sample=False, max_new_tokens=8)[0].tolist()
    assert json.loads(out.strip().splitlines()[-1]) == expected


def test_base_of_a_4bit_adapter_is_loaded_unquantized(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantized = save_adapter(base, tmp_path / "adapter", quantized=True)
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    plain = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    name = "model.language_model.layers.0.self_attn.o_proj"
    lora = dict(quantized.named_parameters())
    a, b = (lora[f"base_model.model.{name}.lora_{part}.default.weight"] for part in "AB")
    expected = plain[f"{name}.weight"] + b @ a  # alpha / r = 1
    torch.testing.assert_close(merged.state_dict()[f"{name}.weight"].float(), expected, atol=2e-2, rtol=1e-2)


def test_whole_layers_get_the_type_of_the_base_model(base, tmp_path):
    save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 0
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_tied_embeddings_that_training_parted(tmp_path):
    base = save_vlm("llava", tmp_path / "base", hidden_size=64)
    plain = AutoModelForImageTextToText.from_pretrained(base)
    plain.lm_head.weight.data.copy_(plain.get_input_embeddings().weight)
    plain.save_pretrained(base)
    config = json.loads(Path(base, "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    Path(base, "config.json").write_text(json.dumps(config))
    model = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    plain = AutoModelForImageTextToText.from_pretrained(base)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    expected = logits(model, base)
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)
    config = json.loads(Path(tmp_path / "merged", "config.json").read_text())  # by which others load it
    assert not config["tie_word_embeddings"] and not config["text_config"].get("tie_word_embeddings", False)


def error_of(arguments, capsys):
    assert main(["merge", *map(str, arguments)]) == 1
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("hera merge: error: ")]
    assert lines[-1] == line
    return line


@pytest.mark.parametrize("control", ["none", "permuted"])
def test_a_control_run_is_still_known_as_such(base, tmp_path, control):
    save_adapter(base, tmp_path / "adapter")
    mark_control(tmp_path / "adapter", control)
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert read_control(tmp_path / "merged") == control


def test_a_named_adapter_of_a_control_run_is_still_known_as_such(base, tmp_path, monkeypatch):
    """PEFT saves it in a folder of its own, which is merged without the one around it, and may be moved away."""
    lora = LoraConfig(r=4, target_modules="all-linear")
    run = HeRATrainer(
        get_peft_model(AutoModelForImageTextToText.from_pretrained(base), lora, adapter_name="mine"),
        config(tmp_path / "out", max_steps=1, teacher_control="permuted", save_strategy="steps", save_steps=1),
        train_dataset=image_dataset(n=24, with_features=8),
        processing_class=AutoProcessor.from_pretrained(base),
    )
    run.train()
    run.save_model()
    folders = [tmp_path / "out" / "mine", tmp_path / "out" / "checkpoint-1" / "mine", tmp_path / "moved"]
    shutil.copytree(folders[0], folders[-1])
    for folder in folders:
        assert main(["merge", str(folder), str(tmp_path / "merged"), "--overwrite"]) == 0
        assert read_control(tmp_path / "merged") == "permuted"
    for folder in folders[:-1]:  # of before the mark was saved there
        (folder / "hera_control.json").unlink()
        monkeypatch.chdir(folder)
        assert read_control(folder) == read_control(".") == "permuted"
    for control in ("permuted", "none"):  # the same folder, another run
        run.args.teacher_control = control
        run.save_model(str(tmp_path / "final"))
        assert read_control(tmp_path / "final" / "mine") == control


def test_refusals(base, tmp_path, capsys):
    save_adapter(base, tmp_path / "adapter")
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "precious").write_text("x")
    assert "--overwrite" in error_of([tmp_path / "adapter", merged], capsys)
    assert "no adapter" in error_of([base, tmp_path / "x"], capsys)
    assert "no file or folder" in error_of([tmp_path / "nothing", tmp_path / "x"], capsys)
    for place in (tmp_path / "adapter", tmp_path, base):
        assert "holds what is to be merged" in error_of([tmp_path / "adapter", place, "--overwrite"], capsys)
    assert (merged / "precious").read_text() == "x" and (tmp_path / "adapter" / "adapter_config.json").exists()
    assert "holds no model" in error_of([tmp_path / "adapter", merged, "--overwrite"], capsys)
    assert (merged / "precious").read_text() == "x"
    (merged / "config.json").write_text("{}")
    (merged / "checkpoint-500").mkdir()
    line = error_of([tmp_path / "adapter", merged, "--overwrite"], capsys)
    assert "is the folder of a training run (checkpoint-*)" in line
    (merged / "checkpoint-500").rmdir()
    assert main(["merge", str(tmp_path / "adapter"), str(merged), "--overwrite"]) == 0
    assert not (merged / "precious").exists() and (merged / "model.safetensors").exists()


def test_base_stored_quantized(base, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    quantized = tmp_path / "quantized"
    model = AutoModelForImageTextToText.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    model.save_pretrained(quantized)
    AutoProcessor.from_pretrained(base).save_pretrained(quantized)
    adapter = save_adapter(base, tmp_path / "adapter")
    adapter.peft_config["default"].base_model_name_or_path = str(quantized)
    adapter.save_pretrained(tmp_path / "adapter")
    message = error_of([tmp_path / "adapter", tmp_path / "merged"], capsys)
    assert "stored quantized (bitsandbytes)" in message and "--base-model" in message
    arguments = [tmp_path / "adapter", tmp_path / "merged", "--base-model", base]
    assert main(["merge", *map(str, arguments)]) == 0
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), logits(adapter, base), atol=1e-4, rtol=1e-4)


def test_adapter_that_is_no_part_of_the_weights(base, tmp_path, capsys):
    model = AutoModelForImageTextToText.from_pretrained(base)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=64, num_layers=3, num_attention_heads=4
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert "PROMPT_TUNING can't be" in error_of([tmp_path / "adapter", tmp_path / "merged"], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_nothing_is_left_of_a_merge_that_failed(base, tmp_path, capsys, monkeypatch):
    """The old result stays where it is."""
    save_adapter(base, tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    import transformers

    def fail(self, path, **kwargs):
        Path(path, "half").write_text("x")
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    message = error_of([tmp_path / "adapter", tmp_path / "merged", "--overwrite"], capsys)
    assert "No space left" in message
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_old_result_stays_whatever_step_of_its_replacement_fails(base, tmp_path, capsys, monkeypatch):
    """The second change of names fails, and then, in another command, it can't be undone either."""
    import os

    save_adapter(base, tmp_path / "adapter")
    merged, arguments = tmp_path / "merged", [tmp_path / "adapter", tmp_path / "merged", "--overwrite"]
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    (merged / "precious").write_text("x")
    original, calls = os.replace, []

    def failing(source, target):
        # Of the names of folders; files within them are written by other libraries.
        if merged.name in Path(source).name and Path(source).is_dir():
            calls.append(source)
            if len(calls) in fatal:
                raise OSError("Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "replace", failing)
    for fatal in ({1}, {2}, {2, 3}):
        calls.clear()
        assert "Input/output error" in error_of(arguments, capsys)
        places = [merged] if fatal != {2, 3} else list(tmp_path.glob(".merged.*.old"))
        assert [(place / "precious").read_text() for place in places] == ["x"]
        assert len(list(tmp_path.iterdir())) == 2
    fatal = set()
    # The next command finds what was put aside, and refuses to lose it.
    assert "--overwrite" in error_of(arguments[:2], capsys)
    assert (merged / "precious").read_text() == "x"
    assert main(["merge", *map(str, arguments)]) == 0
    assert (merged / "model.safetensors").is_file() and len(list(tmp_path.iterdir())) == 2
