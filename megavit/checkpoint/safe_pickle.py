"""Check a checkpoint's pickles against an allow-list before anything else reads them, so that they run no code.

Megatron-Core and torch read `.metadata` with Python's own unpickler, which calls whatever a file names, and read
entries declared as objects with `weights_only=False` (Megatron-Core 0.16.1, torch 2.15). `common.pt` is read
weights-only.
"""

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from megavit.errors import ConfigError

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"

# Exactly these names: a dotted name such as `metadata.os.system` does not match.
_ALLOWED = {
    *(
        (_METADATA, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *(
        ("torch", name)
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    ),
}


def _member(kind: Any, name: Any) -> Enum:
    """Return a member of an enum, which Python 3.11.0 to 3.11.3 pickle as getattr; reject every other attribute."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and type(name) is str and name in kind.__members__):
        raise pickle.UnpicklingError("it names builtins.getattr")
    return kind.__members__[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def check_pickles(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Check that reading a checkpoint's files would run no code.

    Returns:
        The full shapes of the tensors that the checkpoint declares, by key.

    Raises:
        ConfigError: if a file would run code; names the file and the call.
    """
    metadata, common = checkpoint / ".metadata", checkpoint / "common.pt"
    try:
        with metadata.open("rb") as file:
            declared = _Unpickler(file).load().state_dict_metadata
        shapes = {key: tuple(entry.size) for key, entry in declared.items() if hasattr(entry, "size")}
        objects = [key for key, entry in declared.items() if type(entry).__name__ == "BytesStorageMetadata"]
    except OSError as error:
        raise ConfigError(f"{metadata} cannot be read: {error.strerror}") from error
    except Exception as error:
        # Any exception: a malformed pickle can raise any type.
        raise ConfigError(f"{metadata} is rejected: {error}; megavit's checkpoints never contain that") from error
    if objects:
        raise ConfigError(
            f"{metadata} is rejected: it declares {objects[0]} an object, which could be code; megavit's are tensors"
        )
    try:
        torch.load(common, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{common} cannot be read: {error.strerror}") from error
    except Exception as error:
        message = str(error).splitlines()[-1] if str(error) else type(error).__name__
        raise ConfigError(f"{common} is rejected: {message}") from error
    return shapes
