"""Publishing a run: which of its files go to the Hub, and errors that say what is left to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import CONFIG_NAME

from .. import __version__
from ..common.files import write_atomically
from ..common.redaction import HIDDEN, is_local, is_secret, shown_name
from ..runs.control import read_control
from ..runs.record import read_if_whole
from ..runs.written_files import RUN_FILE
from .files import checkpoint_files, publishable_files

logger = get_logger(__name__)


class PushError(OSError):
    """A push to the Hub that failed. Its message is one line: the reason, where the result is, and what to do."""


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
    publish_control: bool = False,
) -> CommitInfo:
    """Publishes what a run left on disk, without its trainer: what [`HeRATrainer.push_to_hub`] would upload.

    Args:
        folder (`str` or `os.PathLike`): The run's `output_dir`, or a folder that `save_model` wrote.
        repo_id (`str`): Name of the repository, such as `"user/model"`. It is created where it does not exist.
        token (`str`, *optional*): Access token that may write, by default that of `hf auth login`.
        revision (`str`, *optional*): Branch, `hub_revision` of the run or `"main"` by default.
        private (`bool`, *optional*): Whether a new repository is private, `hub_private_repo` of the run by default.
        commit_message (`str`, *optional*): Message of the commit.
        publish_control (`bool`, *optional*, defaults to `False`): Whether the result of a control run is published.

    Returns:
        [`~huggingface_hub.CommitInfo`].

    Raises:
        [`PushError`]: If it failed. The folder is as before, and the same call completes what is missing.
        `ValueError`: If the folder holds no model, or that of a control run.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder. Name the `output_dir` of a run.")
    config = (read_if_whole(path / RUN_FILE) or {}).get("config") or {}
    how = push_settings({**config, "publish_control": publish_control}, private, revision)
    check_publishable(read_control(path), publish_control)
    files = result_files(path, None, token)
    _check_complete(path, files)
    api = hub_api(token)
    with explained(repo_id, path, **how):
        repo_id = api.create_repo(repo_id, private=how["private"], exist_ok=True).repo_id
    warn_of_local_base(path)
    return upload(api, repo_id, path, files, commit_message, token, **how)


def push_settings(
    config: Mapping[str, Any], private: bool | None = None, revision: str | None = None
) -> dict[str, Any]:
    """How a run is pushed: as the call says, else as the run is configured. Arguments of [`explained`] and [`upload`].

    Args:
        config (`Mapping[str, Any]`): Settings of the run, as its configuration or its record has them.
        private (`bool`, *optional*), revision (`str`, *optional*): What the call says.

    Returns:
        `dict[str, Any]`: `private`, `revision` and `publish_control`.

    Raises:
        `ValueError`: If the record does not show the branch.
    """
    revision = revision or config.get("hub_revision")
    if revision == HIDDEN:  # neither to a branch of that name, nor to main
        raise ValueError(f"`{RUN_FILE}` does not show the branch that the run was to be pushed to. Set `revision`.")
    return {
        "private": config.get("hub_private_repo") if private is None else private,
        "revision": revision,
        "publish_control": bool(config.get("publish_control")),
    }


def _check_complete(folder: Path, files: Iterable[str]) -> None:
    """Refuses files that nobody can load: without weights, or without the configuration beside them."""
    names = {Path(name).name for name in files}
    if {ADAPTER_CONFIG, CONFIG_NAME}.isdisjoint(names) or not any(name.endswith(".safetensors") for name in names):
        of_run = f" of the run that its `{RUN_FILE}` describes" if (folder / RUN_FILE).is_file() else ""
        raise ValueError(
            f"{str(folder)!r} holds neither a model nor an adapter{of_run}. Name the `output_dir` of a run that has "
            "saved its result."
        )


def check_publishable(control: str, allowed: bool) -> None:
    """Refuses the result of a control run.

    Args:
        control (`str`): `teacher_control` of the run, `"none"` where there was no alignment.
        allowed (`bool`): Whether it may be published all the same.

    Raises:
        `ValueError`: If it may not.
    """
    if control != "none" and not allowed:
        raise ValueError(
            f"This is a control run (`teacher_control={control!r}`): it was trained with other images' teacher vectors,"
            " and nobody should take it for an aligned model. Set `publish_control=True` if it shall be published."
        )


@contextmanager
def explained(
    repo_id: str,
    folder: str | os.PathLike | None,
    private: bool | None = None,
    revision: str | None = None,
    publish_control: bool = False,
) -> Iterator[None]:
    """Turns whatever goes wrong inside into a [`PushError`] of one line.

    Args:
        repo_id (`str`): Name of the repository.
        folder (`str` or `None`): Where the complete result is; `None` if there is none yet.
        private (`bool`, *optional*), revision (`str`, *optional*), publish_control (`bool`):
            Of the push. The calls that the message advises do the same.
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
        how = {"private": private, "revision": revision}
        same = [f"{name}={value!r}" for name, value in how.items() if value is not None]
        control = ["publish_control=True"] if publish_control else []  # the trainer has it in its configuration
        arguments = ", ".join([repr(str(folder)), repr(repo_id), *same, *control])
        raise PushError(
            f"Pushing to {repo_id!r} failed: {reason}. The result is complete in {str(folder)!r}. {cure} and call "
            f"`trainer.push_to_hub({', '.join(same)})` again, or `hera_trainer.hub.push.push_folder({arguments})`."
        ) from error


def warn_of_local_base(folder: str | os.PathLike) -> None:
    """Warns if the adapter in a folder names its base model by a path of this machine."""
    named = Path(folder).glob(f"*/{ADAPTER_CONFIG}")  # one with a name lies in a folder of its own
    path = next((path for path in (Path(folder, ADAPTER_CONFIG), *named) if path.is_file()), None)
    base = None if path is None else json.loads(path.read_text()).get("base_model_name_or_path")
    if base and (is_local(base) or os.path.isdir(base)) and shown_name(base) == Path(base).name:
        warnings.warn(
            f"The base model of this adapter is a local folder, published as {shown_name(base)!r}: nobody else can "
            "load it. If the base model is on the Hub, train from its name there, or correct "
            f"`base_model_name_or_path` in `{ADAPTER_CONFIG}`.",
            stacklevel=3,
        )


def hub_api(token: str | None = None) -> HfApi:
    """The Hub's client, under this library's name."""
    return HfApi(library_name="hera-trainer", library_version=__version__, token=token)


def result_files(
    folder: str | os.PathLike, written: Iterable[str] | None, *tokens: str | None
) -> dict[str, Path | bytes]:
    """What of a run's folder goes to the Hub, without access tokens (see [`~hub.files.publishable_files`]).

    Args:
        folder (`str` or `os.PathLike`): The run's `output_dir`.
        written (iterable of `str`, *optional*): What saving the result writes.
        *tokens (`str`): Access tokens that are known besides those of this machine.
    """
    return publishable_files(folder, _secrets(*tokens), written)


def upload(
    api: HfApi,
    repo_id: str,
    folder: str | os.PathLike,
    files: dict[str, Path | bytes],
    message: str,
    token: str | None = None,
    revision: str | None = None,
    blocking: bool = True,
    private: bool | None = None,
    publish_control: bool = False,
) -> Any:
    """Uploads files in one commit.

    Args:
        api ([`~huggingface_hub.HfApi`]): The Hub's client.
        repo_id (`str`): Name of the repository.
        folder (`str` or `os.PathLike`): Where the complete result is.
        files (`dict[str, Path | bytes]`): Path in the repository -> local file, or content.
        message (`str`): Message of the commit.
        token (`str`, *optional*): Access token that may write.
        revision (`str`, *optional*): Branch, `"main"` by default.
        blocking (`bool`, *optional*, defaults to `True`): Whether to return only when everything is uploaded.
        private (`bool`, *optional*), publish_control (`bool`): Of the push, for [`explained`].

    Returns:
        [`~huggingface_hub.CommitInfo`] or, with `blocking=False`, a future of it.

    Raises:
        [`PushError`]: If it failed; `folder` holds the result.
    """

    def commit() -> CommitInfo:
        with explained(repo_id, folder, private, revision, publish_control):
            operations = [CommitOperationAdd(path, content) for path, content in files.items()]
            return api.create_commit(repo_id, operations, commit_message=message, token=token, revision=revision)

    return commit() if blocking else api.run_as_future(commit)


def push_checkpoint(
    api: HfApi, repo_id: str, checkpoint: Path, written: Sequence[str], args: TrainingArguments, state: TrainerState
) -> list[Any]:
    """Begins to upload what a checkpoint has trained and, if `hub_strategy` says so, the checkpoint.

    Args:
        api ([`~huggingface_hub.HfApi`]): The Hub's client.
        repo_id (`str`): Name of the repository.
        checkpoint (`Path`): A complete checkpoint. Its result is copied into `args.output_dir`.
        written (sequence of `str`): What saving the result writes.
        args ([`~transformers.TrainingArguments`]), state ([`~transformers.TrainerState`]): Of the run.

    Returns:
        `list`: Futures of the commits.
    """
    folder = Path(str(args.output_dir))
    for source in (path for pattern in written for path in checkpoint.glob(pattern)):
        target = folder / source.relative_to(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, partial(shutil.copyfile, source))
    steps = args.save_strategy == SaveStrategy.STEPS
    when = f"step {state.global_step}" if steps else f"epoch {int(state.epoch or 0)}"
    message, token, how = f"Training in progress, {when}", args.hub_token, push_settings(vars(args))
    uploads = {message: result_files(folder, written, token)}
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        kept = checkpoint_files(checkpoint, _secrets(token), written)
        uploads[f"{message}, checkpoint"] = {f"{name}/{path}": file for path, file in kept.items()}
    return [upload(api, repo_id, folder, files, text, token, blocking=False, **how) for text, files in uploads.items()]


def warn_of_failures(push: Any) -> None:
    """Says which uploads of a finished [`~transformers.utils.PushInProgress`] failed."""
    for error in [] if push is None else [job.exception() for job in push.jobs]:
        if error is not None:
            logger.warning(f"{error} Training is not affected.")


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
