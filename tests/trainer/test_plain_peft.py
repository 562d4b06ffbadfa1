"""A published adapter needs PEFT and transformers, and nothing of this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from runs import config
from safetensors.torch import load_file, save_file
from tiny import image_dataset, save_vlm
from transformers import AutoProcessor

from hera_trainer import HeRATrainer

# Runs where hera_trainer cannot be imported. Arguments: folders with `base`, `adapter` and `inputs` each.
STRANGER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hera_trainer":
            raise ImportError("hera_trainer is not installed here")

sys.meta_path.insert(0, Refuse())
try:
    import hera_trainer
except ImportError:
    pass
else:
    raise AssertionError("hera_trainer could be imported")

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

for folder in sys.argv[1:]:
    inputs, found = load_file(f"{folder}/inputs"), {}
    AutoProcessor.from_pretrained(f"{folder}/adapter")

    def look(name, model):
        model.eval()
        with torch.no_grad():
            found[f"{name}_logits"] = model(**inputs).logits
            found[f"{name}_tokens"] = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)

    model = AutoModelForImageTextToText.from_pretrained(f"{folder}/base")
    look("base", model)
    model.load_adapter(f"{folder}/adapter")
    look("transformers", model)
    model = AutoModelForImageTextToText.from_pretrained(f"{folder}/base")
    model = PeftModel.from_pretrained(model, f"{folder}/adapter")
    look("adapter", model)
    model = model.merge_and_unload()
    look("merged", model)
    model.save_pretrained(f"{folder}/merged")
    look("reloaded", AutoModelForImageTextToText.from_pretrained(f"{folder}/merged"))
    save_file({name: value.contiguous() for name, value in found.items()}, f"{folder}/found")
assert not [name for name in sys.modules if name.split(".")[0] == "hera_trainer"]
"""


def train(folder: Path, family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Trains and saves an adapter; logits and greedy tokens of the trained model."""
    base = save_vlm(family, folder / "base")
    trainer = HeRATrainer(
        base,
        config(folder / "run", max_steps=3, learning_rate=0.05, alignment_weight=1.0),
        train_dataset=image_dataset(n=24, with_features=8),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    processor = AutoProcessor.from_pretrained(base)
    row = image_dataset(1)[0]
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"][0]["content"]}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    inputs = dict(processor(text=[prompt], images=[row["images"][0]], return_tensors="pt"))
    save_file({name: value.contiguous() for name, value in inputs.items()}, folder / "inputs")
    model = trainer.model.eval()
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        return model(**inputs).logits, tokens


def test_adapters_in_plain_peft(tmp_path):
    expected = {family: train(tmp_path / family, family) for family in ("llava", "qwen2_5_vl")}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", STRANGER, *(str(tmp_path / family) for family in expected)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    for family, (logits, tokens) in expected.items():
        found = load_file(tmp_path / family / "found")
        for name in ("adapter", "transformers"):
            assert torch.equal(found[f"{name}_logits"], logits)
            assert torch.equal(found[f"{name}_tokens"], tokens)
        for name in ("merged", "reloaded"):
            torch.testing.assert_close(found[f"{name}_logits"], logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(found[f"{name}_tokens"], tokens)
        assert (found["base_logits"] - logits).abs().max() > 0.1  # training has changed something
