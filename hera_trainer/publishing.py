"""Publishing a run: which of its files go to the Hub, and errors that say what is left to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate.logging import get_logger
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from torch import nn
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import CONFIG_NAME, PushInProgress
from trl import SFTTrainer

from .config import HeRAConfig
from .loss import HeRALoss
from .model_card import is_own_text, write_model_card
from .published_files import (
    CARD_FILE,
    PLOTS_FOLDER,
    checkpoint_files,
    is_local,
    publishable_files,
    shown_name,
    written_by,
)
from .redaction import is_secret
from .version import __version__

logger = get_logger(__name__)

# The mixin calls on to a Trainer: type checkers must see it, the class hierarchy must not repeat it.
if TYPE_CHECKING:
    from .trainer import HeRATrainer

    _Base = SFTTrainer
else:
    _Base = object


class PushError(OSError):
    """A push to the Hub that failed. Its message is one line: the reason, where the result is, and what to do."""


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Publishes what a run left on disk, without its trainer: what [`HeRATrainer.push_to_hub`] would upload.

    Args:
        folder (`str` or `os.PathLike`): The run's `output_dir`, or a folder that `save_model` wrote.
        repo_id (`str`): Name of the repository, such as `"user/model"`. It is created where it does not exist.
        token (`str`, *optional*): Access token that may write, by default that of `hf auth login`.
        revision (`str`, *optional*): Branch, `"main"` by default.
        private (`bool`, *optional*): Whether a new repository is private.
        commit_message (`str`, *optional*): Message of the commit.

    Returns:
        [`~huggingface_hub.CommitInfo`].

    Raises:
        [`PushError`]: If it failed. The folder is as before, and the same call completes what is missing.
        `ValueError`: If the folder holds no model.
    """
    path = Path(folder)
    if not (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG_NAME).is_file():
        raise ValueError(f"{str(folder)!r} holds neither a model nor an adapter. Name the `output_dir` of a run.")
    api = HfApi(library_name="hera-trainer", library_version=__version__, token=token)
    with explained(repo_id, path):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    warn_of_local_base(path)
    return _commit(api, repo_id, path, publishable_files(path, _secrets(token)), commit_message, token, revision)


@contextmanager
def explained(repo_id: str, folder: str | os.PathLike | None) -> Iterator[None]:
    """Turns whatever goes wrong inside into a [`PushError`] of one line.

    Args:
        repo_id (`str`): Name of the repository.
        folder (`str` or `None`): Where the complete result is; `None` if there is none yet.
    """
    try:
        yield
    except PushError:
        raise
    except Exception as error:  # the transfer's own client raises types that it does not export
        reason, cure = _reason(error)
        if folder is None:
            raise PushError(
                f"The repository {repo_id!r} could not be opened on the Hub: {reason}. {cure} and start again, or set "
                "`push_to_hub=False`; training has not begun."
            ) from error
        raise PushError(
            f"Pushing to {repo_id!r} failed: {reason}. The result is complete in {str(folder)!r}. {cure} and call "
            f"`trainer.push_to_hub()` again, or `hera_trainer.publishing.push_folder({str(folder)!r}, {repo_id!r})`."
        ) from error


def warn_of_local_base(folder: str | os.PathLike) -> None:
    """Warns if the adapter in a folder names its base model by a path of this machine."""
    path = Path(folder, ADAPTER_CONFIG)
    base = json.loads(path.read_text()).get("base_model_name_or_path") if path.is_file() else None
    if base and (is_local(base) or os.path.isdir(base)) and shown_name(base) == Path(base).name:
        warnings.warn(
            f"The base model of this adapter is a local folder, published as {shown_name(base)!r}: nobody else can "
            "load it. If the base model is on the Hub, train from its name there, or correct "
            f"`base_model_name_or_path` in `{ADAPTER_CONFIG}`.",
            stacklevel=3,
        )


class PublishingMixin(_Base):
    """Model card and pushes of [`HeRATrainer`]."""

    args: HeRAConfig
    model: Any
    criterion: HeRALoss | None
    train_dataset: Any
    push_in_progress: Any
    _checkpoint_to_push: Path | None = None

    @cached_property
    def _hub(self) -> HfApi:
        return HfApi(library_name="hera-trainer", library_version=__version__)

    @property
    def _repo_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    def create_model_card(  # type: ignore[override]  # as TRL's, which takes other arguments than Trainer's
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Writes the model card, and the heat maps that it shows, into `output_dir`.

        With `alignment_weight=0`, the card is that of [`~trl.SFTTrainer`].

        Args:
            model_name (`str`, *optional*): Name of the model.
            dataset_name (`str` or `list[str]`, *optional*):
                Name of the data set on the Hub, by default the one it was loaded from.
            tags (`str` or `list[str]`, *optional*): Further tags.
            license (`str`, *optional*):
                Licence, such as `"apache-2.0"`; a licence that was written into the card by hand stays otherwise.
        """
        if self.criterion is None:
            super().create_model_card(model_name, dataset_name, tags)  # type: ignore[arg-type]
        elif self.is_world_process_zero():
            write_model_card(
                cast("HeRATrainer", self), super().create_model_card, model_name, dataset_name, tags, license
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        here, there = Path(str(self.args.output_dir)), Path(output_dir or str(self.args.output_dir))
        card = here / CARD_FILE
        # Before PEFT rewrites what it finds.
        keeps_card = is_own_text(there / CARD_FILE)
        own = card.read_bytes() if is_own_text(card) else None
        super().save_model(output_dir, _internal_call)
        # What pushes and checkpoints save gets its card from them. Here, PEFT has left a blank form.
        if self.criterion is None or _internal_call or keeps_card or not self.is_world_process_zero():
            return
        try:
            self.create_model_card(model_name=self._repo_name.split("/")[-1])
            if here.resolve() != there.resolve():
                shutil.copy(card, there / CARD_FILE)
                if (here / PLOTS_FOLDER).is_dir():
                    shutil.copytree(here / PLOTS_FOLDER, there / PLOTS_FOLDER, dirs_exist_ok=True)
        finally:
            if own is not None:
                card.write_bytes(own)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        with explained(self._repo_name, None):
            super().init_hf_repo(token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves the result in `output_dir` and uploads it to the repository `args.hub_model_id`.

        As in [`~transformers.Trainer`], but only what [`publishable_files`] names is uploaded.

        Args:
            commit_message (`str`, *optional*): Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to return only when everything is uploaded.
            token (`str`, *optional*): Access token that may write, instead of `args.hub_token`.
            revision (`str`, *optional*): Branch, `args.hub_revision` or `"main"` by default.
            private (`bool`, *optional*): Whether a new repository is private, `args.hub_private_repo` by default.
            **kwargs: Arguments of `create_model_card`: `model_name`, `dataset_name`, `tags`, `license`.

        Returns:
            [`~huggingface_hub.CommitInfo`] or, with `blocking=False`, a future of it; `None` on other processes than
            the first.

        Raises:
            [`PushError`]: If the push failed. The result is complete in `output_dir`, and another call completes it.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()  # it reads the files that are about to be written
        folder, token = str(self.args.output_dir), token if token is not None else self.args.hub_token
        # Before anything is asked of the Hub, so that a refusal finds the result on disk, on all processes.
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        tags += [tag for tag in getattr(self.model, "model_tags", None) or () if tag not in tags]
        name = kwargs.pop("model_name", None) or self._repo_name.split("/")[-1]
        self.create_model_card(model_name=name, tags=tags, **kwargs)
        if self.hub_model_id is None:
            known_as = self._repo_name
            with explained(known_as, folder):
                super().init_hf_repo(token, private)
            if self._repo_name != known_as:  # the code in the card names the repository in full
                self.create_model_card(model_name=name, tags=tags, **kwargs)
        warn_of_local_base(folder)
        written = written_by(self.model, self.processing_class)
        files = publishable_files(folder, _secrets(token, self.args.hub_token), written)
        revision = revision or self.args.hub_revision
        return self._commit(files, commit_message or "End of training", token, revision, blocking)

    def _commit(
        self, files: dict[str, Path | bytes], message: str, token: str | None, revision: str | None, blocking: bool
    ) -> Any:
        arguments = (self._hub, self._repo_name, str(self.args.output_dir), files, message, token, revision)
        return _commit(*arguments) if blocking else self._hub.run_as_future(_commit, *arguments)

    # Pushes while training

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        checkpoint, self._checkpoint_to_push = self._checkpoint_to_push, None
        if checkpoint is not None:
            self._push_checkpoint(checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # `Trainer` calls this while the checkpoint still lacks the marker that it is complete.
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self._checkpoint_to_push = Path(checkpoint_folder)

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Uploads in the background what a checkpoint has trained and, if `hub_strategy` says so, the checkpoint."""
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        args, folder = self.args, Path(str(self.args.output_dir))
        written = written_by(self.model, self.processing_class)
        for source in (path for pattern in written for path in checkpoint.glob(pattern)):
            target = folder / source.relative_to(checkpoint)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
        steps = args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch or 0)}"
        message, token = f"Training in progress, {when}", args.hub_token
        files = publishable_files(folder, _secrets(token), written)
        jobs = [self._commit(files, message, token, args.hub_revision, blocking=False)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            kept = checkpoint_files(checkpoint, _secrets(token), written)
            files = {f"{name}/{path}": file for path, file in kept.items()}
            jobs.append(self._commit(files, f"{message}, checkpoint", token, args.hub_revision, blocking=False))
        self.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]  # it takes a list

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        push = getattr(self, "push_in_progress", None)
        for error in [] if push is None else [job.exception() for job in push.jobs]:
            if error is not None:
                logger.warning(f"{error} Training is not affected.")
        self.push_in_progress = None


def _commit(
    api: HfApi,
    repo_id: str,
    folder: str | os.PathLike,
    files: dict[str, Path | bytes],
    message: str,
    token: str | None,
    revision: str | None,
) -> CommitInfo:
    with explained(repo_id, folder):
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        return api.create_commit(repo_id, operations, commit_message=message, token=token, revision=revision)


def _secrets(*tokens: str | None) -> list[str]:
    """Access tokens that are known here, whatever they look like; of other services, from the environment."""
    others = (value for name, value in os.environ.items() if is_secret(name, value))
    return [secret for secret in {*tokens, get_token(), *others} if secret]


def _reason(error: BaseException) -> tuple[str, str]:
    """Why a push failed, and what to do, from the error of the Hub's client."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    known = (HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled)
    cause = next((link for link in chain if isinstance(link, known)), error)
    if isinstance(cause, OfflineModeIsEnabled):
        return "offline mode is on", "Unset `HF_HUB_OFFLINE`"
    if isinstance(cause, HfHubHTTPError):
        status: int | None = cause.response.status_code
    else:  # the client of Xet, which carries large files, tells it in words
        in_words = re.search(r"HTTP status \w+ error \((\d{3})", str(cause))
        status = None if in_words is None else int(in_words[1])
    if status in (401, 403) or isinstance(cause, LocalTokenNotFoundError):
        reason = "there is no access token" if status is None else f"the Hub refused the access token ({status})"
        return reason, "Log in with a token that may write there (`hf auth login`, `HF_TOKEN` or `hub_token`)"
    if status == 404:
        return "the Hub knows no such repository or branch (404)", "Correct `hub_model_id` or `hub_revision`"
    if status == 429 or (status is not None and status >= 500):
        return f"the Hub is busy or down ({status})", "Wait a little"
    said = next((link for link in chain if isinstance(link, ValueError)), cause)  # what the Hub finds wrong in a card
    summary = " ".join(str(said).split())[:300].rstrip(".")
    if status is None and isinstance(cause, (HTTPError, ConnectionError)):
        return f"the connection broke ({summary or type(cause).__name__})", "Check the network"
    return summary or type(cause).__name__, "Correct that"
