"""Every family of vision teachers, tiny: which vector is read, from a folder and from objects in memory."""

from __future__ import annotations

import pytest
import torch
from tiny_teachers import IMAGES, PATCH, SIZE, TEXT, TOWER, VIT, crop, randomize
from transformers import (
    AlignConfig,
    AlignModel,
    AutoImageProcessor,
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitImageProcessor,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    EfficientNetImageProcessor,
    HieraConfig,
    HieraForPreTraining,
    HieraModel,
    IJepaConfig,
    IJepaModel,
    MetaClip2Config,
    MetaClip2Model,
    PixioConfig,
    PixioModel,
    ResNetConfig,
    ResNetModel,
    SegformerConfig,
    SegformerModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinForMaskedImageModeling,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from hera_trainer.teacher.encoder import VisionTeacher, teacher_identity

NAFLEX = {**TOWER, "num_patches": 16}
SWIGLU = {**VIT, "use_swiglu_ffn": True}
PYRAMID = {"hidden_sizes": [4, 8, 8, 12], "depths": [1, 1, 1, 1]}
HIERA = {"embed_dim": 8, "image_size": [64, 64], "depths": [1, 1, 1], "num_heads": [1, 2, 2], "num_query_pool": 2}
HIERA |= {"embed_dim_multiplier": 2.0, "decoder_hidden_size": 8, "decoder_depth": 1, "decoder_num_heads": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
ALIGN = {"image_size": 32, "width_coefficient": 0.2, "depth_coefficient": 0.3, "hidden_dim": 64}


# The smallest weights with which a tiny convolutional encoder of random weights tells its images apart.
SCALES = {"align": 0.6, "resnet": 1.0}


def square(cls, size: int = SIZE):
    return cls(size={"height": size, "width": size})


def naflex():
    return Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=16)


def class_token(outputs):
    return outputs.last_hidden_state[:, 0]


def pooled(outputs):
    return outputs.pooler_output.squeeze((2, 3)) if outputs.pooler_output.ndim == 4 else outputs.pooler_output


def patch_mean(outputs):
    return outputs.last_hidden_state.mean(dim=1)


def patch_mean_after_class_token(outputs):
    return outputs.last_hidden_state[:, 1:].mean(dim=1)


# Name: model, image processor, the vector that is read, and where the whole model keeps its vision encoder.
TEACHERS = {
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**VIT)), lambda: crop(BitImageProcessor), class_token, ""),
    "dinov2_g": (lambda: Dinov2Model(Dinov2Config(**SWIGLU)), lambda: crop(BitImageProcessor), class_token, ""),
    "dinov2_registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VIT, num_register_tokens=3)),
        lambda: crop(BitImageProcessor),
        class_token,
        "",
    ),
    "dinov2_g_registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SWIGLU)),
        lambda: crop(BitImageProcessor),
        class_token,
        "",
    ),
    "dinov2_classifier": (
        lambda: Dinov2ForImageClassification(Dinov2Config(**VIT)),
        lambda: crop(BitImageProcessor),
        class_token,
        "dinov2",
    ),
    "dinov3_vit": (
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT, num_register_tokens=4)),
        lambda: square(DINOv3ViTImageProcessor),
        class_token,
        "",
    ),
    "dinov3_vit_plus": (
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**VIT, use_gated_mlp=True)),
        lambda: square(DINOv3ViTImageProcessor),
        class_token,
        "",
    ),
    "dinov3_convnext": (
        lambda: DINOv3ConvNextModel(DINOv3ConvNextConfig(**PYRAMID)),
        lambda: square(DINOv3ViTImageProcessor, 64),
        pooled,
        "",
    ),
    "siglip": (
        lambda: SiglipModel(SiglipConfig(vision_config=VIT, text_config=TEXT)),
        lambda: square(SiglipImageProcessor),
        pooled,
        "vision_model",
    ),
    "siglip_vision": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**VIT)),
        lambda: square(SiglipImageProcessor),
        pooled,
        "",
    ),
    "siglip_classifier": (
        lambda: SiglipForImageClassification(SiglipConfig(vision_config=VIT, text_config=TEXT)),
        lambda: square(SiglipImageProcessor),
        pooled,
        "vision_model",
    ),
    "siglip_without_head": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**VIT, vision_use_head=False)),
        lambda: square(SiglipImageProcessor),
        patch_mean,
        "",
    ),
    "siglip2": (
        lambda: Siglip2Model(Siglip2Config(vision_config=NAFLEX, text_config=TEXT)),
        naflex,
        pooled,
        "vision_model",
    ),
    "siglip2_vision": (lambda: Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX)), naflex, pooled, ""),
    "clip": (
        lambda: CLIPModel(CLIPConfig(vision_config=VIT, text_config=TEXT)),
        lambda: crop(CLIPImageProcessor),
        class_token,
        "vision_model",
    ),
    "clip_vision": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)),
        lambda: crop(CLIPImageProcessor),
        class_token,
        "",
    ),
    "clip_projection": (
        lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT, projection_dim=8)),
        lambda: crop(CLIPImageProcessor),
        class_token,
        "vision_model",
    ),
    "metaclip_2": (  # its tower can't be loaded alone
        lambda: MetaClip2Model(MetaClip2Config(vision_config=VIT, text_config={**TEXT, "eos_token_id": 2})),
        lambda: crop(CLIPImageProcessor),
        class_token,
        "vision_model",
    ),
    "align": (
        lambda: AlignModel(AlignConfig(vision_config=ALIGN, text_config=TEXT, projection_dim=8)),
        lambda: square(EfficientNetImageProcessor, 32),
        pooled,
        "vision_model",
    ),
    "vit": (lambda: ViTModel(ViTConfig(**VIT)), lambda: square(ViTImageProcessor), class_token, ""),
    "vit_classifier": (
        lambda: ViTForImageClassification(ViTConfig(**VIT)),
        lambda: square(ViTImageProcessor),
        class_token,
        "vit",
    ),
    "deit_distilled": (
        lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**VIT)),
        lambda: crop(DeiTImageProcessor),
        class_token,
        "deit",
    ),
    "vit_msn": (lambda: ViTMSNModel(ViTMSNConfig(**VIT)), lambda: square(ViTImageProcessor), class_token, ""),
    "ijepa": (lambda: IJepaModel(IJepaConfig(**VIT)), lambda: square(ViTImageProcessor), patch_mean, ""),
    "pixio": (
        lambda: PixioModel(PixioConfig(**TOWER, image_size=SIZE, n_cls_tokens=3)),
        lambda: square(ViTImageProcessor),
        lambda outputs: outputs.last_hidden_state[:, :3].mean(dim=1),
        "",
    ),
    "beit_classifier": (
        lambda: BeitForImageClassification(BeitConfig(**VIT)),
        lambda: square(BeitImageProcessor),
        pooled,
        "beit",
    ),
    "beit_pretrained": (
        lambda: BeitForMaskedImageModeling(BeitConfig(**VIT, vocab_size=8, use_mask_token=True)),
        lambda: square(BeitImageProcessor),
        patch_mean_after_class_token,
        "beit",
    ),
    "beit_class_token": (
        lambda: BeitForImageClassification(BeitConfig(**VIT, use_mean_pooling=False)),
        lambda: square(BeitImageProcessor),
        class_token,
        "beit",
    ),
    "data2vec_vision": (
        lambda: Data2VecVisionModel(Data2VecVisionConfig(**VIT)),
        lambda: square(BeitImageProcessor),
        patch_mean_after_class_token,
        "",
    ),
    "hiera": (lambda: HieraModel(HieraConfig(**HIERA)), lambda: square(ViTImageProcessor, 64), pooled, ""),
    "swin_pretrained": (
        lambda: SwinForMaskedImageModeling(SwinConfig(**SWIN, encoder_stride=8)),
        lambda: square(ViTImageProcessor, 32),
        patch_mean,  # what its pooled output is, where it has one
        "swin",
    ),
    "resnet": (
        lambda: ResNetModel(ResNetConfig(**PYRAMID, embedding_size=4, layer_type="basic")),
        lambda: square(ViTImageProcessor, 64),
        pooled,
        "",
    ),
    "convnextv2_classifier": (
        lambda: ConvNextV2ForImageClassification(ConvNextV2Config(**PYRAMID)),
        lambda: square(ViTImageProcessor, 64),
        pooled,
        "convnextv2",
    ),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_reads_the_documented_vector(name, tmp_path):
    make_model, make_processor, read, tower = TEACHERS[name]
    whole = randomize(make_model(), scale=SCALES.get(name, 0.2))
    whole.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    encoder = whole.get_submodule(tower)
    with torch.no_grad():
        expected = read(encoder(**processor(images=IMAGES, return_tensors="pt")))

    torch.manual_seed(5)
    state = torch.get_rng_state()
    teacher = VisionTeacher.from_pretrained(tmp_path, device="cpu")
    vectors = teacher.encode(IMAGES, batch_size=2)
    assert vectors.dtype == torch.float32 and vectors.device.type == "cpu" and not vectors.requires_grad
    torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-5)
    assert teacher.hidden_size == expected.shape[1]
    assert (vectors - vectors.mean(0)).abs().max() > 1e-3  # the vectors do depend on the image
    assert type(teacher.model) is type(encoder)  # no text tower, no head
    torch.testing.assert_close(teacher.encode(IMAGES), vectors, rtol=1e-5, atol=1e-5)  # in one batch
    assert torch.equal(teacher.encode(IMAGES, batch_size=2), vectors)
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.identity == teacher_identity(tmp_path)

    in_memory = VisionTeacher(whole, processor)
    torch.testing.assert_close(in_memory.encode(IMAGES, batch_size=2), vectors, rtol=1e-5, atol=1e-5)
    assert in_memory.identity == VisionTeacher(whole, AutoImageProcessor.from_pretrained(tmp_path)).identity


@pytest.mark.parametrize("name", ["dinov2_g", "dinov3_vit", "dinov3_convnext", "siglip2", "clip", "ijepa", "hiera"])
def test_reads_the_same_vector_in_bfloat16(name, tmp_path):
    make_model, make_processor, _, _ = TEACHERS[name]
    randomize(make_model(), scale=0.1).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    teacher = VisionTeacher.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.bfloat16}
    exact = VisionTeacher.from_pretrained(tmp_path, device="cpu").encode(IMAGES)
    vectors = teacher.encode(IMAGES)
    assert torch.equal(vectors, vectors.bfloat16().float())
    assert torch.nn.functional.cosine_similarity(vectors, exact).min() > 0.99
    assert teacher.identity != teacher_identity(tmp_path)


def test_identities_tell_the_classes_apart():
    identities = {}
    for name, (make_model, make_processor, _, _) in TEACHERS.items():
        identities[name] = VisionTeacher(randomize(make_model()), make_processor()).identity
    # the same encoder, with a head and without
    assert identities.pop("dinov2_classifier") == identities["dinov2"]
    assert identities.pop("siglip_classifier") == identities["siglip_vision"]
    assert len(set(identities.values())) == len(identities)


# Encoders that mask part of the image, and those that give no one vector


def test_vit_mae_sees_the_whole_image_and_draws_no_random_number(tmp_path):
    config = {**VIT, "mask_ratio": 0.75, "decoder_num_hidden_layers": 1, "decoder_hidden_size": 8}
    config |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 8}
    randomize(ViTMAEForPreTraining(ViTMAEConfig(**config))).save_pretrained(tmp_path)
    square(ViTImageProcessor).save_pretrained(tmp_path)

    reference = ViTMAEModel.from_pretrained(tmp_path, mask_ratio=0.0).eval()
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(images=IMAGES, return_tensors="pt")
    with torch.no_grad():
        expected = reference(**pixels).last_hidden_state
    assert expected.shape[1] == 1 + (SIZE // PATCH) ** 2

    teacher = VisionTeacher.from_pretrained(tmp_path, device="cpu")
    state = torch.get_rng_state()
    vectors = teacher.encode(IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(vectors, expected[:, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(teacher.encode(IMAGES), vectors)


def test_hiera_that_was_pretrained_sees_the_whole_image(tmp_path):
    # its checkpoint has no pooling layer, whose norm would be untrained: the patches are averaged
    masking = randomize(HieraForPreTraining(HieraConfig(**HIERA)))
    masking.save_pretrained(tmp_path)
    square(ViTImageProcessor, 64).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    reference = HieraModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = patch_mean(reference(**processor(images=IMAGES, return_tensors="pt")))

    state = torch.get_rng_state()
    for teacher in (VisionTeacher.from_pretrained(tmp_path, device="cpu"), VisionTeacher(masking, processor)):
        torch.testing.assert_close(teacher.encode(IMAGES, batch_size=2), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("model", "processor"),
    [
        (lambda: SegformerModel(SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])), ViTImageProcessor),
        # a plain mean over the patches would count the padding
        (lambda: Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX, vision_use_head=False)), naflex),
    ],
    ids=["map of patches", "padded patches"],
)
def test_encoder_without_one_vector_is_refused(model, processor):
    teacher = VisionTeacher(model(), processor())
    with pytest.raises(ValueError, match=r"neither a class token.*teacher_model_name_or_path"):
        teacher.encode(IMAGES[:1])


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match="A Linear is no transformers model"):
        VisionTeacher(torch.nn.Linear(2, 2), ViTImageProcessor())
