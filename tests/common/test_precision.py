"""Products of float32 matrices are not rounded where neighbours and losses are computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from tiny import build_vlm, save_tiny_dinov2
from torch.utils._python_dispatch import TorchDispatchMode

from hera_trainer import AttentionHead, HeRALoss, VisionTeacher, get_head_accessor, mutual_knn
from hera_trainer.alignment.contrast import Contrast
from hera_trainer.common.precision import exact_products, rounds_products
from hera_trainer.heads.projection import contributions_add_up, project_heads
from hera_trainer.objectives.cka import CKALoss
from hera_trainer.objectives.uniformity import UniformityLoss

CUDA, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = CUDA.fp32_precision = MKLDNN.fp32_precision = "none"


class Products(TorchDispatchMode):
    """Keeps what the precision was in each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            self.seen.append((CUDA.fp32_precision, MKLDNN.fp32_precision))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", ["none", "ieee", "tf32"])
def test_what_was_set_is_set_again(setting: str) -> None:
    CUDA.fp32_precision = setting
    assert rounds_products() == (setting == "tf32")
    with exact_products(CPU):
        assert CUDA.fp32_precision != "tf32" and not rounds_products()
        with exact_products(CPU):  # nested
            pass
        assert not rounds_products()
    assert CUDA.fp32_precision == setting


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_by_the_older_setting(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    with exact_products(CPU):
        assert not rounds_products()
    assert torch.get_float32_matmul_precision() == precision and rounds_products()
    assert torch.backends.cuda.matmul.allow_tf32


def test_what_follows_its_parent_goes_on_to() -> None:
    """As transformers sets it for `tf32=True`."""
    torch.backends.fp32_precision = "tf32"
    assert rounds_products()
    with exact_products(CPU):
        assert not rounds_products()
    assert rounds_products()
    torch.backends.fp32_precision = "ieee"
    assert not rounds_products()


def test_it_is_restored_after_an_error() -> None:
    torch.backends.fp32_precision = "tf32"
    with pytest.raises(RuntimeError), exact_products(CPU):
        raise RuntimeError
    assert CUDA.fp32_precision == "tf32"


def neighbours() -> None:
    mutual_knn(torch.randn(20, 8), torch.randn(20, 6), k=3)


def many_neighbours() -> None:  # too many for one matrix of similarities
    mutual_knn(torch.randn(4200, 4), torch.randn(4200, 4), k=3)


def contrast() -> None:
    heads = torch.randn(2, 12, 8, requires_grad=True)
    Contrast(HeRALoss(num_neighbors=3))(heads, torch.randn(12, 6), torch.ones(12, dtype=torch.bool))


def uniformity() -> None:
    UniformityLoss()(torch.randn(2, 12, 8), torch.randn(12, 6))


def cka() -> None:
    CKALoss()(torch.randn(2, 12, 8), torch.randn(12, 6))


@pytest.mark.parametrize("compute", [neighbours, many_neighbours, contrast, uniformity, cka])
def test_no_product_is_rounded(compute: Any) -> None:
    torch.backends.fp32_precision = "tf32"
    with Products() as products:
        compute()
    assert products.seen and set(products.seen) == {("ieee", "ieee")}


class Convolutions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::convolution":
            self.seen.append(torch.backends.cudnn.conv.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", ["none", "tf32", "ieee"])
def test_a_teacher_rounds_nothing_by_whoever_asks(tmp_path: Path, setting: str) -> None:
    teacher = VisionTeacher.from_pretrained(save_tiny_dinov2(tmp_path / "teacher"))
    image = PIL.Image.new("RGB", (32, 32), "red")
    torch.backends.fp32_precision = setting
    before = torch.backends.cudnn.conv.fp32_precision
    with Products() as products, Convolutions() as convolutions:
        teacher.encode([image])
    assert products.seen and not any("tf32" in each for each in products.seen)
    assert convolutions.seen and "tf32" not in convolutions.seen
    assert torch.backends.cudnn.conv.fp32_precision == before


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 bits behind the leading one."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("rounded", [True, False])
def test_a_projection_that_is_rounded_adds_up(rounded: bool) -> None:
    """The model's products may be rounded where those of the check are not."""
    torch.manual_seed(0)
    projection = torch.nn.Linear(576, 576, bias=False)
    x = torch.randn(64, 576)
    out = to_tf32(x) @ to_tf32(projection.weight).T if rounded else projection(x)
    out = out.detach()
    assert contributions_add_up(projection, 9, x, out) is not rounded  # a fault, unless the process rounds
    torch.backends.fp32_precision = "tf32"
    assert contributions_add_up(projection, 9, x, out)
    assert not contributions_add_up(projection, 9, x, 1.1 * out)


def test_no_product_of_the_heads_is_rounded() -> None:
    model, _ = build_vlm("llava")
    accessor = get_head_accessor(model)
    projection, head = accessor.projection(0), AttentionHead(0, 1)
    torch.backends.fp32_precision = "tf32"
    pooled = torch.randn(3, accessor.num_heads(0), accessor.head_dim(0))
    with Products() as products:
        project_heads(projection, pooled[:, [head.head]], [head.head])
        out = projection.weight.new_zeros(2, projection.out_features)
        contributions_add_up(projection, accessor.num_heads(0), torch.zeros(2, projection.in_features), out)
    assert products.seen and set(products.seen) == {("ieee", "ieee")}
