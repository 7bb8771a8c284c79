"""Read files of weights tensor by tensor, without running code from them."""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megavit.errors import ConfigError


class TensorFiles:
    """The tensors of .safetensors, .pth or .bin files, read one by one.

    Args:
        paths: the files.

    Raises:
        ConfigError: if a file cannot be read, or holds anything but tensors.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._open = ExitStack()
        self._where: dict[str, Any] = {}
        for path in paths:
            try:
                self._add(path)
            except ConfigError:
                raise
            except Exception as error:
                # Any exception: a truncated file can raise any type.
                message = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ConfigError(f"{path} cannot be read as weights: {message}") from error

    def _add(self, path: Path) -> None:
        if path.suffix == ".safetensors":
            file = self._open.enter_context(safe_open(path, framework="pt"))
            self._where |= dict.fromkeys(file.keys(), file)
            return
        # facebookresearch/mae stores its arguments with the weights, as an argparse.Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for key in ("model", "state_dict", "model_ema"):
            if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
        if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
            raise ConfigError(f"{path} holds no dictionary of weights")
        self._where |= dict.fromkeys(loaded, loaded)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str) -> Tensor:
        """Return one tensor.

        Raises:
            KeyError: if there is no tensor of this name.
        """
        where = self._where[name]
        return where[name] if isinstance(where, dict) else where.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        where = self._where[name]
        return tuple(where[name].shape if isinstance(where, dict) else where.get_slice(name).get_shape())
