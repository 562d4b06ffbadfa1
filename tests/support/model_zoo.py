"""Tiny random models of every image-text-to-text type that transformers knows, offline and without processors.

Where each keeps its attention heads, and how many of what size, is written down here by reading the models: it is what
tests compare the package with, so nothing in here may ask the package, but for which types it knows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from model_zoo_configs import FIRST_SPECIAL_TOKEN, IMAGE_SIZE, IMAGE_TOKEN, NUM_PATCHES, tiny_config
from packaging.version import Version
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING

from hera_trainer.heads.registry import unknown_model_types

__all__ = [
    *("ADDED", "ALL_TYPES", "MAPPING", "SIDE_BY_SIDE", "TRANSFORMERS", "UPSTREAM_FAULTS", "build", "expected_heads"),
    *(
        "known_types",
        "layers_without_output",
        "projection_path",
        "projections",
        "randomize",
        "text_inputs",
        "tiny_config",
    ),
]

Inputs = dict[str, Tensor]
Heads = dict[int, tuple[int, int]]

TRANSFORMERS = Version(transformers.__version__)
# Types that the lowest supported transformers does not have yet, and the version that brought them.
ADDED = dict.fromkeys(("apertus1p5", "hy_v4_vl", "inkling2_loop"), "5.24")
# What transformers lists and the package knows. What it does not know yet is newer than this release: no fault of it.
ALL_TYPES: list[str] = sorted(MAPPING.keys() - set(unknown_model_types()))
# Types whose own forward raises in transformers: the version that broke it, and what it raises.
UPSTREAM_FAULTS: dict[str, tuple[str, type[Exception], str]] = {
    "llama4": ("5.24", AttributeError, "reads `image_outputs`, which the output of its language model does not have"),
}


def known_types(runs: bool = False) -> list[Any]:
    """Parameters of a test that builds the model of every type. A type that the package does not know is skipped, by
    its name.

    Args:
        runs (`bool`): Whether the test runs the whole model. Where that raises in transformers, it must: once it is
            repaired there, the test fails until the type is taken from `UPSTREAM_FAULTS`.
    """
    parameters: list[Any] = list(ALL_TYPES)
    for name, (version, error, what) in UPSTREAM_FAULTS.items() if runs else ():
        reason = f"since transformers {version}, the forward of {name} {what}"
        mark = pytest.mark.xfail(TRANSFORMERS >= Version(version), raises=error, strict=True, reason=reason)
        parameters[parameters.index(name)] = pytest.param(name, marks=mark)
    newer = pytest.mark.skip(reason="newer than this release: support it, as CONTRIBUTING.md says")
    return [*parameters, *(pytest.param(name, marks=newer) for name in unknown_model_types())]


BATCH, LENGTH = 2, 7


def build(model_type: str, seed: int = 0) -> nn.Module:
    """Build a tiny model of the class that is mapped to `model_type`: float32, CPU, eval mode.

    Matrices are wide enough for attention to differ between positions, and biases are not zero, so that what a
    computation leaves out shows. The global random state is left as it was.
    """
    model_class = getattr(transformers, MAPPING[model_type])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(tiny_config(model_type), dtype=torch.float32)
        randomize(model)
    return model.eval()


def randomize(model: nn.Module) -> None:
    """Weights and biases as `build` says."""
    for name, parameter in model.named_parameters():
        if bool((parameter == 1).all()):  # a scale, mostly of a norm
            continue
        if name.endswith(("bias", "attn_gate", "mlp_gate")):
            nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)


# --- Inputs ----------------------------------------------------------------------------------------------------------


def text_inputs(model_type: str, model: nn.Module) -> dict[str, Any]:
    """What `model(**inputs)` needs to run every layer with heads of the text decoder.

    Two rows of 7 text tokens, the last of the second padding, as `input_ids` (`decoder_input_ids` too or instead in
    models with an encoder). Images only where there is no forward pass without.
    """
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(8, FIRST_SPECIAL_TOKEN, (BATCH, LENGTH), generator=random)
    mask = torch.ones_like(tokens)
    mask[-1, -1] = 0
    text = {"input_ids": tokens, "attention_mask": mask}
    image = torch.rand(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random)

    if model_type in ("florence2", "t5gemma2", "diffusion_gemma"):
        return {**text, "decoder_input_ids": tokens.flip(1)}
    if model_type == "udop":
        boxes = torch.rand(BATCH, LENGTH, 4, generator=random).sort(-1).values
        return {**text, "decoder_input_ids": tokens.flip(1), "bbox": boxes}
    if model_type in ("pp_formulanet", "vision-encoder-decoder"):
        return {"pixel_values": image, "decoder_input_ids": tokens}
    if model_type == "pix2struct":
        count = NUM_PATCHES // 2
        rows_and_columns = torch.arange(1.0, count + 1)[:, None].repeat(BATCH, 1, 2)  # 0 is padding
        patches = torch.rand(BATCH, count, model.config.vision_config.patch_embed_hidden_size, generator=random)
        return {"flattened_patches": torch.cat([rows_and_columns, patches], dim=-1), "decoder_input_ids": tokens}
    if model_type == "blip":
        return {**text, "pixel_values": image}
    if model_type == "blip-2":
        return {**_with_image_tokens(text, IMAGE_TOKEN, 4), "pixel_values": image}
    if model_type in ("instructblip", "instructblipvideo"):
        frames = image[:, None] if model_type == "instructblipvideo" else image
        placeholders = _with_image_tokens(text, IMAGE_TOKEN, 4)
        return {**placeholders, "pixel_values": frames, "qformer_input_ids": tokens}
    if model_type == "kosmos-2":
        places = torch.zeros_like(tokens).index_fill(1, torch.arange(1, 5), 1)
        return {**text, "pixel_values": image, "image_embeds_position_mask": places}
    if model_type == "idefics":
        return {**text, "pixel_values": image[:, None], "image_attention_mask": torch.ones_like(tokens)[..., None]}
    if model_type == "pi0":
        robot = {"state": torch.rand(BATCH, 32, generator=random), "timestep": torch.rand(BATCH, generator=random)}
        noise = torch.rand(BATCH, model.config.chunk_size, 32, generator=random)
        cameras = {"pixel_values": image[:, None], "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool)}
        placeholders = _with_image_tokens(text, model.config.vlm_config.image_token_id, NUM_PATCHES)
        return {**placeholders, **cameras, **robot, "noise": noise}
    return text


def _with_image_tokens(text: Inputs, token: int, count: int) -> Inputs:
    front = {"input_ids": torch.full((BATCH, count), token), "attention_mask": torch.ones(BATCH, count).long()}
    return {name: torch.cat([front[name], text[name]], dim=1) for name in text}


# --- Where the heads are ---------------------------------------------------------------------------------------------

PROJECTION = "model.language_model.layers.{}.self_attn.o_proj"
# A gate that stood in the attention until transformers 5.23 is part of the projection's module since.
INKLING2_PROJECTION = f"{PROJECTION}.linear" if Version("5.24") <= TRANSFORMERS else PROJECTION
OPT_PROJECTION = "language_model.model.decoder.layers.{}.self_attn.out_proj"
OTHER_PROJECTIONS: dict[str, str] = {
    **dict.fromkeys(("chameleon", "evolla", "idefics", "mistral4"), "model.layers.{}.self_attn.o_proj"),
    **dict.fromkeys(
        ("emu3", "granite_docling", "idefics2", "idefics3", "smolvlm"), "model.text_model.layers.{}.self_attn.o_proj"
    ),
    **dict.fromkeys(("diffusion_gemma", "t5gemma2"), "model.decoder.layers.{}.self_attn.o_proj"),
    **dict.fromkeys(("inkling2", "inkling2_loop"), INKLING2_PROJECTION),
    "llama4": "language_model.model.layers.{}.self_attn.o_proj",
    "pi0": "model.vlm.language_model.layers.{}.self_attn.o_proj",
    "nemotron_h_omni": "language_model.model.layers.{}.mixer.o_proj",
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), OPT_PROJECTION),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), "text_model.model.layers.{}.self_attn.out_proj"),
    "florence2": "model.language_model.decoder.layers.{}.self_attn.out_proj",
    "lfm2_vl": "model.language_model.layers.{}.self_attn.out_proj",
    "pp_formulanet": "model.decoder.layers.{}.self_attn.out_proj",
    "fuyu": "model.language_model.layers.{}.self_attn.dense",
    "blip": "text_decoder.bert.encoder.layer.{}.attention.output.dense",
    "git": "git.encoder.layer.{}.attention.output.dense",
    "vision-encoder-decoder": "decoder.bert.encoder.layer.{}.attention.output.dense",
    "pix2struct": "decoder.layer.{}.self_attention.attention.output",
    "udop": "decoder.block.{}.layer.0.SelfAttention.o",
}

# Heads of the decoder's layers, as (number, size)
HEADS: Heads = dict.fromkeys(range(3), (4, 12))
NARROW_HEADS = dict.fromkeys(range(3), (4, 8))  # hidden_size / num_heads: these models have no other setting
LATENT_HEADS = dict.fromkeys(range(3), (4, 10))  # v_head_dim
GEMMA4_HEADS = {0: (4, 12), 1: (4, 12), 2: (4, 24)}  # the last layer attends without a window, with global_head_dim
INKLING_HEADS = {0: (6, 8), 1: (6, 8), 2: (4, 12)}  # the last layer has no window
LFM_HEADS = {1: (4, 12), 2: (4, 12)}  # the first layer is a convolution
QWEN_HEADS = {2: (4, 12)}  # the others are linear attention
OTHER_HEADS: dict[str, Heads] = {
    **dict.fromkeys(
        (
            *("blip", "blip-2", "chameleon", "deepseek_ocr2", "florence2", "fuyu", "git", "glm46v", "glm4v", "glmga"),
            *("idefics", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5", "pix2struct", "pp_formulanet"),
            *("qwen2_5_vl", "qwen2_vl", "unlimited_ocr", "vision-encoder-decoder"),
        ),
        NARROW_HEADS,
    ),
    **dict.fromkeys(("hy_v4_vl", "kimi_k25", "mistral4", "mistral_large4"), LATENT_HEADS),
    **dict.fromkeys(("diffusion_gemma", "gemma4", "gemma4_unified"), GEMMA4_HEADS),
    **dict.fromkeys(("inkling2", "inkling_mm_model"), INKLING_HEADS),
    "inkling2_loop": {**INKLING_HEADS, 3: (6, 8)},
    "dots3_note": {0: (4, 10), 1: (4, 10), 2: (2, 6)},  # the last layer has a window
    "gemma3n": dict.fromkeys(range(4), (4, 12)),
    "glm5_next": {1: (4, 10)},  # the others are linear attention
    **dict.fromkeys(("lfm2_vl", "lfm3_vl"), LFM_HEADS),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), QWEN_HEADS),
    "mllama": {0: (4, 8), 2: (4, 8)},  # the other is cross-attention to the image
    "nemotron_h_omni": {2: (4, 12)},  # the others are a state-space layer, experts and an MLP
    "step3p7": {0: (4, 12), 1: (6, 12), 2: (4, 12)},  # the middle layer has a window
}


# Several residual streams leave the layers of these, side by side.
SIDE_BY_SIDE = ("gemma3n", "glm5_next", "hy_v4_vl")


def expected_heads(model_type: str) -> Heads:
    """Layer -> number and size of its heads, for the layers of the text decoder with softmax self-attention.

    The size is the width of a head's slice of what the layer's output projection reads.
    """
    return dict(OTHER_HEADS.get(model_type, HEADS))


def layers_without_output(model_type: str, model: nn.Module) -> list[int]:
    """Layers whose output text alone does not give: those that attend to images, and those of models with several
    residual streams side by side."""
    text = model.config.get_text_config(decoder=True)
    if model_type == "mllama":
        return list(text.cross_attention_layers)
    return list(range(text.num_hidden_layers)) if model_type in SIDE_BY_SIDE else []


def projection_path(model_type: str) -> str:
    """Path of a layer's output projection from the model, with `{}` for the layer."""
    return OTHER_PROJECTIONS.get(model_type, PROJECTION)


def projections(model_type: str, model: nn.Module) -> dict[int, nn.Module]:
    """Layer -> output projection, for the layers of `expected_heads`."""
    return {
        layer: model.get_submodule(projection_path(model_type).format(layer)) for layer in expected_heads(model_type)
    }
