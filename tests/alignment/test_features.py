"""Image features are computed once a micro-batch, and nothing else changes: gradients are equal bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Image, List
from forms import chat, of_rows, photos, settle
from model_zoo import tiny_config
from peft import LoraConfig
from test_window import CHECKPOINTING, make_trainer
from tiny import FAMILIES, build_vlm, image_dataset
from tiny_teachers import noise_image
from torch import nn
from transformers import FastVlmForConditionalGeneration, LlamaConfig, LlamaForCausalLM, TrainerCallback

from hera_trainer import Alignment, AttentionHead, HeRALoss
from hera_trainer.data.collator import TEACHER_COLUMN

LANGUAGE_MODEL = r".*(language_model|text_model)\.layers\..*(q_proj|o_proj|up_proj)"


def lora(targets=LANGUAGE_MODEL, dropout=0.0, **kwargs):
    return LoraConfig(target_modules=targets, r=4, lora_dropout=dropout, init_lora_weights=False, **kwargs)


class Step(TrainerCallback):
    """One optimizer step: its gradients, how often the vision tower ran, and the buffers before and after it."""

    def __init__(self, trainer):
        trainer.add_callback(self)
        self.model = trainer.model
        self.towers = 0
        patches = next(m for m in self.model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
        handle = patches.register_forward_hook(self.count)
        trainer.train()
        handle.remove()
        self.buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def on_train_begin(self, args, state, control, **kwargs):
        self.towers = 0  # what prepares the run is not counted

    def count(self, *args):
        self.towers += 1

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def both(tmp_path, family="llava", cut=(2, 8), change=None, adapter=None, **kwargs):
    """A step that reuses image features, and one that computes them twice. Their gradients and buffers are equal."""
    steps = []
    for memory in (1.0, 0.0):
        model, processor = build_vlm(family)
        settle(processor)
        if change is not None:
            change(model)
        trainer = make_trainer(
            tmp_path,
            family,
            cut,
            lora() if adapter is None else adapter(),
            model=model,
            processor=processor,
            image_feature_gib=memory,
            **{"aligned_heads": ["L3H3", "L3H0"]} if family == "qwen3_5" else {},
            **kwargs,
        )
        steps.append(Step(trainer))
        assert trainer.alignment.features._kept == [[]] * cut[1] or not memory  # nothing is left of it
        assert not any("forward" in module.__dict__ for module in trainer.model.get_base_model().model.modules())
    assert_same(steps[0].gradients, steps[1].gradients)
    assert_same(steps[0].buffers, steps[1].buffers)
    return steps


@pytest.mark.parametrize("family", FAMILIES)
def test_tower_runs_once_a_micro_batch(tmp_path, family):
    once, twice = both(tmp_path, family)
    assert (once.towers, twice.towers) == (8, 16)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_under_checkpointing_and_dropout_of_the_language_model(tmp_path, family, checkpointing):
    once, twice = both(
        tmp_path, family, (4, 4), adapter=lambda: lora(dropout=0.1), checkpointing=CHECKPOINTING[checkpointing]
    )
    assert (once.towers, twice.towers) == (4, 8)


def mixed_rows():
    """None, one and several images and videos; the second micro-batch of four has none at all."""
    rows = []
    for i in range(16):
        clip = [noise_image(100 * i + frame, (32, 32)) for frame in range(4)]
        images, videos = ([], []) if 4 <= i < 8 else (photos(i, i % 3), [clip] * (i % 2))
        rows.append({"images": images, "videos": videos, "messages": chat(i)})
    vectors = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).tolist()
    data = of_rows(rows, videos=List(List(Image())))
    return data.add_column(TEACHER_COLUMN, vectors)


@pytest.mark.parametrize("streamed", [False, True])
def test_several_images_and_videos(tmp_path, streamed):
    data = mixed_rows()
    data = data.to_iterable_dataset() if streamed else data
    once, twice = both(tmp_path, "qwen2_5_vl", (4, 4), data=data)
    assert (once.towers, twice.towers) == (6, 12)  # once for images, once for videos, in three micro-batches


def test_trained_projector(tmp_path):
    """What it is given is computed once."""
    once, twice = both(tmp_path, adapter=lambda: lora(modules_to_save=["multi_modal_projector"]))
    assert (once.towers, twice.towers) == (8, 16)
    assert any("multi_modal_projector" in name for name in once.gradients)


def test_trained_tower(tmp_path):
    """It runs in both passes, and so does the frozen projector behind it, through which its gradient comes."""
    once, twice = both(tmp_path, adapter=lambda: lora(r".*vision_tower.*\.q_proj"))
    assert (once.towers, twice.towers) == (16, 16)
    assert all("vision_tower" in name and value.any() for name, value in once.gradients.items() if "lora_B" in name)


def test_dropout_in_the_tower(tmp_path):
    def change(model):
        for module in model.model.vision_tower.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.5

    once, twice = both(tmp_path, change=change)
    assert (once.towers, twice.towers) == (16, 16)


class Normed(nn.Module):
    """A projector with batch normalization."""

    def __init__(self, projector, width):
        super().__init__()
        self.projector, self.norm = projector, nn.BatchNorm1d(width)

    def forward(self, x):
        return self.projector(self.norm(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("trained", [False, True])
def test_buffers_move_once(tmp_path, trained):
    """As SFTTrainer has them move; whether the module is reused or runs in both passes."""

    def change(model):
        model.model.multi_modal_projector = Normed(model.model.multi_modal_projector, 32)

    def adapter():
        return lora(modules_to_save=["multi_modal_projector"] if trained else None)

    ours, _ = both(tmp_path / "ours", change=change, adapter=adapter)
    model, processor = build_vlm("llava")
    change(model)
    sft = Step(make_trainer(tmp_path, "llava", (2, 8), adapter(), model=model, processor=processor, alignment_weight=0))
    assert_same(ours.buffers, sft.buffers)
    assert max(value.item() for name, value in ours.buffers.items() if "num_batches" in name) == 8


def fast_vlm():
    """FastVLM with a tower that is full of batch normalization, and two micro-batches for it."""
    config = tiny_config("fast_vlm")
    config.vision_config.architecture = "fastvit_t8"
    config.vision_config.model_args = {"layers": (1, 1, 1, 1), "embed_dims": (8, 8, 8, 16)}
    torch.manual_seed(0)
    model = FastVlmForConditionalGeneration(config).train()
    model.requires_grad_(False).get_decoder().requires_grad_(True)
    image = torch.full((8, 4), config.image_token_id)
    text = torch.arange(8 * 6).reshape(8, 6) % 32 + 8
    whole = {
        "input_ids": torch.cat([image, text], dim=1),
        "labels": torch.cat([torch.full_like(image, -100), text], dim=1),
        "pixel_values": torch.randn(8, 3, 64, 64),
        TEACHER_COLUMN: torch.randn(8, 5),
    }
    return model, [{name: value[i : i + 4] for name, value in whole.items()} for i in (0, 4)]


def test_batch_normalization_of_a_tower_in_a_loop_of_ones_own():
    """It is as it was after the first pass, and after the step as without one."""
    model, batches = fast_vlm()
    plain, before = copy.deepcopy(model), {name: buffer.clone() for name, buffer in model.named_buffers()}
    alignment = Alignment(model, HeRALoss(num_neighbors=2), [AttentionHead(0, 1)])
    towers = []
    model.model.vision_tower.timm_model.stem.register_forward_hook(lambda *args: towers.append(args))

    def forward(batch):
        batch = dict(batch)
        alignment.observe(batch)
        return model(**batch).loss

    with alignment.attached():
        alignment.begin_step(2)
        alignment.first_pass(batches, forward)
        assert_same(dict(model.named_buffers()), before)
        for batch in batches:
            with alignment.same_randomness():
                alignment.add_to(forward(batch)).backward()
            alignment.end_micro_batch()
    for batch in batches:
        plain(**{name: value for name, value in batch.items() if name != TEACHER_COLUMN})
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))
    moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    assert len(moved) > 100 and len(towers) == 2


def test_positions_that_change_with_the_longest_text():
    """Dynamic RoPE puts other buffers in the place of its own: both passes meet the same ones."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=8, rope_parameters=rope, **sizes))
    alignment = Alignment(model, HeRALoss(num_neighbors=2), [AttentionHead(1, 1)])
    batches = []
    for length in (6, 10, 14):
        ids = torch.randint(8, 40, (4, length))
        batches.append({"input_ids": ids, "labels": ids.clone(), TEACHER_COLUMN: torch.randn(4, 5)})

    def forward(batch):
        batch = dict(batch)
        alignment.observe(batch)
        return model(**batch).loss

    rotary = model.model.rotary_emb
    before, length = rotary.inv_freq.clone(), rotary.max_seq_len_cached
    with alignment.attached():
        alignment.begin_step(3)
        alignment.first_pass(batches, forward)
        assert torch.equal(rotary.inv_freq, before) and rotary.max_seq_len_cached == length == 8
        plain = copy.deepcopy(model)
        for batch in batches:
            loss = forward(batch)
            alignment.end_micro_batch()
            torch.testing.assert_close(loss, plain(batch["input_ids"], labels=batch["labels"]).loss, rtol=0, atol=0)
    assert rotary.max_seq_len_cached == 14 and not torch.equal(rotary.inv_freq, before)


def test_what_is_kept(tmp_path):
    """Of LLaVA's tower the one hidden state that the model looks at, and what the projector makes of it."""
    trainer = make_trainer(tmp_path, "llava", (4, 4), lora())
    sizes = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            sizes.append((trainer.alignment.features.device_bytes, trainer.alignment.features.host_bytes))

    trainer.add_callback(Look())
    trainer.train()
    patches, width, floats = 9, 32, 4
    assert sizes == [(16 * (patches + 1 + patches) * width * floats, 0)]


def test_limit(tmp_path):
    """Room for one micro-batch on the device and four in main memory; the other three are computed again."""
    of_one = 2 * 19 * 32 * 4 / 2**30
    limited = make_trainer(tmp_path / "a", "llava", (2, 8), lora(), image_feature_gib=of_one)
    step = Step(limited)
    assert step.towers == 8 + 3
    assert_same(step.gradients, Step(make_trainer(tmp_path / "b", "llava", (2, 8), lora())).gradients)


@pytest.mark.parametrize("how", ["torch_compile=True", "tower.compile()"])
def test_compiled(tmp_path, how):
    torch.compiler.reset()
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"} if how == "torch_compile=True" else {}
    trainer = make_trainer(tmp_path, "llava", (8, 2), lora(), max_steps=1, **compiled)
    if not compiled:
        trainer.model.get_base_model().model.vision_tower.compile(backend="eager")
    trainer.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    eager = make_trainer(tmp_path, "llava", (8, 2), lora(), max_steps=1, image_feature_gib=0)
    eager.train()
    ours, theirs = trainer.state.log_history[0], eager.state.log_history[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    torch.compiler.reset()


def test_evaluation_after_a_step_that_broke_off_looks_at_its_own_images(tmp_path):
    """Interrupted between two micro-batches, whose features are kept for the second pass."""

    class Interrupted(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model, processor = build_vlm("llava")
    trainer = make_trainer(tmp_path, "llava", (2, 8), lora(), model=model, processor=processor)
    trainer.add_callback(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    held_out = image_dataset(n=4, seed=9, with_features=8)
    losses = [trainer.evaluate(held_out)["eval_loss"] for _ in range(2)]
    model, processor = build_vlm("llava")
    untouched = make_trainer(tmp_path, "llava", (2, 8), lora(), model=model, processor=processor)
    assert losses == [untouched.evaluate(held_out)["eval_loss"]] * 2
