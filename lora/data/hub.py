"""Data sets of Hugging Face: on the hub, or in a directory, by `datasets`.

What it says about files and splits is taken; files of the kinds that lora/data/readers.py reads are
read there.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora.data.readers import ENDINGS, DataFile
from lora.shaders.errors import InputError

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TIMEOUT = 10.0  # seconds for the first answer of the hub
_OWN_READERS = ("json", "csv", "text", "parquet", "arrow")  # builders of `datasets`

Found = list[DataFile] | Any  # files, or rows as a datasets.Dataset


def is_hub_name(name: str) -> bool:
    """Whether the hub may have a data set of this name; those with an ending of a file are none."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return _NAME.fullmatch(name) is not None and not any(s in ENDINGS for s in suffixes)


def splits_of(
    name: str, config: str | None, *, streaming: bool = False, sample_by: str = "paragraph"
) -> Mapping[str, Found]:
    """The splits of a data set: each its files, or its rows where they aren't ours to read.

    Args:
        name: of a directory, or of the hub.
        config: which of its configs; None for the only one.
        streaming: rows as they come, instead of all of them fetched first.
        sample_by: of plain text.

    Raises:
        InputError: there is no such data set or config, or it can't be had.
    """
    # Imported here: it takes a second, and training from a file has no need of it.
    import datasets

    if Path(name, "dataset_dict.json").is_file() or Path(name, "state.json").is_file():
        return _saved(name, config)
    on_hub = not Path(name).exists()
    offline = _check_hub(name) if on_hub else False
    try:
        with _offline() if offline else contextlib.nullcontext():
            builder = datasets.load_dataset_builder(name, config)
            files = builder.config.data_files
            if builder.name in _OWN_READERS and files and not (on_hub and streaming):
                return {str(s): _files(map(str, files[s]), name, on_hub, sample_by) for s in files}
            loaded = datasets.load_dataset(name, config, streaming=streaming)
    except Exception as error:  # the hub, the network, the builders: anything comes out of it
        if offline:
            raise InputError(
                f"{name}: there is no such file, and as a Hugging Face data set it can't be had: "
                "the hub can't be reached, and the cache has none of that name."
            ) from error
        raise InputError(_refusal(name, error, on_hub)) from error
    return dict(loaded)


def _saved(name: str, config: str | None) -> Mapping[str, Found]:
    """What `save_to_disk` wrote."""
    import datasets

    if config is not None:
        raise InputError(f"{name}: was written by save_to_disk, which keeps no configs.")
    try:
        found = datasets.load_from_disk(name)
    except Exception as error:
        raise InputError(_refusal(name, error, False)) from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}


def _check_hub(name: str) -> bool:
    """Asks the hub once whether it has a data set; True if it can't be reached.

    `datasets` asks five times, with pauses.

    Raises:
        InputError: it has none of that name.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=_TIMEOUT)
    except errors.GatedRepoError:
        raise InputError(
            f"{name}: the hub wants you to accept its terms and to log in (hf auth login)."
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(
            f"{name}: there is no such file, and the hub has no data set of that name (or it is "
            "private: hf auth login)."
        ) from None
    except Exception:  # of one of several network libraries
        return True
    return False


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Lets `datasets` look into its cache alone, without asking the network again and again."""
    import datasets
    import huggingface_hub

    homes: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [home.HF_HUB_OFFLINE for home in homes]
    for home in homes:
        home.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for home, value in zip(homes, before, strict=True):
            home.HF_HUB_OFFLINE = value


def _files(paths: Iterable[str], name: str, on_hub: bool, sample_by: str) -> list[DataFile]:
    """The files of a split, fetched if they are on the hub."""
    places = list(paths)
    if not on_hub:
        return [DataFile(Path(place), place, sample_by) for place in places]
    import datasets

    fetched = datasets.DownloadManager().download(places)
    return [
        DataFile(Path(path), f"{name}/{place.rpartition('/')[2]}", sample_by)
        for path, place in zip(fetched, places, strict=True)
    ]


def _refusal(name: str, error: Exception, on_hub: bool) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    configs = re.search(r"(?:available configs|Available): (\[.*?\])", str(error))
    if configs:
        return f"{name}: name one of its configs with config: {configs[1]}."
    if on_hub:
        return (
            f"{name}: there is no such file, and as a Hugging Face data set it cannot be loaded: "
            f"{reason}"
        )
    return f"{name}: cannot be loaded as a data set: {reason}"
