"""A tiny random model of a type with the processor class that the type really has, made on the spot and offline.

The ten families of `tiny` are among them. The models of the others are those of `model_zoo`, with the token ids of a
tokenizer that is trained here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any

import family_processors as processors
import torch
import transformers as tf
from model_zoo import MAPPING, randomize
from model_zoo_configs import tiny_config
from tiny import CHAT_TEMPLATE, CHAT_TOKENS, build_tokenizer, build_vlm
from tiny import FAMILIES as FIRST_FAMILIES

Tokenizer = processors.Tokenizer
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Family:
    """How a type's processor is made.

    Args:
        processor: Makes it of a tokenizer.
        image: What the chat template writes where an image stands.
        tokens: Attributes of the tokenizer and the special tokens that they name. Fields of the model's config that
            are called alike (`image_token`: `image_token_id`, `image_token_index`) are set to their ids.
        more_tokens: Further special tokens.
        config: Changes to the model's config: paths, and values or functions of the tokenizer.
        template: Name of TRL's file with the type's own chat template.
    """

    processor: Callable[[Tokenizer], tf.ProcessorMixin]
    image: str
    tokens: dict[str, str] = field(default_factory=dict)
    more_tokens: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    template: str | None = None


def token_id(token: str) -> Callable[[Tokenizer], int]:
    return lambda tokenizer: tokenizer.convert_tokens_to_ids(token)


# --- Families --------------------------------------------------------------------------------------------------------

IMAGE = {"image_token": "<image>"}
IMAGE_AND_VIDEO = {**IMAGE, "video_token": "<video>"}
QWEN_TOKENS = {
    **{"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    **{"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"},
}
GEMMA_TOKENS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
GEMMA3N_TOKENS = {
    **GEMMA_TOKENS,
    **{"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"},
}
GEMMA4_TOKENS = {
    **{"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "video_token": "<|video|>"},
    **{"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"},
}
GLM_TOKENS = {
    **{"image_token": "<|image|>", "video_token": "<|video|>"},
    **{"image_start_token": "<|begin_of_image|>", "image_end_token": "<|end_of_image|>"},
    **{"video_start_token": "<|begin_of_video|>", "video_end_token": "<|end_of_video|>"},
}
GLM_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
INTERNVL_TOKENS = {
    **{"start_image_token": "<img>", "end_image_token": "</img>"},
    **{"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
}
AYA_MARKERS = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL")
COHERE_TOKENS = {
    **{"image_token": "<|IMG_PATCH|>", "img_line_break_token": "<|IMG_LINE_BREAK|>"},
    **{"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>"},
}
OVIS_MARKERS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
ERNIE_TOKENS = {
    **{"image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|VIDEO_PLACEHOLDER|>"},
    **{"image_start_token": "<|IMAGE_START|>", "image_end_token": "<|IMAGE_END|>"},
    **{"video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>"},
}
MINICPM_TOKENS = {
    **{"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    **{"image_start_token": "<image>", "image_end_token": "</image>"},
    **{"slice_start_token": "<slice>", "slice_end_token": "</slice>"},
    **{"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"},
}
HUNYUAN_TOKENS = {"image_token": "<img>", "image_start_token": "<img_start>", "image_end_token": "<img_end>"}
MOLMO_MARKERS = ("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>")

FAMILIES: dict[str, Family] = {
    "aria": Family(
        processors.aria,
        "<fim_prefix><image><fim_suffix>",
        IMAGE,
        config={
            **{"vision_config.image_size": processors.ARIA_SIZE, "vision_config.patch_size": 196},
            "projector_patch_to_query_dict": {25: 4},
        },
    ),
    "aya_vision": Family(
        processors.aya_vision, "<image>", IMAGE, AYA_MARKERS, config={"image_token_index": token_id("<|IMG_PATCH|>")}
    ),
    "cohere2_vision": Family(processors.cohere2_vision, "<|IMG_PATCH|>", COHERE_TOKENS),
    "deepseek_vl": Family(partial(processors.squares, "DeepseekVL"), "<image>", IMAGE),
    "ernie4_5_vl_moe": Family(
        partial(processors.grids, "Ernie4_5_VLMoe", draw_on_frames=False),
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        ERNIE_TOKENS,
    ),
    "fast_vlm": Family(
        partial(processors.llava, strategy="full", additional=0, scale=2),
        "<image>\n",
        IMAGE,
        config={
            **{"vision_config.architecture": "fastvit_t8", "vision_config.hidden_size": 128},
            "vision_config.model_args": {"embed_dims": [8, 16, 32, 64], "layers": [1, 1, 1, 1]},
        },
    ),
    "gemma3": Family(processors.gemma3, "<start_of_image>", GEMMA_TOKENS, template="gemma3_training"),
    "gemma3n": Family(
        processors.gemma3n,
        "<image_soft_token>",
        GEMMA3N_TOKENS,
        config={
            **{"vision_config.architecture": "test_convnext", "vision_config.model_args": {}},
            **{"vision_config.hidden_size": 64, "vision_soft_tokens_per_image": 4},
        },
    ),
    "gemma4": Family(
        processors.gemma4,
        "<|image|>",
        GEMMA4_TOKENS,
        config={
            "vision_config": {
                **{"model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 48, "head_dim": 16},
                **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "patch_size": 4},
                "position_embedding_size": 256,
            },
        },
        template="gemma4_v5",
    ),
    **dict.fromkeys(("glm4v", "glm4v_moe"), Family(partial(processors.grids, "Glm4v"), GLM_IMAGE, GLM_TOKENS)),
    "glm46v": Family(partial(processors.grids, "Glm46V"), GLM_IMAGE, GLM_TOKENS),
    "granite4_vision": Family(
        processors.granite4_vision, "<image>\n", IMAGE, config={"image_grid_pinpoints": processors.GRID}
    ),
    "hunyuan_vl": Family(processors.hunyuan_vl, "<img_start><img><img_end>", HUNYUAN_TOKENS),
    "internvl": Family(
        processors.internvl,
        "<IMG_CONTEXT>\n",
        INTERNVL_TOKENS,
        config={"image_token_id": token_id("<IMG_CONTEXT>"), "image_seq_length": 4},
    ),
    "janus": Family(
        partial(processors.squares, "Janus"),
        "<image>\n",
        {**IMAGE, "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
    ),
    "kimi_k25": Family(
        processors.kimi,
        "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        {"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"},
        ("<|media_begin|>", "<|media_content|>", "<|media_end|>"),
    ),
    "lfm2_vl": Family(processors.lfm2_vl, "<image>", IMAGE, template="lfm2_2_5_vl"),
    "llava_next_video": Family(
        processors.llava_next_video, "<image>\n", IMAGE_AND_VIDEO, config={"image_grid_pinpoints": processors.GRID}
    ),
    "minicpmv4_6": Family(processors.minicpm, "<|image_pad|>", MINICPM_TOKENS),
    "mistral3": Family(processors.pixtral, "[IMG]", {"image_token": "[IMG]"}, ("[IMG_BREAK]", "[IMG_END]")),
    "mllama": Family(
        processors.mllama, "<|image|>", {"image_token": "<|image|>"}, config={"vision_config.vision_output_dim": 192}
    ),
    "molmo2": Family(
        processors.molmo2,
        "<|image|>",
        {"image_token": "<|image|>", "video_token": "<|video|>"},
        MOLMO_MARKERS,
        config={"image_patch_id": token_id("<im_patch>")},
    ),
    "ovis2": Family(
        processors.ovis2,
        "<image>\n",
        IMAGE,
        ("<IMG_ATOM>", *OVIS_MARKERS),
        config={
            "image_token_id": token_id("<IMG_ATOM>"),
            "visual_indicator_token_ids": lambda tokenizer: tokenizer.convert_tokens_to_ids(list(OVIS_MARKERS)),
        },
    ),
    "paligemma": Family(processors.paligemma, "<image>", IMAGE),
    "perception_lm": Family(
        processors.perception_lm, "<|image|>", {"image_token": "<|image|>", "video_token": "<|video|>"}
    ),
    "qwen3_5_moe": Family(processors.qwen3_vl, QWEN_IMAGE, QWEN_TOKENS, template="qwen3_6_training"),
    "qwen3_vl_moe": Family(
        processors.qwen3_vl,
        QWEN_IMAGE,
        QWEN_TOKENS,
        config={"vision_config.deepstack_visual_indexes": [0]},
        template="qwen3_vl_training",
    ),
    "vipllava": Family(
        partial(processors.llava, strategy="default", additional=1),
        "<image>\n",
        IMAGE,
        config={"vision_feature_layer": [-2, -1]},
    ),
}
# Forms of data on which SFTTrainer stops with its own collator, and what it says.
REFUSED: dict[tuple[str, str], tuple[type[Exception], str]] = {
    ("ernie4_5_vl_moe", "prompt_completion"): (IndexError, "does not match the shape of the indexed tensor"),
    ("mllama", "prompt_completion"): (RuntimeError, "must match the size of tensor b"),
    ("paligemma", "prompt_completion"): (
        ValueError,
        "`images` are expected as arguments to a `PaliGemmaProcessor` instance.",
    ),
}
# Types on which SFTTrainer stops with its own settings: what it says, and the setting under which it does not.
FAULTS: dict[str, tuple[type[Exception], str, str]] = {
    "glm4v_moe": (
        AttributeError,
        "'Glm4vMoeTextConfig' object has no attribute 'num_experts'",
        "router_aux_loss_coef=0.0",
    ),
}
# Chat templates that TRL has of the first ten.
FIRST_TEMPLATES = {
    **{"qwen2_vl": "qwen2_5_vl_training", "qwen2_5_vl": "qwen2_5_vl_training", "qwen3_vl": "qwen3_vl_training"},
    **{"qwen3_5": "qwen3_5_nothink_training", "llava_next": "llava_next_training"},
    **{"idefics3": "idefics3_training", "smolvlm": "smolvlm_training"},
}
ALL_FAMILIES: tuple[str, ...] = tuple(sorted({*FIRST_FAMILIES, *FAMILIES}))


def trl_template(name: str) -> str:
    """A chat template as TRL ships it."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text()


def build_family(model_type: str, seed: int = 0) -> tuple[tf.PreTrainedModel, tf.ProcessorMixin]:
    """The small model of a type in float32 and eval mode, and its processor with the type's own chat template, where
    TRL ships it. The global random state is left as it was."""
    if model_type in FIRST_FAMILIES:
        model, processor = build_vlm(model_type, seed)
        if model_type in FIRST_TEMPLATES:
            processor.chat_template = trl_template(FIRST_TEMPLATES[model_type])
        return model, processor
    family = FAMILIES[model_type]
    tokens = ["<pad>", "<s>", "</s>", *CHAT_TOKENS, *family.tokens.values(), *family.more_tokens]
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = build_tokenizer(tokens, extra_special_tokens=dict(family.tokens), **roles)
    processor = family.processor(tokenizer)
    own = trl_template(family.template) if family.template else None
    processor.chat_template = own or CHAT_TEMPLATE.replace("IMAGE_PLACEHOLDER", family.image)
    config = family_config(model_type, family, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(tf, MAPPING[model_type])._from_config(config, dtype=torch.float32)
        randomize(model)
    return model.eval(), processor


def family_config(model_type: str, family: Family, tokenizer: Tokenizer) -> tf.PreTrainedConfig:
    """The small config of a type, with a tokenizer's vocabulary and special tokens."""
    tree = tiny_config(model_type).to_dict()
    for path, value in family.config.items():
        *parts, name = path.split(".")
        branch = tree
        for part in parts:
            branch = branch[part]
        branch[name] = value(tokenizer) if callable(value) else copy.deepcopy(value)
    for branch in (tree, tree.get("text_config")):
        if branch is not None:
            vocabularies = ("vocab_size", "vocab_size_per_layer_input")
            branch.update({name: len(tokenizer) for name in vocabularies if name in branch})
            for role in ("pad", "bos", "eos"):
                branch[f"{role}_token_id"] = getattr(tokenizer, f"{role}_token_id")
            for name, token in family.tokens.items():
                for key in (f"{name}_id", f"{name}_index"):
                    if key in branch and key not in family.config:
                        branch[key] = tokenizer.convert_tokens_to_ids(token)
    return tf.CONFIG_MAPPING[model_type].from_dict(tree)
