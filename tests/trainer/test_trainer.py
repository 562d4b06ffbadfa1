"""The trainer as a whole: equal to SFTTrainer without alignment, deterministic, leaving nothing behind."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from reference import alignment_loss, base_model, head_vectors
from runs import HookWatch, assert_same_parameters, config, hooks_of, logged, our_hooks_of, parameters, trainer
from tiny import build_vlm, image_dataset, save_tiny_dinov2, save_vlm, sft_args
from transformers import AutoModelForImageTextToText, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hera_trainer import AttentionHead, HeadRanking, HeRAConfig, HeRATrainer, VisionTeacher, add_teacher_features
from hera_trainer.data.collator import TEACHER_COLUMN
from hera_trainer.runs.record import read_run


class TestWithoutAlignment:
    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
    def test_is_sft_trainer_bit_for_bit(self, tmp_path, family):
        runs = {}
        for name, trainer_class, config_class, extra in (
            ("sft", SFTTrainer, SFTConfig, {}),
            ("hera", HeRATrainer, HeRAConfig, {"alignment_weight": 0.0}),
        ):
            model, processor = build_vlm(family)
            args = sft_args(
                tmp_path / name,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_steps=4,
                learning_rate=1e-3,
                eval_strategy="steps",
                eval_steps=2,
                **extra,
            )
            run = runs[name] = trainer_class(
                model=model,
                args=config_class(**args),
                train_dataset=image_dataset(n=24),
                eval_dataset=image_dataset(n=6, seed=1),
                processing_class=processor,
                peft_config=LoraConfig(target_modules="all-linear", lora_dropout=0.1),
                callbacks=[watch := HookWatch()],
            )
            run.train()
            assert watch.counts == [0, 0, 0, 0]
        assert hooks_of(runs["sft"].model) == hooks_of(runs["hera"].model)
        assert_same_parameters(parameters(runs["sft"].model), parameters(runs["hera"].model))
        for name in ("loss", "eval_loss", "grad_norm", "train_loss"):
            assert logged(runs["sft"], name) == logged(runs["hera"], name) != []
        assert runs["hera"].aligned_heads is None
        assert not logged(runs["hera"], "alignment_loss")

    def test_takes_what_sft_trainer_takes(self, tmp_path):
        """Text only, packed, a batch of one and no teacher to be found."""
        model, processor = build_vlm("llava")
        args = HeRAConfig(
            **sft_args(
                tmp_path,
                alignment_weight=0.0,
                packing=True,
                packing_strategy="wrapped",
                max_steps=1,
                per_device_train_batch_size=1,
                teacher_model_name_or_path="no/such-teacher",
            )
            | {"max_length": 32}
        )
        run = HeRATrainer(
            model, args, train_dataset=image_dataset(n=24, fmt="text"), processing_class=processor.tokenizer
        )
        run.train()
        assert run.state.global_step == 1


class TestTraining:
    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
    @pytest.mark.parametrize(("scope", "pool"), [("micro_batch", 6), ("step", 12)])
    def test_logs_what_the_step_was(self, tmp_path, scope, pool, family):
        run = trainer(
            tmp_path,
            family,
            max_steps=2,
            gradient_accumulation_steps=2,
            contrast_scope=scope,
            alignment_weight=1.0,
        )
        run.train()
        for entry in run.state.log_history[:2]:
            assert entry["loss"] == pytest.approx(entry["lm_loss"] + entry["alignment_loss"], rel=1e-5)
            assert entry["alignment_pool"] == pool
            assert entry["alignment_skipped"] == entry["alignment_left_out"] == 0
            assert entry["temperature"] == pytest.approx(0.3, abs=1e-3)

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
    def test_lm_loss_is_what_sft_trainer_logs(self, tmp_path, family):
        kwargs = {"max_steps": 1, "gradient_accumulation_steps": 3}
        aligned = trainer(tmp_path / "a", family, **kwargs)
        plain = trainer(tmp_path / "b", family, alignment_weight=0.0, **kwargs)
        aligned.train()
        plain.train()
        assert logged(aligned, "lm_loss")[0] == pytest.approx(logged(plain, "loss")[0], rel=1e-6)

    def test_no_hook_remains(self, tmp_path):
        watch = HookWatch()
        run = trainer(tmp_path, max_steps=1, aligned_heads=["L0H1", "L0H2", "L2H2"], callbacks=[watch])
        run.train()
        assert watch.counts == [2]  # one a layer
        assert not our_hooks_of(run.model)

    def test_no_hook_remains_after_an_error(self, tmp_path):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                raise RuntimeError("stopped")

        run = trainer(tmp_path, max_steps=3, callbacks=[Stop()])
        with pytest.raises(RuntimeError, match="stopped"):
            run.train()
        assert not our_hooks_of(run.model)

    def test_other_forwards_are_not_touched(self, tmp_path):
        """A forward in the middle of training computes what the bare model computes, and reads nothing."""
        seen = []

        class Look(TrainerCallback):
            def on_substep_end(self, args, state, control, model=None, **kwargs):
                ids = torch.arange(12).view(2, 6)
                before = torch.get_rng_state()
                with torch.no_grad():
                    seen.append(base_model(model).get_decoder()(input_ids=ids).last_hidden_state)
                assert torch.equal(before, torch.get_rng_state())
                assert run.alignment.capture._record is None

        run = trainer(tmp_path, max_steps=1, gradient_accumulation_steps=2, callbacks=[Look()])
        run.train()
        assert len(seen) == 1

    def test_small_and_empty_rows_are_left_out_and_counted(self, tmp_path):
        """Rows without an image or without a loss token take no part; a micro-batch with too few skips the term."""
        rows = image_dataset(n=12, with_features=8).to_list()
        source = image_dataset(n=12)
        for i in (0, 1, 2):
            rows[i][TEACHER_COLUMN] = None
        for row, original in zip(rows, source, strict=True):
            row["images"] = original["images"]
        dataset = Dataset.from_list(rows)
        run = trainer(tmp_path, dataset=dataset, max_steps=2, per_device_train_batch_size=6, num_neighbors=3)
        run._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(dataset)
        run.train()
        first, second = run.state.log_history[:2]
        assert first["alignment_skipped"] == 1 and first["alignment_pool"] == 0 and first["alignment_left_out"] == 3
        assert "alignment_loss" not in first and first["loss"] == pytest.approx(first["lm_loss"], rel=1e-6)
        assert second["alignment_skipped"] == 0 and second["alignment_pool"] == 6 and second["alignment_left_out"] == 0

    def test_sft_config_is_completed(self, tmp_path):
        model, processor = build_vlm("llava")
        args = SFTConfig(**sft_args(tmp_path, per_device_train_batch_size=12, max_steps=1, eos_token="</s>"))
        run = HeRATrainer(model, args, train_dataset=image_dataset(n=24, with_features=8), processing_class=processor)
        assert isinstance(run.args, HeRAConfig) and run.args.per_device_train_batch_size == 12
        assert run.args.alignment_weight == 0.01 and run.args.gradient_accumulation_steps == 1
        assert run.args.eos_token == "</s>"

    def test_custom_collator_is_wrapped(self, tmp_path):
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        model, processor = build_vlm("llava")
        inner = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        keys = []

        def collator(rows):
            keys.append(set(rows[0]))
            return inner(rows)

        run = HeRATrainer(
            model,
            config(tmp_path, max_steps=1),
            collator,
            image_dataset(n=24, with_features=8),
            processing_class=processor,
        )
        run.train()
        assert all(TEACHER_COLUMN not in names for names in keys)
        assert logged(run, "alignment_pool") == [6.0]


class TestHeads:
    def test_ranking_is_computed_saved_and_used(self, tmp_path):
        run = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
        assert run.aligned_heads is None
        run.train()
        saved = HeadRanking.load(tmp_path / "head_ranking.json")
        assert run.aligned_heads == saved.select("worst", 3) == run.head_ranking.select("worst", 3)
        assert (tmp_path / "checkpoint-1" / "head_ranking.json").is_file()
        run.save_model(str(tmp_path / "final"))
        assert (tmp_path / "final" / "head_ranking.json").is_file()

    def test_ranking_is_cached(self, tmp_path, monkeypatch):
        first = trainer(tmp_path / "a")
        first.prepare_alignment()
        monkeypatch.setattr("hera_trainer.heads.ranking_cache.rank_samples", None)  # a call would fail
        second = trainer(tmp_path / "b")
        second.prepare_alignment()
        assert second.aligned_heads == first.aligned_heads
        assert torch.equal(second.head_ranking.scores, first.head_ranking.scores)

    def test_cache_tells_models_apart(self, tmp_path):
        first, second = trainer(tmp_path / "a"), trainer(tmp_path / "b")
        with torch.no_grad():
            second.model.get_decoder().layers[1].self_attn.v_proj.weight.add_(0.1)
        first.prepare_alignment()
        second.prepare_alignment()
        assert not torch.equal(second.head_ranking.scores, first.head_ranking.scores)

    def test_adapters_are_off_while_ranking(self, tmp_path):
        lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        adapted, bare = trainer(tmp_path / "a", peft_config=lora, seed=3), trainer(tmp_path / "b", seed=3)
        adapted.prepare_alignment()
        bare.prepare_alignment()
        assert torch.equal(adapted.head_ranking.scores, bare.head_ranking.scores)

    def test_explicit_heads_need_no_ranking(self, tmp_path, monkeypatch):
        monkeypatch.setattr("hera_trainer.heads.ranking_cache.rank_samples", None)
        run = trainer(tmp_path, aligned_heads=["L1H2", "L0H3"], max_steps=1)
        run.train()
        assert run.aligned_heads == [AttentionHead(1, 2), AttentionHead(0, 3)]
        assert run.head_ranking is None

    def test_ready_ranking(self, tmp_path, monkeypatch):
        monkeypatch.setattr("hera_trainer.heads.ranking_cache.rank_samples", None)
        scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
        ranking = HeadRanking(scores, torch.rand(3), k=3, num_samples=20)
        ranking.save(tmp_path / "ready.json")
        by_object = trainer(tmp_path, head_ranking=ranking)
        by_path = trainer(tmp_path, head_ranking_path=str(tmp_path / "ready.json"))
        by_object.prepare_alignment()
        by_path.prepare_alignment()
        flat = scores.flatten().argsort()[:3].tolist()
        assert by_object.aligned_heads == by_path.aligned_heads == [AttentionHead(i // 4, i % 4) for i in flat]

    def test_the_ranking_of_an_earlier_run_does_not_stay(self, tmp_path):
        """In the same folder, with heads that were named: the record would have them chosen from those scores."""
        for number in (1, 2):
            trainer(tmp_path, max_steps=1).train()
            assert read_run(tmp_path).head_ranking is not None
            content = (tmp_path / "head_ranking.json").read_bytes()
            trainer(tmp_path, max_steps=1, aligned_heads=["L1H2"]).train()
            assert read_run(tmp_path).head_ranking is None
            assert (tmp_path / f"head_ranking.{number}.json").read_bytes() == content  # nothing computed is lost

    def test_preparing_draws_no_random_numbers(self, tmp_path):
        run = trainer(tmp_path, seed=7)
        before = torch.get_rng_state()
        run.prepare_alignment()
        assert torch.equal(before, torch.get_rng_state())


class TestEvaluation:
    def test_eval_loss_is_the_lm_loss(self, tmp_path):
        evaluation = image_dataset(n=14, seed=5, with_features=8)
        aligned = trainer(tmp_path / "a", eval_dataset=evaluation)
        plain = trainer(tmp_path / "b", eval_dataset=evaluation, alignment_weight=0.0)
        assert aligned.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]

    def test_alignment_loss_over_consecutive_pools(self, tmp_path):
        evaluation = image_dataset(n=15, seed=5, with_features=8)
        run = trainer(tmp_path, eval_dataset=evaluation, per_device_eval_batch_size=4, aligned_heads=["L2H3", "L0H1"])
        metrics = run.evaluate()
        batch = run.data_collator([evaluation[i] for i in range(15)])
        with torch.no_grad():
            _, z = head_vectors(run.model, batch, [(2, 3), (0, 1)], num_heads=4)
            tau = torch.tensor(math.log(0.3))
            pools = [alignment_loss(z[:, i : i + 6], batch[TEACHER_COLUMN][i : i + 6], 3, tau) for i in (0, 6)]
        assert metrics["eval_alignment_loss"] == pytest.approx(sum(pools).item() / 2, rel=1e-4)
        assert metrics["eval_alignment_left_out"] == 3 and metrics["eval_alignment_repeated"] == 0
        assert not our_hooks_of(run.model)

    def test_images_that_several_rows_of_a_pool_show_are_counted(self, tmp_path):
        """As with several questions on an image, one after the other: each is the others' neighbour."""
        evaluation = image_dataset(n=8, seed=5, with_features=8).select([0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 7])
        metrics = trainer(tmp_path, eval_dataset=evaluation, per_device_eval_batch_size=4).evaluate()
        assert metrics["eval_alignment_repeated"] == (3 + 1) / 2

    def test_a_step_that_is_too_small_without_its_queue(self, tmp_path):
        """Four samples a step and twelve past ones train; evaluation, which has no queue, takes pools of five."""
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "queue_size": 12}
        run = trainer(tmp_path, eval_dataset=image_dataset(n=15, seed=5, with_features=8), **settings)
        metrics = run.evaluate()
        assert metrics["eval_alignment_loss"] > 0 and metrics["eval_alignment_left_out"] == 0

    def test_small_evaluation_set_is_no_error(self, tmp_path):
        run = trainer(tmp_path, eval_dataset=image_dataset(n=2, seed=5, with_features=8))
        metrics = run.evaluate()
        assert "eval_alignment_loss" not in metrics and metrics["eval_alignment_left_out"] == 2

    def test_data_passed_to_evaluate_and_several_sets(self, tmp_path):
        teacher = save_tiny_dinov2(tmp_path / "teacher")
        sets = {"a": image_dataset(n=8, seed=5), "b": image_dataset(n=8, seed=6)}
        run = trainer(tmp_path, dataset=image_dataset(n=24), teacher=teacher, eval_dataset=sets)
        metrics = run.evaluate()
        assert {"eval_a_alignment_loss", "eval_b_alignment_loss"} <= metrics.keys()
        direct = run.evaluate(image_dataset(n=8, seed=5))
        assert direct["eval_alignment_loss"] == pytest.approx(metrics["eval_a_alignment_loss"], rel=1e-6)


class TestTeacher:
    def test_teacher_is_loaded_once_and_freed(self, tmp_path, monkeypatch):
        teacher = save_tiny_dinov2(tmp_path / "teacher")
        loads = []
        original = VisionTeacher.from_pretrained.__func__

        def counting(cls, *args, **kwargs):
            loads.append(args)
            return original(cls, *args, **kwargs)

        monkeypatch.setattr(VisionTeacher, "from_pretrained", classmethod(counting))
        dataset = image_dataset(n=24, seed=9)
        first = trainer(tmp_path / "a", dataset=dataset, teacher_model_name_or_path=teacher, max_steps=1)
        first.train()
        assert len(loads) == 1
        second = trainer(tmp_path / "b", dataset=dataset, teacher_model_name_or_path=teacher, max_steps=1)
        second.train()
        assert len(loads) == 1
        assert logged(first, "loss") == logged(second, "loss")

    def test_model_and_teacher_by_path(self, tmp_path):
        """As a user calls it: names only."""
        run = HeRATrainer(
            model=save_vlm("qwen2_5_vl", tmp_path / "model"),
            args=config(tmp_path / "out", max_steps=1, teacher_model_name_or_path=save_tiny_dinov2(tmp_path / "t")),
            train_dataset=image_dataset(n=24, fmt="messages"),
            peft_config=LoraConfig(target_modules="all-linear"),
        )
        run.train()
        run.save_model()
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
        loaded = PeftModel.from_pretrained(plain, tmp_path / "out")
        ours = {n: p for n, p in run.model.named_parameters() if "lora" in n}
        theirs = {n: p for n, p in loaded.named_parameters() if "lora" in n}
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n].to(ours[n])) for n in ours)

    def test_vectors_of_unknown_origin_beside_those_of_a_teacher(self, tmp_path, caplog):
        """What was trained with one teacher is not measured with another without a word."""
        teacher = save_tiny_dinov2(tmp_path / "teacher")
        rows = image_dataset(n=8, seed=5)
        own = add_teacher_features(rows, str(teacher))
        width = len(own[0]["teacher_features"])
        for held_out, said in ((own, 0), (rows, 1)):
            caplog.clear()
            dataset = image_dataset(n=24, with_features=width)
            run = trainer(tmp_path, dataset=dataset, teacher=teacher, eval_dataset=held_out)
            assert "eval_alignment_loss" in run.evaluate()
            told = [record.message for record in caplog.records if "`eval_dataset` has none" in record.message]
            assert len(told) == said and all(str(teacher) in line for line in told)

    @pytest.mark.parametrize("kind", ["one", "several", "replaced", "of the training data"])
    def test_those_of_a_teacher_beside_vectors_of_unknown_origin(self, tmp_path, caplog, kind):
        """Nor the other way round; and what the trainer has encoded itself is not of unknown origin."""
        teacher = save_tiny_dinov2(tmp_path / "teacher")
        width = len(add_teacher_features(image_dataset(n=8), str(teacher))[0]["teacher_features"])
        own, encoded = image_dataset(n=8, seed=5, with_features=width), image_dataset(n=8, seed=6)
        held_out = {"one": own, "several": {"a": own, "b": encoded}}.get(kind, {"a": encoded, "b": encoded})
        run = trainer(tmp_path, dataset=image_dataset(n=24), teacher=teacher, eval_dataset=held_out)
        run.prepare_alignment()
        if kind == "of the training data":
            run.evaluate(run.train_dataset.select(range(6)))
        if kind == "replaced":
            run.eval_dataset["a"] = own
        for _ in range(2):
            run.evaluate()
        told = [record.message for record in caplog.records if "and the training data has none" in record.message]
        assert len(told) == (kind != "of the training data") and all(str(teacher) in line for line in told)


@pytest.mark.parametrize("scope", ["step", "micro_batch"])
def test_nothing_of_an_attempt_that_ran_out_of_memory_goes_on(tmp_path, scope):
    """`auto_find_batch_size` begins anew with a smaller batch: as a run does that has it from the start."""

    class OutOfMemory(TrainerCallback):
        raised = False

        def on_substep_end(self, args, state, control, **kwargs):
            if not self.raised:  # between two micro-batches: the window is open, gradients are there
                self.raised = True
                raise RuntimeError("CUDA out of memory.")

    kwargs = {"gradient_accumulation_steps": 2, "queue_size": 12, "max_steps": 3, "learning_rate": 1e-2}
    kwargs |= {"contrast_scope": scope, "dataset": image_dataset(n=40, with_features=8), "max_grad_norm": 0.0}
    fresh = trainer(tmp_path / "fresh", per_device_train_batch_size=5, **kwargs)
    fresh.train()
    watch = OutOfMemory()
    again = trainer(
        tmp_path / "again", per_device_train_batch_size=6, auto_find_batch_size=True, callbacks=[watch], **kwargs
    )
    again.train()
    assert watch.raised and again._train_batch_size == 5
    for name in ("lm_loss", "alignment_loss", "alignment_pool", "temperature"):
        assert logged(again, name) == logged(fresh, name) and len(logged(fresh, name)) == 3, name
    assert_same_parameters(parameters(again.model), parameters(fresh.model))


def test_a_second_run_of_a_trainer_begins_with_an_empty_queue(tmp_path):
    run = trainer(tmp_path, queue_size=50, max_steps=2)
    run.train()
    run.train()
    assert logged(run, "alignment_pool") == [6, 12]
