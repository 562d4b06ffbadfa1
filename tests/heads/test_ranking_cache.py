"""A cached ranking is taken for what it was computed from, and for nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from runs import config
from tiny import build_vlm, image_dataset
from tokenizers.normalizers import Replace

from hera_trainer import HeadAccessor, HeadRanking, HeRATrainer, decoder_accessor, rank_heads
from hera_trainer.common.digest import weights_digest
from hera_trainer.heads import registry


def trainer(folder, model=None, processing_class=None, train_dataset=None) -> HeRATrainer:
    if model is None:
        model, processor = build_vlm("llava")
    if train_dataset is None:
        train_dataset = image_dataset(n=24, with_features=8)
    processor = processor if processing_class is None else processing_class
    return HeRATrainer(model, config(folder), train_dataset=train_dataset, processing_class=processor)


def rank_of(run: HeRATrainer, model: torch.nn.Module | None = None, **settings) -> HeadRanking:
    """Computed anew."""
    args = run.args
    return rank_heads(
        run.model if model is None else model,
        run.processing_class,
        run.train_dataset,
        k=args.num_neighbors,
        num_samples=args.ranking_num_samples,
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
        progress=False,
        **settings,
    )


def test_cache_notices_a_rewritten_head(tmp_path):
    """Also in the columns of a matrix whose number of rows is a multiple of 64."""
    runs = []
    for name in "ab":
        model, processor = build_vlm("llava", hidden_size=64)
        if runs:
            with torch.no_grad():
                model.get_decoder().layers[0].self_attn.o_proj.weight[:, 16:32].mul_(torch.rand(64, 16))
        runs.append(trainer(tmp_path / name, model=model, processing_class=processor))
        runs[-1].prepare_alignment()
    expected = rank_of(runs[1])
    assert torch.equal(runs[1].head_ranking.scores, expected.scores)
    assert not torch.equal(runs[0].head_ranking.scores, expected.scores)


@pytest.mark.parametrize(("divisor", "first"), [(2, 0), (1, 1)], ids=["number of heads", "a layer without"])
def test_cache_notices_a_corrected_accessor(tmp_path, monkeypatch, divisor, first):
    def mistaken(model):
        right = decoder_accessor(model)
        attentions = {i: layer.self_attn for i, layer in enumerate(right.layers) if i >= first}
        projections = {i: attention.o_proj for i, attention in attentions.items()}
        heads = {i: right.num_heads(i) // divisor for i in projections}
        return HeadAccessor(right.decoder, right.layers, attentions, projections, heads)

    runs = []
    for name, accessor in (("a", mistaken), ("b", lambda model: decoder_accessor(model))):
        monkeypatch.setitem(registry._FACTORIES, "llava", accessor)
        runs.append(trainer(tmp_path / name))
        runs[-1].prepare_alignment()
    expected = rank_of(runs[1])
    assert torch.equal(runs[1].head_ranking.scores, expected.scores)
    assert not torch.equal(runs[0].head_ranking.scores, expected.scores)


def test_cache_tells_tokenizers_apart(tmp_path):
    first = trainer(tmp_path / "a")
    first.prepare_alignment()
    model, processor = build_vlm("llava")
    processor.tokenizer.backend_tokenizer.normalizer = Replace("e", "a")
    second = trainer(tmp_path / "b", model=model, processing_class=processor)
    second.prepare_alignment()
    expected = rank_of(second)
    assert torch.equal(second.head_ranking.scores, expected.scores)
    assert not torch.equal(first.head_ranking.scores, expected.scores)


def test_cache_tells_texts_apart_that_have_one_fingerprint(tmp_path):
    """A fingerprint comes from a function, not from what it reads."""
    runs = []
    for name, shift in (("a", 0), ("b", 7)):
        dataset = image_dataset(n=24, with_features=8)
        texts = dataset["completion"][:]
        turned = dataset.remove_columns("completion").add_column("completion", texts[shift:] + texts[:shift])
        turned._fingerprint = "0123456789abcdef"
        runs.append(trainer(tmp_path / name, train_dataset=turned))
        runs[-1].prepare_alignment()
    expected = rank_of(runs[1])
    assert torch.equal(runs[1].head_ranking.scores, expected.scores)
    assert not torch.equal(runs[0].head_ranking.scores, expected.scores)


def test_cache_tells_configurations_apart(tmp_path):
    """Equal weights compute otherwise under another one."""
    runs = [trainer(tmp_path / "a")]
    model, processor = build_vlm("llava", rope_parameters={"rope_type": "default", "rope_theta": 3.0})
    runs.append(trainer(tmp_path / "b", model=model, processing_class=processor))
    assert weights_digest(runs[0].model.get_decoder()) == weights_digest(model.get_decoder())
    for run in runs:
        run.prepare_alignment()
    assert torch.equal(runs[1].head_ranking.scores, rank_of(runs[1]).scores)
    assert not torch.equal(runs[0].head_ranking.scores, runs[1].head_ranking.scores)


def test_a_cached_ranking_has_the_names_of_this_run(tmp_path):
    runs = []
    for name, fingerprint in (("a", "0123456789abcdef"), ("b", "fedcba9876543210")):
        model, processor = build_vlm("llava")
        model.config.name_or_path = f"models/{name}"
        dataset = image_dataset(n=24, with_features=8)
        dataset._fingerprint = fingerprint
        runs.append(trainer(tmp_path / name, model=model, processing_class=processor, train_dataset=dataset))
        runs[-1].prepare_alignment()
    assert torch.equal(runs[0].head_ranking.scores, runs[1].head_ranking.scores)
    assert [run.head_ranking.model for run in runs] == ["models/a", "models/b"]
    assert [run.head_ranking.dataset_fingerprint for run in runs] == ["0123456789abcdef", "fedcba9876543210"]


@pytest.mark.parametrize("off", [False, True])
def test_injected_adapters_are_off_while_ranking(tmp_path, off):
    """Those of a model that is no `PeftModel`; the bare model's ranking is cached under the same key."""
    model, processor = build_vlm("llava")
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False, modules_to_save=["embed_tokens"])
    inject_adapter_in_model(config, model)
    with torch.no_grad():
        model.get_input_embeddings().modules_to_save["default"].weight.mul_(-1)
    if off:
        model.get_decoder().layers[1].self_attn.q_proj.enable_adapters(False)
    model.get_decoder().layers[2].self_attn.q_proj.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    adapted = trainer(tmp_path / "a", model=model, processing_class=processor)
    adapted.prepare_alignment()
    bare = trainer(tmp_path / "b")
    assert torch.equal(adapted.head_ranking.scores, rank_of(bare).scores)
    assert not torch.equal(adapted.head_ranking.scores, rank_of(adapted).scores)  # its adapters are on again
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.get_decoder().layers[1].self_attn.q_proj.disable_adapters is off
    assert not model.get_decoder().layers[0].self_attn.q_proj.disable_adapters
    assert not model.get_input_embeddings().disable_adapters
    bare.prepare_alignment()
    assert torch.equal(bare.head_ranking.scores, adapted.head_ranking.scores)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_adapters_that_hold_a_part_of_the_base_model_are_on_while_ranking(tmp_path, init):
    """PiSSA and its like take out of the base weights what the adapter adds: without it, there is half a model."""
    model, processor = build_vlm("llava")
    run = trainer(tmp_path / "a", model=model, processing_class=processor)
    lora = LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=init)
    adapted = HeRATrainer(
        build_vlm("llava")[0],
        config(tmp_path / "b"),
        train_dataset=image_dataset(n=24, with_features=8),
        processing_class=processor,
        peft_config=lora,
    )
    for each in (run, adapted):
        each.prepare_alignment()
    torch.testing.assert_close(adapted.head_ranking.scores, run.head_ranking.scores)
    assert adapted.aligned_heads == run.aligned_heads
    with torch.no_grad():
        layer = adapted.model.get_base_model().get_decoder().layers[0].self_attn.q_proj
        layer.lora_B["default"].weight.mul_(-3)
    again = HeRATrainer(
        adapted.model, config(tmp_path / "c"), train_dataset=run.train_dataset, processing_class=processor
    )
    again.prepare_alignment()  # another model, which the cache tells apart
    assert torch.equal(again.head_ranking.scores, rank_of(again).scores)


def test_merged_adapters_are_off_while_ranking_and_merged_again(tmp_path):
    model, processor = build_vlm("llava")
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model)
    layer = model.get_decoder().layers[0].self_attn.q_proj
    layer.merge()
    weight = layer.base_layer.weight.clone()
    run = trainer(tmp_path / "a", model=model, processing_class=processor)
    run.prepare_alignment()
    assert torch.allclose(run.head_ranking.scores, rank_of(trainer(tmp_path / "b")).scores)
    assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(layer.base_layer.weight, weight)


def test_cache_tells_clipping_apart(tmp_path):
    runs = []
    for name, quantile in (("a", None), ("b", 0.7), ("c", 0.7)):
        model, processor = build_vlm("llava")
        settings = config(tmp_path / name, ranking_clip_quantile=quantile)
        rows = image_dataset(n=24, with_features=8)
        runs.append(HeRATrainer(model, settings, train_dataset=rows, processing_class=processor))
        runs[-1].prepare_alignment()
    expected = rank_of(runs[1], clip_quantile=0.7)
    for run in runs[1:]:
        assert torch.equal(run.head_ranking.scores, expected.scores)
        assert run.head_ranking.clip_quantile == 0.7
        assert run.head_ranking.null_p95 == expected.null_p95
    assert not torch.equal(runs[0].head_ranking.scores, expected.scores)
    assert runs[0].head_ranking.clip_quantile is None
