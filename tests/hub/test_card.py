"""The model card: valid, complete, without anything private, and with code that works."""

from __future__ import annotations

import json
import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from card_rules import card_errors
from hub_server import running
from huggingface_hub import ModelCard, get_session
from peft import LoraConfig, PeftModel
from PIL import Image
from runs import config, trainer
from tiny import image_dataset, save_vlm
from transformers import BitsAndBytesConfig
from trl import SFTTrainer

from hera_trainer import HeRAConfig, HeRATrainer
from hera_trainer.evaluation.image_gain import ImageGain
from hera_trainer.objectives.feature import FeatureLoss
from hera_trainer.runs.record import measurement_path, read_run


def lora_run(folder, **kwargs):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return trainer(folder, peft_config=lora, **{"max_steps": 2, **kwargs})


def card_of(folder) -> ModelCard:
    return ModelCard.load(Path(folder, "README.md"))


@contextmanager
def validating(monkeypatch):
    """A server that the client has cards validated by. Older clients ask the Hub for it, whatever their endpoint."""
    with running(monkeypatch) as server:

        def turn(request):
            request.url = request.url.copy_with(scheme="http", host="127.0.0.1", port=server.server_port)

        get_session().event_hooks["request"].append(turn)
        yield


def table_of(card: ModelCard, first: str) -> dict[str, list[str]]:
    """Rows of the table whose header begins with `first`, by their first cell."""
    rows, inside = {}, False
    for line in card.text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if inside and not line.startswith("|"):
            break
        if inside and set(cells[0]) != {"-"}:
            rows[cells[0]] = cells[1:]
        inside = inside or (line.startswith("|") and cells[0] == first)
    return rows


class TestMetadata:
    def test_adapter(self, tmp_path, monkeypatch):
        run = lora_run(tmp_path / "out")
        run.model.config._name_or_path = "Org/Model-2B"
        run.train()
        run.create_model_card(model_name="mine", dataset_name="Org/pictures", tags="extra")
        card = card_of(tmp_path / "out")
        data = card.data.to_dict()
        assert data.pop("tags")[:4] == ["hera", "peft", "sft", "trl"]
        assert {"extra", "generated_from_trainer"} <= set(card.data.tags)
        assert data == {
            "base_model": "Org/Model-2B",
            "datasets": ["Org/pictures"],
            "library_name": "peft",
            "pipeline_tag": "image-text-to-text",
            "model_name": "mine",
        }
        with validating(monkeypatch):
            card.validate()  # the client's own call

    def test_whole_model(self, tmp_path):
        run = trainer(tmp_path / "out", max_steps=1)
        run.create_model_card()
        assert "had not been chosen" in card_of(tmp_path / "out").text
        run.train()
        run.save_model()
        card = card_of(tmp_path / "out")
        assert card.data.library_name == "transformers"
        assert card.data.base_model is None and "peft" not in card.data.tags
        assert not card_errors(str(card))
        assert "PeftModel" not in card.text and "- PEFT" not in card.text

    @pytest.mark.parametrize(
        ("objective", "says"),
        [
            ("contrastive", "pulled towards the neighbourhoods of a frozen vision encoder"),
            ("feature", "trained to give, through projectors that are not kept, the vectors of a frozen vision"),
            ("cka", "trained to find samples as similar to each other as a frozen vision encoder does"),
            ("uniformity", "spread over the samples without a teacher (uniformity), as a control"),
        ],
    )
    def test_what_the_objective_does(self, tmp_path, objective, says):
        run = lora_run(tmp_path, alignment_objective=objective, target_pull=0.3)
        run.train()
        run.create_model_card()
        card = card_of(tmp_path)
        text, settings = " ".join(card.text.split()), table_of(card, "setting")
        assert says in text
        assert ("the method is that of" in text.lower()) is (objective == "contrastive")
        assert ("A control run." in text) is (objective == "uniformity")
        assert (settings["teacher"][0] == "**none**") is (objective == "uniformity")
        assert re.fullmatch(r"\*\*0\.01 at first, \S+ at the end\*\*", settings["weight of the alignment loss, λ"][0])

    def test_of_a_criterion_of_ones_own(self, tmp_path):
        class Halved(FeatureLoss):
            summary = "halved by {x}"

        class Own(HeRATrainer):
            def create_criterion(self):
                return Halved()

        run = trainer(tmp_path, trainer_class=Own, max_steps=1)
        run.train()
        run.create_model_card()
        text = " ".join(card_of(tmp_path).text.split())
        assert "of the language model were halved by {x}. That is not the loss of" in text

    def test_without_alignment(self, tmp_path):
        """TRL's own card, to the letter."""
        run = lora_run(tmp_path / "a", alignment_weight=0.0)
        run.create_model_card(model_name="mine")
        theirs = (tmp_path / "a" / "README.md").read_bytes()
        SFTTrainer.create_model_card(run, model_name="mine")
        sorted_lines = [sorted(text.splitlines()) for text in (theirs, (tmp_path / "a" / "README.md").read_bytes())]
        assert sorted_lines[0] == sorted_lines[1]  # TRL's tags come from a set

    def test_hand_written_licence_stays(self, tmp_path):
        run = lora_run(tmp_path)
        run.prepare_alignment()
        run.create_model_card()
        card = card_of(tmp_path)
        assert card.data.license is None and "No licence is stated" in card.text
        card.data.license, card.data.language = "apache-2.0", "en"
        card.save(tmp_path / "README.md")
        run.create_model_card()
        assert card_of(tmp_path).data.license == "apache-2.0" and card_of(tmp_path).data.language == "en"
        run.create_model_card(license="mit")
        assert card_of(tmp_path).data.license == "mit"
        (tmp_path / "README.md").write_text("---\na: [\n---\n")
        run.create_model_card()
        assert card_of(tmp_path).data.license is None

    def test_own_text_stays(self, tmp_path):
        """`save_model` leaves a card that is not a trainer's, as it is with SFTTrainer."""
        data = "license: mit\ntags:\n- birds\nbase_model: Org/Base-2B\nlibrary_name: transformers"  # PEFT changes these
        own = f"---\n{data}\n---\n\n# Mine\n"
        out, there, other = (tmp_path / name for name in ("out", "there", "other"))
        run = lora_run(out)
        run.prepare_alignment()
        for folder, text in ((out, own), (there, own), (other, "---\nlicense: mit\n---\n")):
            folder.mkdir(exist_ok=True)
            (folder / "README.md").write_text(text)
        for folder in (out, there, other):
            run.save_model(str(folder))
            assert ((folder / "README.md").read_text() == own) == (folder != other)
            assert (out / "README.md").read_text() == own
        assert "hera" in card_of(other).data.tags

    def test_the_licence_of_a_baseline(self, tmp_path):
        run = lora_run(tmp_path / "out", alignment_weight=0)
        run.create_model_card(license="mit")
        assert card_of(tmp_path / "out").data.license == "mit"
        run.create_model_card()  # stays
        card = card_of(tmp_path / "out")
        assert card.data.license == "mit" and "sft" in card.data.tags and "hera" not in card.text.lower()

    def test_the_revision_of_the_base_model(self, tmp_path):
        """An adapter that does not name it would be put on the newest one."""
        base = save_vlm("llava", tmp_path / "my-base")
        lora = LoraConfig(r=4, target_modules="all-linear")
        for revision, said in (("v2", "v2"), ("main", None), (None, None)):
            run = HeRATrainer(
                base,
                config(tmp_path / "out", max_steps=1, model_init_kwargs=revision and {"revision": revision}),
                train_dataset=image_dataset(n=24, with_features=8),
                peft_config=lora,
            )
            run.save_model()
            assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == said
            assert lora.revision is None  # the user's own
            run.model.config._name_or_path = "Org/Model-2B"
            run.create_model_card()
            text = card_of(tmp_path / "out").text
            assert ('from_pretrained("Org/Model-2B", revision="v2", dtype' in text) == (said is not None)
            assert ('from_pretrained("Org/Model-2B", dtype' in text) == (said is None)

    def test_saved_again_beside_the_card_of_a_checkpoint(self, tmp_path):
        """PEFT edits a card that it finds: the local base model, and the tag by which a generated card is known."""
        base = save_vlm("llava", tmp_path / "my-base")
        run = HeRATrainer(
            base,
            config(tmp_path / "out", max_steps=1),
            train_dataset=image_dataset(n=24, with_features=8),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        run.prepare_alignment()
        run.create_model_card()
        run.save_model()
        run.model.save_pretrained(tmp_path / "out")  # by hand, without the trainer
        assert str(base) in (tmp_path / "out" / "README.md").read_text()
        run.save_model()
        text = (tmp_path / "out" / "README.md").read_text()
        assert str(base) not in text and "`my-base`" in text

    def test_validation_refuses(self, monkeypatch):
        with validating(monkeypatch), pytest.raises(ValueError, match="base_model"):
            ModelCard("---\nbase_model: /home/me/model\n---\nhello").validate()


class TestText:
    def test_nothing_private(self, tmp_path):
        base = save_vlm("llava", tmp_path / "my-base")
        run = HeRATrainer(
            base,
            config(tmp_path / "out", max_steps=1, hub_token="hf_secret"),
            train_dataset=image_dataset(n=24, with_features=8),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        run.train()
        run.save_model(str(tmp_path / "elsewhere"))
        for folder in ("out", "elsewhere"):
            text = (tmp_path / folder / "README.md").read_text()
            assert str(tmp_path) not in text and "hf_secret" not in text and str(Path.home()) not in text
            assert "`my-base`, a model that is not on the Hub" in text and "base_model" not in text
            assert "[More Information Needed]" not in text  # PEFT's form
            assert (tmp_path / folder / "hera" / "heads.png").is_file()

    def test_links_of_trackers(self, tmp_path, monkeypatch):
        """An anonymous run has its key in its address."""
        key = "0f3b9c2e7a6d41c58e92b0f7d4a3c6e1905b8d27"
        link = "https://www.comet.com/somebody/faces"
        monkeypatch.setattr("trl.trainer.base_trainer.get_comet_experiment_url", lambda: f"{link}?apiKey={key}")
        run = lora_run(tmp_path)
        run.prepare_alignment()
        run.create_model_card(dataset_name="https://me:pw@example.com/faces")
        text = card_of(tmp_path).text
        assert f"]({link}?apiKey=)" in text and key not in text and ":pw@" not in text

    def test_hub_cache(self, tmp_path):
        """A folder of the Hub's cache is the repository that it was downloaded from."""
        run = lora_run(tmp_path)
        run.prepare_alignment()
        run.model.config._name_or_path = "/data/hub/models--Org--Model-2B/snapshots/0123abcd"
        run.create_model_card()
        assert card_of(tmp_path).data.base_model == "Org/Model-2B"
        assert "[Org/Model-2B](https://huggingface.co/Org/Model-2B)" in card_of(tmp_path).text

    def test_heads(self, tmp_path):
        run = lora_run(tmp_path)
        run.train()
        run.create_model_card()
        card, ranking = card_of(tmp_path), run.head_ranking
        rows = table_of(card, "head")
        mean = sum(map(ranking.score, run.aligned_heads)) / 3
        assert rows == {
            **{f"`{head}`": [f"{ranking.score(head):.3f}"] for head in run.aligned_heads},
            "mean of these 3": [f"{mean:.3f}"],
            "mean of the 3 best at first": [f"{sum(map(ranking.score, ranking.select('top', 3))) / 3:.3f}"],
            "mean of all": [f"{ranking.scores.nanmean().item():.3f}"],
            "unrelated spaces, 95th percentile": [f"{ranking.null_p95:.3f}"],
        }
        assert "What training changed was not measured" in card.text and "AlignmentMonitorCallback" in card.text
        null = f"unrelated spaces 0.130 (95th percentile {ranking.null_p95:.3f})"
        assert f"- When chosen: 24 pairs, text only, k = 3; {null}\n" in card.text
        assert "](hera/heads.png)" in card.text
        with Image.open(tmp_path / "hera" / "heads.png") as heat_map:
            assert heat_map.format == "PNG" and heat_map.width > 300

    def test_before_and_after(self, tmp_path):
        run = lora_run(tmp_path)
        run.train()
        first = run.head_ranking
        for context, change in (("text", 0.25), ("image", 0.5)):
            for step in (0, 1, 2):
                measured = type(first)(first.scores + change * step / 2, first.layer_scores, 3, 20, context=context)
                measured.save(measurement_path(tmp_path, step, context))
        run.create_model_card()
        card = card_of(tmp_path)
        head = run.aligned_heads[0]
        score, best = first.score(head), first.select("top", 3)
        best = sum(map(first.score, best)) / 3
        rows = table_of(card, "head")
        expected = [score, score, score + 0.25, score, score + 0.5]
        assert rows[f"`{head}`"] == [f"{value:.3f}" for value in expected]
        expected = [best, best, best + 0.25, best, best + 0.5]
        assert rows["mean of the 3 best at first"] == [f"{value:.3f}" for value in expected]
        assert "| head | when chosen | text only, before | text only, after | image in context, before |" in card.text
        assert "- Image in context: 20 pairs, image in context, k = 3; unrelated spaces 0.158; held out" in card.text
        assert "Scores that were measured otherwise cannot be compared" in card.text  # 24 and 20
        assert "before is step 0, after is step 2" in card.text and "was not measured" not in card.text
        heat_maps = re.findall(r"!\[.+?\]\((.+?)\)", card.text)
        assert heat_maps == ["hera/heads_text.png", "hera/heads_image.png"]
        assert all((tmp_path / heat_map).is_file() for heat_map in heat_maps)

    def test_measured_otherwise_after_a_while(self, tmp_path):
        run = lora_run(tmp_path)
        run.prepare_alignment()
        first = run.head_ranking
        for step, count in ((0, 20), (2, 21)):
            type(first)(first.scores, first.layer_scores, 3, count).save(measurement_path(tmp_path, step, "text"))
        run.create_model_card()
        card = card_of(tmp_path)
        assert "were measured with different settings, and are not compared" in card.text
        assert len(table_of(card, "head")[f"`{run.aligned_heads[0]}`"]) == 1
        assert "was not measured" not in card.text

    def test_a_monitor_with_a_teacher_of_its_own(self, tmp_path):
        """Its scores are not said to be of the teacher that the model was trained with."""
        run = lora_run(tmp_path)
        run.prepare_alignment()
        run.teacher_vectors._brings_vectors, run.teacher_vectors.teacher = False, "/data/encoders/own"
        run.head_ranking.teacher = "/data/encoders/own"
        for teacher in ("own", "other"):
            for step in (0, 2):
                measured = replace(run.head_ranking, teacher=teacher)
                measured.save(measurement_path(tmp_path, step, "text"))
            run.create_model_card()
            text = card_of(tmp_path).text
            assert ("- Text only: 24 pairs, text only, k = 3, teacher other; unrelated" in text) == (teacher == "other")
            assert ("the teacher, text only, teacher other; the aligned heads" in text) == (teacher == "other")
            assert ("Scores that were measured otherwise cannot be compared" in text) == (teacher == "other")
            assert "- When chosen: 24 pairs, text only, k = 3; unrelated" in text

    def test_ceiling_and_clipping(self, tmp_path):
        ranking = lora_run(tmp_path / "a")
        ranking.prepare_alignment()
        own = {"ceiling": 0.4321, "ceiling_model": str(tmp_path / "second"), "clip_quantile": 0.95}
        run = lora_run(tmp_path / "b", head_ranking=replace(ranking.head_ranking, **own))
        run.prepare_alignment()
        run.create_model_card()
        card = card_of(tmp_path / "b")
        assert table_of(card, "head")["ceiling"] == ["0.432"]
        assert "k = 3, clipped at quantile 0.95; unrelated spaces 0.130 (95th" in card.text
        assert "; ceiling 0.432 (second)\n" in card.text and str(tmp_path) not in card.text

    def test_best_weights(self, tmp_path):
        """What was measured after the step of the weights that were loaded is not theirs."""
        saving = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
        rows = image_dataset(n=8, with_features=8)
        run = lora_run(
            tmp_path, max_steps=3, learning_rate=0.0, load_best_model_at_end=True, eval_dataset=rows, **saving
        )
        run.train()  # nothing changes, so the first remains the best
        assert read_run(tmp_path).best_step == run.best_step == 1
        first = run.head_ranking
        for step in (0, 1, 3):
            measured = type(first)(first.scores + step, first.layer_scores, 3, 20)
            measured.save(measurement_path(tmp_path, step, "text"))
            ImageGain(2.0, 2.25 + step, 90, 12, 1).save(measurement_path(tmp_path, step, "gain"))
        run.create_model_card()
        head = run.aligned_heads[0]
        row = table_of(card_of(tmp_path), "head")[f"`{head}`"]
        assert row == [f"{first.score(head) + change:.3f}" for change in (0, 0, 1)]
        text = card_of(tmp_path).text
        assert "before is step 0, after is step 1\n" in text
        assert "- Image gain: 0.250 at step 0, 1.250 at step 1: what the loss of 12 held-out rows rises by" in text
        assert "- Steps: 3 of 3 (0.75 epochs); the weights are those of step 1, the best in evaluation\n" in text
        run.args.load_best_model_at_end = False
        run.train()
        run.create_model_card()
        assert "- Steps: 3 of 3 (0.75 epochs)\n" in card_of(tmp_path).text

    def test_batch_size_that_was_found(self, tmp_path):
        run = lora_run(tmp_path, per_device_train_batch_size=8)
        run.prepare_alignment()
        run._train_batch_size = 6  # as `auto_find_batch_size` sets it
        run.create_model_card()
        card = card_of(tmp_path)
        assert table_of(card, "setting")["samples compared"][0] == "**6 (6 x 1 x 1)**"
        assert "- Batch: 6 a device x 1 accumulated" in card.text

    def test_without_matplotlib(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        run = lora_run(tmp_path)
        run.prepare_alignment()
        run.create_model_card()
        assert "hera/heads" not in card_of(tmp_path).text and not card_errors(str(card_of(tmp_path)))

    def test_settings_beside_the_paper(self, tmp_path):
        run = lora_run(tmp_path, num_neighbors=10, num_aligned_heads=5, per_device_train_batch_size=12, queue_size=4)
        run.train()
        run.create_model_card()
        rows = table_of(card_of(tmp_path), "setting")
        now = f"{run.criterion.temperature:.4g}"
        assert rows == {
            "weight of the alignment loss, λ": ["0.01", "0.01"],
            "neighbours, k": ["10", "10"],
            "aligned heads, m": ["5 (worst)", "5 (worst)"],
            "temperature, τ": [f"**0.3, learned ({now} now)**", "0.07, learned"],
            "objective": ["contrastive", "contrastive"],
            "similarity of heads": ["**centered_cosine**", "not centered"],
            "similarity of teacher vectors": ["cosine", "not stated"],
            "samples compared": ["**12 (12 x 1 x 1, and 4 past ones)**", "batches of 256, then 128"],
            "teacher": ["**vectors that came with the data**", "DINOv2 ViT-L"],
            "heads ranked on": ["**24 pairs, text only**", "1,000 pairs, text only"],
        }
        settings = {"alignment_weight": 0.5, "temperature": 0.1, "aligned_heads": ["L0H1"], "neighbor_group_size": 6}
        other = lora_run(tmp_path, num_neighbors=3, **settings)
        other.prepare_alignment()
        other.create_model_card()
        rows = table_of(card_of(tmp_path), "setting")
        assert rows["weight of the alignment loss, λ"][0] == "**0.5**" and rows["neighbours, k"][0] == "**3**"
        assert rows["samples compared"][0].endswith(", in groups of 6 neighbours)**")
        assert rows["aligned heads, m"][0] == "**1 (named)**" and "heads ranked on" not in rows
        text = card_of(tmp_path).text
        assert "- Adapter: LORA, r 4, lora_alpha 8, target_modules `q_proj`, `v_proj`" in text
        assert "were named in the configuration" in text

    def test_teacher_of_the_paper(self, tmp_path):
        assert HeRAConfig(str(tmp_path), use_cpu=True, bf16=False).teacher_model_name_or_path == "facebook/dinov2-large"
        run = lora_run(tmp_path)
        run.prepare_alignment()
        for name, shown in {
            "facebook/dinov2-large": "facebook/dinov2-large",
            "facebook/dinov2-base": "**facebook/dinov2-base**",
            "/data/teachers/dinov3": "**dinov3**",
        }.items():
            run.teacher_vectors._brings_vectors, run.teacher_vectors.teacher = False, name
            run.create_model_card()
            assert table_of(card_of(tmp_path), "setting")["teacher"][0] == shown

    def test_citations_and_versions(self, tmp_path):
        import transformers

        import hera_trainer

        run = lora_run(tmp_path)
        run.prepare_alignment()
        run.create_model_card()
        text = card_of(tmp_path).text
        for part in (
            "@article{caffagni2026mind,",
            "title   = {{hera-trainer: Head-Wise Representation Alignment for vision-language models}},",
            "author  = {{The hera-trainer contributors}},",
            f"version = {{{hera_trainer.__version__}}}",
            "@software{vonwerra2020trl,",
            "https://huggingface.co/papers/2606.23885",
            f"- hera-trainer: {hera_trainer.__version__}",
            f"- Transformers: {transformers.__version__}",
        ):
            assert part in text, part
        assert "{%" not in text and "None" not in text

    def test_precision(self, tmp_path):
        """Where nothing is cast, that of the weights that are trained."""
        for dtype, said in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
            run = trainer(tmp_path, max_steps=1, bf16=False)
            run.model.to(dtype)
            run.prepare_alignment()
            run.create_model_card()
            assert f"- Precision: {said}\n" in card_of(tmp_path).text
        run.args.bf16 = True
        run.create_model_card()
        assert "- Precision: bf16\n" in card_of(tmp_path).text

    def test_quantized_base(self, tmp_path):
        run = lora_run(tmp_path)
        run.prepare_alignment()
        run.model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        run.create_model_card()
        assert "trained on the base model in 4 bit (nf4)" in card_of(tmp_path).text


def test_code_of_the_card_works(tmp_path, monkeypatch):
    """The quick start, letter by letter, in a folder that holds what its names mean: of an adapter, of a model."""
    save_vlm("llava", tmp_path / "the-base")
    image_dataset(1)[0]["images"][0].save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    found = {}
    for name, lora in (("adapter", LoraConfig(r=4, target_modules="all-linear")), ("whole", None)):
        out = tmp_path / "somebody" / name
        run = HeRATrainer(
            str(tmp_path / "the-base"),
            config(out, max_steps=1, hub_model_id=f"somebody/{name}"),
            train_dataset=image_dataset(n=24, with_features=8),
            peft_config=lora,
        )
        run.train()
        run.save_model()
        (code,) = re.findall(r"```python\n(.+?)```", card_of(out).text, re.DOTALL)
        found[name] = {}
        exec(code, found[name])
    assert isinstance(found["adapter"]["model"], PeftModel)
    assert type(found["whole"]["model"]).__name__ == "LlavaForConditionalGeneration"
    for run in found.values():
        assert run["output"].shape[1] > run["inputs"]["input_ids"].shape[1]
