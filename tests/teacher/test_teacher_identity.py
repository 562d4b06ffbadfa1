"""What tells vision teachers apart, and what goes wrong when one is loaded, with a cure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_teachers import SQUARE, VIT, save_dinov2
from transformers import AutoModel, BitImageProcessor, BitImageProcessorPil, ViTConfig, ViTImageProcessor, ViTModel

from hera_trainer.teacher.encoder import VisionTeacher, teacher_identity


@pytest.fixture
def dinov2(tmp_path) -> Path:
    return save_dinov2(tmp_path / "dinov2")


# Identity


def test_identity_of_a_folder_covers_weights_and_configuration_but_not_its_place(dinov2, tmp_path):
    identity = teacher_identity(dinov2)
    assert len(identity) == 64 and int(identity, 16) >= 0
    elsewhere = Path(shutil.copytree(dinov2, tmp_path / "elsewhere"))
    assert teacher_identity(str(elsewhere)) == identity

    seen = {identity}
    for name in ("config.json", "preprocessor_config.json"):
        content = (elsewhere / name).read_text()
        settings = json.loads(content)
        settings["layer_norm_eps" if name == "config.json" else "resample"] = 1e-3 if name == "config.json" else 0
        (elsewhere / name).write_text(json.dumps(settings))
        seen.add(teacher_identity(elsewhere))
        (elsewhere / name).write_text(content)
    assert teacher_identity(elsewhere) == identity
    weights = bytearray((elsewhere / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (elsewhere / "model.safetensors").write_bytes(weights)
    seen.add(teacher_identity(elsewhere))
    assert len(seen) == 4


def test_identity_needs_no_model(dinov2, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", refuse)
    assert len(teacher_identity(dinov2)) == 64


def test_identity_in_memory_covers_weights_configuration_and_preprocessing():
    def teacher(seed=0, mean=0.5, eps=1e-6):
        torch.manual_seed(seed)
        processor = ViTImageProcessor(size=SQUARE, image_mean=[mean] * 3)
        return VisionTeacher(ViTModel(ViTConfig(**VIT, layer_norm_eps=eps)), processor)

    identity = teacher().identity
    assert teacher().identity == identity
    others = [teacher(seed=1), teacher(mean=0.25), teacher(eps=1e-3), teacher()]
    with torch.no_grad():
        others[-1].model.layernorm.bias[0] += 1
    assert len({identity, *(other.identity for other in others)}) == 5


HUB_SCRIPT = """
import json, os, pathlib
from hera_trainer.teacher.encoder import VisionTeacher, teacher_identity

def point(name, commit):
    folder = pathlib.Path(os.environ["HF_HOME"], "hub", f"models--org--{name}", "refs")
    folder.mkdir(exist_ok=True)
    (folder / "main").write_text(commit * 40)

out = []
for name, commit in (("tiny", "a"), ("tiny", "b"), ("other", "a"), ("tiny", "a")):
    point(name, commit)
    out.append([teacher_identity(f"org/{name}"), VisionTeacher.from_pretrained(f"org/{name}", device="cpu").identity])
try:
    teacher_identity("org/absent")
except ValueError as error:
    out.append([str(error), type(error.__cause__).__name__])
print(json.dumps(out))
"""


def test_identity_of_a_hub_name_is_its_name_and_commit(dinov2, tmp_path):
    home = tmp_path / "home"
    for name, commit in (("tiny", "a"), ("tiny", "b"), ("other", "a")):
        shutil.copytree(dinov2, home / "hub" / f"models--org--{name}" / "snapshots" / (commit * 40))
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", HUB_SCRIPT], env=env, capture_output=True, text=True, check=True)
    *identities, (message, cause) = json.loads(done.stdout.splitlines()[-1])
    assert all(by_name == by_teacher for by_name, by_teacher in identities)
    first, other_commit, other_name, again = (by_name for by_name, _ in identities)
    assert first == again and len({first, other_commit, other_name, teacher_identity(dinov2)}) == 4
    assert "'org/absent' could not be loaded" in message and "teacher_model_name_or_path" in message
    assert cause == "LocalEntryNotFoundError"


# Teachers that can't be loaded


def test_teacher_that_is_not_there(tmp_path):
    for load in (VisionTeacher.from_pretrained, teacher_identity):
        with pytest.raises(
            ValueError, match=r"nobody/nothing.*could not be loaded[\s\S]*teacher_model_name_or_path"
        ) as e:
            load("nobody/nothing")
        assert e.value.__cause__ is not None
        with pytest.raises(ValueError, match="could not be loaded"):
            load(tmp_path)  # an empty folder


def test_teacher_with_damaged_weights(dinov2):
    weights = dinov2 / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"could not be loaded[\s\S]*teacher_model_name_or_path"):
        VisionTeacher.from_pretrained(dinov2)


def test_teacher_without_image_processor(dinov2):
    (dinov2 / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"could not be loaded[\s\S]*preprocessor_config.json"):
        VisionTeacher.from_pretrained(dinov2)


def test_checkpoint_that_lacks_encoder_weights_is_refused(dinov2):
    settings = json.loads((dinov2 / "config.json").read_text())
    settings["num_hidden_layers"] = 3
    (dinov2 / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="lacks weights of its vision encoder"):
        VisionTeacher.from_pretrained(dinov2)


def test_remote_code_is_never_run(dinov2):
    settings = json.loads((dinov2 / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (dinov2 / "config.json").write_text(json.dumps(settings))
    (dinov2 / "mine.py").write_text("raise SystemExit('remote code ran')\n")
    with pytest.raises(ValueError, match="could not be loaded"):
        VisionTeacher.from_pretrained(dinov2)


@pytest.mark.parametrize("change", ["size", "bfloat16", "half a layer", "weights"])
def test_identity_of_a_loaded_teacher_notices_what_changes_its_vectors(change, dinov2):
    teacher = VisionTeacher.from_pretrained(dinov2, device="cpu")
    before = teacher.identity
    assert before == teacher_identity(dinov2)
    assert teacher.to("cpu").identity == before
    if change == "size":
        size = dict(teacher.image_processor.size)
        teacher.image_processor.size = {"shortest_edge": 64}
    elif change == "bfloat16":
        teacher.model.to(torch.bfloat16)
    elif change == "half a layer":
        teacher.model.encoder.layer[1].half()
    else:
        with torch.no_grad():
            teacher.model.layernorm.bias[0] += 1
    assert teacher.identity != before
    if change == "size":
        teacher.image_processor.size = size
        assert teacher.identity == before


def first_patch(outputs):
    return outputs.last_hidden_state[:, 1]


def last_patch(outputs):
    return outputs.last_hidden_state[:, -1]


class PatchMean(VisionTeacher):
    def forward_prepared(self, prepared):
        return self.model(**prepared).last_hidden_state[:, 1:].mean(1)


def test_identity_tells_ways_to_read_an_encoder(dinov2):
    """Vectors of one way must not come from the cache of another."""
    plain, read = (VisionTeacher.from_pretrained(dinov2, device="cpu") for _ in range(2))
    own = PatchMean.from_pretrained(dinov2, device="cpu")
    read.readout.uses_class_token = False
    assert plain.identity == teacher_identity(dinov2)
    assert len({plain.identity, own.identity, read.identity}) == 3
    read.readout.uses_class_token = True
    assert read.identity == plain.identity
    read.readout = first_patch
    assert read.identity not in (plain.identity, own.identity)
    seen = read.identity
    read.readout = last_patch
    assert read.identity != seen


def test_identity_is_the_same_where_a_device_has_its_own_buffers(dinov2):
    """As `to("cuda")` makes them: new tensors, which nothing was written to. DINOv3, CLIP and SigLIP have some."""
    teacher = VisionTeacher.from_pretrained(dinov2, device="cpu")
    teacher.model.register_buffer("positions", torch.zeros(3), persistent=False)
    teacher.model.positions.copy_(torch.arange(3.0))
    before = teacher._state()
    teacher.model.positions = teacher.model.positions.clone()
    assert teacher._state() == before and teacher.identity == teacher_identity(dinov2)


def test_identity_of_a_class_of_ones_own(dinov2):
    own = PatchMean.from_pretrained(dinov2, device="cpu")
    assert own.identity == PatchMean.from_pretrained(dinov2, device="cpu").identity


def test_identity_notices_every_number_and_is_that_of_what_is_in_memory(dinov2):
    loaded, other = (VisionTeacher.from_pretrained(dinov2, device="cpu") for _ in range(2))
    loaded.model.half()
    other.model.half()
    assert loaded.identity == other.identity
    with torch.no_grad():
        other.model.layernorm.weight[3] += 1
    assert loaded.identity != other.identity


def test_identity_tells_what_resizes_images(dinov2):
    """The two libraries make slightly different pixels of an image."""
    model = AutoModel.from_pretrained(dinov2)
    settings = BitImageProcessor.from_pretrained(dinov2).to_dict()
    settings.pop("image_processor_type", None)
    both = VisionTeacher(model, BitImageProcessor(**settings)), VisionTeacher(model, BitImageProcessorPil(**settings))
    assert both[0].identity != both[1].identity
