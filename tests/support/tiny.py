"""Tiny random vision-language models, data sets and teachers for the tests. Everything is made on the spot, offline."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers as tf
from PIL import Image, ImageColor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# --- Words: the data sets are written with them and the tokenizers are trained on them -------------------------------

COLORS = ("red", "green", "blue", "yellow", "purple", "white", "orange", "black")
PLACES = {"left": 0.25, "middle": 0.5, "right": 0.75}  # where the block's centre is, as a fraction of the width
ANSWERS = (
    "{color}",
    "a {color} block at the {place}",
    "in this picture there is one {color} square, and it sits near the {place} edge of a noisy background",
    "{place}: {color}",
    "I can see something {color}. everything else is grey noise",
    "it shows a large {color} block",
    "the {place} is {color}, the rest is not",
)
QUESTIONS = ("what is in this image?", "describe the picture.", "which color does the block have?")


# --- Tokenizers and chat templates -----------------------------------------------------------------------------------

# Content may be a plain string or the list of parts that multimodal trainers turn it into. The markers around what the
# assistant says are what `assistant_only_loss=True` reads its mask from.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
  {%- if content is string -%}{{- content -}}{%- else -%}
    {%- for part in content -%}
      {%- if part['type'] == 'image' -%}{{- 'IMAGE_PLACEHOLDER' -}}
      {%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- render(message['content']) + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}
  {%- else -%}
    {{- render(message['content']) + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
QWEN_TEMPLATE = CHAT_TEMPLATE.replace("IMAGE_PLACEHOLDER", "<|vision_start|><|image_pad|><|vision_end|>")
LLAVA_TEMPLATE = CHAT_TEMPLATE.replace("IMAGE_PLACEHOLDER", "<image>\n")
IDEFICS_TEMPLATE = CHAT_TEMPLATE.replace("IMAGE_PLACEHOLDER", "<image>")

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
QWEN_TOKENS = ["<|endoftext|>", *CHAT_TOKENS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
LLAVA_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<video>", *CHAT_TOKENS]
IDEFICS_TOKENS = [*LLAVA_TOKENS, "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]


def build_tokenizer(special_tokens: list[str], **roles: str) -> tf.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the words of the data sets; `roles` names the pad, eos and bos tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*COLORS, *PLACES, *ANSWERS, *QUESTIONS, "user assistant system"], trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **roles)


def llava_tokenizer(special_tokens: list[str] = LLAVA_TOKENS) -> tf.PreTrainedTokenizerFast:
    return build_tokenizer(special_tokens, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


# --- Models ----------------------------------------------------------------------------------------------------------
# One small function a family. Each takes the text model's settings and returns (config, processor). Every width is
# derived from the text model's, so that `hidden_size=64` leaves no linear layer narrower than that.

Settings = dict[str, Any]
Recipe = tuple[tf.PreTrainedConfig, tf.ProcessorMixin]

PATCH = 8
CLIP_SIZE = 24  # 3 x 3 patches
IDEFICS_SIZE = 32  # 4 x 4 patches, which become 4 tokens
IDEFICS_TOKENS_PER_IMAGE = 4
ANYRES_GRID = [[24, 48], [48, 24], [48, 48]]


def _text_settings(overrides: Settings) -> Settings:
    """Settings that every text model knows. A wide initializer keeps the heads' attention from being uniform."""
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        **overrides,
    }
    settings.setdefault("intermediate_size", settings["hidden_size"] * 3 // 2)
    return settings


def _text_config(text: Settings, tokenizer: tf.PreTrainedTokenizerFast, **family: Any) -> Settings:
    """The family's settings, the common ones on top. The real models' default token ids lie outside our vocabulary."""
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    return {**family, **text, **ids, "vocab_size": len(tokenizer)}


def _vision_config(text: Settings, **family: Any) -> Settings:
    """A tower of two layers, as wide as the text model."""
    widths = {name: text[name] for name in ("hidden_size", "intermediate_size")}
    return {**widths, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH, **family}


def _token_ids(tokenizer: tf.PreTrainedTokenizerFast, **tokens: str) -> dict[str, int]:
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _qwen(prefix: str, text: Settings, text_family: Settings, vision_family: Settings) -> Recipe:
    """What the Qwen models share; `prefix` is the start of their class names."""
    tokenizer = build_tokenizer(QWEN_TOKENS, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    vision = _vision_config(text, spatial_merge_size=2, temporal_patch_size=2, in_channels=3, **vision_family)
    vision["depth"], vision["num_heads"] = vision.pop("num_hidden_layers"), vision.pop("num_attention_heads")
    config = getattr(tf, f"{prefix}Config")(
        text_config=_text_config(text, tokenizer, **text_family),
        vision_config=vision,
        **_token_ids(tokenizer, image="<|image_pad|>", video="<|video_pad|>"),
        **_token_ids(tokenizer, vision_start="<|vision_start|>", vision_end="<|vision_end|>"),
    )
    # Qwen3.5 has Qwen3-VL's processor, Qwen2.5-VL has Qwen2-VL's for videos, all have Qwen2-VL's for images.
    processor_class = tf.Qwen3VLProcessor if prefix == "Qwen3_5" else getattr(tf, f"{prefix}Processor")
    video_class = tf.Qwen2VLVideoProcessor if prefix.startswith("Qwen2") else tf.Qwen3VLVideoProcessor
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    # 256 to 1024 pixels are 1 to 4 merged image tokens an image.
    images = tf.Qwen2VLImageProcessor(size={"shortest_edge": 256, "longest_edge": 1024}, **patches)
    return config, processor_class(images, tokenizer, video_class(**patches), chat_template=QWEN_TEMPLATE)


def _mrope(rotated: int, **family: Any) -> Settings:
    """Rotary settings: time, height and width share half of the rotated dimensions of a head."""
    side = rotated * 3 // 16
    sections = [rotated // 2 - 2 * side, side, side]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **family}}


def _head_size(text: Settings) -> int:
    return text["hidden_size"] // text["num_attention_heads"]


def _qwen2_vl(text: Settings) -> Recipe:
    vision = {"embed_dim": text["hidden_size"], "mlp_ratio": 2}
    return _qwen("Qwen2VL", text, _mrope(_head_size(text)), vision)


def _qwen2_5_vl(text: Settings) -> Recipe:
    vision = {"out_hidden_size": text["hidden_size"], "window_size": 32, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VL", text, _mrope(_head_size(text)), vision)


def _qwen3_vl(text: Settings) -> Recipe:
    # As in the real models, num_heads * head_dim is not hidden_size.
    text = {"head_dim": 2 * _head_size(text), **text}
    vision = {"out_hidden_size": text["hidden_size"], "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return _qwen("Qwen3VL", text, _mrope(text["head_dim"], mrope_interleaved=True), vision)


def _qwen3_5(text: Settings) -> Recipe:
    text = {"head_dim": 2 * _head_size(text), **text}
    rope = _mrope(text["head_dim"] // 2, partial_rotary_factor=0.5, mrope_interleaved=True)
    linear = {f"linear_{kind}_head_dim": text["hidden_size"] // 4 for kind in ("key", "value")}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    vision = {"out_hidden_size": text["hidden_size"], "num_position_embeddings": 16}
    return _qwen("Qwen3_5", text, {**rope, **linear}, vision)


def _llava_clip(prefix: str, text_type: str, grid: list[list[int]] | None, text: Settings) -> Recipe:
    """LLaVA 1.5 and NeXT: a CLIP tower; NeXT also cuts large images into tiles by a grid."""
    tokenizer = llava_tokenizer()
    anyres = {} if grid is None else {"image_grid_pinpoints": grid}
    clip = {"model_type": "clip_vision_model", "image_size": CLIP_SIZE, "projection_dim": text["hidden_size"]}
    config = getattr(tf, f"{prefix}Config")(
        text_config=_text_config(text, tokenizer, model_type=text_type),
        vision_config=_vision_config(text, **clip),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(CLIP_SIZE // PATCH) ** 2,
        **_token_ids(tokenizer, image="<image>"),
        **anyres,
    )
    image_class = tf.CLIPImageProcessor if grid is None else tf.LlavaNextImageProcessor
    crop = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    processor = getattr(tf, f"{prefix}Processor")(
        image_class(size={"shortest_edge": CLIP_SIZE}, crop_size=crop, **anyres),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the "default" strategy drops again
        chat_template=LLAVA_TEMPLATE,
    )
    return config, processor


def _llava_onevision(text: Settings) -> Recipe:
    tokenizer = llava_tokenizer()
    grid = [[CLIP_SIZE, CLIP_SIZE], *ANYRES_GRID]
    shared = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    siglip = {"model_type": "siglip_vision_model", "image_size": CLIP_SIZE, "vision_use_head": False}
    config = tf.LlavaOnevisionConfig(
        text_config=_text_config(text, tokenizer, model_type="qwen2"),
        vision_config=_vision_config(text, **siglip),
        vision_feature_layer=-1,
        image_grid_pinpoints=grid,
        **_token_ids(tokenizer, image="<image>", video="<video>"),
        **shared,
    )
    square = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    processor = tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=grid),
        tokenizer,
        tf.LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=(CLIP_SIZE // PATCH) ** 2,
        chat_template=LLAVA_TEMPLATE,
        **shared,
    )
    return config, processor


def _idefics(prefix: str, text_type: str, text: Settings) -> Recipe:
    """Idefics 2 resamples an image into few tokens, 3 and SmolVLM shuffle neighbouring patches together."""
    tokenizer = llava_tokenizer(IDEFICS_TOKENS)
    edges = {"size": {"longest_edge": IDEFICS_SIZE}, "max_image_size": {"longest_edge": IDEFICS_SIZE}}
    connector: Settings = {"scale_factor": 2}
    if prefix == "Idefics2":
        edges = {"size": {"shortest_edge": IDEFICS_SIZE - PATCH, "longest_edge": IDEFICS_SIZE}}
        resampler = {"n_latents": IDEFICS_TOKENS_PER_IMAGE, "depth": 1, "n_heads": 2}
        perceiver = {f"resampler_{name}": value for name, value in resampler.items()}
        perceiver |= {"resampler_head_dim": text["hidden_size"] // 2, "num_key_value_heads": 1}
        connector = {"perceiver_config": {"hidden_size": text["hidden_size"], **perceiver}}
    config = getattr(tf, f"{prefix}Config")(
        text_config=_text_config(text, tokenizer, model_type=text_type),
        vision_config=_vision_config(text, image_size=IDEFICS_SIZE),
        **_token_ids(tokenizer, image="<image>"),
        **connector,
    )
    processor = getattr(tf, f"{prefix}Processor")(
        getattr(tf, f"{prefix}ImageProcessor")(do_image_splitting=False, **edges),
        tokenizer,
        *([tf.SmolVLMVideoProcessor()] if prefix == "SmolVLM" else []),
        image_seq_len=IDEFICS_TOKENS_PER_IMAGE,
        chat_template=IDEFICS_TEMPLATE,
    )
    return config, processor


_RECIPES: dict[str, Callable[[Settings], Recipe]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_5": _qwen3_5,
    "llava": partial(_llava_clip, "Llava", "llama", None),
    "llava_next": partial(_llava_clip, "LlavaNext", "mistral", ANYRES_GRID),
    "llava_onevision": _llava_onevision,
    "idefics2": partial(_idefics, "Idefics2", "mistral"),
    "idefics3": partial(_idefics, "Idefics3", "llama"),
    "smolvlm": partial(_idefics, "SmolVLM", "llama"),
}
FAMILIES: tuple[str, ...] = tuple(_RECIPES)


def build_vlm(family: str, seed: int = 0, **text_overrides: Any) -> tuple[tf.PreTrainedModel, tf.ProcessorMixin]:
    """Build a tiny random vision-language model with its processor.

    Args:
        family: One of `FAMILIES`.
        seed: Seed of the weights. The global random state is left as it was.
        **text_overrides: Settings of the text model's config, such as `num_hidden_layers`, `hidden_size` (the vision
            tower takes the same width) or `attention_bias`.

    Returns:
        The fp32 model in eval mode, as `from_pretrained` gives it, and its processor. The text model has 3 layers
        (qwen3_5: 4, the last of which is softmax attention) and 4 attention heads.

    Raises:
        ValueError: The text model of that family has no such setting.
    """
    layers = {"num_hidden_layers": 4} if family == "qwen3_5" else {}
    config, processor = _RECIPES[family](_text_settings({**layers, **text_overrides}))
    known = config.get_text_config().__dataclass_fields__
    unknown = sorted(set(text_overrides) - set(known))
    if unknown:
        raise ValueError(f"The text model of {family!r} has no setting {unknown}; it has {sorted(known)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return model.eval(), processor


def save_vlm(family: str, path: str | Path, **kwargs: Any) -> str:
    """Save `build_vlm(family, **kwargs)` so that the auto classes load model and processor from `path`."""
    model, processor = build_vlm(family, **kwargs)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


# --- Data ------------------------------------------------------------------------------------------------------------


def make_image(rng: np.random.Generator, size: tuple[int, int], color: str, place: str) -> Image.Image:
    """Random noise with a block of one colour; `size` is (height, width)."""
    height, width = size
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    left = int(width * (PLACES[place] - 0.25))
    pixels[height // 4 : height * 3 // 4, left : left + width // 2] = ImageColor.getrgb(color)
    return Image.fromarray(pixels)


def image_dataset(
    n: int = 24, fmt: str = "prompt_completion", seed: int = 0, image_size: int = 32, with_features: int | None = None
) -> datasets.Dataset:
    """Images with a question and an answer about each.

    Args:
        n: Number of rows. After 120 of them the answers repeat; the images never do.
        fmt: `"prompt_completion"` (columns `images`, `prompt`, `completion`), `"messages"` (`images`, `messages`),
            `"image"` (`image`, `messages`) or `"text"` (`text` alone, without images).
        seed: Seed of images, answers and teacher vectors.
        image_size: Smallest height and width in pixels; both vary by a few pixels from row to row.
        with_features: Width of a column `teacher_features` of random float32 vectors; `None` for no such column.

    Returns:
        The data set, conversational but for `"text"`.
    """
    rng = np.random.default_rng(seed)
    contents = itertools.product(ANSWERS, COLORS, PLACES)
    answers = {pattern.format(color=color, place=place): (color, place) for pattern, color, place in contents}
    order = rng.permutation(list(answers)).tolist()
    rows = []
    for index in range(n):
        answer = order[index % len(order)]
        size = (image_size + 4 * (index % 3), image_size + 4 * (index % 2))
        image = make_image(rng, size, *answers[answer])
        rows.append(_row(fmt, image, QUESTIONS[index % len(QUESTIONS)], answer))
    dataset = datasets.Dataset.from_list(rows)
    if with_features is not None:
        vectors = list(rng.standard_normal((n, with_features)).astype(np.float32))
        dataset = dataset.add_column("teacher_features", vectors, feature=datasets.List(datasets.Value("float32")))
    return dataset


def _row(fmt: str, image: Image.Image, question: str, answer: str) -> dict[str, Any]:
    prompt = [{"role": "user", "content": question}]
    completion = [{"role": "assistant", "content": answer}]
    formats = {
        "prompt_completion": {"images": [image], "prompt": prompt, "completion": completion},
        "messages": {"images": [image], "messages": prompt + completion},
        "image": {"image": image, "messages": prompt + completion},
        "text": {"text": f"{question} {answer}"},
    }
    return formats[fmt]


# --- Teacher and training arguments ----------------------------------------------------------------------------------


def save_tiny_dinov2(
    path: str | Path, hidden_size: int = 16, image_size: int = 28, patch_size: int = 14, seed: int = 0
) -> str:
    """Save a tiny random DINOv2 with its image processor so that the auto classes load both from `path`."""
    shape = {"hidden_size": hidden_size, "image_size": image_size, "patch_size": patch_size}
    config = tf.Dinov2Config(num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tf.Dinov2Model(config).save_pretrained(path)
    crop = {"height": image_size, "width": image_size}
    tf.BitImageProcessor(size={"shortest_edge": image_size}, crop_size=crop).save_pretrained(path)
    return str(path)


def sft_args(output_dir: str | Path, **kwargs: Any) -> dict[str, Any]:
    """Arguments for an `SFTConfig` that trains quietly on the CPU; `kwargs` go on top."""
    cpu = {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "max_length": None, "seed": 0}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    return {"output_dir": str(output_dir), **cpu, **quiet, **kwargs}
