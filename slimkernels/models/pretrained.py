"""from_pretrained and save_pretrained: any of our models from and to a Hugging Face folder."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from slimkernels.models import files
from slimkernels.models.block import initial
from slimkernels.models.convert import Converted, Family, to_ours, to_theirs, without_ties
from slimkernels.ops._checks import check_integer


class Pretrained(nn.Module):
    """A model of a family that Hugging Face has, too.

    family      how they write it
    body        how the names begin of what every model of the family has. The rest is the head,
                which a folder may lack: it is then new
    bare        a model without a head, whose parameters have no prefix in its own folders
    theirs      config.json as it was read; save_pretrained keeps what is not ours to say
    generation  generation_config.json as it was read, if there is one
    """

    family: ClassVar[Family]
    body: ClassVar[str | tuple[str, ...]] = ""
    bare: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.theirs: dict = {}
        self.generation: dict = {}

    @property
    def settings(self) -> dict:
        """Both files' entries, such as the ids of special tokens."""
        return {**self.family.defaults, **self.theirs, **self.generation}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options,
    ):
        """The model in a folder of Hugging Face's, in evaluation mode.

        path     a folder with config.json and model.safetensors, or shards and their index, or
                 pytorch_model.bin; otherwise a name on the Hub, if huggingface_hub is installed
        dtype    of the parameters; None for the file's
        device   None for the CPU
        options  the head's, such as num_labels; those not given are the folder's
        Errors   ValueError naming the file, the entry of config.json or the parameter that is
                 wrong or missing; TypeError for an option that the head does not have. Parameters
                 of the head that are not there are new, and those that the model does not have are
                 left: a warning names both.
        """
        caller = f"{cls.__name__}.from_pretrained"
        cls._check_options(caller, dtype, device, options)
        folder = files.folder_of(path, caller)
        theirs = files.read_json(folder / files.CONFIG, caller)
        family = cls.family
        if theirs.get("model_type") != family.model_type:
            raise ValueError(
                f"{caller}: model_type in {folder / files.CONFIG} must be "
                f"{family.model_type!r}; got {theirs.get('model_type')!r}"
            )
        state = files.read_weights(folder, caller, str(device or "cpu"))
        config = family.as_stored(family.from_theirs(theirs), state)
        with torch.device("meta"):
            model = cls(config, **cls._options(theirs, options))
        converted = model._converted(state, caller)
        model._check(converted, caller)
        _fill(model, converted.state, dtype, device)
        if converted.missing or converted.unused:
            _report(caller, converted)
        model.theirs = theirs
        if (folder / files.GENERATION).exists():
            model.generation = files.read_json(folder / files.GENERATION, caller)
        return model.eval()

    def save_pretrained(self, path: str | Path, *, max_shard_size: int | None = None) -> Path:
        """Writes config.json and model.safetensors into the folder `path`, for Hugging Face's class
        of this name, each file whole or not at all; returns the folder.

        max_shard_size  bytes in a file at most, with an index of the files; None for one file
        Errors          ValueError where Hugging Face has no such model, before anything is written
        """
        caller = f"{type(self).__name__}.save_pretrained"
        folder, family = files.path_of(path, caller), self.family
        if max_shard_size is not None:
            check_integer(caller, "max_shard_size", max_shard_size)
        config = {**family.defaults, **self.theirs, **family.to_theirs(self.config)}
        read = family.from_theirs(config)
        if replace(read, initializer_std=self.config.initializer_std) != self.config:
            raise ValueError(
                f"{caller}: Hugging Face's {family.model_type} has no such model; got {self.config}"
            )
        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        config |= {"architectures": [type(self).__name__], "dtype": dtype}
        config |= {"model_type": family.model_type, **self._entries()}
        config.pop("torch_dtype", None)
        state = to_theirs(self.state_dict(), family.names(self.config))
        if self.bare:
            state = {name.removeprefix(family.prefix): tensor for name, tensor in state.items()}
        folder.mkdir(parents=True, exist_ok=True)
        files.write_weights(folder, state, caller, max_shard_size)
        if self.generation:
            files.write_json(folder / files.GENERATION, self.generation)
        files.write_json(folder / files.CONFIG, config)
        return folder

    @classmethod
    def _check_options(cls, caller: str, dtype, device, options: dict) -> None:
        known = list(inspect.signature(cls).parameters)[1:]  # besides the config
        for name in options:
            if name not in known:
                takes = ", ".join(["path", "dtype", "device", *known])
                raise TypeError(f"{caller}: there is no option {name}; it takes {takes}")
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if dtype is not None and not floating:
            raise ValueError(
                f"{caller}: dtype must be a floating torch.dtype or None; got {dtype!r}"
            )
        try:
            device = torch.device("cpu" if device is None else device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{caller}: device must be a torch.device or its name; got {device!r}"
            ) from error
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{caller}: device {device} cannot be used: {reason}") from error

    @classmethod
    def _options(cls, theirs: dict, options: dict) -> dict:
        """Arguments of the constructor besides the config: the caller's, and config.json's."""
        return options

    def _entries(self) -> dict:
        """Entries of config.json that the head has."""
        return {}

    def _converted(self, state: dict[str, Tensor], caller: str) -> Converted:
        family = self.family
        state = {family.today(n): t for n, t in state.items() if not n.endswith(family.constants)}
        if family.prefix and not any(name.startswith(family.prefix) for name in state):
            state = {family.prefix + name: tensor for name, tensor in state.items()}
        state = without_ties(state, family.ties(self.config), caller)
        return to_ours(state, family.names(self.config), self.state_dict())

    def _check(self, converted: Converted, caller: str) -> None:
        for name, absent in converted.missing.items():
            if name.startswith(self.body):
                raise ValueError(f"{caller}: {absent[0]} is missing")
        names = self.family.names(self.config)
        for name, ours in self.state_dict().items():
            tensor = converted.state.get(name)
            if tensor is not None and tensor.shape != ours.shape:
                theirs = to_theirs({name: ours}, names)
                raise ValueError(
                    f"{caller}: {' with '.join(theirs)} must have shape {tuple(ours.shape)}, as "
                    f"config.json has it; got {tuple(tensor.shape)}"
                )


@torch.no_grad()
def _fill(model: Pretrained, state: dict[str, Tensor], dtype, device) -> None:
    """Gives a model on the meta device its parameters: those in `state`, and new ones."""
    found = next(iter(state.values())).dtype
    dtype = dtype or found
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    for name, parameter in model.state_dict().items():
        if name not in state:
            new = torch.empty_like(parameter, device=device or "cpu", dtype=dtype)
            state[name] = initial(new, name, model.config.initializer_std)
    # Copies of views, because a parameter must be contiguous and alone in its memory.
    state = {n: t if t.is_contiguous() else t.contiguous() for n, t in state.items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)
    for module in model.modules():
        if hasattr(module, "make_tables"):  # what is computed, not loaded
            module.make_tables(device or "cpu")


def _report(caller: str, converted: Converted) -> None:
    sentences = []
    if converted.missing:
        new = ", ".join(name for names in converted.missing.values() for name in names)
        sentences.append(f"not in the file, so new, and to be trained: {new}")
    if converted.unused:
        sentences.append(f"in the file, but not of this model: {', '.join(converted.unused)}")
    warnings.warn(f"{caller}: " + "; ".join(sentences), stacklevel=3)
