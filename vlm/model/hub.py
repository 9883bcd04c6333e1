# SPDX-License-Identifier: Apache-2.0
"""Models from the Hugging Face hub, and to it."""

from __future__ import annotations

from pathlib import Path

from aced_sdk.errors import ModelError
from aced_sdk.files import check_links, inside, read_json

# What transformers reads of a repository; subfolders are left out.
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def downloaded(name: str) -> Path:
    """The local folder of a repository's newest revision: its small files and its safetensors; no code, no pickles.

    Args:
        name: `organisation/repository` or `repository`.

    Raises:
        Exception: of huggingface_hub, if it cannot be reached and the cache does not hold the repository.
        ReadError: if the index of its weights names a file outside.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=_SMALL, ignore_patterns=["*/*"]))
    shards = {_WEIGHTS}
    if (folder / _INDEX).is_file():
        shards = set(read_json(folder / _INDEX)["weight_map"].values())
    for shard in sorted(shards):
        inside(folder, shard)
        hf_hub_download(name, shard, revision=folder.name)
    return folder


def push_to_hub(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload what `save` wrote to a repository on the Hugging Face hub, which is made if there is none.

    Weights and JSON files of an earlier upload that are not in the folder are removed, since loaders would take them.

    Args:
        folder: what `save` wrote, merged or apart.
        repo_id: `user/name` or `organisation/name`.
        private: whether a new repository is seen by its owners alone; one that is there stays as it is.

    Returns:
        The repository's address.

    Raises:
        ModelError: if the folder holds no model, or a link that leads out of it; if the hub cannot be reached or
            refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    path = Path(folder)
    if not any((path / part / "config.json").is_file() for part in (".", "base")):
        raise ModelError(f"{path} holds no model", remedy="name a folder that vlm.save wrote", field="folder")
    hub = HfApi()
    try:
        check_links(path)
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=address.repo_id,
            folder_path=path,
            commit_message="Upload with ACED SDK",
            delete_patterns=["*.safetensors", "*.json"],
        )
    except (HTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            remedy = f"log in with `hf auth login`, or set HF_TOKEN, with a token that may write to {repo_id}"
        elif status is not None or isinstance(error, ValueError):
            remedy = "change what the message names; a repository is called user/name"
        else:
            remedy = "check the network, and that HF_HUB_OFFLINE is not set; the folder stays as it is"
        raise ModelError(f"{path} was not uploaded to {repo_id}: {error}", remedy=remedy, field="repo_id") from error
    return str(address)
