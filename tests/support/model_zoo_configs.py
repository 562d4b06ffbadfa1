"""Shrinks the default config of any image-text-to-text model to one that is built and run in milliseconds.

Most of a config shrinks by the names of its fields, whatever the model: see `SMALL`. What that leaves unset,
inconsistent or too uniform is in `OVERRIDES`, by model type.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

Tree = dict[str, Any]

VOCABULARY = 128
FIRST_SPECIAL_TOKEN = 96  # plain text has the ids from 8 to here
IMAGE_TOKEN = 120  # where a config has none
TEXT_LAYERS, TOWER_LAYERS = 3, 2
IMAGE_SIZE, PATCH_SIZE, NUM_PATCHES = 32, 8, 16

WIDTHS = (
    *("hidden_size", "d_model", "embed_dim", "word_embed_proj_dim", "encoder_hidden_size", "text_hidden_size"),
    *("out_hidden_size", "output_dim", "output_channels", "adapter_in_dim", "adapter_out_dim", "adapter_input_size"),
    *("vision_hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim", "projection_dim"),
    *("image_text_hidden_size", "projector_hidden_size", "projection_hidden_size", "projection_hidden_dim"),
    *("decoder_hidden_size", "moe_hidden_size", "patch_embed_hidden_size", "pooler_output_size", "base_channels"),
    *("image_token_embed_dim", "downsample_channels", "latent_channels", "num_embeddings", "codebook_size"),
)
MLP_WIDTHS = (
    *("intermediate_size", "moe_intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim"),
    *("intermediate_size_mlp", "dense_intermediate_size", "share_expert_dim", "shared_expert_intermediate_size"),
    *("shared_experts_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"),
    *("alignment_intermediate_size", "projection_intermediate_size"),
)
QUERY_HEADS = (
    *("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads", "decoder_attention_heads"),
    *("resampler_n_heads", "resampler_heads", "conf_num_attention_heads"),
)
DEPTHS = (
    *("num_hidden_layers", "n_layers", "layers", "depth", "encoder_layers", "decoder_layers", "num_layers"),
    *("num_decoder_layers", "num_global_layers", "conf_num_hidden_layers"),
)

# Four query heads on two key-value heads, and heads that are not hidden_size / num_heads wide: mistakes must show.
SMALL: Tree = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys(MLP_WIDTHS, 48),
    **dict.fromkeys(QUERY_HEADS, 4),
    **{"num_key_value_heads": 2, "head_dim": 12, "d_kv": 12, "rotary_dim": 6, "query_pre_attn_scalar": 12},
    **{"swa_num_attention_heads": 6, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    # Multi-head latent attention: a head's value is not as wide as its query.
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "qk_head_dim": 12, "v_head_dim": 10},
    **{"kv_lora_rank": 16, "q_lora_rank": 16},
    **{"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4, "index_topk_blocks": 2, "index_block_size": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_head_dim": 10, "linear_num_heads": 4},
    **{"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 4},
    **dict.fromkeys(("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1},
    **{"sliding_window": 4, "sliding_window_size": 4, "attention_chunk_size": 4, "max_position_embeddings": 256},
    **{"hidden_size_per_layer_input": 8, "laurel_rank": 8, "additional_vocab_size": 4, "rel_extent": 16},
    **{"num_kv_shared_layers": 0, "num_nextn_predict_layers": 0, "n_layers_per_attn_res_block": 2},
    # Towers, and what joins them to the text model
    **{"image_size": IMAGE_SIZE, "max_image_size": IMAGE_SIZE, "max_img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
    **dict.fromkeys(("image_seq_length", "num_image_tokens", "num_patches", "max_num_patches"), NUM_PATCHES),
    **dict.fromkeys(("num_position_embeddings", "position_embedding_size", "seq_len"), NUM_PATCHES),
    **dict.fromkeys(("num_mel_bins", "n_mel_bins", "mel_vocab_size", "input_feat_size"), 16),
    **{"max_source_positions": 16, "downsample_hidden_size": 16, "hidden_sizes": 16, "conv_output_size": 32},
    **{"num_query_tokens": 4, "latent_query_num": 4, "mm_tokens_per_image": 4, "resampler_n_latents": 4},
    **{"resampler_num_latents": 4, "resampler_depth": 1, "resampler_head_dim": 16, "resampler_dim_head": 16},
    **{"pos_emb_height": 4, "pos_emb_width": 4, "posemb_grid_size": 4, "window_size": 2, "mlp_ratio": 2},
    **{"num_registers": 2, "num_res_blocks": 1, "channel_multiplier": 1, "aligner_num_add_layers": 1},
    **dict.fromkeys(("fullatt_block_indexes", "global_attn_indexes", "intermediate_layers_indices"), 1),
}
TOWER: Tree = {**dict.fromkeys(QUERY_HEADS, 2), "head_dim": 16}
TOWER_PARTS = ("vision", "audio", "vq", "qformer", "perceiver", "sam", "encoder", "adapter")

DROP = object()  # leave the field to its default


def _mrope(*sections: int, **more: Any) -> Tree:
    """Rotary settings of a text model: time, height and width share the rotated half of a head."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}
    return {"text_config.rope_parameters": rope}


HEAD_DIM = {"text_config.head_dim": 12}  # read by the model, although its config has no such field
HYBRID_QWEN = _mrope(1, 1, 1, partial_rotary_factor=0.5)
TIMM = {
    "vision_config.architecture": "test_vit",
    "vision_config.model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": IMAGE_SIZE},
}

OVERRIDES: dict[str, Tree] = {
    "apertus1p5": {
        **{"image_token_offset": 32, "audio_token_offset": 64},  # ids of the codes, 32 of each
        **{"audio_config.codebook_dim": 32, "audio_config.num_filters": 2, **HEAD_DIM},
    },
    "blip-2": {"image_token_index": IMAGE_TOKEN},
    "chameleon": {"vocabulary_map": {"<image>": IMAGE_TOKEN, "IMGIMGABZ": 121}},
    "cohere_compass": {
        # As in the released models: layers with a sliding window rotate, the others know no positions.
        "text_config.layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "text_config.rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
            "full_attention": None,
        },
    },
    **dict.fromkeys(("cosmos3_edge", "cosmos3_omni", "paddleocr_vl", "qwen3_vl", "qwen3_vl_moe"), _mrope(2, 2, 2)),
    "deepseek_ocr2": {
        **{"text_config.num_experts_per_tok": 2, "text_config.n_group": 1, "text_config.topk_group": 1},
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "diffusion_gemma": {
        **{"text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 48},
    },
    "dots3_note": {
        "text_config.head_dim": 16,
        "text_config.per_layer_config": {
            "02": {
                **{"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 24},
                **{"head_dim": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
            },
        },
        "text_config.rope_parameters": DROP,
    },
    "emu3": {
        **HEAD_DIM,
        "vocabulary_map": {"<image>": IMAGE_TOKEN, "<|extra_200|>": 121, "<|visual token 000000|>": 122},
    },
    "ernie4_5_vl_moe": {**_mrope(2, 2, 2), **HEAD_DIM},
    "evolla": {"head_dim": 12},
    "fast_vlm": {**TIMM, **HEAD_DIM},
    # A layer that takes keys and values from an earlier one
    "gemma3n": {**TIMM, "text_config.num_kv_shared_layers": 1},
    **dict.fromkeys(("glm46v", "glm4v", "glmga", "qwen2_vl", "qwen2_5_vl"), _mrope(2, 1, 1)),
    "glm4v_moe": {**_mrope(1, 1, 1, partial_rotary_factor=0.5), **HEAD_DIM},
    "glm5_next": {"text_config.qk_rope_head_dim": 0, "text_config.index_kpool": 2},
    "glm_ocr": {**_mrope(2, 2, 2), **HEAD_DIM},
    "granite_docling": {**HEAD_DIM, "text_config.attention_multiplier": 0.3},
    "granite4_vision": {
        **{"downsample_rate": "1/2", "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0, 1, 1, 2]},
        **{"vision_config.hidden_size": 64, **HEAD_DIM},
    },
    "hunyuan_vl": {**_mrope(2, 2, 1, 1), **HEAD_DIM},
    "hy_v4_vl": {**_mrope(1, 1, 1), "text_config.qk_rope_head_dim": 6},
    "inkling2_loop": {
        # The two layers in the middle, one of each kind, are gone through three times.
        **{"text_config.num_hidden_layers": 4, "text_config.n_layers_per_attn_res_block": 1},
        "text_config.layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid", "hybrid_sliding"],
        **{"text_config.loop_layer_index_start": 1, "text_config.loop_layer_index_end": 3},
    },
    "inkling_mm_model": {"vision_config.n_layers": 4, "vision_config.patch_size": 4},
    "instructblip": {"image_token_index": IMAGE_TOKEN},
    "instructblipvideo": {"video_token_index": IMAGE_TOKEN},
    "kimi_k25": {"text_config.first_k_dense_replace": 1},
    "lfm2_vl": {
        **{"text_config.layer_types": ["conv", "full_attention", "full_attention"], **HEAD_DIM},
        "text_config.full_attn_idxs": DROP,
    },
    "minimax_m3_vl": {
        "text_config.layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "qwen3_5", "qwen3_5_moe"), HYBRID_QWEN),
    "mistral_large4": {"text_config.kv_source_layers": [0, 0, 2]},
    "mllama": {"text_config.cross_attention_layers": [1]},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "perception_lm": TIMM,
    "pix2struct": {"text_config.d_kv": 8},  # its layers need num_heads * d_kv to be hidden_size
    "pp_formulanet": {f"vision_config.post_conv_{name}_channels": 32 for name in ("in", "mid", "out")},
    "qwen2_5_omni_thinker": {**_mrope(2, 2, 2), **HEAD_DIM, "vision_start_token_id": 121},
    "qwen3_omni_moe_thinker": {**_mrope(2, 2, 2), **HEAD_DIM, "vision_start_token_id": 121},
    "qwen4_exp": {
        **_mrope(2, 2, 2),
        **{"text_config.indexer_n_heads": 2, "text_config.indexer_kv_heads": 1, "text_config.indexer_head_dim": 12},
        **{"text_config.indexer_budget": 4, "text_config.indexer_compress_ratio": 2, "text_config.hc_lowrank": 8},
    },
    "step3p7": {
        "text_config.layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
        **{"text_config.sliding_window": 4, "text_config.num_sliding_attention_heads": 6},
        "text_config.per_layer_config": DROP,
        "text_config.rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "unlimited_ocr": {"text_config.num_key_value_heads": 4},  # eager attention takes no fewer
}
for _model_type in (
    *("exaone4_5", "got_ocr2", "internvl", "llava_onevision", "ovis2", "pp_chart2table"),
    "video_llama_3",
):
    OVERRIDES[_model_type] = HEAD_DIM


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A small config of `model_type`, in which every kind of decoder layer occurs that the default config has."""
    config_class = CONFIG_MAPPING[model_type]
    tree = _shrunk(config_class().to_dict(), "", {})
    for path, value in OVERRIDES.get(model_type, {}).items():
        *parts, name = path.split(".")
        branch = tree
        for part in parts:
            branch = branch[part]
        if value is DROP:
            del branch[name]
        else:
            branch[name] = copy.deepcopy(value)  # configs write into their rotary settings
    return config_class.from_dict(tree)


def _shrunk(tree: Tree, part: str, token_ids: dict[int, int]) -> Tree:
    """`tree` with small numbers. `part` is the field that holds it, `token_ids` are the new ids of special tokens."""
    tower = any(word in part for word in TOWER_PARTS)
    small = {**SMALL, **(TOWER if tower else {})}
    if (
        "kv_lora_rank" in tree
    ):  # multi-head latent attention has no key-value heads, and calls the rotated part head_dim
        small |= {"num_key_value_heads": small["num_attention_heads"], "head_dim": small["qk_rope_head_dim"]}
    depth = next((tree[name] for name in DEPTHS if isinstance(tree.get(name), int)), 0)
    kept = list(range(min(depth, TOWER_LAYERS))) if tower else _kept_layers(tree, depth)

    def shrink(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            if name == "per_layer_config":
                return _layer_overrides(tree, kept, small)
            return _shrunk(value, name, token_ids) if "model_type" in value else value
        if value is None or isinstance(value, (bool, str, float)):
            return value
        if name in DEPTHS:
            return len(kept)
        if name.endswith(("_token_id", "_token_index", "_token_ids")):
            return _small_tokens(value, token_ids)
        if isinstance(value, (list, tuple)) and len(value) == depth:
            return [small.get(name, value[layer]) for layer in kept]
        if name in small:
            return [small[name]] * len(value) if isinstance(value, (list, tuple)) else small[name]
        return value

    return {name: shrink(name, value) for name, value in tree.items()}


def _kept_layers(tree: Tree, depth: int) -> list[int]:
    """The first layer of every kind, and the first others until there are enough."""
    lists = [value for value in tree.values() if isinstance(value, (list, tuple)) and len(value) == depth]
    kinds_lists = [value for value in lists if len(set(map(str, value))) < depth]  # not a list of the layers' indices
    alone = {int(layer): str(settings) for layer, settings in tree.get("per_layer_config", {}).items()}
    kinds: dict[Any, int] = {}
    for layer in range(depth):
        kinds.setdefault((*(str(value[layer]) for value in kinds_lists), alone.get(layer)), layer)
    firsts = set(kinds.values())
    others = [layer for layer in range(depth) if layer not in firsts]
    return sorted([*firsts, *others[: max(0, TEXT_LAYERS - len(firsts))]])


def _layer_overrides(tree: Tree, kept: list[int], small: Tree) -> Tree:
    """Settings of single layers: as many times the common ones as they were."""
    by_layer = {int(layer): settings for layer, settings in tree["per_layer_config"].items()}
    return {
        f"{new:02d}": {
            name: round(small[name] * value / tree[name]) if name in small and name in tree else value
            for name, value in by_layer[old].items()
        }
        for new, old in enumerate(kept)
        if old in by_layer
    }


def _small_tokens(ids: Any, token_ids: dict[int, int]) -> Any:
    """New ids for special tokens, each below the vocabulary's size and none that plain text uses."""
    if isinstance(ids, (list, tuple)):
        return [_small_tokens(item, token_ids) for item in ids]
    return ids if ids < 8 else token_ids.setdefault(ids, FIRST_SPECIAL_TOKEN + len(token_ids))
