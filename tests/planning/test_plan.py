"""Estimates from a configuration, compared with models that are really loaded, adapted, optimized and run."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
import transformers
from model_zoo import build
from peft import LoraConfig, get_peft_model
from published_configs import PARAMETERS, PUBLISHED
from runs import trainer
from tiny import build_vlm, image_dataset, save_vlm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from hera_trainer import AttentionHead, HeadCapture, HeRALoss, get_head_accessor
from hera_trainer.alignment.features import ImageFeatures
from hera_trainer.objectives.queue import SampleQueue
from hera_trainer.planning.compute import image_shape, operations
from hera_trainer.planning.memory import activation_bytes, alignment_bytes, optimizer_bytes
from hera_trainer.planning.model import find_parts, meta_model, read_config
from hera_trainer.planning.plan import RunSettings, plan_run

FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"]
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    return save_vlm(request.param, tmp_path_factory.mktemp(request.param), **WIDE)


def storage_bytes(model):
    """Bytes of everything that the parameters keep, each memory counted once."""
    tensors = []
    for parameter in model.parameters():
        tensors.append(parameter)
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            tensors += [tensor for tensor in (state.absmax, state.code, state.offset) if torch.is_tensor(tensor)]
            state = state.state2
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def test_parameters_and_16_bit_weights_are_those_of_the_loaded_model(saved):
    model = AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.bfloat16)
    plan = plan_run(read_config(saved))
    assert sum(plan.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert plan.weights.as_loaded == plan.fixed["weights"] == storage_bytes(model)
    decoder = get_head_accessor(model).decoder
    embeddings = model.get_input_embeddings().weight.numel()
    assert plan.parameters["language_model"] == sum(p.numel() for p in decoder.parameters()) - embeddings
    tower = model.get_encoder(modality="image")
    assert plan.parameters["vision_tower"] == sum(p.numel() for p in tower.parameters())


@pytest.mark.parametrize("double", [False, True])
def test_4_bit_weights_are_those_of_the_loaded_model(saved, double):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.bfloat16, quantization_config=quantization)
    plan = plan_run(read_config(saved), RunSettings(load_in_4bit=True, use_bnb_nested_quant=double))
    assert plan.fixed["weights"] == storage_bytes(model)
    four_bit = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert plan.weights.quantized == sum(module.in_features * module.out_features for module in four_bit)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.layers\.\d+\.(self_attn|mlp)\..*_proj"])
def test_the_adapter_is_the_one_that_peft_makes(saved, targets):
    model = AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    plan = plan_run(read_config(saved), RunSettings(lora_r=4, lora_target_modules=targets))
    assert plan.trained == sum(p.numel() for p in trained)
    assert plan.fixed["adapter"] == plan.fixed["gradients"] == sum(p.numel() * p.element_size() for p in trained)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_the_optimizer_state_is_the_real_one(tmp_path, optim, dtype):
    """That of `Trainer`."""
    shapes = [(16, 64), (64, 100), (4096,), (7, 600), (3,)]
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes])
    model.words = torch.nn.Embedding(100, 64, dtype=dtype)
    parameters = list(model.parameters())
    optimizer = transformers.Trainer(model, transformers.TrainingArguments(tmp_path, optim=optim)).create_optimizer()
    sum(p.float().sum() for p in parameters).backward()
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    others = [p.numel() for p in parameters if p is not model.words.weight]
    planned = optimizer_bytes(others, optim, dtype.itemsize, [model.words.weight.numel()])
    assert len(parameters) == 6 and planned == sum(storages.values())


@pytest.mark.parametrize("tied", [True, False])
def test_states_of_embeddings_are_never_8_bit(tied):
    """Of a whole model: those of its words, the LM head's as well where it is the same, and those of places."""
    config = PUBLISHED["HuggingFaceTB/SmolVLM-500M-Instruct"]()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = meta_model(config, torch.bfloat16)
    words = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    others = [p.numel() for p in model.parameters() if id(p) not in words]
    assert len(words) == 2 and (id(model.get_output_embeddings().weight) in words) == tied
    plan = plan_run(config, RunSettings(use_peft=False, optim="paged_adamw_8bit"))
    float32 = 8 * sum(words.values())
    assert plan.fixed["optimizer"] == optimizer_bytes(others, "paged_adamw_8bit", 2) + float32
    assert plan.pageable > float32 > 0.2 * plan.fixed["optimizer"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_as_many_parameters_as_their_checkpoints(name):
    assert sum(p.numel() for p in meta_model(PUBLISHED[name]()).parameters()) == PARAMETERS[name]


# What transformers' own processors make of images. Idefics3 writes marks between tiles, which are counted apart.


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (333, 777)])
@pytest.mark.parametrize(("family", "patch"), [("Qwen2VLImageProcessor", 14), ("Qwen2VLImageProcessor", 16)])
def test_tokens_of_an_image_qwen(family, patch, size):
    config = PUBLISHED["Qwen/Qwen2.5-VL-3B-Instruct" if patch == 14 else "Qwen/Qwen3-VL-2B-Instruct"]()
    processor = getattr(transformers, family)(patch_size=patch, merge_size=2)
    patches = processor.get_number_of_image_patches(size[1], size[0], {})
    shape = image_shape(config, size)
    assert (shape.tokens, shape.vision_tokens) == (patches // 4, patches)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 200), (384, 384)])
@pytest.mark.parametrize(
    ("name", "tile"), [("HuggingFaceM4/Idefics3-8B-Llama3", 364), ("HuggingFaceTB/SmolVLM-Instruct", 384)]
)
def test_tokens_of_an_image_idefics3(name, tile, size):
    processor = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 4 * tile}, max_image_size={"longest_edge": tile}
    )
    frames, rows, columns = processor.get_number_of_image_patches(size[1], size[0], {})
    config = PUBLISHED[name]()
    shape = image_shape(config, size)
    each = (tile // 14) ** 2 // config.scale_factor**2
    assert shape.frames == frames and shape.patches == (tile // 14) ** 2
    assert shape.tokens - frames * each == 2 * rows * columns + rows + 4


def test_tokens_of_an_image_that_are_given():
    llava, qwen = PUBLISHED["llava-hf/llava-1.5-7b-hf"](), PUBLISHED["Qwen/Qwen3-VL-2B-Instruct"]()
    assert image_shape(llava, (640, 480)).tokens == 576 and image_shape(llava, (1, 1)).vision_tokens == 577
    assert image_shape(qwen, (640, 480), 100).vision_tokens == 400
    with pytest.raises(ValueError, match=r"of type 'llava_next'\. Say it: `--image-tokens N`"):
        image_shape(transformers.LlavaNextConfig(), (640, 480))


def test_what_cannot_be():
    with pytest.raises(ValueError, match="`image_tokens` must be at least 0, got -5"):
        RunSettings(image_tokens=-5)
    model, _ = build_vlm("llava")
    with pytest.raises(ValueError, match=r"`num_aligned_heads` \(99\) exceeds the 12 attention heads"):
        plan_run(model.config, RunSettings(num_aligned_heads=99))


def run_inputs(family):
    model, processor = build_vlm(family, **WIDE)
    row = image_dataset(1)[0]
    text = processor.apply_chat_template(row["prompt"], tokenize=False)
    token = getattr(processor, "image_token", "<image>")
    inputs = processor(text=[f"{token}{text}"], images=[row["images"]], return_tensors="pt")
    return model, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_torch_counts(family):
    model, inputs = run_inputs(family)
    model.set_attn_implementation("eager")  # whose products torch counts on every device, fused attention's it does not
    parts = find_parts(meta_model(model.config))
    tokens = inputs["input_ids"].shape[1]
    image_token = getattr(model.config, "image_token_id", None)
    image_tokens = int((inputs["input_ids"] == image_token).sum())
    shape = image_shape(model.config, (1, 1), image_tokens)
    work = operations(parts, shape, tokens - image_tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(**inputs)
    widths = [parts.accessor.num_heads(i) * parts.accessor.head_dim(i) for i in parts.accessor.layers_with_heads]
    masked = [2.0 * tokens**2 * width for width in widths]  # torch counts masked scores, too
    everything = work.vision + work.projector + sum(work.layers) + sum(masked)
    # The class token of LLaVA's tower, one of ten here, is no patch that is embedded.
    assert counter.get_total_flops() == pytest.approx(everything, rel=5e-3 if family == "llava" else 1e-9)

    capture = HeadCapture(get_head_accessor(model), [AttentionHead(1, 2)], family)
    mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    with capture.attached(), FlopCounterMode(display=False) as counter, torch.no_grad():
        capture.read(lambda batch: model.model(**batch), dict(inputs), mask, stop_early=True)
    first = work.first_pass(1) + sum(masked[:2])
    assert counter.get_total_flops() == pytest.approx(first, rel=1e-2)  # and the vectors of the head


@pytest.mark.parametrize("projector", ["frozen", "trained"])
@pytest.mark.parametrize("family", FAMILIES)
def test_image_features_are_those_that_a_first_pass_keeps(family, projector):
    """And of the limit: on the device, in main memory, computed again."""
    model, inputs = run_inputs(family)
    text = r".*(language_model|text_model)\.layers\..*_proj"
    targets = text if projector == "frozen" else rf"{text}|.*(multi_modal_projector\.linear_1|connector\..*\.proj)"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    features = ImageFeatures(model, get_head_accessor(model).layers, 2**30)
    with torch.no_grad(), features.first_pass(), features.recorded():
        adapted(**inputs)
    image_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    settings = {"per_device_train_batch_size": 1, "lora_target_modules": targets, "lora_r": 4, "dtype": "float32"}
    settings |= {"image_tokens": image_tokens, "text_tokens": inputs["input_ids"].shape[1] - image_tokens}
    settings["gradient_accumulation_steps"] = 8
    plan = plan_run(model.config, RunSettings(**settings))
    assert plan.features.device == plan.alignment["image_features"] == 8 * features.device_bytes > 0
    assert plan.features.host == plan.features.vision == 0

    limited = plan_run(model.config, RunSettings(**settings, image_feature_gib=features.device_bytes / 2**30))
    assert (limited.features.device, limited.features.host) == (features.device_bytes, 4 * features.device_bytes)
    assert limited.features.vision == 3 / 8
    none = plan_run(model.config, RunSettings(**settings, image_feature_gib=0))
    assert none.features.vision == none.features.projector == 1 and none.alignment["image_features"] == 0
    # Without checkpointing the steps cost the same: with it, a tower without features is in the backward.
    plans = [
        plan_run(model.config, RunSettings(**settings, gradient_checkpointing=False, image_feature_gib=each))
        for each in (1, features.device_bytes / 2**30, 0)
    ]
    shares = [next(iter(each.first_pass.values())) for each in plans]
    assert shares[0] < shares[1] < shares[2]
    assert (shares[1] - shares[0]) / (shares[2] - shares[0]) == pytest.approx(3 / 8)


def test_the_layers_of_the_vision_tower():
    model = build("qwen3_vl")  # so small that its deepstack mergers are larger
    assert find_parts(model).vision_blocks == list(model.model.visual.blocks)
    assert find_parts(build("gemma4")).vision_tower is None  # as its default configuration has it


class Peak(TorchDispatchMode):
    """Largest number of bytes alive at a time, of the tensors made inside, views of a model's weights left out."""

    def __init__(self, model=None):
        super().__init__()
        self.alive, self.peak = {}, 0
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()} if model is not None else set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.weights:
                    self.alive[storage._cdata] = (
                        torch.multiprocessing.reductions.StorageWeakRef(storage),
                        storage.nbytes(),
                    )
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize(("heads", "pool", "queue"), [(5, 32, 0), (5, 256, 0), (2, 128, 64), (8, 1100, 0)])
def test_memory_of_the_alignment_loss(heads, pool, queue):
    """The peak of the real loss with its gradient is within the estimate, and not far below it."""
    width, teacher_width, k = 256, 128, 10
    sizes = alignment_bytes(heads, pool, width, teacher_width, queue, k, tokens=0, read=0)
    past = SampleQueue(queue) if queue else None
    criterion = HeRALoss(k)
    with Peak() as measured:
        if past is not None:
            past.push(torch.randn(heads, queue, width), torch.randn(queue, teacher_width))
        z = torch.randn(heads, pool, width).requires_grad_()
        loss = criterion(z, torch.randn(pool, teacher_width), None, past)
        torch.autograd.grad(loss, [z, criterion.log_temperature])
    assert 0.4 * sum(sizes.values()) <= measured.peak <= sum(sizes.values())


SETTINGS = {"lora_target_modules": r".*(language_model|text_model).*\.q_proj", "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("settings", "again"),
    [
        ({}, False),
        ({"alignment_weight": 0.0}, True),
        ({"image_feature_gib": 0.0}, True),
        ({"contrast_scope": "micro_batch"}, True),
        ({"alignment_weight": 0.0, "gradient_checkpointing": False}, False),
    ],
)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_frozen_tower_in_the_backward(tmp_path, family, settings, again):
    """As training has it; of Qwen3-VL transformers does not find the embeddings."""
    folder = save_vlm(family, tmp_path)
    plan = plan_run(read_config(folder), RunSettings(per_device_train_batch_size=6, **SETTINGS, **settings))
    trained = plan._memory.trained
    assert trained == {"vision": False, "projector": False, "language": True}
    again &= family != "qwen3_vl"
    plan._memory.trained = trained | {"vision": True}
    more = plan._memory.batch(6)["activations"] - plan.batch["activations"]
    assert (more == 0) == again

    lora = LoraConfig(target_modules=SETTINGS["lora_target_modules"])
    own = {name: value for name, value in {**SETTINGS, **settings}.items() if name != "lora_target_modules"}
    run = trainer(tmp_path / "run", family, peft_config=lora, **{"gradient_checkpointing": True, **own}, max_steps=1)
    blocks, seen = find_parts(run.model.get_base_model()).vision_blocks, []

    def see(module, inputs, output):
        seen.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    blocks[-1].register_forward_hook(see)
    run.train()
    assert any(seen) == again


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_activations(family, lora, checkpointing):
    """The peak of a real forward and backward through the decoder is near the plan: at most 15 % above it. Without
    dropout, whose masks are floats on a CPU."""
    model, _ = build_vlm(family, hidden_size=256, intermediate_size=768)
    model, tokens = model.to(torch.bfloat16), 256
    if lora:
        get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")).enable_input_require_grads()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    parts = find_parts(model)
    kept, backward = activation_bytes(parts.accessor.layers, tokens, 256, 2, checkpointing)
    embeds = torch.randn(1, tokens, 256, dtype=torch.bfloat16, requires_grad=True)
    with Peak(model) as measured, torch.autocast("cpu", dtype=torch.bfloat16):
        parts.accessor.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state.sum().backward()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    ratio = (measured.peak - gradients) / (kept + backward)
    assert (0.7 if lora else 0.45) <= ratio <= 1.15
