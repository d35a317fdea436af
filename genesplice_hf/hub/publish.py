"""Build a folder that is ready for the Hub, prove that it loads, and send it in one commit.

Pushes to a Hub are not atomic, so everything that can fail is done on the disk first: the folder appears under
its name only when it is complete and verified.
"""

import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genesplice_hf.errors import PublishError
from genesplice_hf.hub.bundle import BUNDLE_FILE, PACKAGE, check_bundle, write_bundle
from genesplice_hf.hub.card import CardFields, check_card, render_card
from genesplice_hf.hub.verify import auto_class_of, make_probe, verify_with_package, verify_without_package

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
OFFICIAL_ENDPOINT = "https://huggingface.co"


@dataclass(frozen=True)
class PublishResult:
    """What `publish` did.

    Attributes:
        folder: the complete, verified folder.
        dry_run: True when nothing was sent.
        repo_id: the repository that the folder was made for.
        commit: the id of the commit, after a push.
        url: the address of the commit, after a push.
        tag: the tag that points to the commit, if one was asked for.
    """

    folder: Path
    dry_run: bool
    repo_id: str | None = None
    commit: str | None = None
    url: str | None = None
    tag: str | None = None


def publish(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    card: CardFields,
    adapter: str | Path | None = None,
    repo_id: str | None = None,
    dry_run: bool | None = None,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    probe: Mapping[str, torch.Tensor] | None = None,
) -> PublishResult:
    """Write weights, tokenizer, adapter, card and bundle into `folder`, verify them, and push one commit.

    Args:
        model: the model itself; merge an adapter first.
        tokenizer: its tokenizer, or None for a model without one.
        folder: where the verified result will lie; must not exist or be empty.
        card: the facts of the model card; `auto_class`, `num_parameters` and the like are filled in here.
        adapter: a folder that PEFT saved; it is copied into the sub-folder `adapter/`. Its base is then named
            by `card.base_model`.
        repo_id: `owner/name` on the Hub.
        dry_run: write the folder only. Default: True without `repo_id` or with `HF_HUB_OFFLINE`.
        private: create the repository as a private one.
        revision: the branch that receives the commit (default: main); made if it does not exist.
        tag: a tag for the commit.
        token: access token; the stored login otherwise.
        endpoint: address of another Hub than the one that huggingface_hub is set to. Hubs other than
            huggingface.co are sent plain LFS uploads, as with `HF_HUB_DISABLE_XET=1`.
        probe: tensors for `forward` by which the copies are compared; needed where the model does not read
            `input_ids`.

    Raises:
        PublishError: the card is incomplete, the folder cannot be made or verified, or the Hub refuses it.
            A folder that failed is removed, and nothing is sent.
    """
    folder = Path(folder)
    is_dry = _is_dry_run(dry_run, repo_id)
    _check_inputs(model, folder, card, adapter)
    card = dataclasses.replace(card, repo_id=repo_id or card.repo_id, revision=tag or card.revision)
    with _workplace(folder) as draft:
        _build(draft, model, tokenizer, card, adapter)
        _verify(draft, model, tokenizer, probe)
    if is_dry or repo_id is None:
        logger.info("wrote %s; a dry run sends nothing", folder)
        return PublishResult(folder, True, repo_id)
    return push_folder(folder, repo_id, private=private, revision=revision, tag=tag, token=token, endpoint=endpoint)


def _is_dry_run(dry_run: bool | None, repo_id: str | None) -> bool:
    offline = constants.is_offline_mode()
    if dry_run is None:
        return repo_id is None or offline
    if not dry_run and repo_id is None:
        raise PublishError("`repo_id` must be `owner/name` for a push, was None; pass it or leave `dry_run` on.")
    if not dry_run and offline:
        raise PublishError("`dry_run` must be left on while HF_HUB_OFFLINE is set; unset it before Python starts.")
    return dry_run


def _check_inputs(model: PreTrainedModel, folder: Path, card: CardFields, adapter: str | Path | None) -> None:
    check_card(card, filled_later=("auto_class", "num_parameters"))
    if not isinstance(model, PreTrainedModel):
        raise PublishError(
            f"`model` must be a PreTrainedModel, was {type(model).__name__}; call `merge_and_unload()` on a PEFT "
            "model and pass the adapter's folder as `adapter`."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise PublishError("`model` holds an adapter, so that only the adapter would be saved; merge it first.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PublishError(f"`folder` ({folder}) must be new or empty; choose another one or remove it first.")
    if adapter is not None:
        _check_adapter(Path(adapter), card)


def _check_adapter(adapter: Path, card: CardFields) -> None:
    missing = [name for name in ADAPTER_FILES if not (adapter / name).is_file()]
    if missing:
        raise PublishError(f"`adapter` ({adapter}) must hold {' and '.join(missing)}; save it with PEFT first.")
    if not card.base_model:
        raise PublishError("`base_model` of the card must name the adapter's base; a reader could not load it.")


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name when all went well and vanishes otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix="draft_", dir=folder.parent))
    try:
        yield draft
        # mkdtemp keeps others out; the result is an ordinary folder.
        draft.chmod(0o755)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _build(
    draft: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    card: CardFields,
    adapter: str | Path | None,
) -> None:
    # False: our key names, not those of the checkpoint that the model may have been converted from.
    model.save_pretrained(draft, save_original_format=False)
    if tokenizer is not None:
        tokenizer.save_pretrained(draft)
    if type(model).__module__.startswith(PACKAGE + "."):
        write_bundle(draft, model, tokenizer)
    if adapter is not None:
        _copy_adapter(Path(adapter), draft / ADAPTER_FOLDER, card.base_model or "")
    (draft / "README.md").write_text(_card_text(draft, model, tokenizer, card), encoding="utf-8")


def _copy_adapter(adapter: Path, target: Path, base_model: str) -> None:
    """Copy the adapter and name its base by `base_model`: a path of this machine helps nobody else."""
    target.mkdir()
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, target / name)
    path = target / ADAPTER_FILES[0]
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = base_model
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _card_text(
    draft: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, card: CardFields
) -> str:
    config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    auto_class = auto_class_of(config)
    return render_card(
        dataclasses.replace(
            card,
            auto_class=auto_class,
            class_reference=config.get("auto_map", {}).get(auto_class),
            num_parameters=model.num_parameters(),
            has_tokenizer=tokenizer is not None,
        )
    )


def _verify(
    draft: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    probe: Mapping[str, torch.Tensor] | None,
) -> None:
    probe = probe if probe is not None else make_probe(model, tokenizer)
    verify_with_package(draft, model, probe)
    verify_without_package(draft, probe=probe)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> PublishResult:
    """Send a folder that `publish` wrote earlier, in one commit.

    Args:
        folder: the verified folder.
        repo_id: `owner/name`; the repository is created where it does not exist.
        private, revision, tag, token, endpoint: as for `publish`.

    Raises:
        PublishError: the folder was changed since it was verified, or the Hub refuses it.
    """
    folder = Path(folder)
    if (folder / BUNDLE_FILE).is_file():
        check_bundle(folder)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        commit = _send(api, folder, repo_id, private=private, revision=revision, tag=tag)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise PublishError(
            f"{api.endpoint} did not take {repo_id}: {error}. The verified folder is {folder}; mend the cause and "
            "call `push_folder`."
        ) from error
    logger.info("pushed %s to %s", folder, commit.commit_url)
    return PublishResult(folder, False, repo_id, commit.oid, commit.commit_url, tag)


def _send(
    api: HfApi, folder: Path, repo_id: str, *, private: bool, revision: str | None, tag: str | None
) -> CommitInfo:
    with _uploads_for(api.endpoint):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        message = "Publish with genesplice-hf"
        commit = api.create_commit(repo_id, _operations(folder), commit_message=message, revision=revision)
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


def _operations(folder: Path) -> list[CommitOperationAdd]:
    """Every file of the folder. `upload_folder` may split one folder into several commits; this cannot."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]


@contextmanager
def _uploads_for(endpoint: str) -> Iterator[None]:
    """Switch Xet uploads off for Hubs that do not have them.

    With Xet the client asks for a write token first and gives up when the Hub knows no such thing. The switch is
    `HF_HUB_DISABLE_XET`, which huggingface_hub reads once, at import, so the constant itself is set for the call.
    """
    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = before or endpoint.rstrip("/") != OFFICIAL_ENDPOINT
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before
