"""Configurations of published models, written down from their `config.json` as far as shapes depend on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import transformers as tf

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIGLIP_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def _text(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: object) -> dict:
    return {
        **{"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": vocabulary},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads, **more},
    }


def _qwen3_vl(text: dict) -> tf.PreTrainedConfig:
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16}
    vision |= {"out_hidden_size": text["hidden_size"], "deepstack_visual_indexes": [5, 11, 17]}
    text = {**text, "head_dim": 128, "tie_word_embeddings": True}
    return tf.Qwen3VLConfig(
        text_config=text, vision_config={**vision, "num_position_embeddings": 2304}, tie_word_embeddings=True
    )


def _qwen2_5_vl(text: dict, tied: bool) -> tf.PreTrainedConfig:
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14}
    vision |= {"out_hidden_size": text["hidden_size"], "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    text = {**text, "tie_word_embeddings": tied}
    return tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def _llava_1_5() -> tf.PreTrainedConfig:
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "projection_dim": 768}
    text = _text(4096, 11008, 32, 32, 32, 32064, model_type="llama")
    return tf.LlavaConfig(text_config=text, vision_config=vision)


def _idefics(prefix: str, scale: int, text: dict, vision: dict) -> tf.PreTrainedConfig:
    text = {**text, "model_type": "llama", "tie_word_embeddings": False}
    config_class = getattr(tf, f"{prefix}Config")
    return config_class(text_config=text, vision_config=vision, scale_factor=scale, tie_word_embeddings=False)


PUBLISHED: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "Qwen/Qwen3-VL-2B-Instruct": partial(_qwen3_vl, _text(2048, 6144, 28, 16, 8, 151936)),
    "Qwen/Qwen3-VL-4B-Instruct": partial(_qwen3_vl, _text(2560, 9728, 36, 32, 8, 151936)),
    "Qwen/Qwen2.5-VL-3B-Instruct": partial(_qwen2_5_vl, _text(2048, 11008, 36, 16, 2, 151936), True),
    "Qwen/Qwen2.5-VL-7B-Instruct": partial(_qwen2_5_vl, _text(3584, 18944, 28, 28, 4, 152064), False),
    "llava-hf/llava-1.5-7b-hf": _llava_1_5,
    "HuggingFaceM4/Idefics3-8B-Llama3": partial(
        _idefics,
        *("Idefics3", 2, _text(4096, 14336, 32, 32, 8, 128259), {**SO400M, "patch_size": 14, "image_size": 364}),
    ),
    "HuggingFaceTB/SmolVLM-Instruct": partial(
        _idefics,
        *("Idefics3", 3, _text(2048, 8192, 24, 32, 32, 49155), {**SO400M, "patch_size": 14, "image_size": 384}),
    ),
    "HuggingFaceTB/SmolVLM-500M-Instruct": partial(
        _idefics,
        *("Idefics3", 4, _text(960, 2560, 32, 15, 5, 49280), {**SIGLIP_BASE, "patch_size": 16, "image_size": 512}),
    ),
}

# As the published checkpoints have them.
PARAMETERS = {
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
    "HuggingFaceTB/SmolVLM-Instruct": 2_246_272_880,
    "HuggingFaceTB/SmolVLM-500M-Instruct": 507_482_304,
}
