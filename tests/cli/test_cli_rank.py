"""`hera rank`, `hera encode` and `hera env`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build_vlm, image_dataset, save_tiny_dinov2, save_vlm
from tiny_teachers import count_work
from transformers import AutoModelForImageTextToText
from trl import TrlParser
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hera_trainer import HeadRanking, HeRAConfig, HeRATrainer, add_teacher_features, rank_heads
from hera_trainer.cli import main
from hera_trainer.cli.rank import draw
from hera_trainer.heads import registry
from hera_trainer.heads.modes import without_adapters

SMALL = ["--k", "3", "--batch-size", "4"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    save_vlm("qwen2_5_vl", folder / "model")
    save_tiny_dinov2(folder / "teacher")
    rows = image_dataset(n=20)
    rows.save_to_disk(folder / "rows")
    (folder / "pictures").mkdir()
    with (folder / "captions.jsonl").open("w") as lines:
        for index, row in enumerate(rows):
            row["images"][0].save(folder / "pictures" / f"{index}.png")
            captions = [row["completion"][0]["content"], "another"]
            lines.write(json.dumps({"photo": f"pictures/{index}.png", "image": "x", "captions": captions}) + "\n")
    return folder


def run(parts, *arguments):
    """`hera rank` with the teacher of the tests; the ranking that it wrote."""
    output = parts / "ranking.json"
    code = main(["rank", *map(str, arguments), "--teacher", str(parts / "teacher"), "--output", str(output), *SMALL])
    assert code == 0
    return HeadRanking.load(output)


def expected(parts, model=None, **kwargs):
    """The same in Python."""
    rows = add_teacher_features(datasets.load_from_disk(parts / "rows"), str(parts / "teacher"))
    _, processor = build_vlm("qwen2_5_vl")
    model = AutoModelForImageTextToText.from_pretrained(parts / "model") if model is None else model
    return rank_heads(model, processor, rows, k=3, batch_size=4, progress=False, **kwargs)


def assert_same(a, b):
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(a.layer_scores, b.layer_scores, rtol=0, atol=1e-6)
    assert (a.k, a.num_samples, a.context, a.seed) == (b.k, b.num_samples, b.context, b.seed)


def test_ranking_is_that_of_rank_heads(parts, capsys):
    ranking = run(parts, parts / "model", parts / "rows", "--m", 2, "--selection", "top")
    assert_same(ranking, expected(parts))
    assert ranking.scores.unique().numel() > 2
    out = capsys.readouterr().out
    heads = ranking.select("top", 2)
    assert " ".join(f"{head}={ranking.score(head):.4f}" for head in heads) in out
    assert f"--head_ranking_path {parts / 'ranking.json'} --head_selection top --num_aligned_heads 2" in out
    assert (parts / "ranking.png").read_bytes().startswith(b"\x89PNG")


def test_training_draws_the_random_heads_that_were_shown(parts, tmp_path, capsys):
    ranking = run(parts, parts / "model", parts / "rows", "--m", 3, "--selection", "random", "--seed", 5)
    out = capsys.readouterr().out
    shown = re.search(r"^random: (.*)$", out, re.MULTILINE).group(1)
    options = re.search(r"hera sft --head_ranking_path \S+ (.*) \.\.\.", out).group(1).split()
    (args,) = TrlParser(HeRAConfig).parse_args_and_config(
        [*options, "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    )
    heads = ranking.select(args.head_selection, args.num_aligned_heads, args.seed)
    assert [part.split("=")[0] for part in shown.split()] == list(map(str, heads))


def test_scores_stand_beside_what_to_hold_them_against(parts, tmp_path, capsys):
    second = save_tiny_dinov2(tmp_path / "second", seed=1)
    options = ["--ceiling", second, "--clip-quantile", 0.9]
    ranking = run(parts, parts / "model", parts / "rows", *options)
    same = expected(parts, clip_quantile=0.9, ceiling=second)
    assert_same(ranking, same)
    facts = ("null_mean", "null_p95", "ceiling", "ceiling_model", "clip_quantile")
    assert [getattr(ranking, name) for name in facts] == [getattr(same, name) for name in facts]
    assert 0 < ranking.ceiling < 1 and not torch.equal(ranking.scores, expected(parts).scores)
    out = capsys.readouterr().out
    mean = ranking.scores.nanmean()
    assert f"12 heads, mutual k-NN with k = 3, N = 20, clipped at quantile 0.9: mean {mean:.4f}\n" in out
    null = f"unrelated spaces {3 / 19:.4f} (95th percentile {ranking.null_p95:.4f})"
    assert f"to hold it against: {null}, ceiling {ranking.ceiling:.4f} ({second})\n" in out


@pytest.mark.parametrize(
    ("similarity", "settings"), [("centered_cosine", {"center": True}), ("dot", {"normalize": False})]
)
def test_how_vectors_are_compared(parts, similarity, settings):
    ranking = run(parts, parts / "model", parts / "rows", "--similarity", similarity, "--no-plot")
    same = expected(parts, **settings)
    assert_same(ranking, same)
    assert ranking.spaces == same.spaces != expected(parts).spaces


def test_what_would_fail_in_the_end_fails_at_once(parts, monkeypatch, tmp_path, capsys):
    """A heat map that cannot be drawn before the teacher works, more heads than there are before any is scored."""
    count = count_work(monkeypatch)
    image_dataset(n=24, seed=11).save_to_disk(tmp_path / "rows")
    arguments = ["rank", str(parts / "model"), str(tmp_path / "rows"), "--teacher", str(parts / "teacher")]
    arguments += ["--output", str(tmp_path / "heads.json"), "--k", "3"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        assert main(arguments) == 1
    assert "--no-plot" in capsys.readouterr().err and not count["images"]
    assert main([*arguments, "--no-plot", "--m", "13"]) == 1
    assert "--m 13 exceeds the 12 heads of this model" in capsys.readouterr().err
    assert not (tmp_path / "heads.json").exists()


def test_captions_in_columns_of_other_names(parts):
    """Of several captions the first counts; paths of images are relative to the file."""
    columns = ["--image-column", "photo", "--caption-column", "captions", "--no-plot"]
    assert_same(run(parts, parts / "model", parts / "captions.jsonl", *columns), expected(parts))


@pytest.mark.parametrize("column", ["messages", "turns", "completion"])
def test_captions_that_are_turns(parts, tmp_path, column):
    """Beside other texts, and under any name."""
    rows = datasets.load_from_disk(parts / "rows")
    turns = rows["completion"][:]
    rows = rows.select_columns(["images", "prompt"]) if column == "completion" else rows.select_columns(["images"])
    rows = rows.add_column(column, turns).add_column("text", ["of something else"] * len(rows))
    rows.save_to_disk(tmp_path / "rows")
    arguments = [parts / "model", tmp_path / "rows", "--caption-column", column, "--no-plot"]
    assert_same(run(parts, *arguments), expected(parts))


def test_data_that_brings_its_vectors(parts, tmp_path, capsys):
    """No teacher is said to have made them, and one that is named would not be used."""
    rows = add_teacher_features(datasets.load_from_disk(parts / "rows"), str(parts / "teacher"))
    rows.save_to_disk(tmp_path / "rows")
    output = tmp_path / "ranking.json"
    command = ["rank", str(parts / "model"), str(tmp_path / "rows"), "--output", str(output), "--no-plot", *SMALL]
    assert main(command) == 0
    ranking = HeadRanking.load(output)
    assert_same(ranking, expected(parts))
    assert ranking.teacher == ""
    assert main([*command, "--teacher", str(parts / "teacher")]) == 1
    assert "would not be used" in capsys.readouterr().err


def test_images_in_context(parts):
    _, processor = build_vlm("qwen2_5_vl")
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)

    def collate(rows):
        return collator([{name: row[name] for name in ("images", "prompt", "completion")} for row in rows])

    ranking = run(parts, parts / "model", parts / "rows", "--context", "image")
    assert_same(ranking, expected(parts, data_collator=collate))
    columns = ["--image-column", "photo", "--caption-column", "captions", "--context", "image"]
    captioned = run(parts, parts / "model", parts / "captions.jsonl", *columns)
    assert captioned.context == "image" and captioned.num_samples == ranking.num_samples
    rows = datasets.load_from_disk(parts / "rows")
    texts = ["<|image_pad|>" + row["completion"][0]["content"] for row in rows]  # with the placeholder, to train on
    rows.select_columns(["images"]).add_column("text", texts).save_to_disk(parts / "plain")
    assert_same(run(parts, parts / "model", parts / "plain", "--context", "image"), captioned)


def test_adapter(parts):
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_pretrained(parts / "model")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(parts / "adapter")
    ranking = run(parts, parts / "adapter", parts / "rows")
    assert_same(ranking, expected(parts, model=model))
    with without_adapters(model):
        assert not torch.equal(ranking.scores, expected(parts, model=model).scores)


def test_only_as_many_images_as_needed_are_encoded(parts, monkeypatch, tmp_path):
    rows = datasets.concatenate_datasets([image_dataset(n=40, seed=3)] * 2)  # each image twice
    drawn = draw(rows, 15, seed=0)
    assert len(drawn) < len(rows)
    assert len({row["images"][0].tobytes() for row in drawn}) >= 15
    assert draw(rows, 40, seed=0) is rows or len({row["images"][0].tobytes() for row in draw(rows, 40, seed=0)}) == 40
    rows.save_to_disk(tmp_path / "rows")
    count = count_work(monkeypatch)
    ranking = run(parts, parts / "model", tmp_path / "rows", "--num-samples", 15, "--no-plot")
    assert ranking.num_samples == 15 and 15 <= count["images"] < 40


@pytest.mark.parametrize("caption_column", [None, "caption"])
def test_rows_that_cannot_be_ranked_on_do_not_count(caption_column):
    """Without a text, without an image, or with the images of another row: as many of the others are drawn as asked."""
    rows = image_dataset(n=40, seed=3)
    kinds = [index % 4 for index in range(40)]  # usable, no text, no image, the images of the first of these rows
    texts = [row[0]["content"] if kind != 1 else "" for row, kind in zip(rows["completion"], kinds, strict=True)]
    images = [rows[3 if kind == 3 else index]["images"] if kind != 2 else [] for index, kind in enumerate(kinds)]
    completion = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {"images": images, "prompt": rows["prompt"][:], "completion": completion}
    if caption_column is not None:
        columns = {"images": images, caption_column: texts}
    features = datasets.Features({name: rows.features.get(name, datasets.Value("string")) for name in columns})
    rows = datasets.Dataset.from_dict(columns, features=features)
    for wanted in (4, 8, 11):
        drawn = draw(rows, wanted, 0, caption_column)
        texts = drawn[caption_column] if caption_column else [row[0]["content"] for row in drawn["completion"]]
        usable = {row[0].tobytes() for row, text in zip(drawn["images"], texts, strict=True) if row and text}
        assert len(usable) >= wanted
    assert len(draw(rows, 4, 0, caption_column)) < 40 and len(draw(rows, 12, 0, caption_column)) == 40


@pytest.mark.parametrize("columns", [[], ["--caption-column", "caption"]])
def test_what_encode_has_cached_is_not_encoded_again(parts, monkeypatch, tmp_path, columns):
    """Also where only some of the rows are ranked, and where captions are put into another column first."""
    rows = image_dataset(n=24, seed=8 + len(columns))
    if columns:
        captions = [row["completion"][0]["content"] for row in rows]
        rows = rows.select_columns(["images"]).add_column("caption", captions)
    rows.save_to_disk(tmp_path / "rows")
    count = count_work(monkeypatch)
    arguments = [parts / "model", tmp_path / "rows", "--num-samples", 15, "--no-plot", *columns]
    before = run(parts, *arguments)
    encoded = count["images"]
    assert main(["encode", str(tmp_path / "rows"), "--teacher", str(parts / "teacher")]) == 0
    assert (encoded, count["images"]) == (15, 15 + 24)
    after = run(parts, *arguments, "--seed", 1)
    assert count["images"] == 15 + 24 and not torch.equal(after.scores, before.scores)
    assert_same(run(parts, *arguments), before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["captions.jsonl", "--image-column", "photo"], "--caption-column. There are photo, image, captions"),
        (["captions.jsonl", "--image-column", "picture"], "no column 'picture'"),
        (["rows", "--output", "heads.png"], "must end in .json"),
        (["rows", "--k", "19"], "21 are needed"),
        (["rows", "--num-samples", "4"], "--num-samples 4 must be at least 5 for --k 3"),
        (["rows", "--m", "13"], "--m 13 exceeds the 12 heads"),
        (["rows", "--teacher", "./nowhere"], "./nowhere"),
        (["rows", "--ceiling", "./nothing"], "./nothing"),
        (["rows", "--ceiling", "teacher"], "is the teacher itself"),
        (["rows", "--clip-quantile", "95"], "`--clip-quantile` must be above 0 and below 1"),
        (["nowhere.jsonl"], "no file or folder"),
        (["rows", "--base-model", "model"], "takes no base model"),
        (["rows", "--device", "cuda:9"], "no device 'cuda:9' here (`--device`). There are cpu"),
        (["rows", "--device", "gpu"], "no device 'gpu' here"),
    ],
)
def test_errors_are_one_line(parts, arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(parts)
    defaults = ["--teacher", "teacher", "--num-samples", "30", *SMALL]
    assert main(["rank", "model", arguments[0], *defaults, *arguments[1:]]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hera rank: error: ") and words in line


# --- encode ----------------------------------------------------------------------------------------------------------


def numbers(text):
    return [int(number) for number in re.findall(r"(\d+) (?:rows|images|distinct|encoded|were)", text)]


def test_encode_spares_training_the_teacher(parts, tmp_path, monkeypatch, capsys):
    rows = datasets.concatenate_datasets([image_dataset(n=16, seed=5), image_dataset(n=16, seed=5).select(range(4))])
    rows.save_to_disk(tmp_path / "rows")
    arguments = ["encode", str(tmp_path / "rows"), "--teacher", str(parts / "teacher"), "--batch-size", "5"]
    count = count_work(monkeypatch)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert numbers(out) == [20, 20, 16, 16, 0] and count == {"loads": 1, "images": 16}
    assert Path(out.splitlines()[-1].removeprefix("Cache: ")).is_file()
    assert main(arguments) == 0
    assert numbers(capsys.readouterr().out) == [20, 20, 16, 0, 16] and count == {"loads": 1, "images": 16}

    config = HeRAConfig(
        output_dir=str(tmp_path / "out"),
        teacher_model_name_or_path=str(parts / "teacher"),
        per_device_train_batch_size=8,
        num_neighbors=3,
        aligned_heads=["L0H1"],
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    stored = datasets.load_from_disk(tmp_path / "rows")
    trainer = HeRATrainer(model=str(parts / "model"), args=config, train_dataset=stored)
    trainer.train()
    assert count == {"loads": 1, "images": 16} and trainer.state.log_history


def test_encode_goes_on_where_it_was(parts, tmp_path, monkeypatch, capsys):
    """Of a run that was killed, the chunks that were saved count as cached."""
    from hera_trainer.teacher import vectors

    image_dataset(n=12, seed=6).save_to_disk(tmp_path / "rows")
    # Small chunks, and a teacher that dies in the second.
    defaults = vectors.add_teacher_features.__kwdefaults__
    monkeypatch.setattr(vectors.add_teacher_features, "__kwdefaults__", {**defaults, "chunk_size": 4})
    count = count_work(monkeypatch)
    encode = vectors.VisionTeacher.encode

    def dies(self, images, batch_size=32):
        if count["images"] == 4:
            raise KeyboardInterrupt
        return encode(self, images, batch_size)

    arguments = ["encode", str(tmp_path / "rows"), "--teacher", str(parts / "teacher"), "--batch-size", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(vectors.VisionTeacher, "encode", dies)
        assert main(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "hera encode: interrupted"
    assert main(arguments) == 0
    assert numbers(capsys.readouterr().out) == [12, 12, 12, 8, 4] and count["images"] == 12


@pytest.mark.parametrize(("make", "words"), [("vectors", "nothing to encode"), ("text", "no image column")])
def test_encode_what_has_no_images(parts, tmp_path, make, words, capsys):
    data = image_dataset(n=4, with_features=3) if make == "vectors" else image_dataset(n=4, fmt="text")
    data.save_to_disk(tmp_path / "rows")
    assert main(["encode", str(tmp_path / "rows"), "--teacher", str(parts / "teacher")]) == 1
    assert words in capsys.readouterr().err.splitlines()[-1]


# --- env -------------------------------------------------------------------------------------------------------------


def test_env(capsys, monkeypatch, tmp_path):
    from importlib.metadata import version

    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecretsecret")
    monkeypatch.setenv("HOME", str(tmp_path / "jane"))
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "jane" / ".cache" / "huggingface"))
    monkeypatch.delitem(registry._FACTORIES, "llava")
    monkeypatch.delitem(registry._FACTORIES, "qwen3_vl")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    lines = dict(line[2:].split(": ", 1) for line in out.splitlines() if line.startswith("- "))
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        assert lines[name] == version(name)
    assert lines["Hugging Face cache"] == "~/.cache/huggingface"
    unknown = lines["model types of transformers that this release does not know"].split(", ")
    assert {"llava", "qwen3_vl"} <= set(unknown) and "idefics3" not in unknown
    assert {"hera-trainer", "Python", "platform", "CPU", "RAM", "accelerator 0", "bitsandbytes"} <= lines.keys()
    assert "secret" not in out and "jane" not in out


def test_env_shows_the_accelerate_config(capsys, monkeypatch, tmp_path):
    import accelerate.commands.config as config

    path = tmp_path / "default_config.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: bf16\nnum_processes: 2\n"
        "use_cpu: false\ndebug: false\nmain_process_ip: 10.1.2.3\n"
        "deepspeed_config: {deepspeed_config_file: /home/jane/zero3.json, deepspeed_hostfile: /home/jane/hosts}\n"
    )
    monkeypatch.setattr(config, "default_config_file", str(path))
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "- accelerate config:\n  - " in out and "  - num_processes: 2\n" in out and "10.1.2.3" not in out
    assert "jane" not in out and "zero3.json" in out
