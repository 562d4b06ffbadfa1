"""The page on writing an accessor, executed as it stands on a model of the kind that it describes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hera_trainer.heads import registry
from hera_trainer.heads.head import AttentionHead

PAGE = Path(__file__).parents[2] / "docs" / "own_accessor.md"
HEADS, SIZE, WIDTH = 3, 5, 8  # 15 features of heads in a stream of 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * SIZE)
        self.merge = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)  # each [B, heads, T, size]
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.merge(out.transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, convolves: bool) -> None:
        super().__init__()
        if convolves:
            self.convolution = Convolution()
        else:
            self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.attention(x) if hasattr(self, "attention") else self.convolution(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(20, WIDTH)
        self.stack = nn.ModuleList(Block(convolves=i % 3 == 2) for i in range(4))

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Tensor:
        x = self.embeddings(input_ids)
        for block in self.stack:
            x = block(x)
        return x


class StackedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="stacked_vlm", name_or_path="")
        self.language_model = Decoder()


def blocks_of_code() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("error")
def test_the_page_works_as_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    torch.manual_seed(0)
    model = StackedModel()
    scope: dict[str, Any] = {"model": model}
    common, own, checking = blocks_of_code()

    exec(common, scope)
    assert registry._FACTORIES["my_vlm"] is registry._FACTORIES["llava"]
    exec(own, scope)
    exec(checking, scope)
    assert capsys.readouterr().out.split()[-3:] == ["4", str(3 * HEADS), str(SIZE)]
    assert scope["accessor"].heads() == [AttentionHead(layer, head) for layer in (0, 1, 3) for head in range(HEADS)]

    # The check that the page recommends does see a model that does something else.
    attention = model.language_model.stack[1].attention
    monkeypatch.setattr(attention.merge, "forward", lambda x: 2 * nn.Linear.forward(attention.merge, x))
    with pytest.raises(ValueError, match="In layer 1 of this 'stacked_vlm' model, the contributions of the 3"):
        exec(checking, scope)
