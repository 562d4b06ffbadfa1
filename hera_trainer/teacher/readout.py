"""Which vector of a vision encoder's output is the teacher's vector."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel


class TeacherReadout:
    """Decides which vector of a vision encoder's output is the teacher's vector. The first rule that fits counts.

    1. An encoder with a class token (DINOv2 and DINOv3 ViTs, with registers or without, ViT, DeiT, ViT-MAE, ViT-MSN,
       CLIP vision) is read there: `last_hidden_state[:, 0]` of the last layer. The class token comes first, before
       registers and patches, and no pooling head, which a checkpoint may not even have trained, stands between it and
       us. Of several class tokens (Pixio) it is their mean. Left out are encoders that read the average of their
       patches instead and normalise nothing but that (BEiT and data2vec-vision with `use_mean_pooling`).
    2. Any other encoder (SigLIP, SigLIP2, DINOv3 ConvNeXt, ResNet, Swin, ...) is read at its pooled output,
       `pooler_output`.
    3. One that has no pooled output either (I-JEPA) is read at the mean of its patch tokens in the last layer.

    A timm model is read at what timm itself pools, `pooler_output`: the class token, the average of the patches or an
    attention pool, as the architecture's `global_pool` has it. Where timm would average normalised patches past a class
    token (its DINOv3), the class token is read, as rule 1 has it.

    Whether there is a class token is seen from the parameters, not from a list of model types.

    Args:
        model (`PreTrainedModel`): The vision encoder.
    """

    CLASS_TOKENS = ("embeddings.cls_token", "embeddings.class_embedding")

    def __init__(self, model: PreTrainedModel):
        self.model_type = model.config.model_type
        if self.model_type == "timm_wrapper":
            self.num_class_tokens = int(_timm_averages_past_class_token(model.timm_model))
            self.uses_class_token = self.num_class_tokens > 0
        else:
            self.num_class_tokens = _count_class_tokens(model, self.CLASS_TOKENS)
            averages = getattr(model.config, "use_mean_pooling", False)
            self.uses_class_token = self.num_class_tokens > 0 and not averages
        # A NaFlex encoder pads the patches of small images: a plain mean would count the padding.
        self._pads = "pixel_attention_mask" in inspect.signature(model.forward).parameters

    def __call__(self, outputs: Any) -> torch.Tensor:
        """Returns the vectors `[B, d_teacher]` of a batch, in the encoder's dtype."""
        tokens, pooled = outputs.last_hidden_state, outputs.get("pooler_output")
        if self.uses_class_token:
            return tokens[:, : self.num_class_tokens].mean(1)
        if pooled is not None and pooled.shape[2:].numel() == 1:
            return pooled.flatten(1)  # convolutional encoders pool to [B, d, 1, 1]
        if pooled is None and isinstance(tokens, torch.Tensor) and tokens.ndim == 3 and not self._pads:
            return tokens[:, self.num_class_tokens :].mean(1)
        raise ValueError(
            f"A vision teacher of type {self.model_type!r} has neither a class token, nor a pooled output, nor one "
            "sequence of patches: there is no one vector an image. Set `teacher_model_name_or_path` to an encoder that "
            "has one, such as DINOv2."
        )


def _count_class_tokens(model: PreTrainedModel, names: tuple[str, ...]) -> int:
    for name, parameter in model.named_parameters():
        if name.endswith(names):
            return parameter.shape[1] if parameter.ndim == 3 else 1  # [1, n, d] or [d]
    return 0


def _timm_averages_past_class_token(model: torch.nn.Module) -> bool:
    own = {name for name, _ in model.named_parameters(recurse=False)}
    if "cls_token" not in own or getattr(model, "global_pool", None) != "avg":
        return False
    # Elsewhere (BEiT, EVA) the last norm sits behind the average, and the class token never goes through one.
    return not isinstance(getattr(model, "norm", None), torch.nn.Identity | None)
