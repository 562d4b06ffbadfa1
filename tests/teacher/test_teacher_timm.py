"""timm models as vision teachers: which vector is read, and what they need."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from tiny_teachers import IMAGES
from transformers import (
    AutoImageProcessor,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)

from hera_trainer.teacher.encoder import VisionTeacher, teacher_identity

IMAGE = (3, 32, 32)
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}


def class_token(model, tokens):
    return tokens[:, 0]


def patch_mean(model, tokens):
    return model.fc_norm(tokens[:, model.num_prefix_tokens :].mean(dim=1))


def attention_pool(model, tokens):
    return model.attn_pool(tokens)


def feature_map_mean(model, tokens):
    return tokens.mean(dim=(2, 3))


# Architecture, what makes it tiny, and the vector that is read, computed from timm's `forward_features`.
TIMM = {
    "vit": ("vit_tiny_patch16_224", TINY, class_token),
    "dinov2": ("vit_small_patch14_dinov2", {**TINY, "img_size": 28, "patch_size": 7}, class_token),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {**TINY, "patch_size": 8}, class_token),
    "dinov2_g": ("vit_giant_patch14_reg4_dinov2", {**TINY, "patch_size": 8}, class_token),
    "dinov3": ("vit_small_patch16_dinov3", TINY, class_token),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 12)}, None),
    "vit_averaged": ("vit_base_patch16_224", {**TINY, "global_pool": "avg"}, patch_mean),
    "clip": ("vit_base_patch16_clip_224", TINY, class_token),
    "siglip": ("vit_base_patch16_siglip_224", TINY, attention_pool),
    "siglip2_gap": ("vit_base_patch16_siglip_gap_224", TINY, patch_mean),
    "eva02_clip": ("eva02_base_patch16_clip_224", TINY, class_token),
    "eva02": ("eva02_tiny_patch14_224", {**TINY, "patch_size": 8}, patch_mean),
    "beit": ("beit_base_patch16_224", TINY, patch_mean),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", TINY, lambda model, tokens: tokens[:, :2].mean(dim=1)),
    "vit_without_class_token": ("test_vit4", {"img_size": 32}, patch_mean),
    "resnet": ("test_resnet", {}, feature_map_mean),
    "efficientnet": ("test_efficientnet", {}, feature_map_mean),
    "mambaout": ("test_mambaout", {}, None),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}, None),
}


def save_timm(folder: Path, name: str, classes: int = 3) -> torch.nn.Module:
    """Saves a tiny timm model the way timm does, a classification head included, and returns it."""
    architecture, model_args, _ = TIMM[name]
    size = (3, 224, 224) if name == "swin" else (3, 28, 28) if name == "dinov2" else IMAGE
    torch.manual_seed(0)
    overlay = {"input_size": size, "num_classes": classes, "crop_pct": 0.9}
    model = timm.create_model(architecture, num_classes=classes, pretrained_cfg_overlay=overlay, **model_args).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # class tokens and layer scales that start near zero would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True)
    return model


def wrap(model: torch.nn.Module, folder: Path) -> TimmWrapperModel:
    """The encoder of a timm model that lies in `folder`, wrapped by hand."""
    config = TimmWrapperConfig.from_pretrained(folder)
    config.model_args.pop("num_classes")
    wrapped = TimmWrapperModel(config)
    weights = {f"timm_model.{name}": tensor for name, tensor in model.state_dict().items()}
    assert not wrapped.load_state_dict(weights, strict=False).missing_keys
    return wrapped


@pytest.mark.parametrize("name", TIMM)
def test_reads_the_documented_vector(name, tmp_path):
    model = save_timm(tmp_path, name)
    read = TIMM[name][2]
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    pixels = torch.stack([transform(image) for image in IMAGES])
    with torch.no_grad():
        tokens = model.forward_features(pixels)
        expected = read(model, tokens) if read else model.forward_head(tokens, pre_logits=True)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    teacher = VisionTeacher.from_pretrained(tmp_path, device="cpu")
    vectors = teacher.encode(IMAGES, batch_size=2)
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
    assert teacher.hidden_size == expected.shape[1]
    assert (vectors - vectors.mean(0)).abs().max() > 1e-3
    assert isinstance(teacher.model, TimmWrapperModel)
    torch.testing.assert_close(teacher.encode(IMAGES), vectors, rtol=1e-4, atol=1e-5)  # in one batch
    assert torch.equal(teacher.encode(IMAGES, batch_size=2), vectors)
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.identity == teacher_identity(tmp_path)

    in_memory = VisionTeacher(wrap(model, tmp_path), AutoImageProcessor.from_pretrained(tmp_path))
    torch.testing.assert_close(in_memory.encode(IMAGES, batch_size=2), vectors, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "siglip", "resnet"])
def test_reads_the_same_vector_in_bfloat16(name, tmp_path):
    save_timm(tmp_path, name)
    exact = VisionTeacher.from_pretrained(tmp_path, device="cpu").encode(IMAGES)
    teacher = VisionTeacher.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    vectors = teacher.encode(IMAGES)
    assert torch.equal(vectors, vectors.bfloat16().float())
    assert torch.nn.functional.cosine_similarity(vectors, exact).min() > 0.99
    assert teacher.identity == teacher_identity(tmp_path, dtype=torch.bfloat16) != teacher_identity(tmp_path)


def test_identity_covers_architecture_weights_and_preprocessing(tmp_path):
    seen = set()
    for name in ("vit", "clip", "dinov3", "resnet"):
        model = save_timm(tmp_path / name, name)
        processor = AutoImageProcessor.from_pretrained(tmp_path / name)
        in_memory = VisionTeacher(wrap(model, tmp_path / name), processor)
        again = VisionTeacher(in_memory.model, AutoImageProcessor.from_pretrained(tmp_path / name))
        assert again.identity == in_memory.identity
        seen |= {teacher_identity(tmp_path / name), in_memory.identity}
    with torch.no_grad():
        next(again.model.parameters()).flatten()[0].add_(1)
    seen.add(again.identity)
    processor.data_config["crop_pct"] = 0.5
    seen.add(in_memory.identity)

    config = tmp_path / "vit" / "config.json"
    config.write_text(config.read_text().replace('"crop_pct": 0.9', '"crop_pct": 0.8'))
    seen.add(teacher_identity(tmp_path / "vit"))
    assert len(seen) == 2 * 4 + 3


# What timm models need, and those that are refused


def test_timm_that_is_not_installed_is_named(tmp_path, monkeypatch):
    save_timm(tmp_path, "resnet")
    monkeypatch.setattr("hera_trainer.teacher.checkpoint.is_timm_available", lambda: False)
    for load in (VisionTeacher.from_pretrained, teacher_identity):
        with pytest.raises(ValueError, match=r"could not be loaded: .*needs the timm library: `pip install timm`"):
            load(tmp_path)


def test_architecture_that_timm_does_not_know_is_named(tmp_path):
    save_timm(tmp_path, "resnet")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("test_resnet", "resnet_of_tomorrow"))
    with pytest.raises(ValueError, match=r"'resnet_of_tomorrow' is not supported.*pip install -U timm"):
        VisionTeacher.from_pretrained(tmp_path)


def test_checkpoint_that_lacks_weights_is_refused(tmp_path):
    save_timm(tmp_path, "vit")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"depth": 2', '"depth": 3'))
    with pytest.raises(ValueError, match=r"lacks weights of its vision encoder, such as 'timm_model.blocks.2"):
        VisionTeacher.from_pretrained(tmp_path)


def test_timm_objects_other_than_the_wrapped_encoder_are_refused(tmp_path):
    model = save_timm(tmp_path, "resnet")
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"A ResNet is no transformers model.*AutoModel.from_pretrained"):
        VisionTeacher(model, processor)
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=3)
    with pytest.raises(ValueError, match="Pass a `TimmWrapperModel`"):
        VisionTeacher(TimmWrapperForImageClassification(config), processor)
    unpooled = TimmWrapperConfig(architecture="test_vit", model_args={"img_size": 32, "global_pool": ""})
    with pytest.raises(ValueError, match="there is no one vector an image"):
        VisionTeacher(TimmWrapperModel(unpooled), processor).encode(IMAGES[:1])
