"""What the right images are worth to a model: whose images a row gets instead, and the loss with both."""

from __future__ import annotations

import base64
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import build_vlm, image_dataset
from tiny_teachers import encoded
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer.data.rows import collatable
from hera_trainer.evaluation.image_gain import ImageGain, image_shape, measure_image_gain, other_rows, with_images_of
from hera_trainer.heads.pooling import placeholder_token_ids


class TestOtherRows:
    def test_every_image_moves_to_another_row(self):
        given = other_rows([1] * 50, range(50), seed=0)
        assert sorted(given) == list(range(50)) and all(row != other for row, other in enumerate(given))
        assert given == other_rows([1] * 50, range(50), seed=0) != other_rows([1] * 50, range(50), seed=1)

    def test_within_a_shape(self):
        shapes = ["one", "two", None, "one", "two", "three", None, "one"]
        given = other_rows(shapes, range(8), seed=3)
        assert [given[row] for row in (2, 5, 6)] == [None] * 3  # no image, and nobody else's that fit
        for row in (0, 1, 3, 4, 7):
            assert given[row] != row and shapes[given[row]] == shapes[row]

    def test_rows_of_one_image_get_one_other(self):
        images = ["a", "b", "a", "c", "b", "a"]
        given = other_rows([1] * 6, images, seed=0)
        shown = [images[other] for other in given]
        assert all(own != other for own, other in zip(images, shown, strict=True))
        assert len(set(zip(images, shown, strict=True))) == 3 == len(set(shown))
        assert other_rows([1] * 3, ["a"] * 3, seed=0) == [None] * 3


@pytest.fixture(scope="module")
def collator():
    return DataCollatorForVisionLanguageModeling(build_vlm("llava")[1])


def pixels(images):
    return [image.tobytes() for image in images]


class TestRows:
    @pytest.mark.parametrize("fmt", ["prompt_completion", "messages", "image"])
    def test_columns(self, collator, fmt):
        row, other = (collatable(row, collator) for row in image_dataset(2, fmt=fmt))
        assert image_shape(row) == image_shape(other) != image_shape({**row, "images": row["images"] * 2})
        lent = with_images_of(row, other)
        assert pixels(lent.pop("images")) == pixels(other["images"]) != pixels(row.pop("images"))
        assert lent == row  # the words are its own

    def test_inside_of_messages(self, collator):
        """One in the messages, one in the column, for which there is a placeholder."""

        def row(first, second, words):
            parts = [{"type": "image", "image": first}, {"type": "image"}, {"type": "text", "text": words}]
            messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": words}]
            return collatable({"messages": messages, "images": [second]}, collator)

        images = [row["images"][0] for row in image_dataset(4)]
        lent = with_images_of(row(*images[:2], "own"), row(*images[2:], "other's"))
        first, second, words = lent["messages"][0]["content"]
        assert pixels([first["image"], *lent["images"]]) == pixels(images[2:])
        assert (second, words) == ({"type": "image"}, {"type": "text", "text": "own"})

    def test_json_of_a_collator_of_ones_own(self):
        def row(image, words):
            uri = f"data:image/png;base64,{base64.b64encode(encoded(image)).decode()}"
            content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": words}]
            return {"messages": json.dumps([{"role": "user", "content": content}])}

        one, two = (row["images"][0] for row in image_dataset(2))
        expected = row(two, "own")
        assert with_images_of(row(one, "own"), row(two, "other's")) == expected
        assert image_shape(expected) == image_shape(row(one, ""))

    def test_without_images(self, collator):
        parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
        for row in ({"text": "words"}, {"messages": [{"role": "user", "content": parts}], "images": [None]}):
            assert image_shape(row) is None


def rows_with(counts: list[int]) -> list[dict[str, Any]]:
    """Rows with so many images each."""
    images = iter(row["images"][0] for row in image_dataset(sum(counts), seed=5))
    rows = image_dataset(len(counts))
    return [{**rows[i], "images": [next(images) for _ in range(count)]} for i, count in enumerate(counts)]


def plain_loss(model, batches):
    """Of single rows, weighted by hand."""
    losses, tokens = [], []
    with torch.no_grad():
        for batch in batches:
            losses.append(model(**batch).loss.double())
            tokens.append((batch["labels"][:, 1:] != -100).sum())
    tokens = torch.stack(tokens)
    return ((torch.stack(losses) * tokens).sum() / tokens.sum()).item(), int(tokens.sum())


def setup(family="llava", **kwargs):
    model, processor = build_vlm(family)
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    rows = rows_with([1, 2, 1, 1, 2, 3, 1, 1])
    shapes = [image_shape(collatable(row, collator)) for row in rows]
    others = dict(enumerate(other_rows(shapes, range(len(rows)), seed=0)))

    def read(index):
        return collatable(dict(rows[index]), collator)

    return model, collator, rows, others, read


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_as_a_plain_loop_over_rows(family, batch_size):
    model, collator, rows, others, read = setup(family)
    model.train()
    gain = measure_image_gain(model, read, collator, others, batch_size)
    assert model.training
    model.eval()
    kept = [row for row, other in others.items() if other is not None]
    assert (gain.rows, gain.left_out) == (7, 1) and kept == [0, 1, 2, 3, 4, 6, 7]  # nobody else has three images
    loss, tokens = plain_loss(model, [collator([read(row)]) for row in kept])
    permuted = [{**rows[row], "images": rows[others[row]]["images"]} for row in kept]
    permuted_loss, _ = plain_loss(model, [collator([collatable(row, collator)]) for row in permuted])
    assert gain.tokens == tokens
    assert (gain.loss, gain.permuted_loss) == pytest.approx((loss, permuted_loss), abs=1e-6)
    assert gain.gain == gain.permuted_loss - gain.loss and abs(gain.gain) > 1e-3


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_placeholders_do_not_count(family):
    """They carry labels in plain `messages` data: hundreds an image, beside tens of words."""
    model, processor = build_vlm(family)
    ids = placeholder_token_ids(model.config, processor)
    collator = DataCollatorForVisionLanguageModeling(processor)
    rows = image_dataset(n=8, fmt="messages")

    class Looks(torch.nn.Module):
        """Loses 1 a token of text with the right images and 3 with others, and nothing at placeholders."""

        def __init__(self):
            super().__init__()
            self.weight, self.calls, self.placeholders = torch.nn.Parameter(torch.zeros(1)), 0, 0

        def forward(self, input_ids, labels, **kwargs):
            self.calls += 1
            is_image = torch.isin(input_ids, torch.tensor(ids))
            labelled = labels[:, 1:] != -100
            self.placeholders += int((labelled & is_image[:, 1:]).sum())
            loss = torch.where(is_image, 0.0, 1.0 if self.calls % 2 else 3.0)[:, 1:]
            return SimpleNamespace(loss=loss[labelled].mean())

    def read(index):
        return collatable(dict(rows[index]), collator)

    others = {row: (row + 1) % 8 for row in range(8)}
    counted = measure_image_gain(Looks(), read, collator, others, 1)
    assert counted.gain < 1.9  # what labels alone say
    looks = Looks()
    gain = measure_image_gain(looks, read, collator, others, 1, placeholder_ids=ids)
    assert (gain.loss, gain.permuted_loss) == pytest.approx((1, 3)) and looks.placeholders == 0
    assert gain.tokens < counted.tokens


def test_model_that_does_not_look():
    model, collator, _, others, read = setup()
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.zeros_(parameter)
    gain = measure_image_gain(model, read, collator, others, 3)
    assert gain.gain == 0 and gain.loss > 0


def test_rows_without_a_label():
    """They add nothing, where the mean of their batch is NaN."""
    model, collator, _, others, read = setup()

    def without_labels(rows):
        batch = collator(rows)
        batch["labels"][:1] = -100
        return batch

    gain = measure_image_gain(model, read, without_labels, others, 3)
    alone = measure_image_gain(model, read, collator, {row: others[row] for row in (1, 2, 4, 6)}, 1)
    # Of seven rows in batches of three, the first of each batch has none.
    assert gain.loss == pytest.approx(alone.loss, abs=1e-6) and gain.tokens == alone.tokens


def test_on_disk(tmp_path):
    gain = ImageGain(2.0, 2.5, 100, 12, 3)
    path = tmp_path / "new" / "gain.json"
    gain.save(path)
    assert json.loads(path.read_text())["image_gain"] == 0.5 and ImageGain.load(path) == gain
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no image gain"):
        ImageGain.load(path)
