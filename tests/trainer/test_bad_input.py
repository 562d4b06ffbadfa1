"""Bad input is refused before the first step, with a message that names the cure."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, concatenate_datasets
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from runs import NoStep
from tiny import build_vlm, image_dataset, save_tiny_dinov2, sft_args
from transformers import TrainerCallback

import hera_trainer.trainer as trainer_module
from hera_trainer import HeadRanking, HeRAConfig, HeRALoss, HeRATrainer, get_head_accessor, rank_heads
from hera_trainer.alignment.checks import check_loss_scaling
from hera_trainer.data.collator import TEACHER_COLUMN
from hera_trainer.heads.checks import check_attention_kernel
from hera_trainer.objectives.cka import CKALoss
from hera_trainer.objectives.feature import FeatureLoss
from hera_trainer.teacher.image_sources import column_images


def trainer(tmp_path, dataset=None, family="llava", model=None, data_collator=None, **kwargs):
    own = ("teacher", "head_ranking", "eval_dataset", "peft_config")
    own = {name: kwargs.pop(name) for name in own if name in kwargs}
    callbacks = kwargs.pop("callbacks", [NoStep()])
    built, processor = build_vlm(family)
    defaults = {
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 1,
        "num_neighbors": 3,
        "num_aligned_heads": 3,
        "max_steps": 2,
    }
    return HeRATrainer(
        built if model is None else model,
        HeRAConfig(**sft_args(tmp_path, **{**defaults, **kwargs})),
        data_collator,
        image_dataset(n=24, with_features=8) if dataset is None else dataset,
        processing_class=processor,
        callbacks=callbacks,
        **own,
    )


def with_features(values):
    dataset = image_dataset(n=len(values))
    return dataset.add_column(TEACHER_COLUMN, values)


def test_unknown_model_type(tmp_path):
    model, _ = build_vlm("llava")
    model.config.model_type = "cyclops"
    with pytest.raises(ValueError, match=r"(?s)model type 'cyclops'.*register_head_accessor"):
        trainer(tmp_path, model=model)


@pytest.mark.parametrize("head", ["L3H0", "L0H4"])
def test_head_that_does_not_exist(tmp_path, head):
    with pytest.raises(ValueError, match=f"{head} does not exist.*`aligned_heads`"):
        trainer(tmp_path, aligned_heads=["L0H0", head])


def test_head_named_twice(tmp_path):
    with pytest.raises(ValueError, match="`aligned_heads` names the same attention head twice"):
        trainer(tmp_path, aligned_heads=["L0H0", "L0H0"])


def test_more_heads_than_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"`num_aligned_heads` \(13\) exceeds the 12 attention heads"):
        trainer(tmp_path, num_aligned_heads=13)


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5}, "gradient_accumulation_steps=6"),
        ({"per_device_train_batch_size": 11}, "gradient_accumulation_steps=2"),
        (
            {"per_device_train_batch_size": 11, "contrast_scope": "micro_batch", "gradient_accumulation_steps": 4},
            "per_device_train_batch_size=12",
        ),
        ({"per_device_train_batch_size": 2, "queue_size": 5}, "gradient_accumulation_steps=4"),
    ],
)
def test_pool_too_small_names_the_smallest_setting_that_passes(tmp_path, settings, cure):
    with pytest.raises(ValueError, match=cure):
        trainer(tmp_path, num_neighbors=10, **settings)
    name, value = cure.split("=")
    trainer(tmp_path, num_neighbors=10, **{**settings, name: int(value)})
    with pytest.raises(ValueError, match=cure):
        trainer(tmp_path, num_neighbors=10, **{**settings, name: int(value) - 1})


def test_defaults_train_out_of_the_box(tmp_path):
    run = trainer(
        tmp_path,
        image_dataset(n=32, with_features=8),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=HeRAConfig.gradient_accumulation_steps,
        num_neighbors=HeRAConfig.num_neighbors,
        callbacks=[],
        max_steps=1,
    )
    run.train()
    assert run.state.log_history[0]["alignment_pool"] == 32


def test_batch_size_found_automatically_that_is_too_small(tmp_path):
    """`auto_find_batch_size` halves the batch after running out of memory: the pool must not shrink in silence."""

    class OutOfMemory(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise RuntimeError("CUDA out of memory.")

    run = trainer(tmp_path, callbacks=[OutOfMemory()], auto_find_batch_size=True)
    with pytest.raises(ValueError, match="Too few samples are compared for `num_neighbors`"):
        run.train()


@pytest.mark.parametrize("empty", ["images", "features"])
def test_no_row_has_an_image(tmp_path, empty):
    if empty == "features":
        dataset = with_features([None] * 12)
    else:
        rows = [{k: v for k, v in row.items() if k != "images"} for row in image_dataset(n=12)]
        dataset = Dataset.from_list(rows).add_column("images", [[]] * 12).cast_column("images", List(Image()))
    with pytest.raises(ValueError, match=r"(?s)No row .*has.*alignment_weight=0"):
        trainer(tmp_path, dataset, teacher=save_tiny_dinov2(tmp_path / "teacher")).train()


def test_text_only_data(tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset` has no column `image`.*alignment_weight=0"):
        trainer(tmp_path, image_dataset(n=12, fmt="text"))


def test_data_that_is_no_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"`train_dataset` is a list, but .*`datasets.Dataset` or a streamed"):
        trainer(tmp_path, list(image_dataset(n=12)))


def test_all_splits_at_once(tmp_path):
    splits = DatasetDict(train=image_dataset(n=12), test=image_dataset(n=12))
    with pytest.raises(ValueError, match=r"`train_dataset` is a DatasetDict of 'train', 'test'\. Pass one"):
        trainer(tmp_path, splits)


@pytest.mark.parametrize("hides", ["with_transform", "with_format", "set_transform"])
def test_transforms_that_hide_the_vectors(tmp_path, hides):
    rows = image_dataset(n=24, with_features=8)
    names = [name for name in rows.column_names if name != TEACHER_COLUMN]

    def chosen(batch):
        return {name: batch[name] for name in names}

    if hides == "with_format":
        rows = rows.with_format("python", columns=names)
    elif hides == "with_transform":
        rows = rows.with_transform(chosen)
    else:
        rows.set_transform(chosen)
    run = trainer(tmp_path, rows, aligned_heads=["L0H0"])
    with pytest.raises(ValueError, match="transform or format leaves out column `teacher_features`"):
        run.train()
    whole = image_dataset(n=24, with_features=8).with_transform(lambda batch: batch)
    trainer(tmp_path, whole, aligned_heads=["L0H0"]).prepare_alignment()
    held_out = trainer(tmp_path, whole, eval_dataset={"hidden": rows}, aligned_heads=["L0H0"])
    with pytest.raises(ValueError, match=r"Row 0 of `eval_dataset\['hidden'\]` comes without its teacher vector"):
        held_out.prepare_alignment()


def test_images_in_a_column_that_does_not_count(tmp_path):
    """Where data sets of both forms are put together, `datasets` fills the other column with nulls."""
    one = image_dataset(n=12)
    other = one.map(lambda row: {"image": row["images"][0]}, remove_columns="images", features=_with_image(one))
    both = concatenate_datasets([other, one])
    with pytest.raises(ValueError, match=r"Row 12 of `train_dataset` has its images in `images`, and null in `image`"):
        trainer(tmp_path, both)
    with pytest.raises(ValueError, match="A row has its images in `images`, and null in `image`"):
        column_images(both[12])
    assert column_images(both[0]) == [both[0]["image"]] and len(column_images(one[0])) == 1


def _with_image(rows):
    features = {name: feature for name, feature in rows.features.items() if name != "images"}
    return Features({**features, "image": Image()})


def test_rows_that_lack_a_vector_though_they_have_an_image(tmp_path, caplog):
    rows = concatenate_datasets([image_dataset(n=24, with_features=8), image_dataset(n=12, seed=1)])
    trainer(tmp_path, rows, aligned_heads=["L0H0"], gradient_accumulation_steps=2).prepare_alignment()
    assert "12 of 36 rows of `train_dataset` have an image, and null in column `teacher_features`" in caplog.text
    caplog.clear()
    trainer(tmp_path, aligned_heads=["L0H0"]).prepare_alignment()
    assert "null in column" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"optim": "lomo", "gradient_accumulation_steps": 2},
            r"`optim='lomo'` moves the weights after each micro-batch",
        ),
        (
            {"train_sampling_strategy": "batch_rebalance", "contrast_scope": "micro_batch"},
            "'batch_rebalance'` makes micro-batches of few long samples",
        ),
    ],
)
def test_settings_under_which_too_little_or_too_much_is_compared(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, **settings)


def test_a_step_outside_of_training(tmp_path):
    run = trainer(tmp_path, aligned_heads=["L0H0"])
    run.prepare_alignment()
    batch = run.data_collator([run.train_dataset[i] for i in range(6)])
    run.model.train()
    with pytest.raises(RuntimeError, match="Heads are read inside of `train` alone"):
        run.compute_loss(run.model, dict(batch))
    with torch.no_grad():  # nothing is trained
        assert run.compute_loss(run.model, dict(batch)) > 0


def test_a_loss_that_is_asked_for_twice(tmp_path):
    class Twice(HeRATrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            first = super().compute_loss(model, inputs, *args, **kwargs)
            return first + super().compute_loss(model, inputs, *args, **kwargs)

    model, processor = build_vlm("llava")
    args = HeRAConfig(**sft_args(tmp_path, aligned_heads=["L0H0"], max_steps=1, num_neighbors=2))
    run = Twice(model, args, train_dataset=image_dataset(n=8, with_features=8), processing_class=processor)
    with pytest.raises(ValueError, match="The loss of a micro-batch was asked for twice"):
        run.train()


def test_activated_lora_under_checkpointing(tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5])
    settings = {"peft_config": lora, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="aLoRA does not go through several micro-batches"):
        trainer(tmp_path, **settings)


def test_an_adapter_that_comes_after_the_trainer(tmp_path):
    run = trainer(tmp_path, aligned_heads=["L0H0"])
    get_peft_model(run.model, LoraConfig(target_modules=["o_proj"]))  # which puts it into the model itself
    with pytest.raises(ValueError, match="Layers of the model were replaced after the trainer was made"):
        run.prepare_alignment()


@pytest.mark.parametrize(
    ("name", "value"), [("alignment_weight", 0.0), ("num_neighbors", 2), ("aligned_heads", ["L1H1"])]
)
def test_settings_that_are_changed_too_late(tmp_path, name, value):
    run = trainer(tmp_path, aligned_heads=["L0H0"])
    setattr(run.args, name, value)
    with pytest.raises(ValueError, match=rf"`{name}` was changed after the trainer was made.*make a new trainer"):
        run.train()


def test_formatting_that_would_not_happen(tmp_path):
    model, processor = build_vlm("llava")
    with pytest.raises(ValueError, match=r"`formatting_func` is not applied.*`dataset.map`"):
        HeRATrainer(
            model,
            HeRAConfig(**sft_args(tmp_path, num_neighbors=3, per_device_train_batch_size=6)),
            train_dataset=image_dataset(n=24, with_features=8),
            processing_class=processor,
            formatting_func=lambda row: "a",
        )


def test_grouping_by_length(tmp_path):
    with pytest.raises(ValueError, match=r"'group_by_length'.*`train_sampling_strategy='random'`"):
        trainer(tmp_path, train_sampling_strategy="group_by_length")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_image_that_cannot_be_read_names_the_row(tmp_path, damage):
    source = image_dataset(n=12)
    rows = []
    for i, row in enumerate(source):
        path = tmp_path / f"{i}.png"
        row["images"][0].save(path)
        rows.append({**row, "images": [str(path)]})
    broken = tmp_path / "7.png"
    if damage == "missing":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:60])
    good_first = Dataset.from_list(rows).cast_column("images", List(Image()))
    with pytest.raises(ValueError, match=r"[Rr]ow 7"):
        trainer(tmp_path, good_first, teacher=save_tiny_dinov2(tmp_path / "teacher")).train()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_name_the_row(tmp_path, value):
    values = np.random.default_rng(0).normal(size=(12, 4)).tolist()
    values[5][2] = value
    with pytest.raises(ValueError, match="row 5"):
        trainer(tmp_path, with_features(values)).train()


def test_features_of_different_widths(tmp_path):
    values = np.random.default_rng(0).normal(size=(12, 4)).tolist()
    values[9] = values[9][:3]
    with pytest.raises(ValueError, match=r"(?s)widths.*row 9"):
        trainer(tmp_path, with_features(values)).train()


def test_train_and_eval_widths_differ(tmp_path):
    run = trainer(tmp_path, eval_dataset=image_dataset(n=12, with_features=5))
    with pytest.raises(ValueError, match="`eval_dataset` have 5 dimensions, those of `train_dataset` 8"):
        run.train()


def test_teacher_that_cannot_be_loaded(tmp_path):
    run = trainer(tmp_path, image_dataset(n=12), teacher_model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"(?s)nowhere.*teacher_model_name_or_path"):
        run.train()


@pytest.mark.parametrize("setting", ["packing", "padding_free"])
def test_packing(tmp_path, setting):
    with pytest.raises(ValueError, match=f"`{setting}=False`"):
        trainer(tmp_path, **{setting: True})


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
        {"target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
    ],
)
def test_head_below_all_that_is_trained(tmp_path, lora):
    """Adapters in later layers, or in the MLP behind the head, cannot move it."""
    run = trainer(tmp_path, aligned_heads=["L1H1"], peft_config=LoraConfig(exclude_modules=".*vision.*", **lora))
    with pytest.raises(ValueError, match="No trainable parameter influences attention head L1H1"):
        run.train()


def test_head_at_the_height_of_what_is_trained(tmp_path):
    lora = LoraConfig(
        target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers", exclude_modules=".*vision.*"
    )
    run = trainer(tmp_path, aligned_heads=["L1H1"], peft_config=lora, callbacks=[])
    run.train()
    assert run.state.global_step == 2


def test_forward_that_bypasses_the_projection(tmp_path):
    model, _ = build_vlm("llava")
    projection = model.get_decoder().layers[1].self_attn.o_proj

    class Fused(torch.nn.Module):
        """An attention whose output projection is never called as a module."""

        def __init__(self, attention):
            super().__init__()
            self.attention, self.o_proj, self.config = attention, projection, attention.config
            self.head_dim = attention.head_dim
            attention.o_proj = lambda x: torch.nn.functional.linear(x, projection.weight)

        def forward(self, *args, **kwargs):
            return self.attention(*args, **kwargs)

    attention = model.get_decoder().layers[1].self_attn
    del attention._modules["o_proj"]
    model.get_decoder().layers[1].self_attn = Fused(attention)
    with pytest.raises(ValueError, match="does not call the output projection of layer 1"):
        trainer(tmp_path, model=model, aligned_heads=["L1H0"]).train()


def test_forward_that_is_patched_after_the_check(tmp_path):
    """What escapes the start-up check stops the first step."""

    class Patch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            attention = model.get_decoder().layers[1].self_attn
            projection = attention._modules.pop("o_proj")
            attention.__dict__["o_proj"] = lambda x: torch.nn.functional.linear(x, projection.weight)

    run = trainer(tmp_path, aligned_heads=["L1H0"], callbacks=[Patch()])
    with pytest.raises(RuntimeError, match="did not go through the attention output projection of layer 1"):
        run.train()
    assert run.state.global_step == 0


def test_projection_that_does_not_add_up(tmp_path):
    model, _ = build_vlm("llava")
    projection = model.get_decoder().layers[1].self_attn.o_proj
    forward = projection.forward
    projection.forward = lambda x: forward(x) + x.square().mean(-1, keepdim=True)
    with pytest.raises(ValueError, match=r"layer 1.*do not add up"):
        trainer(tmp_path, model=model, aligned_heads=["L1H0"]).train()


def test_prompt_tuning(tmp_path):
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="prompt"):
        trainer(tmp_path, peft_config=peft_config, callbacks=[]).train()


def test_ranking_of_another_model(tmp_path):
    ranking = HeadRanking(torch.rand(5, 4), torch.rand(5), k=3, num_samples=20, model="other")
    with pytest.raises(ValueError, match="computed for 'other' with 5 layers"):
        trainer(tmp_path, head_ranking=ranking).train()


def test_ranking_that_cannot_be_read(tmp_path):
    (tmp_path / "ranking.json").write_text("{")
    with pytest.raises(ValueError, match="`head_ranking_path`"):
        trainer(tmp_path, head_ranking_path=str(tmp_path / "ranking.json"))


def test_collator_that_loses_samples(tmp_path):
    def collator(rows):
        return {"input_ids": torch.zeros(1, 4).long(), "labels": torch.zeros(1, 4).long()}

    with pytest.raises(ValueError, match="cannot ride through this `data_collator`"):
        trainer(tmp_path, data_collator=collator).train()


def test_too_few_distinct_images_to_rank(tmp_path):
    values = [[1.0, 2.0]] * 12
    with pytest.raises(ValueError, match="1 samples with distinct images"):
        trainer(tmp_path, with_features(values)).train()


def test_model_split_over_devices(tmp_path):
    model, _ = build_vlm("llava")
    model.hf_device_map = {"model.language_model": 0, "lm_head": 1}
    model.is_parallelizable, model.model_parallel = True, True
    with pytest.raises(ValueError, match=r"split over several devices .* set `alignment_weight=0`"):
        trainer(tmp_path, model=model)
    trainer(tmp_path, model=model, alignment_weight=0.0)
    held_out = image_dataset(n=24, with_features=8)
    with pytest.raises(ValueError, match=r"AlignmentMonitorCallback.* does not support yet.* leave the monitor out"):
        trainer(tmp_path, model=model, alignment_weight=0.0, monitor_steps=1, eval_dataset=held_out)
    with pytest.raises(ValueError, match="which a ranking of heads does not support"):
        rank_heads(model, build_vlm("llava")[1], held_out)


def test_flash_attention_of_a_model_that_is_read_on_the_cpu():
    model, _ = build_vlm("llava")
    check_attention_kernel(model, torch.device("cuda"))
    get_head_accessor(model).decoder.config._attn_implementation = "flash_attention_2"
    check_attention_kernel(model, torch.device("cpu"))
    with pytest.raises(ValueError, match="`attn_implementation='flash_attention_2'` has no kernel for it"):
        check_attention_kernel(model, torch.device("cuda"))


def test_fp16_under_deepspeed_needs_an_objective_without_trained_parameters() -> None:
    deepspeed = SimpleNamespace(mixed_precision="fp16", state=SimpleNamespace(deepspeed_plugin=object()))
    args = SimpleNamespace(alignment_objective="contrastive")
    learned, fixed = HeRALoss(), HeRALoss(learn_temperature=False)
    with pytest.raises(ValueError, match=r"\(log_temperature\).* set `learn_temperature=False`"):
        check_loss_scaling(learned, args, deepspeed)
    check_loss_scaling(fixed, args, deepspeed)
    bf16 = SimpleNamespace(mixed_precision="bf16", state=deepspeed.state)
    elsewhere = SimpleNamespace(mixed_precision="fp16", state=SimpleNamespace(deepspeed_plugin=None))
    for accelerator in (bf16, elsewhere):
        check_loss_scaling(learned, args, accelerator)
    args.alignment_objective, projectors = "feature", FeatureLoss()
    projectors.prepare(2, 8, 6, 0)
    with pytest.raises(ValueError, match=r"The feature objective cannot train its own parameters .*Use bf16\.$"):
        check_loss_scaling(projectors, args, deepspeed)
    check_loss_scaling(CKALoss(), args, deepspeed)


def test_projectors_are_refused_before_the_first_step(tmp_path, monkeypatch) -> None:
    """They are made when the heads are known."""
    run = trainer(tmp_path, alignment_objective="feature", aligned_heads=["L0H1"], callbacks=[NoStep()])
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    engine = SimpleNamespace(mixed_precision="fp16", state=state)
    check = trainer_module.check_loss_scaling
    monkeypatch.setattr(trainer_module, "check_loss_scaling", lambda objective, args, _: check(objective, args, engine))
    with pytest.raises(ValueError, match="feature objective cannot train"):
        run.train()
