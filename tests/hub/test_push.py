"""`push_to_hub` with the real client against a small server: what is uploaded, and what is not."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import USER, running
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from runs import NoStep, config, trainer
from safetensors.torch import load_file
from tiny import build_vlm, image_dataset, save_vlm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipImageProcessor,
    InstructBlipProcessor,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
)

from hera_trainer import HeRATrainer
from hera_trainer.hub.files import publishable_files
from hera_trainer.hub.push import push_folder
from hera_trainer.runs.record import read_run
from hera_trainer.runs.written_files import written_by

REPO = f"{USER}/aligned"
TOKEN = "hf_write"


@pytest.fixture
def hub(monkeypatch):
    with running(monkeypatch) as server:
        yield server


def adapter_run(tmp_path, **kwargs):
    """A LoRA run on a base model in a local folder, with everything in its own folder that may lie there."""
    base = save_vlm("llava", tmp_path / "the-base")
    return HeRATrainer(
        base,
        config(tmp_path / "out", **{"max_steps": 2, "hub_token": TOKEN, **kwargs}),
        train_dataset=image_dataset(n=24, with_features=8),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


class Words(PreTrainedTokenizer):
    """A tokenizer that no library knows, with a vocabulary under a name of its own."""

    vocab_files_names = {"vocab_file": "words.lst"}

    @property
    def vocab_size(self):
        return 1

    def get_vocab(self):
        return {"a": 0}

    def _tokenize(self, text):
        return text.split()

    def _convert_token_to_id(self, token):
        return 0

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = Path(save_directory, "words.lst")
        path.write_text("a")
        return (str(path),)


def assert_private(contents: dict[str, bytes], *folders: Path) -> None:
    """Nowhere an access token, a folder of this machine, or a pickled object that could hold them."""
    for name, content in contents.items():
        for secret in (TOKEN, os.getcwd(), str(Path.home()), *map(str, folders)):
            assert secret.encode() not in content, (name, secret)
        assert Path(name).name != "training_args.bin"


def push_with_warning(run, **kwargs):
    with pytest.warns(UserWarning, match="base model of this adapter is a local folder"):
        return run.push_to_hub(**kwargs)


class TestAdapter:
    def test_what_is_uploaded(self, hub, tmp_path):
        hub.chunk_size = 10_000  # the adapter goes in several parts
        run = adapter_run(tmp_path, save_strategy="steps", save_steps=1, hub_model_id="aligned")
        out = tmp_path / "out"
        run.train()
        for name in ("runs/now/events.out.tfevents.0", "teacher_features.arrow", ".env", "train.log", "notes.py"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(f"{tmp_path} {TOKEN}")
        info = push_with_warning(run)
        files = hub.repos[REPO]
        assert set(files) == {
            *("README.md", "adapter_config.json", "adapter_model.safetensors", "head_ranking.json", "hera/heads.png"),
            *("hera_run.json", "trainer_state.json"),
            *("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
        }
        assert_private(files, tmp_path)
        assert_private({str(i): body for i, body in enumerate(hub.received)}, tmp_path)
        assert len(hub.parts) > 1
        assert files["adapter_model.safetensors"] == (out / "adapter_model.safetensors").read_bytes()
        assert files["README.md"] == (out / "README.md").read_bytes()
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "the-base"
        here = json.loads((out / "adapter_config.json").read_text())
        assert here["base_model_name_or_path"] == str(tmp_path / "the-base")  # which loads, here
        assert info.commit_url.startswith(f"{hub.url}/{REPO}/commit/")
        assert hub.commits[REPO] == ["initial commit", "End of training"]

    def test_a_stranger_loads_it(self, hub, tmp_path):
        run = adapter_run(tmp_path, hub_model_id="aligned")
        run.train()
        push_with_warning(run)
        folder = HfApi(endpoint=hub.url).snapshot_download(REPO, cache_dir=tmp_path / "cache")
        base = AutoModelForImageTextToText.from_pretrained(tmp_path / "the-base")
        model = PeftModel.from_pretrained(base, folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        image = image_dataset(1)[0]["images"][0]
        inputs = processor(text=["<image>\nwhat is it?"], images=[image], return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, run.model.eval()(**inputs).logits)
        assert read_run(folder).aligned_heads == run.aligned_heads  # and can make a report of the run

    def test_arguments(self, hub, tmp_path):
        """As in `Trainer`: token, visibility, branch, message, names for the card, a future."""
        run = adapter_run(tmp_path, hub_token=None)
        run.prepare_alignment()
        future = push_with_warning(
            run, commit_message="hello", token=TOKEN, private=True, blocking=False, tags="mine", license="mit"
        )
        future.result(timeout=60)
        assert hub.commits[f"{USER}/out"][-1] == "hello"
        assert hub.visibility[f"{USER}/out"] == "private"
        card = ModelCard(hub.repos[f"{USER}/out"]["README.md"].decode())
        assert card.data.license == "mit" and "mine" in card.data.tags
        push_with_warning(run, dataset_name="somebody/pictures")
        card = ModelCard(hub.repos[f"{USER}/out"]["README.md"].decode())
        assert card.data.license == "mit" and card.data.datasets == ["somebody/pictures"]

    def test_configured_token_stays_here(self, hub, tmp_path):
        """Also when another one is given for the push."""
        run = adapter_run(tmp_path, hub_token="hf_configured")
        run.prepare_alignment()
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "trainer_state.json").write_text('{"token": "hf_configured"}')
        with pytest.warns(UserWarning, match=r"trainer_state\.json' holds an access token"):
            push_with_warning(run, token=TOKEN)
        assert "trainer_state.json" not in hub.repos[f"{USER}/out"]

    def test_only_what_the_run_writes(self, hub, tmp_path, caplog):
        """Nothing of a name that no run writes, and neither another run's weights nor another kind of model's."""
        run = adapter_run(tmp_path, hub_model_id="aligned")
        run.model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        run.train()
        out = tmp_path / "out"
        foreign = ("credentials.json", "kaggle.json", "model.safetensors", "notes.md", "LICENSE", "hera/mine.png")
        inside = {"old": ("adapter_config.json", "adapter_model.safetensors"), "data": ("train.json",)}
        for name in (*foreign, *(f"{folder}/{name}" for folder, names in inside.items() for name in names)):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("{}")
        push_with_warning(run)
        files = dict(hub.repos[REPO])
        assert set(files) == {
            *("README.md", "adapter_config.json", "adapter_model.safetensors", "head_ranking.json", "hera/heads.png"),
            *("second/adapter_config.json", "second/adapter_model.safetensors"),
            *("hera_run.json", "trainer_state.json"),
            *("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
        }
        (said,) = [r.getMessage() for r in caplog.records if "Not uploaded" in r.getMessage()]
        left_out = said.split(": ")[1].split(" in ")[0].split(", ")
        assert sorted(left_out) == sorted([*foreign, "old", "data"]) and "huggingface_hub.upload_file" in said
        push_with_warning(run)
        assert len([r for r in caplog.records if "Not uploaded" in r.getMessage()]) == 1  # once
        hub.repos[REPO] = {}
        with pytest.warns(UserWarning, match="local folder"):
            push_folder(out, REPO)  # as the run's record has it
        assert hub.repos[REPO] == files

    def test_keys_of_other_services_stay_here(self, hub, tmp_path, monkeypatch):
        """Whatever they look like, if the environment of the run names them."""
        key = "0f3b9c2e7a6d41c58e92b0f7d4a3c6e1905b8d27"
        monkeypatch.setenv("WANDB_API_KEY", key)
        run = adapter_run(tmp_path)
        run.prepare_alignment()
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "trainer_state.json").write_text(json.dumps({"log_history": [{"note": key}]}))
        with pytest.warns(UserWarning, match=r"trainer_state\.json' holds an access token"):
            push_with_warning(run)
        assert_private(hub.repos[f"{USER}/out"])
        assert not any(key.encode() in content for content in hub.repos[f"{USER}/out"].values())

    def test_from_disk(self, hub, tmp_path):
        """What a run left behind is published without its trainer, as its trainer would."""
        run = adapter_run(tmp_path, hub_model_id=REPO)
        run.train()
        run.save_model()
        with pytest.warns(UserWarning, match="local folder"):
            push_folder(tmp_path / "out", REPO, private=True)
        first = dict(hub.repos[REPO])
        push_with_warning(run)
        assert first == hub.repos[REPO]
        assert hub.commits[REPO] == ["initial commit", "Upload model"]  # there was nothing left to commit
        with pytest.raises(ValueError, match="neither a model nor an adapter"):
            push_folder(tmp_path, REPO)

    def test_not_without_weights(self, hub, tmp_path):
        """Of a run that was begun in the folder of another kind of model's, and stopped."""
        run = adapter_run(tmp_path)
        run.train()
        run.save_model()
        with pytest.raises(AssertionError, match="a training step began"):
            trainer(tmp_path / "out", max_steps=1, callbacks=[NoStep()]).train()
        with pytest.raises(ValueError, match="an adapter of the run that its"):
            push_folder(tmp_path / "out", REPO)
        assert not hub.repos

    @pytest.mark.parametrize("control", ["none", "permuted"])
    def test_an_adapter_with_a_name(self, hub, tmp_path, control):
        model, processor = build_vlm("llava")
        run = HeRATrainer(
            get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), adapter_name="mine"),
            config(tmp_path / "out", max_steps=1, teacher_control=control),
            train_dataset=image_dataset(n=24, with_features=8),
            processing_class=processor,
        )
        run.train()
        run.save_model()
        push_folder(tmp_path / "out", REPO, publish_control=control != "none")
        assert {"mine/adapter_config.json", "mine/adapter_model.safetensors"} < set(hub.repos[REPO])
        card = hub.repos[REPO]["README.md"].decode()
        (place,) = re.findall(r'PeftModel\.from_pretrained\(model, "[^"]+", subfolder="(\w+)"\)', card)
        loaded = PeftModel.from_pretrained(build_vlm("llava")[0], tmp_path / "out", subfolder=place)
        before, after = get_peft_model_state_dict(run.model, adapter_name="mine"), get_peft_model_state_dict(loaded)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert ("hera_control.json" in hub.repos[REPO]) == (control != "none")
        for folder in ("out", "out/mine"):
            if control != "none":
                with pytest.raises(ValueError, match="control run"):
                    push_folder(tmp_path / folder, REPO)


class TestWholeModel:
    def test_what_is_uploaded(self, hub, tmp_path):
        run = trainer(tmp_path / "out", max_steps=1, hub_model_id="aligned")
        run.train()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            run.push_to_hub()
        files = hub.repos[REPO]
        assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} < set(files)
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
        assert_private(files, tmp_path)
        assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()

    def test_without_alignment(self, hub, tmp_path):
        """SFTTrainer's card, and no more private things than with alignment."""
        run = trainer(tmp_path / "out", max_steps=1, alignment_weight=0.0, hub_model_id="aligned", hub_token=TOKEN)
        run.train()
        run.push_to_hub()
        files = hub.repos[REPO]
        assert b"It has been trained using [TRL]" in files["README.md"]
        assert "model.safetensors" in files and "head_ranking.json" not in files
        assert_private(files, tmp_path)


class TestWhileTraining:
    def test_end(self, hub, tmp_path):
        run = adapter_run(
            tmp_path, push_to_hub=True, hub_model_id=REPO, hub_strategy="end", save_strategy="steps", save_steps=1
        )
        run.train()
        assert hub.commits[REPO] == ["initial commit"]
        with pytest.warns(UserWarning, match="local folder"):
            run.save_model()
        assert hub.commits[REPO][1:] == ["Model save"]
        assert "hera/heads.png" in hub.repos[REPO]

    def test_every_save(self, hub, tmp_path):
        run = adapter_run(
            tmp_path,
            **{"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "every_save", "hub_always_push": True},
            **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
        )
        run.train()
        assert hub.commits[REPO][1:] == ["Training in progress, step 1", "Training in progress, step 2"]
        files = hub.repos[REPO]
        assert not [name for name in files if "checkpoint" in name or name.endswith(".pt")]
        assert_private(files, tmp_path)
        last = tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors"
        assert files["adapter_model.safetensors"] == last.read_bytes()

    @pytest.mark.parametrize(("strategy", "folder"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", None)])
    def test_checkpoints(self, hub, tmp_path, monkeypatch, strategy, folder):
        """A checkpoint with its optimizer, since that is what the strategy asks for, and still nothing private."""
        run = adapter_run(
            tmp_path,
            **{"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": strategy},
            **{"save_strategy": "steps", "save_steps": 2},
        )
        make = run._save_optimizer_and_scheduler

        def leave_more(checkpoint):
            make(checkpoint)
            for name in ("kaggle.json", "state.bin", "old/adapter_model.safetensors"):
                Path(checkpoint, name).parent.mkdir(exist_ok=True)
                Path(checkpoint, name).write_text("{}")

        monkeypatch.setattr(run, "_save_optimizer_and_scheduler", leave_more)
        run.train()
        files = hub.repos[REPO]
        assert not [name for name in files if "old" in name or name.endswith(("kaggle.json", "state.bin"))]
        prefix = f"{folder or 'checkpoint-2'}/"
        names = {name.removeprefix(prefix) for name in files if name.startswith(prefix)}
        assert {"optimizer.pt", "trainer_state.json", "hera_state.json", "hera_complete"} < names
        assert "training_args.bin" not in names and "README.md" not in names
        assert_private(files, tmp_path)
        hub.repos[REPO] = {name: content for name, content in files.items() if name.startswith(prefix)}
        copy = HfApi(endpoint=hub.url).snapshot_download(REPO, cache_dir=tmp_path / "cache")
        resumed = adapter_run(tmp_path / "elsewhere", max_steps=3)
        resumed.train(resume_from_checkpoint=str(Path(copy, prefix)))
        assert resumed.state.global_step == 3 and resumed.aligned_heads == run.aligned_heads


class TestFiles:
    def test_paths_and_tokens(self, tmp_path):
        folder = tmp_path / "run"
        (folder / "_private").mkdir(parents=True)
        (folder / "alignment_monitor").mkdir()
        (folder / "_private" / "a.json").write_text("{}")
        cached = "/data/hub/models--Org--Model-2B/snapshots/0123abcd"
        content = {"base": str(tmp_path / "models" / "mine"), "cached": cached, "note": f"see {tmp_path}/run/x"}
        content |= {"home": "~/models/other", "name": "Org/Model", "template": "a/b\n{{ c }}", "slash": "/", "n": [1.5]}
        (folder / "config.json").write_text(json.dumps(content))
        (folder / "tokenizer.json").write_text(json.dumps({"/usr/bin": 1}))
        (folder / "generation_config.json").write_text('{"key": "hf_secret"}')
        (folder / "preprocessor_config.json").write_text("{")
        (folder / "alignment_monitor" / "step-00000001-text.json").write_text("{}")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.warns(UserWarning, match=r"generation_config\.json' holds an access token"):
            files = publishable_files(folder, ["hf_secret"])
        names = {"config.json", "tokenizer.json", "preprocessor_config.json"}
        names |= {"alignment_monitor/step-00000001-text.json"}
        assert set(files) == names
        changed = {"base": "mine", "cached": "Org/Model-2B", "note": "see .../x", "home": "other"}
        assert json.loads(files["config.json"]) == {**content, **changed}
        assert files["tokenizer.json"] == b'{"/usr/bin": 1}'
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_card_of_an_adapter_of_a_local_model(self, tmp_path):
        """As PEFT writes it."""
        data = {"base_model": "/home/me/models/base", "library_name": "peft"}
        data["tags"] = ["base_model:adapter:/home/me/models/base", "lora"]
        ModelCard(f"---\n{yaml.safe_dump(data)}---\n\n# Mine\n").save(tmp_path / "README.md")
        card = publishable_files(tmp_path)["README.md"].decode()
        assert "/home/me" not in card and "base_model" not in card and "# Mine" in card
        assert ModelCard(card).data.tags == ["lora"] and ModelCard(card).data.library_name == "peft"
        (tmp_path / "README.md").write_text("---\nlicense: mit: x\n---\n")  # for the Hub to say what is wrong
        assert publishable_files(tmp_path)["README.md"] == (tmp_path / "README.md").read_bytes()
        data |= {"base_model": "org/base", "tags": ["base_model:adapter:org/base", "lora"]}
        ModelCard(f"---\n{yaml.safe_dump(data)}---\n\n# Mine\n").save(tmp_path / "README.md")
        assert publishable_files(tmp_path)["README.md"] == (tmp_path / "README.md").read_bytes()

    def test_heat_maps_of_an_earlier_run(self, tmp_path):
        """Only those that the card shows."""
        run = trainer(tmp_path, max_steps=1)
        run.prepare_alignment()
        run.save_model()
        (tmp_path / "hera" / "heads_text.png").write_bytes(b"of another run")
        maps = [name for name in publishable_files(tmp_path) if name.startswith("hera/")]
        assert maps == ["hera/heads.png"]

    def test_texts(self, tmp_path):
        """What stands in settings between other words."""
        said = {
            "command": "train --data=/home/me/faces --cache file:///home/me/cache",
            "source": "https://me:pw@example.com/data",
            "bucket": "s3://AKIAKEY:se/cr+et@bucket/data",
            "signed": "https://example.com/data?part=2&X-Amz-Signature=0f3b9c2e7a6d41c58e92",
            "windows": r"see C:\Users\me\faces",
            "pattern": r"^model\.layers\.\d+\.(q_proj|v_proj)$",
            "tokens": ["</s>", "<|im_end|>", "and/or", "/no_think", "a/b"],
        }
        (tmp_path / "config.json").write_text(json.dumps(said))
        changed = {
            "command": "train --data=.../faces --cache .../cache",
            "source": "https://<hidden>@example.com/data",
            "bucket": "s3://<hidden>@bucket/data",
            "signed": "https://example.com/data?part=2&X-Amz-Signature=",
            "windows": "see .../faces",
        }
        assert json.loads(publishable_files(tmp_path)["config.json"]) == {**said, **changed}

    def test_sharded_model(self, tmp_path):
        model, _ = build_vlm("llava")
        model.save_pretrained(tmp_path, max_shard_size="50KB")
        written = {path.name for path in tmp_path.iterdir()}
        assert len([name for name in written if name.startswith("model-0")]) > 1
        for name in ("model-old.safetensors", "model.bin", "pytorch_model.bin", "credentials.json"):
            (tmp_path / name).write_text("{}")
        assert set(publishable_files(tmp_path)) == written
        assert set(publishable_files(tmp_path, written=written_by(model, None))) == written

    def test_processor(self, tmp_path):
        """A vocabulary of a class of one's own, several chat templates, and a second tokenizer in its own folder."""
        fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
        processor = InstructBlipProcessor(BlipImageProcessor(), Words(), fast)
        processor.chat_template = {"default": "{{ 1 }}", "tools": "{{ 2 }}"}
        processor.save_pretrained(tmp_path)
        paths = [path for path in tmp_path.rglob("*") if path.is_file()]
        written = {path.relative_to(tmp_path).as_posix() for path in paths}
        assert {"words.lst", "qformer_tokenizer/tokenizer.json", "additional_chat_templates/tools.jinja"} < written
        for name in ("words.txt", "kaggle.json", "other/tokenizer.json", "qformer_tokenizer/kaggle.json"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("{}")
        assert set(publishable_files(tmp_path, written=written_by(torch.nn.Linear(1, 1), processor))) == written

    def test_without_a_record(self, tmp_path):
        """A folder that `save_model` wrote elsewhere: the tokenizer's class tells its vocabulary."""
        (tmp_path / "adapter_config.json").write_text("{}")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
        for name in ("spiece.model", "tokenizer.model", "vocab.json", "config.json", "adapter_model.safetensors"):
            (tmp_path / name).write_text("{}")
        names = {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "spiece.model"}
        assert set(publishable_files(tmp_path)) == names

    def test_code_of_a_model_of_ones_own(self, tmp_path):
        classes = {"AutoConfig": "settings.Mine", "AutoModel": "modeling.Mine", "AutoTokenizer": [None, "Org/x--a.B"]}
        (tmp_path / "config.json").write_text(json.dumps({"auto_map": classes}))
        for name, text in {"settings": "", "modeling": "from .parts import x\n", "parts": "", "train": ""}.items():
            (tmp_path / f"{name}.py").write_text(text)
        assert set(publishable_files(tmp_path)) == {"config.json", "settings.py", "modeling.py", "parts.py"}

    def test_weights(self, hub, tmp_path):
        """Large files are streamed from disk, not read into memory."""
        run = adapter_run(tmp_path)
        run.prepare_alignment()
        run.save_model()
        files = publishable_files(tmp_path / "out")
        assert files["adapter_model.safetensors"] == tmp_path / "out" / "adapter_model.safetensors"
        assert load_file(files["adapter_model.safetensors"])
