"""Models as people load them: auto classes, bare language models, PEFT in all its forms, tied weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import reference
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from reference import Recorder, assert_gradients_equal, step_gradients
from tiny import build_vlm, image_dataset, save_vlm, sft_args
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import AttentionHead, HeRAConfig, HeRATrainer, get_head_accessor, rank_heads
from hera_trainer.heads.capture import HeadCapture
from hera_trainer.heads.modes import without_adapters

WEIGHT = 5.0
HEADS = [AttentionHead(1, 3), AttentionHead(0, 1), AttentionHead(1, 0)]
LANGUAGE_MODEL = r".*language_model.*\.{}"
Wrap = Callable[[nn.Module], nn.Module]


def lora(**kwargs: Any) -> LoraConfig:
    """An adapter that does something from the start, with a scale other than 1."""
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": LANGUAGE_MODEL.format("(q_proj|o_proj)")}
    return LoraConfig(**{**defaults, "init_lora_weights": False, **kwargs})


def peft_model(*adapters: tuple[str, LoraConfig], active: str | list[str] | None = None, seed: int = 0) -> Wrap:
    def wrap(model: nn.Module) -> nn.Module:
        torch.manual_seed(seed)
        (name, config), *others = adapters
        wrapped = get_peft_model(model, config, adapter_name=name)
        for name, config in others:
            wrapped.add_adapter(name, config)
        with torch.no_grad():  # copies of modules and magnitudes that an adapter brings along begin as the model's own
            for parameter in (p for n, p in wrapped.named_parameters() if "modules_to_save" in n or "magnitude" in n):
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
        if active is not None:
            wrapped.base_model.set_adapter(active)
        return wrapped

    return wrap


def disabled(model: nn.Module) -> nn.Module:
    model = peft_model(("one", lora(modules_to_save=["linear_1"])))(model)
    model.base_model.disable_adapter_layers()
    return model


def merged(model: nn.Module) -> nn.Module:
    model = peft_model(("one", lora()))(model)
    model.merge_adapter()
    return model


SAVED = {"target_modules": LANGUAGE_MODEL.format("q_proj"), "modules_to_save": ["o_proj"]}
DORA = lora(use_dora=True, lora_dropout=0.3)

FORMS: dict[str, Wrap] = {
    "bare": lambda model: model,
    "LoRA": peft_model(("default", lora())),
    "rsLoRA under another name": peft_model(("vision", lora(use_rslora=True))),
    "DoRA with dropout": peft_model(("default", DORA)),
    "o_proj copied": peft_model(("default", lora(**SAVED))),
    "two adapters, the first active": peft_model(("vision", lora()), ("spare", lora(r=2)), active="vision"),
    "two adapters, the second active": peft_model(("spare", DORA), ("vision", lora(r=2)), active="vision"),
    "both active": peft_model(("one", lora()), ("two", lora(r=2, lora_alpha=3)), active=["one", "two"]),
    "a copy an adapter": peft_model(("spare", lora(**SAVED)), ("vision", lora(**SAVED)), active="vision"),
    "a copy of the inactive adapter": peft_model(
        ("spare", lora(**SAVED)), ("vision", lora(target_modules=SAVED["target_modules"])), active="vision"
    ),
    "disabled": disabled,
    "merged": merged,
}


def lora_weight(layer: nn.Module) -> Tensor:
    """What PEFT's documentation says a LoRA layer multiplies with, from its numbers alone."""
    weight = layer.base_layer.weight
    if layer.disable_adapters or layer.merged:
        return weight
    total = weight
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        rank = layer.r[name]
        scale = layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora[name] else rank)
        update = scale * layer.lora_B[name].weight @ layer.lora_A[name].weight
        if layer.use_dora[name]:
            norm = (weight + update).norm(dim=1).detach()  # section 4.3 of the DoRA paper: a constant in the gradient
            magnitude = layer.lora_magnitude_vector[name].weight
            total = total + (magnitude / norm)[:, None] * (weight + update) - weight
        else:
            total = total + update
    return total


def effective_weight(projection: nn.Module) -> Tensor:
    """Weight `[d_model, in_features]` that the projection uses now."""
    if isinstance(projection, ModulesToSaveWrapper):
        copies = [projection.modules_to_save[name] for name in projection.active_adapters]
        assert len(copies) <= 1
        return (copies[0] if copies and not projection.disable_adapters else projection.original_module).weight
    return lora_weight(projection) if hasattr(projection, "lora_A") else projection.weight


@pytest.fixture(autouse=True)
def own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "effective_weight", effective_weight)


def make_batch(processor: Any, n: int = 4) -> dict[str, Tensor]:
    return DataCollatorForVisionLanguageModeling(processor)(list(image_dataset(n=n)))


def read(model: nn.Module, batch: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Head vectors of a training forward, as the trainer reads them."""
    capture = HeadCapture(get_head_accessor(model), HEADS, "llava")
    with capture.attached():
        capture.start(mask)
        model(**batch)
        return capture.vectors().detach()


class TestHeadVectors:
    @pytest.mark.parametrize("form", FORMS)
    def test_are_those_of_the_weights_in_force(self, form: str) -> None:
        model, processor = build_vlm("llava", attention_bias=True)
        model, batch = FORMS[form](model).eval(), make_batch(processor)
        mask = reference.pooled_positions(batch, model)
        vectors = read(model, batch, mask)
        with torch.no_grad():
            _, expected = reference.head_vectors(model, batch, HEADS, num_heads=4)
        torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
        if form != "bare":  # the comparison above would notice an adapter that is left out
            with nullcontext() if form == "merged" else model.disable_adapter(), torch.no_grad():
                _, base = reference.head_vectors(model, batch, HEADS, num_heads=4)
            assert torch.equal(base, expected) == (form in ("disabled", "merged"))

    def test_dropout_does_not_reach_the_projection(self) -> None:
        """The input of the projection is that of the training forward, dropout and all; the projection has none."""
        model, processor = build_vlm("llava")
        model, batch = FORMS["DoRA with dropout"](model).train(), make_batch(processor)
        mask = reference.pooled_positions(batch, model)
        torch.manual_seed(5)
        vectors = read(model, batch, mask)
        torch.manual_seed(5)
        with torch.no_grad():
            _, expected = reference.head_vectors(model, batch, HEADS, num_heads=4)
        torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("form", ["two adapters, the second active", "a copy an adapter"])
    def test_an_inactive_adapter_contributes_nothing(self, form: str) -> None:
        model, processor = build_vlm("llava")
        model, batch = FORMS[form](model).eval(), make_batch(processor)
        mask = reference.pooled_positions(batch, model)
        before = read(model, batch, mask)
        for name, changes in ((".spare.", False), (".vision.", True)):
            with torch.no_grad():
                for parameter in (p for n, p in model.named_parameters() if name in n):
                    parameter.add_(0.1)
            assert torch.equal(read(model, batch, mask), before) != changes


def make_trainer(tmp_path: Any, model: nn.Module, processor: Any, **kwargs: Any) -> HeRATrainer:
    data = image_dataset(n=8, with_features=8)
    own = {name: kwargs.pop(name) for name in ("peft_config",) if name in kwargs}
    defaults = {"aligned_heads": [str(head) for head in HEADS], "num_neighbors": 3, "alignment_weight": WEIGHT}
    defaults |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    args = HeRAConfig(**sft_args(tmp_path, **{**defaults, "max_grad_norm": 0.0, "learning_rate": 1e-2, **kwargs}))
    trainer = HeRATrainer(model, args, train_dataset=data, processing_class=processor, **own)
    trainer._get_train_sampler = lambda *args: SequentialSampler(data)
    return trainer


def assert_step_is_exact(trainer: HeRATrainer) -> dict[str, Tensor]:
    recorder = Recorder(trainer)
    trainer.train()
    assert_gradients_equal(recorder.gradients, step_gradients(recorder, WEIGHT, "step", recorder.seeds), 5e-4)
    return recorder.gradients


class TestTraining:
    CONFIGS = {
        "LoRA": lora(),
        "rsLoRA": lora(use_rslora=True, target_modules="all-linear"),
        "DoRA with dropout": DORA,
        "o_proj copied": lora(**SAVED),
        "projector and LM head copied": lora(modules_to_save=["multi_modal_projector", "lm_head"]),
    }

    @pytest.mark.parametrize("name", CONFIGS)
    def test_peft_config(self, tmp_path: Any, name: str) -> None:
        model, processor = build_vlm("llava")
        trainer = make_trainer(tmp_path, model, processor, peft_config=copy.deepcopy(self.CONFIGS[name]))
        assert_step_is_exact(trainer)
        trainer.save_model()
        self.check_saved(trainer, tmp_path, processor)

    @pytest.mark.parametrize(
        ("form", "trained"),
        [
            ("rsLoRA under another name", "vision"),
            ("two adapters, the first active", "vision"),
            ("two adapters, the second active", "vision"),
            ("a copy an adapter", "vision"),
            ("a copy of the inactive adapter", "vision"),
        ],
    )
    def test_ready_made_models(self, tmp_path: Any, form: str, trained: str) -> None:
        """Only the active adapter moves, and what is saved computes the same in plain PEFT."""
        model, processor = build_vlm("llava")
        model = FORMS[form](model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = make_trainer(tmp_path, model, processor)
        gradients = assert_step_is_exact(trainer)
        assert all(f".{trained}." in name for name in gradients if name != "log_temperature")
        moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved and all(f".{trained}." in name for name in moved)
        assert trainer.model.active_adapters == [trained]
        trainer.save_model()
        self.check_saved(trainer, tmp_path / trained, processor)

    @staticmethod
    def check_saved(trainer: HeRATrainer, folder: Any, processor: Any) -> None:
        loaded = PeftModel.from_pretrained(build_vlm("llava")[0], folder).eval()
        batch = make_batch(processor)
        with torch.no_grad():
            ours, theirs = trainer.model.eval()(**batch).logits, loaded(**batch).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("embeddings", ["trained", "frozen"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_weights(self, tmp_path: Any, tied: bool, embeddings: str) -> None:
        model, processor = build_vlm("llava")
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = tied
        model.tie_weights()
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        model.get_input_embeddings().weight.requires_grad_(embeddings == "trained")
        gradients = assert_step_is_exact(make_trainer(tmp_path, model, processor))
        names = {name for name in gradients if "embed_tokens" in name or "lm_head" in name}
        trained = {"model.language_model.embed_tokens.weight"} if embeddings == "trained" else set()
        assert names == trained | (set() if tied else {"lm_head.weight"})


class TestLoading:
    """A saved checkpoint through each class that loads it: the right modules are found and heads score the same."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> str:
        path = tmp_path_factory.mktemp("models")
        model, processor = build_vlm("llava")
        save_vlm("llava", path / "vlm")
        text = LlamaForCausalLM(model.config.text_config)
        text.model.load_state_dict(model.model.language_model.state_dict())
        text.save_pretrained(path / "text")
        processor.tokenizer.save_pretrained(path / "text")
        return str(path)

    CLASSES: dict[str, tuple[Any, str, Callable[[nn.Module], nn.Module]]] = {
        "AutoModelForImageTextToText": (AutoModelForImageTextToText, "vlm", lambda m: m.model.language_model),
        "LlavaForConditionalGeneration": (LlavaForConditionalGeneration, "vlm", lambda m: m.model.language_model),
        "AutoModel": (AutoModel, "vlm", lambda m: m.language_model),
        "AutoModelForCausalLM": (AutoModelForCausalLM, "text", lambda m: m.model),
        "AutoModel of a language model": (AutoModel, "text", lambda m: m),
    }

    @pytest.mark.parametrize("wrapped", [False, True])
    @pytest.mark.parametrize("name", CLASSES)
    def test_heads_and_ranking(self, folder: str, name: str, wrapped: bool) -> None:
        data = image_dataset(n=30, with_features=8)
        source, processor = build_vlm("llava")
        expected = rank_heads(source, processor, data, k=3, progress=False)
        loader, kind, decoder = self.CLASSES[name]
        model = loader.from_pretrained(f"{folder}/{kind}")
        layers = decoder(model).layers
        model = peft_model(("vision", lora(target_modules=["o_proj"])))(model) if wrapped else model
        accessor = get_head_accessor(model)
        assert accessor.decoder is decoder(model.get_base_model() if wrapped else model)
        assert [accessor.projection(i) for i in range(3)] == [layer.self_attn.o_proj for layer in layers]
        with without_adapters(model):
            ranking = rank_heads(model, processor.tokenizer if kind == "text" else processor, data, k=3, progress=False)
        assert torch.equal(ranking.scores, expected.scores)
        assert torch.equal(ranking.layer_scores, expected.layer_scores)


class TestRankingWithAdapters:
    @pytest.mark.parametrize("form", [form for form in FORMS if form not in ("bare", "disabled", "merged")])
    def test_adapters_are_off_and_then_as_before(self, tmp_path: Any, form: str) -> None:
        model, processor = build_vlm("llava")
        settings = {"aligned_heads": None, "num_aligned_heads": 3, "seed": 11}
        bare = make_trainer(tmp_path / "bare", build_vlm("llava")[0], processor, **settings)
        bare.prepare_alignment()
        model = FORMS[form](model)
        for name, parameter in model.named_parameters():  # an adapter that is trained in part
            if "layers.2." in name:
                parameter.requires_grad_(False)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        active, training = model.active_adapters, [module.training for module in model.modules()]
        trainer = make_trainer(tmp_path, model, processor, **settings)
        trainer.prepare_alignment()
        assert torch.equal(trainer.head_ranking.scores, bare.head_ranking.scores)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert model.active_adapters == active
        assert [module.training for module in model.modules()] == training
        layers = get_head_accessor(model).layers
        assert not any(getattr(layer.self_attn.o_proj, "disable_adapters", False) for layer in layers)

    def test_the_adapters_matter_here(self) -> None:
        """A ranking with an adapter on is another one."""
        data = image_dataset(n=30, with_features=8)
        model, processor = build_vlm("llava")
        model = FORMS["LoRA"](model)
        on = rank_heads(model, processor, data, k=3, progress=False)
        with without_adapters(model):
            off = rank_heads(model, processor, data, k=3, progress=False)
        assert not torch.equal(on.scores, off.scores)
