"""Reads a state dict, names to NumPy arrays, from the files that PyTorch users have: safetensors, npz, torch.save.

A ``torch.save`` file is a pickle, and unpickling can run any code. The unpickler here knows tensors and plain
containers and refuses the rest, so that a file from a stranger can be opened; PyTorch itself is not needed.
"""

import collections
import functools
import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, Literal

import jax.numpy as jnp
import numpy as np
import safetensors

StateDict = dict[str, np.ndarray]


class PretrainedError(ValueError):
    """A file of weights cannot be read, or does not hold the network that was asked for."""


_STORAGE_DTYPES: Mapping[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

# The first object of a file written by torch.save before PyTorch 1.6.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _StorageType:
    """Stands for a storage class of PyTorch while its tensors are read."""

    def __init__(self, name: str):
        self.dtype = _STORAGE_DTYPES[name]


class _Storage:
    """A flat buffer that tensors are views of; a legacy file fills it in after the tensors."""

    def __init__(self, dtype: np.dtype, size: int):
        self.dtype, self.size = dtype, size
        self.values: np.ndarray | None = None


class _Tensor:
    """A tensor before its storage is known to be filled."""

    def __init__(self, storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int]):
        self.storage, self.offset, self.shape, self.strides = storage, offset, tuple(shape), tuple(strides)

    def array(self) -> np.ndarray:
        values, shape, strides = self.storage.values, self.shape, self.strides
        integers = (self.offset, *shape, *strides)
        if len(shape) != len(strides) or not all(isinstance(number, int) and number >= 0 for number in integers):
            raise pickle.UnpicklingError("a tensor has an impossible shape")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        # The second test refuses a small buffer that is blown up by strides of zero.
        if values is None or (0 not in shape and (last >= values.size or math.prod(shape) > values.size)):
            raise pickle.UnpicklingError("a tensor reaches past the end of its storage")
        bytes_ = [stride * values.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(values[self.offset :], shape, bytes_, writeable=False)
        return np.ascontiguousarray(view).reshape(shape)


def _rebuild_tensor(storage: Any, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor has no storage")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors, dictionaries, lists, tuples, numbers and strings, and refuses everything else."""

    def __init__(self, file: BinaryIO, find_storage: Callable[[np.dtype, str, int], _Storage]):
        super().__init__(file, encoding="latin1")
        self._find_storage = find_storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGE_DTYPES:
            return _StorageType(name)
        # A fresh wrapper for each, so that a pickle that sets attributes on it changes nothing of ours.
        if (module, name) in (("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2")):
            return functools.partial(_rebuild_tensor)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return functools.partial(_rebuild_parameter)
        raise pickle.UnpicklingError(
            f"it holds a {module}.{name}, and only tensors and plain containers are read; save the state dict alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            raise pickle.UnpicklingError("it refers to something other than a tensor's storage")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("it has storages that are views of others")
        return self._find_storage(pid[1].dtype, str(pid[2]), int(pid[4]))


def _fill(storage: _Storage, content: bytes, order: Literal["little", "big"]) -> None:
    if len(content) != storage.size * storage.dtype.itemsize:
        raise pickle.UnpicklingError("a storage is shorter than its tensors")
    storage.values = np.frombuffer(content, storage.dtype.newbyteorder(order)).astype(storage.dtype, copy=False)


def _read_torch_zip(archive: zipfile.ZipFile) -> Any:
    names = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise PretrainedError("a zip file that is neither an npz nor a torch.save file")
    root = pickles[0].removesuffix("data.pkl")
    order = "big" if f"{root}byteorder" in names and archive.read(f"{root}byteorder") == b"big" else "little"
    storages: dict[str, _Storage] = {}

    def find_storage(dtype: np.dtype, key: str, size: int) -> _Storage:
        if key not in storages:
            info = names[f"{root}data/{key}"]
            if info.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError("a storage is compressed, which torch.save never does")
            storages[key] = _Storage(dtype, size)
            _fill(storages[key], archive.read(info), order)
        return storages[key]

    return _TensorUnpickler(io.BytesIO(archive.read(pickles[0])), find_storage).load()


def _read_torch_legacy(file: BinaryIO) -> Any:
    storages: dict[str, _Storage] = {}

    def find_storage(dtype: np.dtype, key: str, size: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, size))

    def load() -> Any:
        return _TensorUnpickler(file, find_storage).load()

    if load() != _LEGACY_MAGIC:
        raise PretrainedError("a pickle that torch.save did not write")
    load()  # version of the format
    system = load()
    order = "little" if system["little_endian"] else "big"
    content = load()
    for key in load():
        storage = storages[str(key)]
        if int.from_bytes(file.read(8), order) != storage.size:
            raise pickle.UnpicklingError("a storage is shorter than its tensors")
        _fill(storage, file.read(storage.size * storage.dtype.itemsize), order)
    return content


def _read_safetensors(path: str) -> StateDict:
    with safetensors.safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _flatten(content: Any) -> StateDict:
    """The tensors of a checkpoint: the dictionary itself, or the one it keeps under a customary key."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise PretrainedError(f"a {type(content).__name__} where a dictionary of tensors is expected")
    others = [key for key, value in content.items() if not isinstance(value, (_Tensor, np.ndarray))]
    if others:
        raise PretrainedError(f"{others[0]!r} is not a tensor")
    arrays = {str(key): value.array() if isinstance(value, _Tensor) else value for key, value in content.items()}
    if arrays and all(name.startswith("module.") for name in arrays):  # saved from DataParallel
        arrays = {name.removeprefix("module."): value for name, value in arrays.items()}
    return arrays


def _read(path: str) -> StateDict:
    with open(path, "rb") as file:
        start = file.read(9)
        file.seek(0)
        # First safetensors: it starts with the length of its header, which can look like anything.
        if start[8:] == b"{":
            return _flatten(_read_safetensors(path))
        if start[:2] == b"PK":
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                if not names or not all(name.endswith(".npy") for name in names):
                    return _flatten(_read_torch_zip(archive))
            with np.load(path, allow_pickle=False) as arrays:
                return _flatten(dict(arrays))
        if start[:1] == b"\x80":
            return _flatten(_read_torch_legacy(file))
    raise PretrainedError("none of safetensors, npz and torch.save")


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Reads a file of named tensors; which of the formats it has is seen from its first bytes.

    Args:
      path: a safetensors file, an ``.npz``, or a file of ``torch.save`` (of any version since 0.4) that holds a state
        dict or a checkpoint with one under ``state_dict``, ``model`` or ``model_state_dict``. The prefix ``module.`` is
        dropped.

    Raises:
      PretrainedError: the file is damaged, of another format, or holds other objects than tensors; the message says
        which.
      OSError: there is no such file, or it cannot be opened.
    """
    path = os.fspath(path)
    try:
        return _read(path)
    except PretrainedError as error:
        raise PretrainedError(f"cannot read weights from {path}: {error}") from None
    except pickle.UnpicklingError as error:
        raise PretrainedError(f"cannot read weights from {path}: {error}") from error
    except OSError:
        raise
    except Exception as error:  # A damaged file can break its parser anywhere.
        raise PretrainedError(f"cannot read weights from {path}: the file is damaged or truncated ({error})") from error
