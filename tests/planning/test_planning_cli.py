"""`hera plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from recipes import RECIPES
from tiny import save_vlm

from hera_trainer import HeadRanking, HeRAConfig, get_head_accessor
from hera_trainer.cli import main
from hera_trainer.data.pool import check_pool
from hera_trainer.objectives.feature import FeatureLoss
from hera_trainer.planning.model import meta_model, read_config
from hera_trainer.planning.plan import GIB, RunSettings, aligned_heads, plan_run, usable_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder without its weights."""
    path = tmp_path_factory.mktemp("model")
    save_vlm("llava", path, hidden_size=64, intermediate_size=128)
    for weights in path.glob("*.safetensors"):
        weights.unlink()
    return str(path)


def as_json(arguments, capsys):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_the_plan(folder, capsys):
    options = ["--load-in-4bit", "--double-quant", "--batch-size", "2", "--accumulation", "8", "--image-size", "64x32"]
    options += ["--text-tokens", "50", "--lora-r", "4", "--optim", "paged_adamw_8bit", "--m", "3", "--k", "4"]
    found = as_json([folder, *options, "--teacher-dim", "32", "--gpu-memory", "8"], capsys)
    settings = RunSettings(
        load_in_4bit=True,
        use_bnb_nested_quant=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        image_size=(64, 32),
        text_tokens=50,
        lora_r=4,
        optim="paged_adamw_8bit",
        num_aligned_heads=3,
        num_neighbors=4,
        teacher_dim=32,
    )
    plan = plan_run(read_config(folder), settings)
    assert found == json.loads(
        json.dumps({"model": folder, **plan.to_dict(), "largest_micro_batch": plan.largest_batch(8)})
    )
    assert found["pool"] == 16 and found["estimate"] is True
    assert found["total"] == sum(sum(found[part].values()) for part in ("fixed", "batch", "alignment"))


def test_ddp_has_the_gradients_twice(folder, capsys):
    one, two = (as_json([folder, "--processes", n], capsys)["fixed"] for n in ("1", "2"))
    assert (one["gradient_buckets"], two["gradient_buckets"]) == (0, one["gradients"])
    assert main(["plan", folder, "--processes", "2"]) == 0
    assert "gradients once more, in DDP's buckets" in capsys.readouterr().out


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_dtype_auto_is_what_the_model_is_stored_in(folder, tmp_path, stored, capsys):
    config = read_config(folder)
    config.dtype = stored
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {tmp_path / 'model'}\ndtype: auto\n")
    found = as_json(["--config", str(tmp_path / "run.yaml")], capsys)
    assert found["settings"]["dtype"] == stored


def test_text_says_that_it_is_an_estimate_and_names_all_parts(folder, capsys):
    assert main(["plan", folder, "--gpu-memory", "24"]) == 0
    text = capsys.readouterr().out
    for words in (
        *("An estimate from the model's configuration", "language model", "vision tower", "projector", "embeddings"),
        *(
            "nf4, double quantization",
            "LoRA adapter",
            "optimizer",
            "activations",
            "head alignment, 5 heads, pool of 32",
        ),
        *("first third", "last layer (2)", "accumulation", "GPU of 24 GiB", "largest micro-batch"),
    ):
        assert words in text


def test_pools_are_refused_where_training_refuses_them(tmp_path):
    for batch in (1, 2, 4, 11, 12):
        for steps in (1, 3, 6, 12):
            for queue in (0, 5):
                for scope in ("step", "micro_batch"):
                    values = {
                        "per_device_train_batch_size": batch,
                        "gradient_accumulation_steps": steps,
                        "queue_size": queue,
                        "contrast_scope": scope,
                    }
                    config = HeRAConfig(str(tmp_path), use_cpu=True, bf16=False, **values)
                    settings = RunSettings(**values)
                    assert settings.pool_size() == config.pool_size() + queue
                    if settings.pool_size() >= settings.least_pool:
                        check_pool(config)
                    else:
                        with pytest.raises(ValueError, match="Too few samples"):
                            check_pool(config)


@pytest.mark.parametrize("objective", ["contrastive", "feature", "cka", "uniformity"])
@pytest.mark.parametrize("group", [0, 4])
def test_pools_of_other_objectives_and_groups(tmp_path, objective, group):
    for batch in (1, 2, 3, 4, 12):
        values = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "neighbor_group_size": group}
        values["alignment_objective"] = objective
        config, settings = HeRAConfig(str(tmp_path), use_cpu=True, bf16=False, **values), RunSettings(**values)
        if settings.pool_size() >= settings.least_pool:
            check_pool(config)
        else:
            with pytest.raises(ValueError, match=r"Too few samples|`neighbor_group_size`"):
                check_pool(config)


def test_the_projectors_of_the_feature_objective(folder, capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("use_peft: true\nlora_target_modules: all-linear\ndtype: bfloat16\nalignment_objective: feature\n")
    planned, plain = as_json([folder, "--config", str(path)], capsys), as_json([folder], capsys)
    objective = FeatureLoss()
    objective.prepare(5, 64, 1024, seed=0)
    optimizer = torch.optim.AdamW(objective.parameters())
    sum(p.sum() for p in objective.parameters()).backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    held = [*objective.parameters(), *(p.grad for p in objective.parameters()), *states]
    assert planned["alignment"]["projectors"] == sum(tensor.nbytes for tensor in held)
    assert planned["total"] == plain["total"] + planned["alignment"]["projectors"]


def test_the_table_of_pools(folder, capsys):
    main(["plan", folder, "--batch-size", "1", "--k", "10"])
    text = capsys.readouterr().out
    assert "batch 1      -      -      -      -     16     32" in text
    assert "batch 8      -     16     32     64    128    256" in text
    assert "have a pool of 4: training would refuse them" in text


def test_defaults_are_those_of_the_trainer(tmp_path):
    config, settings = HeRAConfig(str(tmp_path), use_cpu=True, bf16=False), RunSettings()
    shared = set(RunSettings.__dataclass_fields__) & set(HeRAConfig.__dataclass_fields__)
    assert {name: getattr(settings, name) for name in shared} == {name: getattr(config, name) for name in shared}
    assert len(shared) >= 10


def test_the_first_pass_of_real_heads(folder, capsys, tmp_path):
    scores = torch.ones(3, 4)
    scores[1, 2] = scores[0, 3] = 0.0
    HeadRanking(scores, torch.ones(3), k=5, num_samples=100).save(tmp_path / "ranking.json")
    ranked = as_json([folder, "--head-ranking", str(tmp_path / "ranking.json"), "--m", "2"], capsys)
    named = as_json([folder, "--heads", "L0H3", "L1H2"], capsys)
    assert ranked["first_pass"] == named["first_pass"] and list(named["first_pass"]) == ["deepest head in layer 1"]
    guesses = as_json([folder], capsys)["first_pass"]
    assert len(guesses) == 2 and min(guesses.values()) < named["first_pass"]["deepest head in layer 1"]
    assert named["first_pass"]["deepest head in layer 1"] < max(guesses.values()) < 1 / 3
    alone = as_json([folder, "--heads", "L1H2", "--accumulation", "1"], capsys)["first_pass"]
    assert set(alone.values()) == {0.0}


def test_random_heads_are_those_that_training_draws(folder, tmp_path):
    ranking = HeadRanking(torch.rand(3, 4), torch.ones(3), k=5, num_samples=100)
    ranking.save(tmp_path / "ranking.json")
    drawn = {"head_ranking_path": str(tmp_path / "ranking.json"), "head_selection": "random", "num_aligned_heads": 3}
    accessor = get_head_accessor(meta_model(read_config(folder)))
    for seed in range(4):
        args = HeRAConfig(str(tmp_path), use_cpu=True, bf16=False, seed=seed, **drawn)
        trained = ranking.select(args.head_selection, args.num_aligned_heads, args.seed)
        assert aligned_heads(RunSettings(seed=seed, **drawn), accessor) == trained
    assert aligned_heads(RunSettings(**drawn), accessor) == ranking.select("random", 3, HeRAConfig.seed)


def test_image_features_of_a_frozen_tower(folder, capsys):
    """One micro-batch on the device, the others in main memory."""
    options = [folder, "--target-modules", r".*language_model.*_proj", "--accumulation", "3", "--image-size", "24"]
    options += ["--batch-size", "4096"]
    kept = as_json(options, capsys)["alignment"]["image_features"]
    assert main(["plan", *options, "--image-feature-gib", str(kept / 3 / 2**30)]) == 0
    text = capsys.readouterr().out
    assert f"{2 * kept / 3 / 2**30:.3f} GiB of image features wait in main memory" in text
    assert main(["plan", *options]) == 0
    assert "main memory" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", *options, "--image-feature-gib", "much"])


def test_training_all_weights(folder, capsys):
    found = as_json([folder, "--full", "--dtype", "float32", "--optim", "adamw_torch"], capsys)
    everything = sum(found["parameters"].values())
    assert found["trained"] == everything and found["fixed"]["adapter"] == 0
    assert found["fixed"]["weights"] == found["fixed"]["gradients"] == 4 * everything
    lora = as_json([folder, "--dtype", "float32"], capsys)["first_pass"]
    assert max(found["first_pass"].values()) < max(lora.values())  # the same pass in a longer step


def test_largest_batch_is_the_largest_that_fits(folder):
    plan = plan_run(read_config(folder), RunSettings(image_size=(24, 24), text_tokens=20_000))
    gpu = next(size for size in (1.0, 1.5, 2.0, 3.0) if plan.largest_batch(size) > 3)
    largest = plan.largest_batch(gpu)
    settings = {"image_size": (24, 24), "text_tokens": 20_000}
    fitting = [
        plan_run(read_config(folder), RunSettings(per_device_train_batch_size=size, **settings)).total
        for size in (largest, largest + 1)
    ]
    assert fitting[0] <= usable_bytes(gpu) < fitting[1] and usable_bytes(gpu) < gpu * GIB


def test_options_go_before_the_file(folder, capsys):
    recipe = str(RECIPES[0])
    found = as_json([folder, "--config", recipe, "--batch-size", "3", "--target-modules", "q_proj", "v_proj"], capsys)
    assert found["settings"]["per_device_train_batch_size"] == 3
    assert found["settings"]["lora_target_modules"] == ["q_proj", "v_proj"]
    assert found["settings"]["optim"] == "paged_adamw_8bit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing/here"], "configuration of 'nothing/here' cannot be read"),
        ([], "Which model\\?"),
        (["FOLDER", "--heads", "L9H0"], "L9H0 does not exist in this model, which has heads in layers 0 to 2"),
        (["FOLDER", "--heads", "third"], "'third' is not an attention head"),
        (["FOLDER", "--heads", "L1H0", "--m", "3"], "--m says how many heads are chosen, but they are named"),
        (["FOLDER", "--optim", "lion"], "state of optimizer 'lion' is not known"),
        (["FOLDER", "--full", "--load-in-4bit"], "4-bit weights cannot be trained"),
        (["FOLDER", "--batch-size", "0"], "per_device_train_batch_size"),
        (["FOLDER", "--target-modules", "nope"], "nope"),
        (["FOLDER", "--head-ranking", "missing.json"], "missing.json"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["./nowhere"], "no file or folder './nowhere'"),
    ],
)
def test_errors_are_one_line(folder, options, message, capsys):
    assert main(["plan", *[folder if option == "FOLDER" else option for option in options]]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hera plan: error: ") and error.count("\n") == 1
    assert message.replace("\\", "") in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1\nb: 2\n", "is no YAML file"),
        ("", "Write `name: value` lines"),
        ("per_device_train_batch_size: many\n", "whole number of at least 1, got 'many'"),
    ],
)
def test_files_that_are_no_settings(folder, content, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert main(["plan", folder, "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("hera plan: error: ") and error.count("\n") == 1 and message in error


def test_files_are_read_as_training_reads_them(folder, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        "use_peft: true\nlora_target_modules: q_proj v_proj\naligned_heads: L0H3 L1H2\n"
        "activation_checkpointing: false\n"
    )
    found = as_json([folder, "--config", str(path)], capsys)
    options = ["--target-modules", "q_proj", "v_proj", "--heads", "L0H3", "L1H2", "--dtype", "float32"]
    assert found == as_json([folder, *options, "--no-checkpointing"], capsys)


def test_what_training_takes_from_a_file_is_planned_for(folder, tmp_path, capsys):
    path = tmp_path / "run.yaml"

    def planned(more=""):
        path.write_text(f"use_peft: true\nlora_target_modules: q_proj v_proj\n{more}")
        return as_json([folder, "--config", str(path)], capsys)

    plain, head = planned(), meta_model(read_config(folder)).get_output_embeddings().weight
    assert planned("lora_modules_to_save: lm_head\n")["trained"] == plain["trained"] + head.numel()
    assert planned("use_dora: true\n")["trained"] > plain["trained"]
    short = planned("model_init_kwargs: {dtype: bfloat16}\n")
    assert short["fixed"]["weights"] == plain["fixed"]["weights"] / 2
    assert planned("dtype: null\n")["fixed"]["weights"] == plain["fixed"]["weights"]  # "auto": it is stored in float32
    assert planned("image_feature_gib: 5e-1\n")["settings"]["image_feature_gib"] == 0.5
    path.write_text("load_in_8bit: true\n")
    assert main(["plan", folder, "--config", str(path)]) == 1
    assert "Take `load_in_8bit` out of the file" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["model_revision: v2", "model_init_kwargs: {revision: v2}"])
def test_the_revision_of_a_file_is_read(folder, tmp_path, monkeypatch, line):
    found = []
    monkeypatch.setattr("hera_trainer.planning.model.read_config", lambda *given: found.append(given[1]) or config)
    config = read_config(folder)
    adapter = "use_peft: true\nlora_target_modules: all-linear"
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {folder}\n{adapter}\n{line}\n")
    for options in ([], ["--revision", "v3"], [folder]):  # another model has revisions of its own
        assert main(["plan", *options, "--config", str(tmp_path / "run.yaml")]) == 0
    assert found == ["v2", "v3", None]


def test_a_baseline_costs_no_alignment(folder, tmp_path, capsys):
    """`alignment_weight: 0` is SFTTrainer, which compares nothing and refuses no batch."""
    path = tmp_path / "run.yaml"
    path.write_text("use_peft: true\nlora_target_modules: all-linear\ndtype: bfloat16\nalignment_weight: 0\n")
    aligned, plain = as_json([folder], capsys), as_json([folder, "--config", str(path)], capsys)
    assert plain["alignment"] == {} and set(plain["first_pass"].values()) == {0.0}
    assert plain["fixed"] == aligned["fixed"] and plain["total"] < aligned["total"]
    assert main(["plan", folder, "--config", str(path), "--batch-size", "1"]) == 0
    text = capsys.readouterr().out
    assert "head alignment: none" in text and "refuse" not in text


@pytest.mark.parametrize("size", ["0x3", "big", "3x4x5"])
def test_a_wrong_size_of_images(size, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "x", "--image-size", size])
    assert stopped.value.code == 2 and "640x480" in capsys.readouterr().err
