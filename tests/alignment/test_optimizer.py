"""The temperature is trained alike beside every optimizer, and its state goes with every checkpoint."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig
from runs import config, logged, trainer
from safetensors.torch import load_file
from tiny import build_vlm, image_dataset, save_vlm, sft_args
from transformers import BitsAndBytesConfig, TrainerCallback
from transformers.optimization import Adafactor, AdafactorSchedule
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import SFTConfig, SFTTrainer

from hera_trainer import HeRALoss, HeRATrainer
from hera_trainer.alignment.alignment import OBJECTIVE_FILE
from hera_trainer.alignment.optimizer import ObjectiveOptimizer, scheduled_rate
from hera_trainer.hub.files import publishable_files

STEPS, RATE, WARMUP = 5, 1e-2, 2


class Gradients(TrainerCallback):
    """Keeps the gradient of the log temperature before each step."""

    def __init__(self):
        self.values = []
        self.trainer = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.values.append(self.trainer.criterion.log_temperature.grad.item())


def adam(gradients, rates, beta1=0.9, beta2=0.999, epsilon=1e-8):
    """The log temperature after each step, by Kingma and Ba's Algorithm 1."""
    value, m, v, values = math.log(0.3), 0.0, 0.0, []
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        value -= rate * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + epsilon)
        value = max(value, math.log(0.01))
        values.append(value)
    return values


def linear(step):
    """Transformers' linear schedule with warm-up."""
    return RATE * (step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP))


def lora():
    return LoraConfig(target_modules=["q_proj", "o_proj"], r=4)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=RATE)


def own_rates(model):
    """As the Qwen-VL repositories have it: a rate for each part, the first one tiny."""
    tower = [p for name, p in model.named_parameters() if "vision" in name]
    rest = [p for name, p in model.named_parameters() if "vision" not in name]
    return torch.optim.AdamW([{"params": tower, "lr": 1e-7}, {"params": rest, "lr": 5e-3}], lr=RATE)


def frozen_first(model):
    tower = [p for name, p in model.named_parameters() if "vision" in name]
    rest = [p for name, p in model.named_parameters() if "vision" not in name]
    return torch.optim.AdamW([{"params": tower, "lr": 0.0}, {"params": rest, "lr": 5e-3}], lr=RATE)


def muon(model):
    """Takes matrices only."""
    return torch.optim.Muon([p for p in model.parameters() if p.requires_grad and p.ndim == 2], lr=RATE)


OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "own rates": own_rates, "frozen first": frozen_first, "muon": muon}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", ["trainer's", "create_optimizer", *OPTIMIZERS])
def test_adam_at_the_rate_of_the_schedule_beside_every_optimizer(tmp_path, optimizer, accumulation):
    gradients = Gradients()

    class Own(HeRATrainer):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = own_rates(self.model)
            return self.optimizer

    model, processor = build_vlm("llava")
    if optimizer == "muon":
        from peft import get_peft_model

        model = get_peft_model(model, lora())
    run = (Own if optimizer == "create_optimizer" else HeRATrainer)(
        model,
        config(
            tmp_path,
            max_steps=STEPS,
            learning_rate=RATE,
            warmup_steps=WARMUP,
            lr_scheduler_type="linear",
            gradient_accumulation_steps=accumulation,
        ),
        train_dataset=image_dataset(n=24, with_features=8),
        processing_class=processor,
        optimizers=(OPTIMIZERS[optimizer](model) if optimizer in OPTIMIZERS else None, None),
        callbacks=[gradients],
    )
    gradients.trainer = run
    run.train()
    expected = [math.exp(value) for value in adam(gradients.values, [linear(step) for step in range(STEPS)])]
    assert logged(run, "temperature") == pytest.approx(expected, rel=1e-5)
    assert abs(math.log(expected[-1] / 0.3)) > 1e-3
    owned = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert id(run.criterion.log_temperature) not in owned


def test_rate_of_layerwise_optimizers():
    """They keep an optimizer and a schedule for each parameter, behind one that does nothing."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    parts = {parameter: torch.optim.SGD([parameter], lr=0.5) for parameter in parameters}
    schedules = [torch.optim.lr_scheduler.LambdaLR(part, lambda step: 1 / (step + 1)) for part in parts.values()]
    optimizer = LayerWiseDummyOptimizer(optimizer_dict=parts, lr=0.5)
    assert scheduled_rate(0.2, optimizer) == pytest.approx(0.2)
    for part, schedule in zip(parts.values(), schedules, strict=True):
        part.step()
        schedule.step()
    assert scheduled_rate(0.2, optimizer) == pytest.approx(0.1)


def test_rate_on_a_plateau():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    assert scheduled_rate(0.2, optimizer) == pytest.approx(0.2)
    schedule.step(1.0)
    schedule.step(1.0)
    assert scheduled_rate(0.2, optimizer) == pytest.approx(0.02)


@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau", "greedy"])
def test_rate_beside_groups_with_rates_of_their_own(tmp_path, schedule):
    """As in the first step, so in a run that goes on."""

    class Own(HeRATrainer):
        def create_optimizer(self, *args, **kwargs):
            first, *rest = (p for p in self.model.parameters() if p.requires_grad)
            groups = [{"params": [first], "lr": 1e-5}, {"params": rest}]
            self.optimizer = torch.optim.AdamW(groups, lr=1e-3)
            return self.optimizer

        def training_step(self, *args, **kwargs):
            for group in self.optimizer.param_groups:  # as if it had come so far
                group["lr"] *= 0.5
            return super().training_step(*args, **kwargs)

    settings = {"lr_scheduler_type": schedule, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1}
    if schedule != "linear":
        settings |= {"eval_strategy": "steps", "eval_steps": 9, "eval_dataset": image_dataset(n=6, with_features=8)}
    settings |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 6}
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectiveOptimizer, "step", lambda self, learning_rate: taken.append(learning_rate))
        trainer(tmp_path, trainer_class=Own, max_steps=2, **settings).train()
        whole = list(taken)
        trainer(tmp_path, trainer_class=Own, max_steps=2, **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )
    assert whole[0] == pytest.approx(5e-4)
    if schedule != "greedy":  # which sets rates of its own where it goes on
        assert taken[2:] == pytest.approx(whole[1:])


@pytest.mark.parametrize("learned", [True, False])
def test_beside_an_optimizer_that_finds_its_own_rates(tmp_path, learned):
    model, processor = build_vlm("llava")
    optimizer = Adafactor(model.parameters(), lr=None, relative_step=True)
    run = HeRATrainer(
        model,
        config(tmp_path, max_steps=1, learning_rate=RATE, learn_temperature=learned),
        train_dataset=image_dataset(n=24, with_features=8),
        processing_class=processor,
        optimizers=(optimizer, AdafactorSchedule(optimizer)),
    )
    run.train()
    assert run.optimizer.optimizer is optimizer
    moved = math.log(run.criterion.temperature) - math.log(0.3)
    assert abs(moved) == pytest.approx(RATE if learned else 0.0, rel=1e-3, abs=1e-6)


class TestResumeAcrossSettings:
    """The optimizer's parameter groups are those of SFTTrainer, whatever is aligned."""

    KWARGS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "learning_rate": 1e-2}

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ({"alignment_weight": 0.0}, {}),
            ({}, {"alignment_weight": 0.0}),
            ({"learn_temperature": False}, {}),
            ({}, {"learn_temperature": False}),
        ],
    )
    def test_of_our_own(self, tmp_path, before, after):
        first = trainer(tmp_path, peft_config=lora(), **self.KWARGS, **before)
        first.train()
        kwargs = {**self.KWARGS, "max_steps": 3}
        second = trainer(tmp_path, peft_config=lora(), **kwargs, **after)
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert second.state.global_step == 3 and len(logged(second, "loss")) == 3
        if "alignment_weight" not in {**before, **after}:
            begin = first.criterion.temperature
            assert second.criterion.temperature == pytest.approx(begin, rel=2e-2 if not after else 1e-6)

    def test_another_temperature(self, tmp_path):
        """The checkpoint's goes on, as the record of the run cannot tell by itself."""
        fixed = {**self.KWARGS, "learn_temperature": False}
        trainer(tmp_path, peft_config=lora(), temperature=0.3, **fixed).train()
        second = trainer(tmp_path, peft_config=lora(), **{**fixed, "max_steps": 3}, temperature=0.07)
        with pytest.warns(UserWarning, match=r"the checkpoint's temperature, 0\.3, and not with .* set now, 0\.07"):
            second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert second.criterion.temperature == pytest.approx(0.3)

    def test_of_sft_trainer(self, tmp_path):
        model, processor = build_vlm("llava")
        args = sft_args(tmp_path, per_device_train_batch_size=6, **self.KWARGS)
        plain = SFTTrainer(
            model, SFTConfig(**args), train_dataset=image_dataset(n=24), processing_class=processor, peft_config=lora()
        )
        plain.train()
        run = trainer(tmp_path, peft_config=lora(), **{**self.KWARGS, "max_steps": 4})
        with pytest.warns(UserWarning, match="SFTTrainer wrote it"):
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert run.state.global_step == 4 and len(logged(run, "alignment_loss")) == 2


def test_saved_without_the_optimizer_too(tmp_path):
    kwargs = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True, "learning_rate": 1e-2}
    first = trainer(tmp_path, max_steps=2, **kwargs)
    first.train()
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    state = load_file(tmp_path / "checkpoint-2" / OBJECTIVE_FILE)
    assert state["log_temperature"] == first.criterion.log_temperature.item() != pytest.approx(math.log(0.3))
    second = trainer(tmp_path, max_steps=2, **kwargs)
    second.train(resume_from_checkpoint=True)
    assert second.criterion.log_temperature.item() == state["log_temperature"]


def test_saved_beside_the_result_for_those_who_evaluate_it_later(tmp_path, caplog):
    rows = image_dataset(n=12, seed=1, with_features=8)
    settings = {"save_strategy": "no", "learning_rate": 1e-2, "aligned_heads": ["L0H1", "L1H2"]}
    run = trainer(tmp_path, eval_dataset=rows, max_steps=3, **settings)
    run.train()
    trained = run.evaluate()["eval_alignment_loss"]
    run.save_model()
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]  # which loaders may look for
    later = trainer(tmp_path, eval_dataset=rows, **settings)
    later.model.load_state_dict(run.model.state_dict())
    assert later.evaluate()["eval_alignment_loss"] != pytest.approx(trained, abs=1e-6)
    assert f"they are taken by `trainer.alignment.load_objective({str(tmp_path)!r})`" in caplog.text
    later.alignment.load_objective(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not there' holds nothing that an alignment objective has learned"):
        later.alignment.load_objective(tmp_path / "not there")
    assert later.criterion.log_temperature.item() == run.criterion.log_temperature.item() != math.log(0.3)
    assert later.evaluate()["eval_alignment_loss"] == trained
    for number, learned in enumerate([False, True], start=1):  # it must not pass for these runs'
        run.save_model()
        trainer(tmp_path, max_steps=1, learn_temperature=learned, **settings).train()
        assert not (tmp_path / "hera_objective").exists() and len(list(tmp_path.glob("hera_objective*"))) == number


# --- Other parameters than the temperature ---------------------------------------------------------------------------


FEATURE = {"alignment_objective": "feature", "objective_learning_rate": 1e-2, "aligned_heads": ["L0H1", "L1H2"]}


def four_bit():
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return BitsAndBytesConfig(load_in_4bit=True, **settings)


@pytest.mark.parametrize("backbone", ["float32", "4 bit"])
def test_projectors_move_under_lora_and_are_no_part_of_the_adapter(tmp_path, backbone):
    """PEFT freezes what is part of a model; the projectors are not. Each of them moves at the objective's own rate."""
    save_vlm("llava", tmp_path / "base")
    quantized = {"quantization_config": four_bit()} if backbone == "4 bit" else {}
    args = config(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2, **FEATURE)
    rows = image_dataset(n=24, with_features=8)
    run = HeRATrainer(str(tmp_path / "base"), args, train_dataset=rows, peft_config=lora(), **quantized)
    run.prepare_alignment()
    before = {name: parameter.detach().clone() for name, parameter in run.criterion.named_parameters()}
    assert sorted(before) == ["first_bias", "first_weight", "second_bias", "second_weight"]
    assert before["first_weight"].shape[::2] == (2, 8)
    run.train()
    for name, parameter in run.criterion.named_parameters():
        moved = (parameter - before[name]).abs()
        assert (moved > 0).flatten(1).any(1).all(), name  # of both heads
        assert moved.max() <= 2 * 1.01e-2  # two steps of Adam at 1e-2
    saved = load_file(tmp_path / "run" / "checkpoint-2" / OBJECTIVE_FILE)
    assert all(torch.equal(saved[name], parameter) for name, parameter in run.criterion.named_parameters())
    run.save_model(str(tmp_path / "result"))
    adapter = load_file(tmp_path / "result" / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    assert not [name for name in publishable_files(tmp_path / "result") if "objective" in name]
    trained = dict(run.model.named_parameters())
    assert not {id(parameter) for parameter in run.criterion.parameters()} & set(map(id, trained.values()))


def test_a_resumed_run_goes_on_with_its_projectors(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **FEATURE}
    whole = trainer(tmp_path, peft_config=lora(), **settings)
    whole.train()
    resumed = trainer(tmp_path, peft_config=lora(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(resumed, "alignment_loss") == logged(whole, "alignment_loss")
    pairs = zip(whole.criterion.named_parameters(), resumed.criterion.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        assert torch.equal(a, b), name


class RunningMean(HeRALoss):
    """An objective that keeps something beside its parameters: here the mean of the teacher's vectors so far."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, heads, teacher, valid=None, queue=None):
        self.mean = 0.5 * self.mean + 0.5 * teacher.mean(0)
        self.seen += 1
        return super().forward(heads, teacher - self.mean, valid, queue)


def test_what_an_objective_keeps_goes_on_and_is_not_changed_by_evaluation(tmp_path):
    class Own(HeRATrainer):
        def create_criterion(self):
            return RunningMean(num_neighbors=3)

    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "logging_steps": 1, "trainer_class": Own}
    whole = trainer(tmp_path, **settings)
    whole.train()
    assert whole.criterion.seen == 6
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(resumed.criterion.mean, whole.criterion.mean) and resumed.criterion.seen == 6
    assert logged(resumed, "alignment_loss") == logged(whole, "alignment_loss")
    rows = image_dataset(n=12, seed=1, with_features=8)
    watched = trainer(tmp_path, eval_dataset=rows, eval_strategy="steps", eval_steps=1, **settings)
    watched.train()
    assert logged(watched, "eval_alignment_loss") and watched.criterion.seen == 6
    assert logged(watched, "alignment_loss") == logged(whole, "alignment_loss")


def test_a_checkpoint_of_another_objective_is_refused(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "aligned_heads": ["L0H1", "L1H2"]}
    trainer(tmp_path, **{**settings, "max_steps": 1}).train()
    other = trainer(tmp_path, **settings, alignment_objective="feature")
    with pytest.raises(ValueError, match="holds other parameters than those of FeatureLoss"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
