"""An adapter's files pushed to a model repository of the Hub."""

from __future__ import annotations

from collections.abc import Mapping

from lora.shaders.errors import InputError, LoraError


def check_can_push(repository: str) -> None:
    """Refuses a push that can only fail, before anything is trained.

    Raises:
        InputError: nobody is logged in, or the Hub is not to be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise InputError(f"hub: {repository}: HF_HUB_OFFLINE forbids pushing; unset it or hub.")
    if huggingface_hub.get_token() is None:
        raise InputError(
            f"hub: {repository}: nobody is logged in; log in with `hf auth login`, or set HF_TOKEN."
        )


def push(repository: str, files: Mapping[str, bytes], message: str) -> str:
    """Makes one commit of some files; the repository is made if need be. Returns its page.

    Args:
        repository: ORG/REPO.
        files: contents by their paths in the repository.
        message: of the commit.

    Raises:
        LoraError: it could not be pushed.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd

    api = huggingface_hub.HfApi()
    try:
        page = api.create_repo(repository, exist_ok=True)
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=contents)
            for name, contents in files.items()
        ]
        api.create_commit(repository, operations, commit_message=message)
    # What a broken connection or a refusal raises differs between versions of huggingface_hub and
    # has no common class.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise LoraError(
            f"The adapter is saved, but could not be pushed to {repository}: {reason}. Once "
            "that is mended, the same command with --resume pushes it."
        ) from error
    return str(page)
