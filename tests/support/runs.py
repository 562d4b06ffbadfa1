"""What tests of the trainer share: small runs, and what is looked at afterwards."""

from __future__ import annotations

import torch
from tiny import build_vlm, image_dataset, sft_args
from transformers import TrainerCallback

from hera_trainer import HeRAConfig, HeRATrainer
from hera_trainer.alignment.window import StepWindow


class NoStep(TrainerCallback):
    """Fails the test if training begins."""

    def on_step_begin(self, args, state, control, **kwargs):
        raise AssertionError("a training step began")


def config(tmp_path, **kwargs):
    defaults = {
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 1,
        "num_neighbors": 3,
        "num_aligned_heads": 3,
        "learning_rate": 1e-3,
    }
    return HeRAConfig(**sft_args(tmp_path, **{**defaults, **kwargs}))


def trainer(tmp_path, family="llava", dataset=None, trainer_class=HeRATrainer, peft_config=None, **kwargs):
    model, processor = build_vlm(family)
    own = {
        name: kwargs.pop(name) for name in ("teacher", "head_ranking", "eval_dataset", "callbacks") if name in kwargs
    }
    return trainer_class(
        model,
        config(tmp_path, **kwargs),
        train_dataset=image_dataset(n=24, with_features=8) if dataset is None else dataset,
        processing_class=processor,
        peft_config=peft_config,
        **own,
    )


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_parameters(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def hooks_of(model):
    """Names of the modules in which the model's hooks are defined (other libraries place some too)."""
    found = []
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            found += [getattr(hook, "func", hook).__module__ for hook in hooks.values()]
    return sorted(found)


def our_hooks_of(model):
    return [name for name in hooks_of(model) if name.startswith("hera_trainer")]


class HookWatch(TrainerCallback):
    """Keeps how many hooks of ours there were at the end of each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.counts.append(len(our_hooks_of(model)))


def watch_passes(monkeypatch):
    """A list that the relative difference between the first pass and the training pass is added to, whenever a run
    looks at it."""
    seen = []
    original = StepWindow.check

    def check(self, heads, dtype):
        start = self.starts[self.position]
        first = self.heads[:, start : start + heads.shape[1]]
        seen.append(((first - heads.detach()).norm() / first.norm()).item())
        return original(self, heads, dtype)

    monkeypatch.setattr(StepWindow, "check", check)
    return seen


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
