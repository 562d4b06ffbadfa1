"""AlignmentMonitorCallback: what it measures and logs, and that training is the same with it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from peft import LoraConfig
from runs import assert_same_parameters, config, logged, parameters, trainer
from tiny import build_vlm, image_dataset, save_tiny_dinov2, sft_args
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import (
    AlignmentMonitorCallback,
    AttentionHead,
    DecoderLayer,
    HeadRanking,
    HeRATrainer,
    VisionTeacher,
    add_teacher_features,
    get_head_accessor,
    plot_head_scores,
    rank_heads,
    read_run,
)
from hera_trainer.runs.plots import monitor_group
from hera_trainer.runs.record import measurement_path, measurements

K = 3
GROUPS = ("aligned", "top", "all")
KEYS = [f"{group}/{name}" for group in ("alignment_mknn", "alignment_mknn_image") for name in GROUPS]


def held_out(n=16, **kwargs):
    return image_dataset(**{"n": n, "seed": 7, "with_features": 8, **kwargs})


def mean_loss(model, collator, rows):
    """Of single rows, weighted by their labelled tokens."""
    batches = [collator([row]) for row in rows]
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in batches]
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)


def monitored_steps(run, key="alignment_mknn/all"):
    return [entry["step"] for entry in run.state.log_history if key in entry]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps, measured before the first, after the second and after the last."""
    monitor = AlignmentMonitorCallback(held_out(), every=2, num_samples=14)
    run = trainer(tmp_path_factory.mktemp("run"), max_steps=3, learning_rate=1e-2, callbacks=[monitor])
    run.train()
    return run


class TestValues:
    def test_when(self, run):
        for key in KEYS:
            assert monitored_steps(run, key) == [0, 2, 3]

    def test_logged_values_are_means_of_what_rank_heads_gives(self, run):
        """After the last step, the model is the one in memory."""
        collator = DataCollatorForVisionLanguageModeling(run.processing_class, completion_only_loss=True)
        top = run.head_ranking.select("top", 3)
        for group, data_collator in (("alignment_mknn", None), ("alignment_mknn_image", collator)):
            ranking = rank_heads(
                run.model, run.processing_class, held_out(), K, 14, progress=False, data_collator=data_collator
            )
            expected = {"aligned": run.aligned_heads, "top": top, "all": ranking.heads()}
            for name, heads in expected.items():
                mean = torch.stack([ranking.scores[head.layer, head.head] for head in heads]).mean().item()
                assert logged(run, f"{group}/{name}")[-1] == pytest.approx(mean, abs=1e-6)

    def test_what_unrelated_spaces_score(self, run):
        """In every measurement, and in the log once."""
        kept = read_run(run.args.output_dir)
        for context, group in (("text", "alignment_mknn"), ("image", "alignment_mknn_image")):
            assert monitored_steps(run, f"{group}/null_p95") == [0]
            assert logged(run, f"{group}/null_p95") == [kept.monitored[context][0].null_p95]
            for ranking in kept.monitored[context].values():
                assert ranking.null_mean == pytest.approx(K / 13, rel=0.05) and ranking.null_p95 > K / 13

    def test_kept_as_rankings(self, run):
        kept = read_run(run.args.output_dir)
        assert {context: list(steps) for context, steps in kept.monitored.items()} == {
            "text": [0, 2, 3],
            "image": [0, 2, 3],
        }
        for context, group in (("text", "alignment_mknn"), ("image", "alignment_mknn_image")):
            means = [kept.monitored[context][step].scores.mean().item() for step in (0, 2, 3)]
            assert logged(run, f"{group}/all") == pytest.approx(means, abs=1e-6)
            first, last = kept.before_after(context)
            assert (first.context, first.k, first.num_samples) == (context, K, 14)
            assert not torch.equal(first.scores, last.scores)  # the model was trained

    def test_image_gain(self, run):
        """After the last step, as a plain loop over the samples that are ranked, each with another one's image."""
        rows = held_out().remove_columns("teacher_features")
        (monitor,) = run._monitors
        others = monitor._others
        drawn = np.random.default_rng(run.args.seed).permutation(16)[:14].tolist()
        assert list(others) == drawn and sorted(others.values()) == sorted(drawn)
        assert all(row != other for row, other in others.items())
        collator = DataCollatorForVisionLanguageModeling(run.processing_class, completion_only_loss=True)
        run.model.eval()
        loss = mean_loss(run.model, collator, [rows[i] for i in others])
        permuted = [{**rows[i], "images": rows[other]["images"]} for i, other in others.items()]
        permuted_loss = mean_loss(run.model, collator, permuted)
        kept = read_run(run.args.output_dir).image_gains
        assert [(step, gain.rows, gain.left_out) for step, gain in kept.items()] == [(s, 14, 0) for s in (0, 2, 3)]
        assert (kept[3].loss, kept[3].permuted_loss) == pytest.approx((loss, permuted_loss), abs=1e-6)
        assert logged(run, "image_gain") == [gain.gain for gain in kept.values()]
        assert abs(kept[3].gain) > 1e-4 and kept[0].gain != kept[3].gain

    def test_image_gain_cuts_no_texts(self, tmp_path):
        """Of images whose tokens follow their size, other ones would leave other words of a text that is cut."""
        rows = held_out(8)
        sizes = [(28, 28) if i % 2 else (84, 56) for i in range(8)]
        rows = rows.map(lambda row, i: {"images": [row["images"][0].resize(sizes[i])]}, with_indices=True)
        gains = []
        for name, length in (("a", None), ("b", 40)):
            monitor = AlignmentMonitorCallback(rows, every=9, num_samples=8)
            run = trainer(
                tmp_path / name, "qwen2_5_vl", max_steps=1, learning_rate=0.0, max_length=length, callbacks=[monitor]
            )
            run.train()
            gains.append(read_run(run.args.output_dir).image_gains[0])
            assert run.data_collator.max_length == length
        assert gains[0] == gains[1] and gains[0].tokens > 0

    def test_no_logits_of_all_positions_are_made(self, tmp_path):
        """Neither training nor measuring calls the head on more than one: where texts are long, it would not fit."""
        monitor = AlignmentMonitorCallback(held_out(), every=1, num_samples=14)
        run = trainer(tmp_path, max_steps=1, callbacks=[monitor])
        lengths = []
        head = run.model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
        run.train()
        assert logged(run, "image_gain") and set(lengths) == {1}

    def test_losses_are_logged_at_every_step_as_without(self, run, tmp_path):
        plain = trainer(tmp_path, max_steps=3, learning_rate=1e-2)
        plain.train()
        for name in ("loss", "lm_loss", "alignment_loss", "temperature", "grad_norm", "entropy"):
            assert logged(run, name) == logged(plain, name)
        assert_same_parameters(parameters(run.model), parameters(plain.model))


class Drawing:
    """A collator that draws from every random state, as one that augments images would."""

    def __init__(self, processor):
        self.inner = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)

    def __call__(self, rows):
        random.random(), np.random.rand(), torch.rand(1)
        return self.inner(rows)


class Draws(TrainerCallback):
    """Keeps a number from each random state at the end of each step."""

    def __init__(self):
        self.numbers = []

    def on_step_end(self, args, state, control, **kwargs):
        self.numbers.append((random.random(), np.random.rand(), torch.rand(1).item()))


class TestSameTraining:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_bit_for_bit(self, tmp_path, checkpointing):
        """With dropout, whole steps of two micro-batches, logging every other step and a collator that draws."""

        def train(folder, *callbacks):
            model, processor = build_vlm("llava", attention_dropout=0.2)
            draws = Draws()
            run = HeRATrainer(
                model,
                config(
                    folder,
                    max_steps=4,
                    gradient_accumulation_steps=2,
                    logging_steps=2,
                    gradient_checkpointing=checkpointing,
                    learning_rate=1e-2,
                ),
                train_dataset=image_dataset(n=48, with_features=8),
                data_collator=Drawing(processor),
                processing_class=processor,
                peft_config=LoraConfig(target_modules="all-linear", lora_dropout=0.2),
                callbacks=[*callbacks, draws],
            )
            run.train()
            return run, draws.numbers

        plain, drawn = train(tmp_path / "plain")
        watched, drawn_too = train(tmp_path / "watched", AlignmentMonitorCallback(held_out(), every=1))
        assert monitored_steps(watched) == [0, 1, 2, 3, 4]
        for name in ("loss", "lm_loss", "alignment_loss", "temperature", "grad_norm"):
            assert len(logged(plain, name)) == 2 and logged(watched, name) == logged(plain, name)
        assert drawn == drawn_too
        assert_same_parameters(parameters(watched.model), parameters(plain.model))

    def test_leaves_the_model_as_it_was(self, tmp_path):
        states = []

        class Modes(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                hooks = [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.modules()]
                modes = [m.training for m in model.modules()]
                states.append((modes, hooks, [p.requires_grad for p in model.parameters()], torch.is_grad_enabled()))

        callbacks = [Modes(), AlignmentMonitorCallback(held_out(), every=1), Modes()]
        run = trainer(tmp_path, max_steps=1, peft_config=LoraConfig(target_modules="all-linear"), callbacks=callbacks)
        run.train()
        before, after = states
        assert before == after and any(before[0])


class TestUse:
    def test_by_config_on_the_evaluation_data(self, tmp_path):
        run = trainer(
            tmp_path,
            max_steps=2,
            monitor_steps=1,
            monitor_num_samples=12,
            eval_dataset=held_out(),
            eval_strategy="epoch",
        )
        run.train()
        assert monitored_steps(run) == [0, 1, 2]
        assert read_run(tmp_path).monitored["image"][2].num_samples == 12

    def test_teachers_vectors_are_computed_once(self, tmp_path, monkeypatch):
        seen = []
        original = VisionTeacher.encode

        def encode(self, images, **kwargs):
            seen.append(len(images))
            return original(self, images, **kwargs)

        monkeypatch.setattr(VisionTeacher, "encode", encode)
        teacher = save_tiny_dinov2(tmp_path / "teacher", seed=41)  # one that no other test has used
        rows = {"dataset": image_dataset(n=24), "eval_dataset": held_out(with_features=None), "teacher": teacher}
        for folder in ("a", "b"):
            run = trainer(tmp_path / folder, max_steps=2, monitor_steps=1, **rows)
            run.train()
        assert sum(seen) == 24 + 16
        assert read_run(tmp_path / "a").monitored["text"][0].teacher == "teacher"

    def test_another_teacher_than_the_trainers(self, tmp_path):
        """Is measured with, also where the held-out rows have the trainer's vectors by then."""
        other = save_tiny_dinov2(tmp_path / "other", seed=42)
        rows = held_out(with_features=None)
        watch = AlignmentMonitorCallback(teacher=other, every=2, num_samples=12, contexts=["text"])
        own = {"dataset": image_dataset(n=24), "teacher": save_tiny_dinov2(tmp_path / "own", seed=41)}
        run = trainer(tmp_path, max_steps=2, eval_dataset=rows, callbacks=[watch], **own)
        run.train()
        measured = read_run(tmp_path).monitored["text"][2]
        expected = rank_heads(
            run.model,
            run.processing_class,
            add_teacher_features(rows, other),
            K,
            12,
            seed=run.args.seed,
            progress=False,
        )
        torch.testing.assert_close(measured.scores, expected.scores, rtol=0, atol=1e-6)
        assert measured.teacher == "other"

    def test_vectors_that_held_out_rows_bring(self, tmp_path):
        """Are nobody's by name, and no other teacher is taken for theirs."""
        run = trainer(tmp_path / "a", max_steps=1, monitor_steps=1, monitor_num_samples=12, eval_dataset=held_out())
        run.train()
        assert {ranking.teacher for ranking in read_run(tmp_path / "a").monitored["text"].values()} == {""}
        named = AlignmentMonitorCallback(held_out(), teacher="some/encoder", num_samples=12)
        with pytest.raises(ValueError, match="the held-out data brings its own `teacher_features`"):
            trainer(tmp_path / "b", max_steps=1, callbacks=[named])

    def test_with_a_stream_as_training_data(self, tmp_path):
        rows = image_dataset(n=24, with_features=8).to_iterable_dataset()
        run = trainer(tmp_path, dataset=rows, max_steps=2, callbacks=[AlignmentMonitorCallback(held_out(), every=2)])
        run.train()
        assert monitored_steps(run) == [0, 2]

    def test_control_run_without_alignment(self, tmp_path):
        """The heads of another run are watched while SFTTrainer's loss alone is trained."""
        run = trainer(
            tmp_path,
            max_steps=2,
            alignment_weight=0.0,
            aligned_heads=["L0H1"],
            monitor_steps=2,
            eval_dataset=held_out(),
        )
        run.train()
        assert monitored_steps(run, "alignment_mknn_image/aligned") == [0, 2]
        kept = read_run(tmp_path)
        assert logged(run, "alignment_mknn/aligned")[1] == pytest.approx(
            kept.monitored["text"][2].score(AttentionHead(0, 1)), abs=1e-6
        )
        assert kept.record["teacher"] is None  # none has taught, whatever encoder would have
        assert not logged(run, "alignment_loss")

    @pytest.mark.parametrize("granularity", ["head", "layer"])
    def test_run_without_alignment_measures_the_same_groups(self, tmp_path, granularity):
        """Given the same ranking: a baseline differs in nothing but the loss."""
        settings = {"aligned_heads": None, "alignment_granularity": granularity, "num_aligned_heads": 2, "max_steps": 2}
        watched = {"monitor_steps": 2, "eval_dataset": held_out(), "head_selection": "random"}
        aligned = trainer(tmp_path / "a", **settings, **watched)
        aligned.train()
        path = str(tmp_path / "a" / "head_ranking.json")
        baseline = trainer(tmp_path / "b", alignment_weight=0.0, head_ranking_path=path, **settings, **watched)
        baseline.train()
        ranking = read_run(tmp_path / "b").head_ranking
        assert ranking.scores.equal(aligned.head_ranking.scores)
        groups = {"aligned": aligned.aligned_heads, "top": ranking.select("top", 2, granularity=granularity)}
        for context, measured in read_run(tmp_path / "b").monitored.items():
            for name, units in groups.items():
                means = [sum(map(measured[step].score, units)) / 2 for step in (0, 2)]
                assert logged(baseline, f"{monitor_group(context)}/{name}") == pytest.approx(means, abs=1e-6)
        assert baseline.aligned_heads is None

    def test_ranking_of_another_model_without_alignment(self, tmp_path):
        ranking = HeadRanking(torch.rand(7, 5), torch.rand(7), k=2, num_samples=20)
        with pytest.raises(ValueError, match="has 3 layers"):
            trainer(tmp_path, alignment_weight=0.0, head_ranking=ranking, monitor_steps=2, eval_dataset=held_out())

    def test_layers(self, tmp_path):
        """The groups are of layers, by the scores of the layers; named ones of a control run, too."""
        layers = {"alignment_granularity": "layer", "aligned_heads": None}
        aligned = trainer(
            tmp_path / "a", **layers, num_aligned_heads=2, callbacks=[AlignmentMonitorCallback(held_out(), every=1)]
        )
        aligned.train()
        named = AlignmentMonitorCallback(held_out(), every=1, heads=["L2"])
        control = trainer(tmp_path / "b", alignment_weight=0.0, aligned_heads=None, callbacks=[named])
        control.train()
        recorded = read_run(control.args.output_dir)
        assert recorded.record["config"]["alignment_weight"] == 0 and recorded.curve("loss")[0]
        for run, units in ((aligned, aligned.aligned_heads), (control, [DecoderLayer(2)])):
            kept = read_run(run.args.output_dir).monitored["text"]
            for name, chosen in (("aligned", units), ("all", [DecoderLayer(layer) for layer in range(3)])):
                means = [
                    sum(ranking.layer_scores[i].item() for (i,) in chosen) / len(chosen) for ranking in kept.values()
                ]
                assert logged(run, f"alignment_mknn/{name}") == pytest.approx(means, abs=1e-6)
        assert aligned.aligned_heads == aligned.head_ranking.select("worst", 2, granularity="layer")

    def test_one_context_and_other_settings(self, tmp_path):
        monitor = AlignmentMonitorCallback(held_out(), every=5, contexts=["image"], num_samples=10, k=2, heads=["L2H0"])
        run = trainer(tmp_path, max_steps=1, callbacks=[monitor])
        run.train()
        assert not logged(run, "alignment_mknn/all") and len(logged(run, "image_gain")) == 2
        kept = read_run(tmp_path).monitored
        assert list(kept) == ["image"] and kept["image"][1].k == 2
        assert logged(run, "alignment_mknn_image/aligned")[1] == pytest.approx(
            kept["image"][1].score(AttentionHead(2, 0)), abs=1e-6
        )

    def test_values_are_clipped_as_in_the_ranking(self, tmp_path):
        monitor = AlignmentMonitorCallback(held_out(), every=1, contexts=["text"])
        run = trainer(tmp_path, max_steps=1, ranking_clip_quantile=0.7, callbacks=[monitor])
        run.train()
        ranking = rank_heads(run.model, run.processing_class, held_out(), K, 500, progress=False, clip_quantile=0.7)
        kept = read_run(tmp_path)
        assert torch.equal(kept.monitored["text"][1].scores, ranking.scores)
        assert kept.monitored["text"][1].clip_quantile == run.head_ranking.clip_quantile == 0.7

    def test_no_image_gain_with_text_alone(self, tmp_path):
        monitor = AlignmentMonitorCallback(held_out(), contexts=["text"])
        run = trainer(tmp_path, max_steps=1, callbacks=[monitor])
        run.train()
        assert logged(run, "alignment_mknn/all") and not logged(run, "image_gain")
        assert read_run(tmp_path).image_gains == {}

    def test_rows_whose_images_fit_nowhere(self, tmp_path):
        """One row with two images has no partner; where all rows are so, there is no image gain."""
        rows = held_out()
        images = rows["images"][:]
        some = rows.map(lambda row, i: {"images": images[i] * (2 if i == 3 else 1)}, with_indices=True)
        run = trainer(tmp_path, max_steps=1, callbacks=[AlignmentMonitorCallback(some)])
        run.train()
        gain = read_run(tmp_path).image_gains[1]
        assert (gain.rows, gain.left_out) == (15, 1)
        every = rows.map(lambda row, i: {"images": images[i] * (1 + i)}, with_indices=True)
        run = trainer(tmp_path, max_steps=1, callbacks=[AlignmentMonitorCallback(every)])
        with pytest.warns(UserWarning, match="no two have equally many images"):
            run.train()
        assert logged(run, "alignment_mknn_image/all") and not logged(run, "image_gain")

    def test_plain_text_in_a_column_of_another_name(self, tmp_path):
        def plain(rows):
            texts = [f"<image> {completion[0]['content']}" for completion in rows["completion"]]
            return rows.remove_columns(["prompt", "completion"]).add_column("caption", texts)

        run = trainer(
            tmp_path,
            dataset=plain(image_dataset(n=24, with_features=8)),
            max_steps=1,
            dataset_text_field="caption",
            monitor_steps=1,
            eval_dataset=plain(held_out()),
        )
        run.train()
        assert monitored_steps(run, "alignment_mknn_image/all") == [0, 1]

    def test_heads_that_overflow_are_not_measured(self, tmp_path, caplog):
        """At the step at which they do: training goes on as without the monitor, and they are measured again later."""

        class Overflowing(TrainerCallback):
            """Before the monitor looks; undone after it has."""

            def on_step_end(self, args, state, control, model=None, **kwargs):
                norm = get_head_accessor(model).layers[1].input_layernorm
                if state.global_step == 2:
                    self.kept = norm.weight.detach().clone()
                    norm.weight.data.fill_(torch.inf)

            def on_step_begin(self, args, state, control, model=None, **kwargs):
                if state.global_step == 2:
                    get_head_accessor(model).layers[1].input_layernorm.weight.data.copy_(self.kept)

        callbacks = [Overflowing(), AlignmentMonitorCallback(held_out(), every=1)]
        run = trainer(tmp_path, max_steps=3, callbacks=callbacks)
        run.train()
        assert monitored_steps(run) == [0, 1, 3] and len(logged(run, "loss")) == 3
        (said,) = [record.getMessage() for record in caplog.records if "Nothing is measured" in record.getMessage()]
        assert "at step 2: The attention heads of layer 1 give NaN or inf" in said

    def test_measured_at_the_end_of_a_run_that_is_stopped(self, tmp_path):
        class Stop(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                control.should_training_stop = state.global_step == 2

        callbacks = [AlignmentMonitorCallback(held_out(), every=100), Stop()]
        run = trainer(tmp_path, max_steps=4, callbacks=callbacks)
        run.train()
        assert monitored_steps(run) == [0, 2]


class TestResuming:
    SETTINGS = {"save_strategy": "steps", "save_steps": 2, "monitor_steps": 1, "learning_rate": 1e-2}

    def train(self, folder, resume=None, **kwargs):
        run = trainer(folder, eval_dataset=held_out(), **{"max_steps": 4, **self.SETTINGS, **kwargs})
        run.train(resume_from_checkpoint=resume)
        return run

    def test_steps_after_the_checkpoint_are_measured_again(self, tmp_path):
        whole = self.train(tmp_path)
        before = read_run(tmp_path)
        marked = tmp_path / "alignment_monitor" / "step-00000000-text.json"
        HeadRanking(**{**vars(before.monitored["text"][0]), "teacher": "kept"}).save(marked)
        resumed = self.train(tmp_path, resume=str(tmp_path / "checkpoint-2"), max_steps=3)
        after = read_run(tmp_path)
        for context in ("text", "image"):
            assert list(after.monitored[context]) == [0, 1, 2, 3]
            for step, ranking in after.monitored[context].items():
                assert torch.equal(ranking.scores, before.monitored[context][step].scores)
        assert after.monitored["text"][0].teacher == "kept"
        assert monitored_steps(resumed) == [0, 1, 2, 3]
        assert after.image_gains == {step: before.image_gains[step] for step in (0, 1, 2, 3)}
        for key in (*KEYS, "image_gain"):
            assert logged(resumed, key) == logged(whole, key)[:4]
        assert after.record["resumed_from"] == "checkpoint-2"
        assert after.log_history == resumed.state.log_history

    def test_measured_otherwise_after_a_while(self, tmp_path, monkeypatch):
        """Heat maps show no difference of what cannot be compared."""
        figures = []

        def plot(panels, *args, difference, **kwargs):
            figures.append((list(panels), difference))
            return plot_head_scores(panels, *args, difference=difference, **kwargs)

        monkeypatch.setattr("hera_trainer.runs.monitor.plot_head_scores", plot)
        monkeypatch.setattr("hera_trainer.runs.monitor._give_image", lambda *args: None)
        settings = {"report_to": "tensorboard", "monitor_steps": 2}
        self.train(tmp_path, **settings, max_steps=2)
        self.train(tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings, monitor_num_samples=10)
        texts = figures[::2]  # the other context in between
        assert texts == [(["first", "step 0"], True), (["first", "step 2"], True), (["step 4"], False)]
        run = read_run(tmp_path)
        assert [ranking.num_samples for ranking in run.monitored["text"].values()] == [16, 16, 10]
        assert run.before_after("text") is None

    def test_new_run_forgets_the_old_one(self, tmp_path):
        self.train(tmp_path)
        self.train(tmp_path, max_steps=1, monitor_steps=5, save_strategy="no")
        assert {context: list(steps) for context, steps in read_run(tmp_path).monitored.items()} == {
            "text": [0, 1],
            "image": [0, 1],
        }
        assert list(read_run(tmp_path).image_gains) == [0, 1]
        kept = sorted(path.name for path in (tmp_path / "earlier-run" / "alignment_monitor").glob("*-gain.json"))
        assert kept[0] == "step-00000000-gain.json" and len(kept) > 1  # nothing that was measured is lost

    def test_a_checkpoint_of_another_folder(self, tmp_path):
        """Its run's measurements come along, and those of an earlier run in the own folder go."""
        self.train(tmp_path / "first", max_steps=3)
        for step, kind, path in list(measurements(tmp_path / "first")):
            own = measurement_path(tmp_path / "second", step + 1, kind)
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(path.read_text())
        checkpoint = str(tmp_path / "first" / "checkpoint-2")
        resumed = self.train(tmp_path / "second", resume=checkpoint, max_steps=3, monitor_steps=3)
        before, after = read_run(tmp_path / "first"), read_run(tmp_path / "second")
        for context in ("text", "image"):
            assert list(after.monitored[context]) == [0, 1, 2, 3]
            for step in (0, 1, 2):
                assert torch.equal(after.monitored[context][step].scores, before.monitored[context][step].scores)
        assert monitored_steps(resumed) == [0, 1, 2, 3] == list(after.image_gains)
        assert after.record["started"] == before.record["started"]

    def test_a_run_that_begins_anew_is_not_measured_again(self, tmp_path, monkeypatch):
        """After running out of memory (`auto_find_batch_size`), what was measured before the first step stands."""

        class OutOfMemory(TrainerCallback):
            raised = False

            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 2 and not self.raised:  # once this step has been measured
                    self.raised = True
                    raise RuntimeError("CUDA out of memory.")

        steps, kept_before = [], []
        measure = AlignmentMonitorCallback._measure

        def counted(self, args, state, control):
            steps.append(state.global_step)
            kept_before.append([step for step, kind, _ in measurements(args.output_dir) if kind == "text"])
            return measure(self, args, state, control)

        monkeypatch.setattr(AlignmentMonitorCallback, "_measure", counted)
        settings = {"auto_find_batch_size": True, "save_strategy": "no", "monitor_steps": 2, "max_steps": 3}
        settings |= {"dataset": image_dataset(n=40, with_features=8)}
        watch = OutOfMemory()
        run = trainer(tmp_path, eval_dataset=held_out(), **{**self.SETTINGS, **settings}, callbacks=[watch])
        run.train()
        assert watch.raised and run._train_batch_size == 5
        assert steps == [0, 2, 2, 3] and monitored_steps(run) == [0, 2, 3]
        assert kept_before == [[], [0], [0], [0, 2]]
        kept = read_run(tmp_path)
        for context, group in (("text", "alignment_mknn"), ("image", "alignment_mknn_image")):
            assert list(kept.monitored[context]) == [0, 2, 3]
            means = [kept.monitored[context][step].scores.mean().item() for step in (0, 2, 3)]
            assert logged(run, f"{group}/all") == pytest.approx(means, abs=1e-6)
            assert monitored_steps(run, f"{group}/null_p95") == [0]
        run.train()  # a second run of the trainer is one of its own
        assert steps == [0, 2, 2, 3, 0, 2, 3]

    def test_added_in_the_middle(self, tmp_path):
        self.train(tmp_path, monitor_steps=None)
        run = self.train(tmp_path, resume=str(tmp_path / "checkpoint-2"))
        assert monitored_steps(run) == [2, 3, 4]


class TestRefused:
    def test_too_few_held_out_rows(self, tmp_path):
        for rows, found in (
            (held_out().select(range(3)), "has 3 rows"),
            (concatenate_datasets([held_out().select([0])] * 9), "has 1 with distinct images and an answer"),
        ):
            with pytest.raises(ValueError, match=f"at least 5 held-out rows, but `eval_dataset` {found}"):
                trainer(tmp_path, monitor_steps=2, eval_dataset=rows).train()

    def test_without_evaluation_data(self, tmp_path):
        with pytest.raises(ValueError, match=r"`monitor_steps`.*no `eval_dataset`"):
            trainer(tmp_path, monitor_steps=2)

    def test_several_data_sets(self, tmp_path):
        with pytest.raises(ValueError, match=r"dictionary of data sets \('a', 'b'\).*name the one"):
            trainer(tmp_path, monitor_steps=2, eval_dataset={"a": held_out(), "b": held_out()})

    def test_a_stream(self, tmp_path):
        with pytest.raises(ValueError, match=r"`eval_dataset` is a stream.*Dataset\.from_list"):
            trainer(tmp_path, monitor_steps=2, eval_dataset=held_out().to_iterable_dataset())

    def test_data_without_images(self, tmp_path):
        with pytest.raises(ValueError, match="`dataset` has no column `image`"):
            trainer(tmp_path, callbacks=[AlignmentMonitorCallback(image_dataset(fmt="text"))])

    def test_too_few_samples(self, tmp_path):
        with pytest.raises(ValueError, match=r"`num_samples` \(4\) must be at least k \+ 2 = 5"):
            trainer(tmp_path, callbacks=[AlignmentMonitorCallback(held_out(), num_samples=4)])
        rows = concatenate_datasets([held_out(4)] * 3)
        run = trainer(tmp_path, callbacks=[AlignmentMonitorCallback(rows)])
        with pytest.raises(ValueError, match="but `dataset` has 4 with distinct images"):
            run.train()

    def test_unknown_heads(self, tmp_path):
        with pytest.raises(ValueError, match="no attention head L9H0"):
            trainer(tmp_path, callbacks=[AlignmentMonitorCallback(held_out(), heads=["L9H0"])])
        run = trainer(tmp_path)
        run.add_callback(AlignmentMonitorCallback(held_out(), heads=["L9H0"]))  # too late to be seen before training
        with pytest.raises(ValueError, match="no attention head L9H0"):
            run.train()

    def test_two_monitors(self, tmp_path):
        run = trainer(tmp_path, monitor_steps=2, eval_dataset=held_out())
        run.callback_handler.callbacks.append(AlignmentMonitorCallback(held_out()))
        with pytest.raises(ValueError, match="more than one `AlignmentMonitorCallback`"):
            run.train()

    @pytest.mark.parametrize("settings", [{"contexts": ["pixels"]}, {"contexts": []}, {"contexts": "text"}])
    def test_contexts(self, settings):
        with pytest.raises(ValueError, match=r"^`contexts` must be a sequence of 'text' and 'image'"):
            AlignmentMonitorCallback(held_out(), **settings)

    @pytest.mark.parametrize("name", ["every", "k"])
    def test_numbers(self, name):
        with pytest.raises(ValueError, match=f"^`{name}` must be at least 1, got 0"):
            AlignmentMonitorCallback(held_out(), **{name: 0})

    def test_other_trainers(self, tmp_path):
        model, processor = build_vlm("llava")
        run = SFTTrainer(
            model,
            SFTConfig(**sft_args(tmp_path, max_steps=1)),
            train_dataset=image_dataset(),
            processing_class=processor,
            callbacks=[AlignmentMonitorCallback(held_out())],
        )
        with pytest.raises(ValueError, match="works with `HeRATrainer`"):
            run.train()
