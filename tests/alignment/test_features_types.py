"""Image features of model types that have no tiny processor: pixels made by hand, and what the language model then says
is the same bit for bit, though no vision module has run."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from model_zoo import build
from model_zoo_configs import IMAGE_SIZE
from torch import nn

from hera_trainer import get_head_accessor
from hera_trainer.alignment.features import ImageFeatures
from hera_trainer.heads.capture import ForwardDone

PLAIN = [
    *("aya_vision", "cohere2_vision", "deepseek_vl", "gemma3", "internvl", "janus", "mistral3", "ovis2", "paligemma"),
    "video_llava",
]


def inputs_of(model_type, model):
    """Two rows of an image and five tokens of text."""
    generator = torch.Generator().manual_seed(0)
    text = torch.arange(10).reshape(2, 5) + 8
    if model_type == "mllama":  # whose layers attend to the images, of four tiles each
        ids = torch.cat([torch.full((2, 1), model.config.image_token_id), text], dim=1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(2, 1, 4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
            "cross_attention_mask": torch.ones(2, 6, 1, 4, dtype=torch.long),
        }
    images = {"pixel_values": torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
    if model_type == "mistral3":
        images["image_sizes"] = torch.full((2, 2), IMAGE_SIZE)
    with torch.no_grad():
        features = model.model.get_image_features(**images, return_dict=True).pooler_output
    count = sum(part.numel() // part.shape[-1] for part in features) // 2
    ids = torch.cat([torch.full((2, count), model.config.image_token_id), text], dim=1)
    kinds = {"token_type_ids": torch.zeros_like(ids)} if model_type in ("gemma3", "paligemma") else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images, **kinds}


@pytest.mark.parametrize("model_type", [*PLAIN, "mllama"])
def test_the_language_model_says_the_same(model_type):
    model = build(model_type).train()
    if model_type == "mllama":  # a projector that reads what the tiny tower writes, and gates that are open
        model.model.multi_modal_projector = nn.Linear(192, model.config.text_config.hidden_size)
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                nn.init.constant_(parameter, 0.7)
    accessor = get_head_accessor(model)
    model.requires_grad_(False)
    inputs = inputs_of(model_type, model)
    expected = model(**inputs, use_cache=False).logits
    other = model(**{**inputs, "pixel_values": inputs["pixel_values"] * -2}, use_cache=False).logits
    assert not torch.equal(other, expected)  # the images matter

    def leave(*args):
        raise ForwardDone

    features = ImageFeatures(model, accessor.layers, 2**30)
    handle = accessor.layers[0].register_forward_hook(leave)
    with torch.no_grad(), features.first_pass(), suppress(ForwardDone), features.recorded():
        model(**inputs, use_cache=False)
    handle.remove()
    runs = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.register_forward_hook(lambda *args: runs.append(args))
    with features.reused(0):
        logits = model(**inputs, use_cache=False).logits
    assert torch.equal(logits, expected) and not runs
