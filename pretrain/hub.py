"""`pairstream pretrain push RUN --repo ORG/NAME`: a checkpoint on the Hugging Face hub, for stock open_clip."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro

from pairstream.errors import require
from pretrain.encoder import checkpoint_folder, load_encoder
from pretrain.towers import CONFIG


def stage(checkpoint: Path, repo: str, folder: Path, license_name: str | None = None) -> list[Path]:
    """Lay out what goes to the hub: the checkpoint, with the names of this machine's places replaced by the repo's.

    Args:
        checkpoint: A checkpoint's folder.
        repo: `ORG/NAME`.
        folder: An empty folder.
        license_name: For the card's metadata, such as `mit`.

    Returns:
        The files, in order.
    """
    for path in checkpoint.iterdir():
        if path.is_file():
            shutil.copy2(path, folder / path.name)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    text = config["model_cfg"]["text_cfg"]
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if text.get(key):  # open_clip reads a transformers tower's configuration from where this says
            text[key] = repo
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    card = folder / "README.md"
    said = card.read_text(encoding="utf-8").replace("local-dir:PATH-OF-THIS-FOLDER", f"hf-hub:{repo}")
    if license_name and said.startswith("---\n"):
        said = said.replace("---\n", f"---\nlicense: {license_name}\n", 1)
    card.write_text(said, encoding="utf-8")
    return sorted(folder.iterdir())


def push(
    run: Annotated[str, tyro.conf.Positional],
    /,
    repo: str,
    dry_run: bool = False,
    private: bool = False,
    branch: str | None = None,
    license: str | None = None,
) -> str:
    """Upload a checkpoint with its model card; `hf-hub:ORG/NAME` then opens it in open_clip and here.

    Args:
        run: A run folder (its newest checkpoint) or a checkpoint.
        repo: ORG/NAME on the hub; made when it does not exist.
        dry_run: Check everything and list what would be uploaded; nothing leaves this machine.
        private: Make a new repo private.
        branch: Branch to push to; the main one by default.
        license: For the card, such as `mit` or `cc-by-4.0`.
    """
    hub: Any = require("huggingface_hub", "remote", "pushing to the hub")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if repo.count("/") != 1:
            raise HFValidationError("one '/' must part owner and name")
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--repo {repo!r}: expected ORG/NAME: {error}") from error
    checkpoint = checkpoint_folder(run)
    if checkpoint is None:
        raise FileNotFoundError(f"no folder {run}: expected a run folder or a checkpoint")
    load_encoder(checkpoint, device="cpu")  # a damaged one is found here, not by those who download it
    with tempfile.TemporaryDirectory() as temporary:
        files = stage(checkpoint, repo, Path(temporary), license)
        size = sum(path.stat().st_size for path in files)
        print(f"{checkpoint} -> https://huggingface.co/{repo}" + (f" ({branch})" if branch else ""))
        for path in files:
            print(f"  {path.stat().st_size:>14,}  {path.name}")
        if dry_run:
            print(f"dry run: {len(files)} files, {size:,} bytes, nothing uploaded")
            return repo
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        if branch:
            api.create_branch(repo, branch=branch, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=temporary,
            revision=branch,
            commit_message=f"Add {checkpoint.parent.name}",
        )
    print(f'open_clip.create_model_and_transforms("hf-hub:{repo}")')
    return repo


def main(argv: list[str]) -> int:
    """The command."""
    tyro.cli(push, args=argv, prog="pairstream pretrain push")
    return 0
