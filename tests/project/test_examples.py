"""The training scripts in examples/, run on tiny models; their own loop gives the gradients of HeRATrainer."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel
from reference import Recorder, assert_gradients_equal
from runs import assert_same_parameters, logged, parameters
from runs import trainer as small_trainer
from safetensors.torch import load_file
from tiny import image_dataset, save_tiny_dinov2, save_vlm, sft_args
from transformers import AutoModelForImageTextToText, TrainerCallback, TrainingArguments

from hera_trainer import Alignment, Contrast, HeadRanking, HeRALoss, read_run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of examples/ as a module, for this test alone."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a teacher and a data set."""
    folder = tmp_path_factory.mktemp("examples")
    save_vlm("llava", folder / "model")
    save_tiny_dinov2(folder / "teacher")
    image_dataset(n=24).save_to_disk(folder / "data")
    return folder


# --- A loop of one's own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_own_loop_has_the_gradients_of_the_trainer(tmp_path: Path, example: Any, family: str, accumulation: int):
    """Language-model loss, alignment loss and temperature, for the batches of one optimizer step of HeRATrainer."""
    weight = 5.0
    trainer = small_trainer(
        tmp_path,
        family,
        alignment_weight=weight,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
    )
    trainer.model_accepts_loss_kwargs = True  # of Qwen2.5-VL, the loss over all tokens of the step, as of the others
    recorder = Recorder(trainer)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "lm_loss" in entry)

    model, criterion = recorder.model.train(), HeRALoss(num_neighbors=trainer.args.num_neighbors)
    accelerator = Accelerator(cpu=True)
    alignment = Alignment(model, criterion, trainer.aligned_heads, weight=weight, accelerator=accelerator)
    batches = copy.deepcopy(recorder.batches)
    with alignment.attached():
        logs = example("custom_loop").train_step(accelerator, model, batches, alignment)

    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients["log_temperature"] = criterion.log_temperature.grad
    assert set(gradients) == set(recorder.gradients)
    assert_gradients_equal(gradients, recorder.gradients, tolerance=1e-4)
    # The trainer logs the temperature after its step, the loop takes none.
    assert logs.pop("temperature") == pytest.approx(trainer.args.initial_temperature)
    assert logs == pytest.approx({name: entry[name] for name in logs}, rel=1e-4)


def flags(parts: Path, out: Path, **others: Any) -> list[str]:
    """What both scripts with a loop take, and others."""
    settings = {
        **{"model": parts / "model", "dataset": parts / "data", "teacher": parts / "teacher", "output_dir": out},
        **{"num_neighbors": 3, "num_heads": 3, "ranking_samples": 24},
        **others,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def arguments(parts: Path, out: Path, **others: Any) -> list[str]:
    return ["--cpu", *flags(parts, out, **{"steps": 4, "batch_size": 4, "accumulation": 3, **others})]


def test_own_loop_as_a_script(parts: Path, tmp_path: Path, example: Any) -> None:
    found = example("custom_loop").main(arguments(parts, tmp_path, learning_rate=1e-2))
    assert len(found["log"]) == 4
    assert found["log"][-1]["lm_loss"] < found["log"][0]["lm_loss"]
    assert 0 <= found["before"] <= 1 and 0 <= found["after"] <= 1
    ranking = HeadRanking.load(tmp_path / "head_ranking.json")
    assert ranking.select("worst", 3) == found["heads"]
    base = AutoModelForImageTextToText.from_pretrained(parts / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path)
    trained = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert any(p.abs().max() > 0 for p in trained)


def test_own_loop_learns_the_alignment(parts: Path, tmp_path: Path, example: Any) -> None:
    found = example("custom_loop").main(arguments(parts, tmp_path, weight=10, learning_rate=2e-2, steps=10))
    assert found["log"][-1]["alignment_loss"] < found["log"][0]["alignment_loss"]


def test_own_loop_on_too_little_data(parts: Path, tmp_path: Path, example: Any) -> None:
    with pytest.raises(ValueError, match="less than one optimizer step"):
        example("custom_loop").main(arguments(parts, tmp_path, accumulation=7))


# --- A plain Trainer -------------------------------------------------------------------------------------------------


class Seeded(TrainerCallback):
    """Draws the same dropout in every trainer."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.manual_seed(1)


class Gradients(TrainerCallback):
    """Keeps the gradients of the last optimizer step."""

    def __init__(self, log_temperature: torch.Tensor) -> None:
        self.log_temperature = log_temperature

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = [*model.named_parameters(), ("log_temperature", self.log_temperature)]
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "tuning", "size", "accumulation"),
    [
        ("llava", "full", 1, 8),
        ("llava", "full", 2, 4),
        ("llava", "full", 4, 2),
        ("llava", "lora_dropout", 4, 2),
        ("llava", "lora_dropout", 8, 1),
        ("qwen2_5_vl", "full", 2, 4),  # a mean of means is its language-model loss
        ("qwen2_5_vl", "lora_dropout", 4, 2),
    ],
)
def test_plain_trainer_has_the_gradients_of_the_trainer(
    tmp_path: Path, example: Any, family: str, tuning: str, size: int, accumulation: int
) -> None:
    """Of all parameters and the temperature, for the same rows; and it logs what HeRATrainer logs."""
    module, rows = example("plain_trainer"), image_dataset(n=8, with_features=8)
    shared = {
        **{"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1},
        **{"train_sampling_strategy": "sequential", "max_grad_norm": 1e6, "learning_rate": 1e-3},
    }
    # Both matrices of the adapters are random, so that each has a gradient.
    lora = LoraConfig(target_modules="all-linear", lora_dropout=0.2, init_lora_weights=False)
    reference = small_trainer(
        *(tmp_path, family, rows),
        peft_config=None if tuning == "full" else lora,
        callbacks=[Seeded()],
        alignment_weight=5.0,
        **shared,
    )
    recorder = Recorder(reference)
    reference.train()

    settings = {**sft_args(tmp_path / "plain", **shared), "remove_unused_columns": False}
    del settings["max_length"]  # of SFTTrainer's collator
    criterion = HeRALoss(num_neighbors=3)
    keeps = Gradients(criterion.log_temperature)
    plain = module.AlignedTrainer(
        *(recorder.model, TrainingArguments(**settings)),
        data_collator=lambda batch: module.collate(batch, reference.processing_class),
        train_dataset=rows.with_format(None),
        callbacks=[Seeded(), keeps],
        heads=reference.aligned_heads,
        criterion=criterion,
        weight=5.0,
    )
    plain.train()
    assert set(keeps.gradients) == set(recorder.gradients)
    assert_gradients_equal(keeps.gradients, recorder.gradients, tolerance=1e-4)
    for name in ("loss", "grad_norm", "lm_loss", "alignment_loss", "alignment_pool", "temperature"):
        (entry,) = logged(plain, name)
        assert [entry] == pytest.approx(logged(reference, name), rel=1e-4), name
    assert criterion.log_temperature.item() == pytest.approx(reference.criterion.log_temperature.item(), rel=1e-5)


def plain_arguments(parts: Path, out: Path, **others: Any) -> list[str]:
    settings = {
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 2},
        **{"learning_rate": 1e-2, "weight": 1.0, "logging_steps": 1, "report_to": "none", "use_cpu": True},
        **{"disable_tqdm": True, "dataloader_pin_memory": False, **others},
    }
    return flags(parts, out, **settings)


def test_plain_trainer_as_a_script(parts: Path, tmp_path: Path, example: Any) -> None:
    """It learns, evaluates the language-model loss, and goes on from a checkpoint as if it had not stopped."""
    main = example("plain_trainer").main
    whole = main(plain_arguments(parts, tmp_path))
    for name in ("loss", "alignment_loss"):
        assert logged(whole, name)[-1] < logged(whole, name)[0]
    resumed = main(plain_arguments(parts, tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2"))
    assert resumed.alignment.heads == whole.alignment.heads
    for name in ("loss", "lm_loss", "alignment_loss", "temperature"):
        assert logged(resumed, name) == logged(whole, name) and len(logged(whole, name)) == 4
    assert_same_parameters(parameters(resumed.model), parameters(whole.model))
    assert torch.equal(resumed.alignment.criterion.log_temperature, whole.alignment.criterion.log_temperature)

    rows = whole.train_dataset.select(range(8))
    batch = whole.data_collator(list(rows))
    del batch["teacher_features"]
    with torch.no_grad():
        expected = whole.model.eval()(**batch).loss.item()
    assert whole.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    base = AutoModelForImageTextToText.from_pretrained(parts / "model")
    saved = parameters(PeftModel.from_pretrained(base, tmp_path))
    assert_same_parameters(saved, {name: p.detach() for name, p in whole.model.named_parameters()})


# --- An objective of one's own ---------------------------------------------------------------------------------------


def test_own_objective_by_its_definition(example: Any) -> None:
    criterion = example("own_objective").DistanceLoss()
    generator = torch.Generator().manual_seed(0)
    heads, teacher = torch.randn(2, 7, 6, generator=generator), torch.randn(7, 4, generator=generator)
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]

    def relative(x: torch.Tensor) -> dict[tuple[int, int], float]:
        distances = {(i, j): (x[i] - x[j]).norm().item() for i, j in pairs}
        mean = sum(distances.values()) / len(pairs)
        return {pair: distance / mean for pair, distance in distances.items()}

    target, total = relative(teacher), 0.0
    for head in heads:
        for pair, distance in relative(head).items():
            error = abs(distance - target[pair])
            total += 0.5 * error**2 if error < 1 else error - 0.5
    terms = criterion(heads, teacher)
    assert terms["distances"].item() == pytest.approx(total / (2 * 7 * 7), rel=1e-4)  # those with themselves are zero
    assert terms["scale"] == 0


def test_own_objective_leaves_samples_and_small_pools_out(example: Any) -> None:
    criterion = example("own_objective").DistanceLoss()
    heads, teacher = torch.randn(2, 8, 6, requires_grad=True), torch.randn(8, 4)
    valid = torch.tensor([True, True, False, True, True, True, False, True])
    whole, part = criterion(heads, teacher, valid), criterion(heads[:, valid], teacher[valid])
    torch.testing.assert_close(whole["distances"], part["distances"])
    small = criterion(heads, teacher, torch.arange(8) < 2)
    assert small == 0 and torch.autograd.grad(small, heads)[0].abs().sum() == 0
    pool = Contrast(criterion)(heads, teacher, valid)
    (expected,) = torch.autograd.grad(whole["distances"], heads)
    torch.testing.assert_close(pool.heads_grad, expected)
    assert pool.samples == 6


def test_own_objective_from_the_command_line(parts: Path, tmp_path: Path, example: Any, monkeypatch: Any) -> None:
    """It is found by its name, learned, and its terms and its parameter are logged and saved."""
    module = example("own_objective")
    words = {"model_name_or_path": parts / "model", "dataset_name": parts / "data", "output_dir": tmp_path}
    words |= {"max_steps": 8, "logging_steps": 1, "save_steps": 8, "alignment_weight": 10, "learning_rate": 2e-2}
    words |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "bf16": False, "use_cpu": True}
    words |= {"teacher_model_name_or_path": parts / "teacher", "aligned_heads": "L0H1", "report_to": "none"}
    words |= {"alignment_objective": "distances", "disable_tqdm": True}
    module.sft.main([word for name, value in words.items() for word in (f"--{name}", str(value))])
    run = read_run(tmp_path)
    (_, losses), (_, distances), (_, scale) = (
        run.curve(name) for name in ("alignment_loss", "alignment_loss/distances", "alignment_loss/scale")
    )
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert [a + b for a, b in zip(distances, scale, strict=True)] == pytest.approx(losses, rel=1e-4)
    assert load_file(tmp_path / "checkpoint-8" / "hera_objective.safetensors")["log_scale"] != 0
