"""The real processors of model types, set to images of a few patches."""

from __future__ import annotations

from typing import Any

import transformers as tf
from model_zoo_configs import IMAGE_SIZE, NUM_PATCHES, PATCH_SIZE

Tokenizer = tf.PreTrainedTokenizerFast
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def grids(prefix: str, tokenizer: Tokenizer, **video: Any) -> tf.ProcessorMixin:
    """Of models that cut an image of any size into a grid of patches and merge two by two of them."""
    patches = {"patch_size": PATCH_SIZE, "merge_size": 2}
    images = getattr(tf, f"{prefix}ImageProcessor")(size={"shortest_edge": 256, "longest_edge": 1024}, **patches)
    videos = getattr(tf, f"{prefix}VideoProcessor")(**patches, **video)
    return getattr(tf, f"{prefix}Processor")(images, tokenizer, videos)


def qwen3_vl(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    patches = {"patch_size": PATCH_SIZE, "merge_size": 2, "temporal_patch_size": 2}
    images = tf.Qwen2VLImageProcessor(size={"shortest_edge": 256, "longest_edge": 1024}, **patches)
    return tf.Qwen3VLProcessor(images, tokenizer, tf.Qwen3VLVideoProcessor(**patches))


def gemma3(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    return tf.Gemma3Processor(tf.Gemma3ImageProcessor(size=SQUARE), tokenizer, image_seq_length=4)


SMALL_GEMMA = {"height": 2 * IMAGE_SIZE, "width": 2 * IMAGE_SIZE}  # its tower makes one token of 32 x 32 pixels


def gemma3n(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    images = tf.SiglipImageProcessor(size=SMALL_GEMMA)
    return tf.Gemma3nProcessor(tf.Gemma3nAudioFeatureExtractor(), images, tokenizer, image_seq_length=4)


def gemma4(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    images = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 3}  # 70 is the fewest it takes
    videos = tf.Gemma4VideoProcessor(**images)
    return tf.Gemma4Processor(tf.Gemma4AudioFeatureExtractor(), tf.Gemma4ImageProcessor(**images), tokenizer, videos)


def internvl(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    images = tf.GotOcr2ImageProcessor(size=SQUARE, max_patches=2)
    return tf.InternVLProcessor(images, tokenizer, tf.InternVLVideoProcessor(size=SQUARE), image_seq_length=4)


def pixtral(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    images = tf.PixtralImageProcessor(size={"longest_edge": IMAGE_SIZE}, patch_size=PATCH_SIZE)
    return tf.PixtralProcessor(images, tokenizer, patch_size=PATCH_SIZE, spatial_merge_size=2)


def mllama(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    return tf.MllamaProcessor(tf.MllamaImageProcessor(size=SQUARE, max_image_tiles=4), tokenizer)


def llava(tokenizer: Tokenizer, strategy: str, additional: int, scale: int = 1) -> tf.ProcessorMixin:
    """LLaVA's processor, which others share."""
    square = {name: scale * size for name, size in SQUARE.items()}
    return tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": square["height"]}, crop_size=square),
        tokenizer,
        patch_size=IMAGE_SIZE if scale > 1 else PATCH_SIZE,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=additional,
    )


GRID = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE]]


def llava_next_video(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    shared = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": SQUARE}
    return tf.LlavaNextVideoProcessor(
        tf.LlavaNextVideoVideoProcessor(**shared),
        tf.LlavaNextImageProcessor(image_grid_pinpoints=GRID, **shared),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def granite4_vision(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    return tf.Granite4VisionProcessor(
        tf.LlavaNextImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE, image_grid_pinpoints=GRID),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        downsample_rate="1/2",
    )


def aya_vision(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    images = tf.GotOcr2ImageProcessor(size=SQUARE, max_patches=2)
    return tf.AyaVisionProcessor(images, tokenizer, patch_size=PATCH_SIZE, img_size=IMAGE_SIZE, downsample_factor=2)


def cohere2_vision(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    # `patch_size` squared is the number of tokens of a tile.
    return tf.Cohere2VisionProcessor(
        tf.Cohere2VisionImageProcessor(size=SQUARE, max_patches=2, patch_size=2), tokenizer
    )


def ovis2(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    return tf.Ovis2Processor(tf.Ovis2ImageProcessor(size=SQUARE), tokenizer, image_seq_length=NUM_PATCHES)


def lfm2_vl(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    limits = {"min_image_tokens": 2, "max_image_tokens": 4, "tile_size": IMAGE_SIZE, "do_image_splitting": False}
    return tf.Lfm2VlProcessor(tf.Lfm2VlImageProcessor(encoder_patch_size=PATCH_SIZE, **limits), tokenizer)


def perception_lm(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    images = tf.PerceptionLMImageProcessor(vision_input_type="vanilla", tile_size=IMAGE_SIZE)
    videos = tf.PerceptionLMVideoProcessor(size=SQUARE)
    return tf.PerceptionLMProcessor(videos, images, tokenizer, patch_size=16, pooling_ratio=1)


ARIA_SIZE = 980  # what its processor asks for, whatever the image processor is set to


def aria(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    return tf.AriaProcessor(tf.AriaImageProcessor(), tokenizer, size_conversion={ARIA_SIZE: 4})


def squares(prefix: str, tokenizer: Tokenizer) -> tf.ProcessorMixin:
    """Of models that make every image a square of as many tokens as there are patches."""
    images = getattr(tf, f"{prefix}ImageProcessor")(size=SQUARE, min_size=PATCH_SIZE)
    return getattr(tf, f"{prefix}Processor")(images, tokenizer, num_image_tokens=NUM_PATCHES)


def paligemma(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    images = tf.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = NUM_PATCHES
    return tf.PaliGemmaProcessor(images, tokenizer)


def hunyuan_vl(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    size = {"shortest_edge": 256, "longest_edge": 1024}
    return tf.HunYuanVLProcessor(tf.HunYuanVLImageProcessor(size=size, patch_size=PATCH_SIZE), tokenizer)


def kimi(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    images = {"size": {"max_height": IMAGE_SIZE, "max_width": IMAGE_SIZE}, "patch_size": PATCH_SIZE}
    return tf.Kimi_K25Processor(tf.Kimi_K25ImageProcessor(**images), tokenizer, tf.Kimi_K25VideoProcessor(**images))


def minicpm(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    images = {"scale_resolution": 2 * IMAGE_SIZE, "patch_size": PATCH_SIZE, "slice_mode": False}
    return tf.MiniCPMV4_6Processor(
        tf.MiniCPMV4_6ImageProcessor(**images), tf.MiniCPMV4_6VideoProcessor(**images), tokenizer
    )


def molmo2(tokenizer: Tokenizer) -> tf.ProcessorMixin:
    images = {"size": SQUARE, "patch_size": PATCH_SIZE}
    return tf.Molmo2Processor(
        tf.Molmo2ImageProcessor(max_crops=2, overlap_margins=[1, 1], **images),
        tf.Molmo2VideoProcessor(**images),
        tokenizer,
    )
