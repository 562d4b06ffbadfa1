"""Which models' attention heads can be found, and how to tell of others."""

from __future__ import annotations

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .accessor import HeadAccessor, HeadAccessorFactory
from .layouts import decoder_accessor

# Vision-language models.
_MULTIMODAL = """
    apertus1p5 aria aya_vision blip blip-2 chameleon cohere2_vision cohere_compass cosmos3_edge cosmos3_omni
    deepseek_ocr2 deepseek_vl deepseek_vl_hybrid diffusion_gemma dots3_note emu3 ernie4_5_vl_moe evolla exaone4_5
    fast_vlm florence2 fuyu gemma3 gemma3n gemma4 gemma4_unified git glm46v glm4v glm4v_moe glm5_next glm_ocr glmga
    got_ocr2 granite4_vision granite_docling hunyuan_vl hy_v4_vl hyperclovax_vision_v2 idefics idefics2 idefics3
    inkling2 inkling2_loop inkling_mm_model instructblip instructblipvideo internvl janus kimi_k25 kosmos-2
    kosmos-2.5 lfm2_vl lfm3_vl lighton_ocr llama4 llava llava_next llava_next_video llava_onevision minicpm_ocr
    minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 mistral4 mistral_large4 mllama molmo2 muse_glimmer muse_spark
    nemotron_h_omni ovis2 paddleocr_vl paligemma perception_lm pi0 pix2struct pp_chart2table pp_formulanet
    qianfan_ocr qwen2_5_omni_thinker qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_omni_moe_thinker qwen3_vl
    qwen3_vl_moe qwen4_exp shieldgemma2 smolvlm step3p7 t5gemma2 udop unlimited_ocr video_llama_3 video_llava
    vipllava vision-encoder-decoder
"""
# The text decoders of the above by themselves, where they need nothing but text.
_TEXT_DECODERS = """
    apertus1p5_text aria_text blip_text_model cohere_compass_text cosmos3_edge_text deepseek_ocr2_text
    dots3_note_text emu3_text_model ernie4_5_vl_moe_text gemma3n_text gemma4_text gemma4_unified_text glm4v_moe_text
    glm4v_text glm5_next_text glm_ocr_text granite4_vision_text granite_docling_text hunyuan_vl_text hy_v4_vl_text
    hyperclovax inkling2_loop_text inkling2_text inkling_text kosmos_2_5_text_model kosmos_2_text_model lfm3
    llama4_text minimax_m3_vl_text mistral_large4_text mllama_text_model molmo2_text muse_glimmer_text
    muse_spark_text paddleocr_vl_text qwen2_5_omni_text qwen2_5_vl_text qwen2_vl_text qwen3_5_moe_text
    qwen3_omni_moe_text qwen3_vl_moe_text qwen3_vl_text qwen4_exp_text step3p5 unlimited_ocr_text
"""
# Language models, to rank the heads of one before it has seen an image.
_LANGUAGE = """
    cohere cohere2 deepseek_v3 ernie4_5 exaone4 gemma gemma2 gemma3_text gpt2 gpt_neox granite lfm2 llama mistral
    mixtral nemotron_h olmo2 opt persimmon phi phi3 qwen2 qwen3 qwen3_5_text qwen3_moe smollm3 stablelm
"""

_FACTORIES: dict[str, HeadAccessorFactory] = dict.fromkeys(
    (_MULTIMODAL + _TEXT_DECODERS + _LANGUAGE).split(), decoder_accessor
)


def unwrap_model(model: nn.Module) -> nn.Module:
    """The transformers model inside distributed, compiled and PEFT wrappers."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(model, PeftModel):  # which may wrap a compiled model
        model = extract_model_from_parallel(model.get_base_model(), keep_torch_compile=False)
    return model


def register_head_accessor(model_type: str, factory: HeadAccessorFactory) -> None:
    """Tells hera_trainer where a model type keeps its attention heads.

    Args:
        model_type (`str`): `config.model_type` of the model.
        factory (`Callable`): Takes the transformers model (unwrapped from PEFT and parallel wrappers), returns its
            [`HeadAccessor`]. Replaces an earlier registration. For a model with the common layout (its
            `get_decoder().layers[i].self_attn.o_proj`), [`~heads.layouts.decoder_accessor`] is the factory.

    Example:

    ```python
    >>> def my_accessor(model):
    ...     layers = model.transformer.blocks
    ...     attentions = {i: layer.attn for i, layer in enumerate(layers)}
    ...     projections = {i: layer.attn.out_proj for i, layer in enumerate(layers)}
    ...     return HeadAccessor(model.transformer, layers, attentions, projections, {i: 16 for i in projections})
    >>> register_head_accessor("my_model", my_accessor)
    ```
    """
    _FACTORIES[model_type] = factory


def has_common_layout(model: nn.Module) -> bool:
    """Whether the accessor of a model's type is the common one, and not one of the user's own."""
    return _FACTORIES.get(unwrap_model(model).config.model_type) is decoder_accessor


def supported_model_types() -> list[str]:
    """Model types that have an accessor."""
    return sorted(_FACTORIES)


def unknown_model_types() -> list[str]:
    """Image-text-to-text types of the installed transformers that have no accessor: newer than this release."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - _FACTORIES.keys())


def get_head_accessor(model: nn.Module) -> HeadAccessor:
    """The attention heads of `model`'s language model: vision towers, which name their projections alike, are never
    touched.

    Args:
        model (`nn.Module`): A transformers model, plain, quantized, wrapped by PEFT or by a parallel wrapper.

    Returns:
        [`HeadAccessor`].

    Raises:
        `ValueError`: If the model type is unknown (the message has examples of accessors), or the model does not look
            like its type says.
    """
    base = unwrap_model(model)
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type not in _FACTORIES:
        raise ValueError(_HOW_TO_REGISTER.format(model_type=model_type))
    return _FACTORIES[model_type](base)


_HOW_TO_REGISTER = """\
No attention-head accessor is known for model type {model_type!r}. If the model keeps its output projections at \
`model.get_decoder().layers[i].self_attn.o_proj`, as most do, register the common accessor:

    from hera_trainer import decoder_accessor, register_head_accessor
    register_head_accessor({model_type!r}, decoder_accessor)

Otherwise write one, a function from the model to a `HeadAccessor`:

    from hera_trainer import HeadAccessor, register_head_accessor
    def accessor(model):
        layers = model.my_decoder.blocks
        attentions = {{i: layer.attn for i, layer in enumerate(layers)}}
        projections = {{i: layer.attn.out_proj for i, layer in enumerate(layers)}}
        heads = {{i: layer.attn.num_heads for i, layer in enumerate(layers)}}
        return HeadAccessor(model.my_decoder, layers, attentions, projections, heads)
    register_head_accessor({model_type!r}, accessor)

`hera_trainer.heads.registry.supported_model_types()` lists the types that need none of this."""
