"""Folders of Hugging Face's form: config.json, and the weights in one file or in shards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
_OLD_WEIGHTS = "pytorch_model.bin"
_FORMS = (WEIGHTS, INDEX, _OLD_WEIGHTS, _OLD_WEIGHTS + ".index.json")
# Of a model on the Hub: perhaps its owner, and its own.
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def path_of(path: object, caller: str) -> Path:
    """`path` as a Path, or a ValueError where it cannot be one."""
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise ValueError(f"{caller}: path must be the path of a folder; got {path!r}")
    return Path(path)


def is_hub_name(path: str) -> bool:
    """Whether `path` has the form of a name on the Hub, which no absolute path has."""
    return _NAME.fullmatch(path) is not None


def folder_of(path: str | Path, caller: str) -> Path:
    """`path` if it is a folder; else what huggingface_hub has downloaded under this name.

    Errors  ValueError where there is neither
    """
    folder = path_of(path, caller)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{caller}: path must be a folder; {path} is a file")
    if not is_hub_name(str(path)):
        raise ValueError(f"{caller}: path must be a folder that exists; {path} does not")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{caller}: {path} is no folder, and fetching it by name from the Hub needs the "
            f"huggingface_hub package: pip install huggingface_hub"
        ) from None
    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # its many kinds all mean that there is no such model here
        reason = " ".join(str(error).split())  # of several lines
        raise ValueError(
            f"{caller}: {path} is no folder, and the Hub gave no model of that name: {reason}"
        ) from error


def read_json(path: Path, caller: str) -> dict:
    """The object in a .json file, or a ValueError that names the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{caller}: {path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{caller}: {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{caller}: {path} must hold an object; got {type(found).__name__}")
    return found


def read_weights(folder: Path, caller: str, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from the shards that an index names.

    Safetensors come first. A pytorch_model.bin is read with weights_only, so it cannot run code.
    Errors  ValueError naming the file that is missing or damaged
    """
    form = next((name for name in _FORMS if (folder / name).exists()), None)
    if form is None:
        raise ValueError(f"{caller}: {folder} has no {WEIGHTS}, {INDEX} or {_OLD_WEIGHTS}")
    if not form.endswith(".index.json"):
        return _read(folder / form, caller, device)
    shards = read_json(folder / form, caller).get("weight_map", {})
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"{caller}: weight_map in {folder / form} must say a file for each name")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        if not (folder / shard).exists():
            raise ValueError(f"{caller}: {folder / form} names {shard}, which does not exist")
        state |= _read(folder / shard, caller, device)
    absent = sorted(shards.keys() - state.keys())
    if absent:
        raise ValueError(f"{caller}: {folder / form} promises {absent[0]}, which no shard has")
    return state


def _read(path: Path, caller: str, device: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return _safetensors(caller).load_file(path, device=device)
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # each of the two libraries has errors of its own
        if isinstance(error, ImportError):
            raise
        raise ValueError(f"{caller}: {path} cannot be read: {error}") from error


def write_json(path: Path, content: dict) -> None:
    """Writes a .json file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    _replace(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_weights(
    folder: Path, state: dict[str, Tensor], caller: str, max_shard_size: int | None
) -> None:
    """Writes model.safetensors, or shards of at most max_shard_size bytes and their index.

    Each file is whole or not there; weights of another form are removed last.
    """
    save_file = _safetensors(caller).save_file
    state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    shards = _shards(state, max_shard_size)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = [WEIGHTS] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        _replace(folder / name, lambda partial, s=shard: save_file(s, partial, {"format": "pt"}))
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        size = sum(map(_bytes, state.values()))
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    written = {*names, INDEX} if len(shards) > 1 else set(names)
    for old in (*_FORMS, *(path.name for path in folder.glob("model-*-of-*.safetensors"))):
        if old not in written:
            (folder / old).unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shards(state: dict[str, Tensor], limit: int | None) -> list[dict[str, Tensor]]:
    """`state` in its order, cut before the tensor that would make a part too large."""
    shards, size = [{}], 0
    for name, tensor in state.items():
        size += _bytes(tensor)
        if limit is not None and size > limit and shards[-1]:
            shards.append({})
            size = _bytes(tensor)
        shards[-1][name] = tensor
    return shards


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _safetensors(caller: str):
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{caller} needs the safetensors package: pip install 'slimkernels[train]'"
        ) from error
    return safetensors.torch
