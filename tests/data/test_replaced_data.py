"""Data sets and collators that are set after the trainer was made, and what is refused before the teacher is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset, List, Value
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType
from runs import assert_same_parameters, config, logged, parameters, trainer
from tiny import build_vlm, image_dataset, save_tiny_dinov2, sft_args
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import AttentionHead, HeadRanking, HeRAConfig, HeRATrainer, add_teacher_features
from hera_trainer.data.collator import TEACHER_COLUMN, TeacherCollator

HEADS = ["L0H1", "L2H3"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny_dinov2(tmp_path_factory.mktemp("teacher"))


def make(tmp_path, teacher, **kwargs):
    defaults = {"max_steps": 2, "aligned_heads": HEADS, "dataset": image_dataset(n=24, seed=1)}
    return trainer(tmp_path, teacher=teacher, **{**defaults, **kwargs})


class TestReplacedTrainingData:
    def test_rows_of_what_was_prepared_keep_their_teacher(self, tmp_path, teacher):
        run = make(tmp_path, teacher, queue_size=4)
        run.prepare_alignment()
        name, identity = run.teacher_name, run.teacher_vectors.identity
        run.train_dataset = run.train_dataset.select(range(20))
        run.train()
        assert run.teacher_name == name != "" and run.teacher_vectors.identity == identity
        assert json.loads((tmp_path / "hera_run.json").read_text())["teacher"] == Path(name).name

    def test_rows_of_a_control_run_are_not_permuted_twice(self, tmp_path, teacher):
        run = make(tmp_path, teacher, teacher_control="permuted")
        run.prepare_alignment()
        rows = run.train_dataset
        run.train_dataset = rows.select(range(20))
        with pytest.raises(ValueError, match=r"was applied to them\. Choose rows before"):
            run.train()
        run.train_dataset = rows.select(range(20)).remove_columns(TEACHER_COLUMN)
        run.train()
        right = add_teacher_features(image_dataset(n=24, seed=1).select(range(20)), teacher)[TEACHER_COLUMN]
        assert run.teacher_vectors.right_rows[TEACHER_COLUMN][:] == right[:]

    def test_nor_are_those_that_brought_their_vectors(self, tmp_path, teacher):
        run = make(tmp_path, teacher, teacher_control="permuted", dataset=image_dataset(n=24, seed=1, with_features=8))
        run.prepare_alignment()
        run.train_dataset = run.train_dataset.select(range(20))
        with pytest.raises(ValueError, match=r"was applied to them\. Choose rows before"):
            run.train()

    @pytest.mark.parametrize("control", ["none", "permuted"])
    def test_other_rows_may_bring_vectors_of_their_own(self, tmp_path, teacher, control):
        run = make(tmp_path, teacher, teacher_control=control)
        run.prepare_alignment()
        assert run.teacher_name
        new = image_dataset(n=24, seed=2, with_features=run.teacher_vectors.width)
        run.train_dataset = new
        run.train()
        assert run.teacher_name == "" and run.teacher_vectors.right_rows[TEACHER_COLUMN][:] == new[TEACHER_COLUMN][:]

    @pytest.mark.parametrize("when", ["at once", "after preparing", "after evaluating", "after training"])
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_new_rows_are_trained_on_as_if_given_at_first(self, tmp_path, teacher, when, accumulation):
        kwargs = {"gradient_accumulation_steps": accumulation, "eval_dataset": image_dataset(n=6, seed=3)}
        new = image_dataset(n=24, seed=2)
        expected = make(tmp_path / "a", teacher, dataset=new, **kwargs)
        run = make(tmp_path / "b", teacher, **kwargs)
        begin = {name: value.clone() for name, value in run.model.state_dict().items()}
        if when == "after preparing":
            run.prepare_alignment()
        elif when == "after evaluating":
            run.evaluate()
        elif when == "after training":
            run.train()
            run.model.load_state_dict(begin)
            run.optimizer = run.lr_scheduler = None
        run.train_dataset = new
        torch.manual_seed(0)
        run.train()
        torch.manual_seed(0)
        expected.train()
        assert logged(run, "alignment_pool") == [6.0 * accumulation] * 2
        assert logged(run, "lm_loss")[0] == logged(expected, "lm_loss")[0]
        if when != "after training":  # the temperature has moved by then
            assert logged(run, "lm_loss") == logged(expected, "lm_loss")
            assert logged(run, "alignment_loss") == logged(expected, "alignment_loss")
            assert_same_parameters(parameters(run.model), parameters(expected.model))

    def test_rows_of_another_teacher_are_refused(self, tmp_path, teacher):
        run = make(tmp_path, teacher)
        run.prepare_alignment()
        run.train_dataset = image_dataset(n=24, seed=2, with_features=5)
        with pytest.raises(ValueError, match="have 5 dimensions, those of `train_dataset` 16"):
            run.train()

    def test_rows_without_images_are_refused(self, tmp_path, teacher):
        run = make(tmp_path, teacher)
        run.prepare_alignment()
        run.train_dataset = image_dataset(n=24, fmt="text")
        with pytest.raises(ValueError, match="there is nothing to align with"):
            run.train()

    def test_a_data_loader_without_vectors_is_an_error(self, tmp_path, teacher):
        class OwnLoader(HeRATrainer):
            def get_train_dataloader(self):
                rows = image_dataset(n=24, seed=2)
                return DataLoader(rows, batch_size=6, collate_fn=self.data_collator.inner)

        for accumulation in (1, 2):
            run = make(
                tmp_path / f"{accumulation}", teacher, trainer_class=OwnLoader, gradient_accumulation_steps=accumulation
            )
            with pytest.raises(ValueError, match="training batch has no teacher vectors"):
                run.train()

    def test_vectors_of_new_rows_draw_no_random_numbers(self, tmp_path, teacher):
        run = make(tmp_path, teacher)
        run.prepare_alignment()
        run.train_dataset = image_dataset(n=24, seed=4)
        before = torch.get_rng_state()
        run.get_train_dataloader()
        assert torch.equal(before, torch.get_rng_state())
        assert TEACHER_COLUMN in run.train_dataset.column_names


class TestReplacedCollator:
    @pytest.mark.parametrize("prepared", [False, True])
    def test_vectors_ride_through_a_new_collator(self, tmp_path, teacher, prepared):
        run = make(tmp_path, teacher)
        if prepared:
            run.prepare_alignment()
        inner = DataCollatorForVisionLanguageModeling(run.processing_class, completion_only_loss=True)
        seen = []

        def collator(rows):
            seen.append(set(rows[0]))
            return inner(rows)

        run.data_collator = collator
        run.train()
        assert logged(run, "alignment_pool") == [6.0, 6.0]
        assert seen and all(TEACHER_COLUMN not in names for names in seen)
        assert isinstance(run.data_collator, TeacherCollator) and run.data_collator.inner is collator

    def test_an_unfit_collator_is_refused_before_the_first_step(self, tmp_path, teacher):
        run = make(tmp_path, teacher)
        run.prepare_alignment()
        run.data_collator = lambda rows: {"pixel_values": torch.zeros(len(rows), 3)}
        with pytest.raises(ValueError, match="cannot ride through this `data_collator`"):
            run.train()
        assert run.state.global_step == 0


class TestReplacedEvaluationData:
    def test_new_rows_have_vectors(self, tmp_path, teacher):
        new = image_dataset(n=6, seed=7)
        expected = make(tmp_path / "a", teacher, eval_dataset=new).evaluate()
        run = make(tmp_path / "b", teacher, eval_dataset=image_dataset(n=6, seed=3))
        before = run.evaluate()
        run.eval_dataset = new
        after = run.evaluate()
        assert after["eval_alignment_loss"] == expected["eval_alignment_loss"] != before["eval_alignment_loss"]

    def test_a_set_that_joins_a_dictionary(self, tmp_path, teacher):
        new = image_dataset(n=6, seed=7)
        run = make(tmp_path, teacher, eval_dataset={"a": image_dataset(n=6, seed=3)})
        run.evaluate()
        run.eval_dataset["b"] = new
        metrics = run.evaluate()
        assert metrics["eval_b_alignment_loss"] == pytest.approx(run.evaluate(new)["eval_alignment_loss"])
        assert metrics["eval_b_alignment_left_out"] == 0


def test_a_checkpoint_goes_on_with_its_heads_also_after_an_evaluation(tmp_path):
    kwargs = {"save_strategy": "steps", "save_steps": 1, "eval_dataset": image_dataset(n=8, seed=5, with_features=8)}
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    ranking = HeadRanking(scores, torch.rand(3), k=3, num_samples=20)
    first = trainer(tmp_path, head_ranking=ranking, max_steps=1, **kwargs)
    first.train()
    second = trainer(tmp_path, max_steps=2, **kwargs)
    second.evaluate()
    assert second.aligned_heads != first.aligned_heads  # so far, heads of its own ranking
    second.train(resume_from_checkpoint=True)
    assert second.aligned_heads == first.aligned_heads == second.alignment.heads
    assert torch.equal(second.head_ranking.scores, scores)
    assert HeadRanking.load(tmp_path / "head_ranking.json").scores.equal(scores)


@dataclass
class OwnConfig(SFTConfig):
    own_setting: str = "mine"


@dataclass
class OwnArguments(TrainingArguments):
    own_setting: str = "mine"


@pytest.mark.parametrize("config_class", [OwnConfig, OwnArguments])
def test_arguments_with_fields_of_the_users_own(tmp_path, config_class):
    class Reads(HeRATrainer):
        def compute_loss(self, *args, **kwargs):
            assert self.args.own_setting == "yours"
            return super().compute_loss(*args, **kwargs)

    values = sft_args(tmp_path, per_device_train_batch_size=12, max_steps=1)
    if config_class is OwnArguments:
        values.pop("max_length")
    model, processor = build_vlm("llava")
    run = Reads(
        model,
        config_class(**values, own_setting="yours", hub_token="hf_secret"),
        train_dataset=image_dataset(n=24, with_features=8),
        processing_class=processor,
    )
    assert isinstance(run.args, HeRAConfig) and run.args.hub_token == "hf_secret"
    run.train()
    assert logged(run, "alignment_pool") == [12.0]
    assert "own_setting" not in (tmp_path / "hera_run.json").read_text()


class TestRefusedBeforeTheTeacherIsLoaded:
    """The teacher's name leads nowhere: what is refused later would fail there."""

    def make(self, tmp_path, **kwargs):
        return trainer(tmp_path, dataset=image_dataset(n=24), teacher_model_name_or_path="no/such-teacher", **kwargs)

    @pytest.mark.parametrize("adapter", [PromptTuningConfig, PrefixTuningConfig])
    def test_prompt_learning(self, tmp_path, adapter):
        with pytest.raises(ValueError, match="puts virtual tokens before the text") as error:
            self.make(tmp_path, peft_config=adapter(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
        assert "acking" not in str(error.value)

    def test_data_parallel(self, tmp_path, monkeypatch):
        monkeypatch.setattr(HeRAConfig, "n_gpu", 2)
        with pytest.raises(ValueError, match="accelerate launch"):
            self.make(tmp_path)

    def test_divided_sequences(self, tmp_path):
        from types import SimpleNamespace

        from hera_trainer.alignment.checks import check_tokens_stay

        model, _ = build_vlm("llava")
        for cp, sp in ((True, False), (False, True)):
            parallelism = SimpleNamespace(cp_enabled=cp, sp_enabled=sp)
            with pytest.raises(ValueError, match="cannot be pooled"):
                check_tokens_stay(model, SimpleNamespace(parallelism_config=parallelism))
        check_tokens_stay(
            model, SimpleNamespace(parallelism_config=SimpleNamespace(cp_enabled=False, sp_enabled=False))
        )


def test_other_adapters_pass(tmp_path):
    run = trainer(tmp_path, peft_config=LoraConfig(target_modules="all-linear"), aligned_heads=HEADS, max_steps=1)
    run.train()
    assert run.aligned_heads == [AttentionHead(0, 1), AttentionHead(2, 3)]
    assert isinstance(run.train_dataset, Dataset) and config(tmp_path).n_gpu <= 1


class TestEvaluatingOnTexts:
    """A split without any image has a language-model loss, and its alignment loss is not measured."""

    def texts(self):
        rows = image_dataset(n=6, seed=3)
        return rows.map(lambda row: {"images": []}, features=rows.features)

    def test_beside_one_with_images(self, tmp_path, teacher, caplog):
        splits = {"texts": self.texts(), "images": image_dataset(n=12, seed=4)}
        run = make(tmp_path, teacher, eval_dataset=splits, eval_strategy="steps", eval_steps=1)
        run.train()
        found = [entry for entry in run.state.log_history if "eval_texts_loss" in entry]
        assert len(found) == 2 and all(entry["eval_texts_loss"] > 0 for entry in found)
        assert "eval_texts_alignment_loss" not in found[0] and found[0]["eval_texts_alignment_left_out"] == 0
        assert len([entry for entry in run.state.log_history if "eval_images_alignment_loss" in entry]) == 2
        (said,) = [record.message for record in caplog.records if "is not measured" in record.message]
        assert "No row of `eval_dataset['texts']` has an image" in said

    def test_of_data_whose_vectors_are_known(self, tmp_path, teacher):
        """A part of it that has none."""
        rows = self.texts().add_column(TEACHER_COLUMN, [None] * 6)
        run = make(tmp_path, teacher, eval_dataset=rows.cast_column(TEACHER_COLUMN, List(Value("float32"))))
        assert run.evaluate()["eval_alignment_left_out"] == 0

    def test_that_are_named_after_training(self, tmp_path, teacher):
        run = make(tmp_path, teacher)
        run.train()
        alone = HeRATrainer(
            run.model,
            config(tmp_path / "alone", alignment_weight=0.0),
            train_dataset=image_dataset(n=8, seed=1),
            processing_class=run.processing_class,
        )
        loss = alone.evaluate(self.texts())["eval_loss"]
        assert run.evaluate(self.texts())["eval_loss"] == pytest.approx(loss)
        assert run.predict(self.texts()).metrics["test_loss"] == pytest.approx(loss)

    def test_choose_no_best_model(self, tmp_path, teacher):
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_texts_alignment_loss"}
        steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        run = make(tmp_path, teacher, eval_dataset={"texts": self.texts()}, **best, **steps)
        with pytest.raises(ValueError, match="but there are 0"):
            run.train()


def test_a_path_as_the_teacher(tmp_path, teacher):
    run = make(tmp_path, Path(teacher), queue_size=4)
    named = make(tmp_path / "named", teacher, queue_size=4)
    run.prepare_alignment()
    named.prepare_alignment()
    assert run.teacher_name == named.teacher_name
    assert run.teacher_vectors.identity == named.teacher_vectors.identity
