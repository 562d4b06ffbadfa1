"""Every image-text-to-text type that transformers lists and the package knows: where its heads are, and that they are
right."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import transformers
from datasets import Dataset
from families import ALL_FAMILIES
from model_zoo import (
    ADDED,
    ALL_TYPES,
    SIDE_BY_SIDE,
    TRANSFORMERS,
    build,
    expected_heads,
    known_types,
    layers_without_output,
    projections,
    text_inputs,
)
from model_zoo_configs import FIRST_SPECIAL_TOKEN
from packaging.version import Version
from supported_models import NOT_TRAINED, PAGE, page_rows, page_version, row, uses
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hera_trainer.heads.accessor import HeadAccessor
from hera_trainer.heads.capture import HeadCapture
from hera_trainer.heads.checks import check_decoder, check_projections
from hera_trainer.heads.head import AttentionHead, DecoderLayer
from hera_trainer.heads.projection import project_heads, projection_offset
from hera_trainer.heads.rank import rank_heads, rank_samples
from hera_trainer.heads.registry import get_head_accessor
from hera_trainer.heads.samples import Samples

LANGUAGE_MODELS = """
    CohereForCausalLM Cohere2ForCausalLM DeepseekV3ForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM GemmaForCausalLM
    Gemma2ForCausalLM Gemma3ForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM GraniteForCausalLM Lfm2ForCausalLM
    LlamaForCausalLM MistralForCausalLM MixtralForCausalLM NemotronHForCausalLM Olmo2ForCausalLM OPTForCausalLM
    PersimmonForCausalLM PhiForCausalLM Phi3ForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM Qwen3_5ForCausalLM
    Qwen3MoeForCausalLM SmolLM3ForCausalLM StableLmForCausalLM
""".split()


@lru_cache(maxsize=1)  # the tests of one type follow each other
def model_of(model_type: str) -> nn.Module:
    return build(model_type)


# The tests that run the whole model, not its text decoder alone.
RUNNING = (
    "test_contributions_add_up_in_a_forward_pass",
    "test_the_loss_on_captured_heads_has_the_gradient_of_one_without_hooks",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        metafunc.parametrize("model_type", known_types(metafunc.definition.name in RUNNING), scope="module")


def sum_of_contributions(accessor: HeadAccessor, layer: int, x: Tensor) -> Tensor:
    """What all heads of a layer write, and the bias: `[..., d_model]`."""
    heads, projection = accessor.num_heads(layer), accessor.projection(layer)
    parts = project_heads(projection, x.reshape(-1, heads, accessor.head_dim(layer)), range(heads))
    return (parts.sum(1) + projection_offset(projection)).reshape(*x.shape[:-1], -1)


def test_every_head_is_found(model_type: str) -> None:
    model = model_of(model_type)
    accessor = get_head_accessor(model)
    assert {i: (accessor.num_heads(i), accessor.head_dim(i)) for i in accessor.layers_with_heads} == expected_heads(
        model_type
    )
    assert {i: accessor.projection(i) for i in accessor.layers_with_heads} == projections(model_type, model)


@torch.no_grad()
def test_contributions_add_up_in_a_forward_pass(model_type: str) -> None:
    model = model_of(model_type)
    accessor = get_head_accessor(model)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    handles = [
        accessor.projection(layer).register_forward_hook(lambda m, args, out, i=layer: seen.update({i: (args[0], out)}))
        for layer in accessor.layers_with_heads
    ]
    try:
        model(**text_inputs(model_type, model))
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen) == accessor.layers_with_heads
    for layer, (x, out) in seen.items():
        torch.testing.assert_close(sum_of_contributions(accessor, layer, x), out, rtol=1e-4, atol=1e-5)


def test_the_decoder_runs_on_text_alone_unless_it_says_not(model_type: str) -> None:
    model = model_of(model_type)
    accessor = get_head_accessor(model)
    if accessor.needs:
        with pytest.raises((TypeError, ValueError), match=r"decoder_input_ids|encoder_hidden_states|pixel_values"):
            accessor.decoder(input_ids=torch.ones(1, 3).long(), attention_mask=torch.ones(1, 3), use_cache=False)
        with pytest.raises(ValueError, match=f"{model_type}' model needs {accessor.needs}, so .* ranked on text"):
            rank_heads(model, PreTrainedTokenizerBase(), Dataset.from_dict({}))
    else:
        check_projections(model, accessor, accessor.layers_with_heads)


def test_every_head_is_ranked_on_text(model_type: str) -> None:
    model = model_of(model_type)
    if get_head_accessor(model).needs:
        pytest.skip("its text decoder does not run on text alone")
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(8, FIRST_SPECIAL_TOKEN, (6, 5), generator=random)
    texts = [(row[: 3 + i % 3], torch.ones(3 + i % 3).bool()) for i, row in enumerate(ids)]
    samples = Samples(list(range(6)), texts, torch.randn(6, 4, generator=random), 0)
    ranking = rank_samples(
        model,
        PreTrainedTokenizerBase(),
        Dataset.from_dict({}),
        samples,
        k=2,
        batch_size=4,
        normalize=True,
        teacher_name="",
        progress=False,
        distributed=False,
    )
    scored = {layer: int(row.isfinite().sum()) for layer, row in enumerate(ranking.scores) if row.isfinite().any()}
    assert scored == {layer: count for layer, (count, _) in expected_heads(model_type).items()}
    unscored = (~ranking.layer_scores.isfinite()).nonzero().flatten().tolist()
    assert unscored == layers_without_output(model_type, model)


def test_the_decoder_by_itself_has_the_same_heads(model_type: str) -> None:
    model = model_of(model_type)
    whole = get_head_accessor(model)
    if whole.needs or model.config.is_encoder_decoder:
        pytest.skip("its text decoder does not run by itself")
    alone = get_head_accessor(whole.decoder)
    assert alone.decoder is whole.decoder and alone.heads() == whole.heads()
    assert [alone.projection(i) for i in alone.layers_with_heads] == list(projections(model_type, model).values())


def test_the_trainer_refuses_what_it_cannot_align(model_type: str) -> None:
    model = model_of(model_type)
    accessor = get_head_accessor(model)
    if accessor.needs or model.config.is_encoder_decoder:
        with pytest.raises(ValueError, match=f"can't align .* this '{model_type}' model: (its text|it is an)"):
            check_decoder(model, accessor)
    else:
        check_decoder(model, accessor)
        assert uses(model, accessor) == "all" or model_type in NOT_TRAINED


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_the_loss_on_captured_heads_has_the_gradient_of_one_without_hooks(model_type: str) -> None:
    model = model_of(model_type)
    accessor = get_head_accessor(model)
    if uses(model, accessor) != "all":
        pytest.skip("its heads are ranked and not trained")
    first, last = accessor.layers_with_heads[0], accessor.layers_with_heads[-1]
    heads = [AttentionHead(first, 2), AttentionHead(last, 0), AttentionHead(last, accessor.num_heads(last) - 1)]
    inputs = text_inputs(model_type, model)
    mask = inputs["attention_mask"].bool()
    weight = torch.linspace(-1, 1, 3 * len(mask) * 32).reshape(3, len(mask), 32)

    capture = HeadCapture(accessor, heads, model_type)
    with capture.attached():
        capture.start(mask)
        language = model(**inputs).logits.square().mean()
        ours = capture.vectors()
        found = gradients(model, language + (ours * weight).sum())
        capture.stop()

    read: dict[int, list[Tensor]] = {first: [], last: []}
    handles = [
        accessor.projection(i).register_forward_pre_hook(lambda m, args, i=i: read[i].append(args[0])) for i in read
    ]
    language = model(**inputs).logits.square().mean()
    for handle in handles:
        handle.remove()
    theirs = []
    for layer, head in heads:
        size = accessor.head_dim(layer)
        block = slice(head * size, (head + 1) * size)
        mean = (read[layer][0] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # of a loop, the first pass
        # Transposed only in GPT-2's kind of linear module, which none of these models has.
        theirs.append(mean[:, block] @ accessor.projection(layer).weight[:, block].T)
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-4, atol=1e-5)
    expected = gradients(model, language + (torch.stack(theirs) * weight).sum())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("type_", SIDE_BY_SIDE)
def test_layers_with_several_outputs_are_refused(type_: str) -> None:
    model = build(type_)
    inputs = text_inputs(type_, model)
    capture = HeadCapture(get_head_accessor(model), [DecoderLayer(0)], type_)
    with capture.attached(), pytest.raises(ValueError, match="put out several residual streams side by side"):
        capture.start(inputs["attention_mask"].bool())
        model(**inputs)


def test_the_page_has_a_row_for_every_type() -> None:
    """None may vanish: not from the package, and not from transformers in a version that had it."""
    not_yet = {name for name, version in ADDED.items() if TRANSFORMERS < Version(version)}
    assert list(page_rows()) == sorted([*ALL_TYPES, *not_yet]), "run `python tests/support/supported_models.py`"


@pytest.mark.skipif(TRANSFORMERS < page_version(), reason="the page is that of a newer transformers")
def test_the_page_says_what_the_models_are(model_type: str) -> None:
    assert page_rows()[model_type] == row(model_type), "run `python tests/support/supported_models.py`"


def test_what_is_said_of_the_trainer() -> None:
    """On the page and in the README: as many types as run through it in `tests/trainer/test_families.py`."""
    assert [name for name, cells in page_rows().items() if cells[3] == "trainer"] == list(ALL_FAMILIES)
    readme = " ".join((PAGE.parents[1] / "README.md").read_text().split())
    assert f" {len(ALL_FAMILIES)} of them run from images to a saved adapter" in readme


def test_a_causal_model_around_a_multimodal_models_decoder() -> None:
    config = model_of("mllama").config.text_config
    model = transformers.MllamaForCausalLM(config)
    accessor = get_head_accessor(model)
    assert accessor.decoder is model.model
    assert {i: (accessor.num_heads(i), accessor.head_dim(i)) for i in accessor.layers_with_heads} == expected_heads(
        "mllama"
    )


@torch.no_grad()
@pytest.mark.parametrize("class_name", LANGUAGE_MODELS)
def test_language_models(class_name: str) -> None:
    model_class = getattr(transformers, class_name)
    config = model_class.config_class()
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "head_dim": 12, "vocab_size": 64, "pad_token_id": 0, "ffn_dim": 48}
    small |= {"num_local_experts": 2, "num_experts": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    small |= {"q_lora_rank": 8, "kv_lora_rank": 8, "moe_intermediate_size": 16, "word_embed_proj_dim": 32}
    small |= {"max_position_embeddings": 64, "num_experts_per_tok": 2}
    small |= {
        "DeepseekV3ForCausalLM": {"head_dim": 64, "num_key_value_heads": 4},  # of the rotated part; no groups
        "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    }.get(class_name, {})
    config = model_class.config_class(**{name: value for name, value in small.items() if hasattr(config, name)})
    torch.manual_seed(0)
    model = model_class(config).eval()
    accessor = get_head_accessor(model)
    check_projections(model, accessor, accessor.layers_with_heads)
    assert all(accessor.num_heads(layer) == 4 for layer in accessor.layers_with_heads)
    assert accessor.num_layers == 4
    hybrid = class_name in ("Lfm2ForCausalLM", "NemotronHForCausalLM", "Qwen3_5ForCausalLM")
    assert (len(accessor.layers_with_heads) < 4) == hybrid
