"""Two stages, both aligned: a projector between frozen parts, then the language model too; and who reaches a head."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from reference import Recorder, assert_gradients_equal, step_gradients
from safetensors.torch import load_file
from tiny import build_vlm, image_dataset, save_vlm, sft_args
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import AutoModelForImageTextToText, MllamaConfig, MllamaForConditionalGeneration, TrainerCallback
from trl import ModelConfig, TrlParser
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import AttentionHead, HeadRanking, HeRAConfig, HeRATrainer, get_head_accessor
from hera_trainer.data.collator import TEACHER_COLUMN
from hera_trainer.heads.checks import check_trainable

WEIGHT = 5.0
PROJECTORS = {"llava": "multi_modal_projector", "qwen2_5_vl": "visual.merger", "idefics3": "connector"}
TOWERS = {"llava": "vision_tower", "qwen2_5_vl": "visual.", "idefics3": "vision_model"}
TEXT = r".*language_model\."


def only(model: nn.Module, *parts: str) -> nn.Module:
    """Trains the parameters with one of these parts in their names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return model


def stage_2(model: nn.Module, family: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(PROJECTORS[family] in name or TOWERS[family] not in name)
    return model


def make_trainer(
    tmp_path: Path, model: nn.Module, processor: Any, data: Dataset | None = None, **kwargs: Any
) -> HeRATrainer:
    data = image_dataset(n=24, with_features=8) if data is None else data
    callbacks = kwargs.pop("callbacks", None)
    defaults = {"num_aligned_heads": 3, "num_neighbors": 3, "alignment_weight": WEIGHT, "learning_rate": 1e-2}
    defaults |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    args = HeRAConfig(**sft_args(tmp_path, **{**defaults, "max_steps": 1, **kwargs}))
    trainer = HeRATrainer(model, args, train_dataset=data, processing_class=processor, callbacks=callbacks)
    trainer._get_train_sampler = lambda *args: SequentialSampler(data)
    return trainer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


class TestStages:
    @pytest.mark.parametrize("checkpointing", [None, False, True])
    @pytest.mark.parametrize("family", PROJECTORS)
    def test_projector_alone(self, tmp_path: Path, family: str, checkpointing: bool | None) -> None:
        """The step's gradient is exact, the alignment has its part in it, and nothing but the projector moves."""
        model, processor = build_vlm(family)
        before = weights(only(model, PROJECTORS[family]))
        settings: dict[str, Any] = {"gradient_checkpointing": checkpointing is not None}
        settings["gradient_checkpointing_kwargs"] = None if checkpointing is None else {"use_reentrant": checkpointing}
        trainer = make_trainer(tmp_path, model, processor, **settings)
        recorder = Recorder(trainer)
        trainer.train()
        expected = step_gradients(recorder, WEIGHT, "step", recorder.seeds)
        assert_gradients_equal(recorder.gradients, expected, tolerance=5e-4)
        projector = {name for name in before if PROJECTORS[family] in name}
        assert set(recorder.gradients) - {"log_temperature"} == projector == moved(trainer.model, before)
        plain = step_gradients(recorder, 0.0, "step", recorder.seeds)
        for name in projector:
            assert (expected[name] - plain[name]).abs().max() > 0.01 * plain[name].abs().max(), name

    def test_an_image_behind_the_text_gives_the_projector_no_gradient(self) -> None:
        """Attention is causal: what is pooled before the image does not know it."""
        model, processor = build_vlm("llava")
        only(model, "multi_modal_projector")
        batch = DataCollatorForVisionLanguageModeling(processor)(list(image_dataset(n=2)))
        image = batch["input_ids"] == model.config.image_token_id
        outputs: list[Tensor] = []
        projection = get_head_accessor(model).projection(1)
        with torch.enable_grad():
            handle = projection.register_forward_hook(lambda module, args, out: outputs.append(args[0]))
            model(**batch)
            handle.remove()
        first = image.long().argmax(1)
        for positions, reaches in ((slice(0, int(first.min())), False), (slice(int(first.max()), None), True)):
            loss = outputs[0][:, positions].square().sum()
            (gradient,) = torch.autograd.grad(
                loss, [model.model.multi_modal_projector.linear_1.weight], retain_graph=True
            )
            assert bool(gradient.any()) == reaches

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
    def test_resuming(self, tmp_path: Path, family: str) -> None:
        def run(folder: str, callbacks: list | None = None) -> HeRATrainer:
            model, processor = build_vlm(family)
            model = only(model, PROJECTORS[family])
            kwargs = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "callbacks": callbacks}
            return make_trainer(tmp_path / folder, model, processor, image_dataset(n=32, with_features=8), **kwargs)

        class StopAtTwo(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = state.global_step == 2

        whole = run("whole")
        before = weights(whole.model)
        whole.train()
        run("half", [StopAtTwo()]).train()
        resumed = run("half")
        resumed.train(resume_from_checkpoint=True)
        assert resumed.aligned_heads == whole.aligned_heads
        assert not moved(resumed.model, weights(whole.model))
        assert moved(resumed.model, before) == {name for name in before if PROJECTORS[family] in name}

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
    def test_the_second_stage_goes_on_from_the_first(
        self, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Loaded from the folder of stage 1, with its heads: a step is exact, and all but the tower moves."""
        model, processor = build_vlm(family)
        first = make_trainer(tmp_path / "stage1", only(model, PROJECTORS[family]), processor)
        first.train()
        first.save_model()
        monkeypatch.setattr("hera_trainer.heads.ranking_cache.rank_samples", None)  # a call would fail
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "stage1")
        assert not moved(loaded, weights(first.model))
        before = weights(stage_2(loaded, family))
        second = make_trainer(
            tmp_path / "stage2",
            loaded,
            processor,
            image_dataset(n=24, seed=7, with_features=8),
            head_ranking_path=str(tmp_path / "stage1" / "head_ranking.json"),
        )
        recorder = Recorder(second)
        assert second.aligned_heads == first.aligned_heads
        second.train()
        expected = step_gradients(recorder, WEIGHT, "step", recorder.seeds)
        assert_gradients_equal(recorder.gradients, expected, tolerance=5e-4)
        trained = {name for name, p in second.model.named_parameters() if p.requires_grad}
        assert {"lm_head.weight"} < trained and any(PROJECTORS[family] in name for name in trained)
        assert moved(second.model, before) == set(recorder.gradients) - {"log_temperature"} == trained
        saved = HeadRanking.load(tmp_path / "stage2" / "head_ranking.json")
        assert torch.equal(saved.scores, first.head_ranking.scores)

    def test_rows_without_an_image_come_first(self, tmp_path: Path) -> None:
        """The check looks at a row with an image; rows without one give a projector no gradient."""
        data = image_dataset(n=24, with_features=8)
        features = [None if i < 4 else vector for i, vector in enumerate(data[TEACHER_COLUMN])]
        images = [[] if i < 4 else images for i, images in enumerate(data["images"])]
        rows = Dataset.from_list(
            [{**row, "images": image} for row, image in zip(data.remove_columns("images"), images, strict=True)],
            features=data.features,
        )
        rows = rows.remove_columns(TEACHER_COLUMN).add_column(
            TEACHER_COLUMN, features, feature=data.features[TEACHER_COLUMN]
        )
        model, processor = build_vlm("llava")
        trainer = make_trainer(tmp_path, only(model, "multi_modal_projector"), processor, rows)
        inputs = trainer.teacher_vectors.image_batch() if trainer.prepare_alignment() is None else None
        assert "pixel_values" in inputs and "labels" not in inputs and TEACHER_COLUMN not in inputs


def image_batch(processor: Any) -> dict[str, Any]:
    batch = dict(DataCollatorForVisionLanguageModeling(processor)(list(image_dataset(n=1))))
    return {name: value for name, value in batch.items() if name != "labels"}


def with_lora(**kwargs: Any) -> Any:
    return lambda model: get_peft_model(model, LoraConfig(r=2, **kwargs))


def inactive(model: nn.Module) -> nn.Module:
    """An adapter over all layers that is trained but not active, beside one on the LM head."""
    model = get_peft_model(model, LoraConfig(r=2, target_modules=TEXT + ".*q_proj"), adapter_name="spare")
    model.add_adapter("vision", LoraConfig(r=2, target_modules=["lm_head"]))
    model.set_adapter("vision")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def merged(model: nn.Module) -> nn.Module:
    model = with_lora(target_modules=TEXT + ".*q_proj")(model)
    model.merge_adapter()
    return model


def with_inputs_that_require_grad(model: nn.Module) -> nn.Module:
    """As for reentrant checkpointing: the embeddings' output requires a gradient, though no parameter below does."""
    model = with_lora(target_modules=["lm_head"])(model)
    model.enable_input_require_grads()
    return model


INFLUENCE = {
    "projector": lambda model: only(model, "multi_modal_projector"),
    "vision tower": lambda model: only(model, "vision_tower.encoder.layers.0"),
    "projector copied": with_lora(target_modules=["lm_head"], modules_to_save=["multi_modal_projector"]),
    "embeddings": lambda model: only(model, "embed_tokens"),
    "norms": lambda model: only(model, "layernorm"),
    "biases": lambda model: only(model, "v_proj.bias"),
    "o_proj copied": with_lora(target_modules=["lm_head"], modules_to_save=["o_proj"]),
    "LoRA above, and the projector": with_lora(
        target_modules=TEXT + r"layers\.2\..*q_proj", modules_to_save=["multi_modal_projector"]
    ),
}
NO_INFLUENCE = {
    "a layer of the tower whose features are not used": lambda model: only(model, "vision_tower.encoder.layers.1"),
    "LM head": lambda model: only(model, "lm_head"),
    "LM head copied": with_lora(target_modules=TEXT + r"layers\.2\..*q_proj", modules_to_save=["lm_head"]),
    "later layers": lambda model: only(model, "language_model.layers.2", "language_model.norm"),
    "inactive adapter": inactive,
    "merged adapter": merged,
    "inputs that require a gradient": with_inputs_that_require_grad,
}


class TestTrainable:
    @pytest.mark.parametrize("name", INFLUENCE)
    def test_influence(self, name: str) -> None:
        model, processor = build_vlm("llava", attention_bias=True)
        model = INFLUENCE[name](model)
        flags = [module.training for module in model.modules()]
        check_trainable(model, get_head_accessor(model), [AttentionHead(1, 2)], lambda: image_batch(processor))
        assert flags == [module.training for module in model.modules()]
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("name", NO_INFLUENCE)
    def test_no_influence(self, name: str) -> None:
        model, processor = build_vlm("llava")
        model = NO_INFLUENCE[name](model)
        with pytest.raises(ValueError, match=r"No trainable parameter influences attention head L1H2.*such as"):
            check_trainable(model, get_head_accessor(model), [AttentionHead(1, 2)], lambda: image_batch(processor))

    @pytest.mark.parametrize("part", ["lm_head", "vision_tower.encoder.layers.1"])
    def test_the_trainer_refuses_before_the_first_step(self, tmp_path: Path, part: str) -> None:
        model, processor = build_vlm("llava")
        with pytest.raises(ValueError, match="No trainable parameter influences attention head"):
            make_trainer(tmp_path, only(model, part), processor).train()

    def test_images_that_enter_at_later_layers_too(self) -> None:
        """Qwen3-VL adds features of earlier tower layers after its first layers: the head of layer 0 comes before."""
        model, processor = build_vlm("qwen3_vl")
        only(model, "deepstack_merger_list")
        accessor = get_head_accessor(model)
        check_trainable(model, accessor, [AttentionHead(1, 0)], lambda: image_batch(processor))
        with pytest.raises(ValueError, match="influences attention head L0H0"):
            check_trainable(model, accessor, [AttentionHead(0, 0)], lambda: image_batch(processor))
        check_trainable(only(model, "visual.merger"), accessor, [AttentionHead(0, 0)], lambda: image_batch(processor))

    def test_images_that_enter_by_cross_attention_only(self) -> None:
        text = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
        text |= {"num_key_value_heads": 2, "intermediate_size": 48, "cross_attention_layers": [2], "pad_token_id": 0}
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2}
        vision |= {"intermediate_size": 48, "vision_output_dim": 64, "image_size": 16, "patch_size": 8}
        vision |= {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]}
        model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text, image_token_id=60))
        accessor = get_head_accessor(only(model, "multi_modal_projector"))
        batch = {
            "input_ids": torch.tensor([[60, 1, 2, 3]]),
            "attention_mask": torch.ones(1, 4, dtype=torch.long),
            "pixel_values": torch.randn(1, 1, 1, 3, 16, 16),
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(1, 4, 1, 1, dtype=torch.long),
        }
        check_trainable(model, accessor, [AttentionHead(3, 0)], lambda: dict(batch))
        with pytest.raises(ValueError, match="influences attention head L1H0"):
            check_trainable(model, accessor, [AttentionHead(3, 0), AttentionHead(1, 0)], lambda: dict(batch))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """examples/two_stage.py as a module."""
    path = Path(__file__).parents[2] / "examples" / "two_stage.py"
    spec = importlib.util.spec_from_file_location("two_stage", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "two_stage", module)  # data classes look for their module
    spec.loader.exec_module(module)
    return module


def run_example(example: Any, folder: Path, **others: Any) -> None:
    """From the command line's arguments to the saved models."""
    settings = {
        **{"model_name_or_path": folder / "model", "output_dir": folder / "out", "max_steps": 2},
        **{"caption_dataset": folder / "captions", "instruction_dataset": folder / "instructions"},
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_neighbors": 3},
        **{"stage1_gradient_accumulation_steps": 3, "use_cpu": True, "bf16": False, "save_strategy": "no"},
        **{"logging_steps": 1, "disable_tqdm": True, "report_to": "none", "num_aligned_heads": 3},
        **others,
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    parser = TrlParser((example.TwoStageArguments, HeRAConfig, ModelConfig))
    example.main(*parser.parse_args_and_config(arguments))


def save_inputs(folder: Path) -> None:
    save_vlm("llava", folder / "model")
    image_dataset(n=24, with_features=8).save_to_disk(folder / "captions")
    image_dataset(n=24, with_features=8, seed=5).save_to_disk(folder / "instructions")


def test_example(tmp_path: Path, example: Any) -> None:
    save_inputs(tmp_path)
    run_example(example, tmp_path)

    def saved(folder: str) -> dict[str, Tensor]:
        return load_file(tmp_path / folder / "model.safetensors")

    start, first, second = saved("model"), saved("out/stage1"), saved("out/stage2")
    one = {name for name in start if not torch.equal(first[name], start[name])}
    two = {name for name in start if not torch.equal(second[name], first[name])}
    assert one == {name for name in start if "multi_modal_projector" in name}
    assert two == {name for name in start if "vision_tower" not in name}
    rankings = [HeadRanking.load(tmp_path / "out" / stage / "head_ranking.json") for stage in ("stage1", "stage2")]
    assert torch.equal(rankings[0].scores, rankings[1].scores)


def test_example_adapter(tmp_path: Path, example: Any) -> None:
    """Stage 2 with LoRA trains and keeps the projector, too."""
    save_inputs(tmp_path)
    run_example(example, tmp_path, max_steps=1, use_peft=True, lora_target_modules="all-linear")
    adapter = load_file(tmp_path / "out" / "stage2" / "adapter_model.safetensors")
    first = load_file(tmp_path / "out" / "stage1" / "model.safetensors")

    def projector(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = {name: weight for name, weight in weights.items() if "lora_" not in name}
        return {n.split("multi_modal_projector.")[1]: w for n, w in whole.items() if "multi_modal_projector" in n}

    before, after = projector(first), projector(adapter)
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    assert len(adapter) > len(after) == sum("lora_" not in name for name in adapter)
    with pytest.raises(ValueError, match="no quantized weights"):
        run_example(example, tmp_path, use_peft=True, load_in_4bit=True)


def test_example_resumed(tmp_path: Path, example: Any) -> None:
    """From a checkpoint of either stage, the rest of the run is that of one without interruption."""
    save_inputs(tmp_path)
    run_example(example, tmp_path, save_strategy="steps", save_steps=1)
    stages = [tmp_path / "out" / stage / "model.safetensors" for stage in ("stage1", "stage2")]
    whole = [load_file(path) for path in stages]
    # Stage 2 has begun anew by then, and has put the checkpoints of its first time aside.
    for stage, checkpoint in ((1, "checkpoint-1"), (2, "earlier-run/checkpoint-1")):
        stages[1].unlink()
        before = stages[0].stat().st_mtime_ns
        run_example(example, tmp_path, resume_from_checkpoint=tmp_path / "out" / f"stage{stage}" / checkpoint)
        assert (stages[0].stat().st_mtime_ns == before) == (stage == 2)
        for path, expected in zip(stages, whole, strict=True):
            found = load_file(path)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` .* must be the folder of a checkpoint in .*stage1"):
        run_example(example, tmp_path, resume_from_checkpoint=tmp_path / "out" / "checkpoint-1")
