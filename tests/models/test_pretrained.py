"""Reading weights: the formats, the names, and every refusal."""

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ltp_jax import models, pretrained
from ltp_jax.models.state_dict import read_state_dict
from ltp_jax.models.weights import WEIGHTS
from tests.models.filling import fill_state_dict


class _Global:
    """Pickles as a reference to something that is not installed here."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class _Storage:
    def __init__(self, key: str, size: int):
        self.key, self.size = key, size


class _Tensor:
    def __init__(self, key: str, shape: tuple[int, ...], strides: tuple[int, ...], size: int):
        self.arguments = (_Storage(key, size), 0, shape, strides, False, collections.OrderedDict())


# The pickler that is written in Python: it can be taught to write names of what is absent. Its types are not declared.
_PythonPickler: Any = vars(pickle)["_Pickler"]


class _Pickler(_PythonPickler):
    """Writes what torch.save writes, without torch."""

    def emit(self, content: bytes) -> None:
        vars(self)["write"](content)

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return "storage", _Global("torch", "FloatStorage"), obj.key, "cpu", obj.size
        return None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global):
            self.emit(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _Tensor):
            self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
            self.save(obj.arguments)
            self.emit(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def _pickle(obj: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(obj)
    return buffer.getvalue()


def _torch_zip(path: Path, content: bytes, storages: dict[str, np.ndarray]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for key, values in storages.items():
            archive.writestr(f"archive/data/{key}", values.tobytes())
    return path


def _torch_legacy(path: Path, content: bytes, storages: dict[str, np.ndarray]) -> Path:
    head = [_pickle(0x1950A86A20F9469CFC6C), _pickle(1001), _pickle({"little_endian": True})]
    body = [len(values).to_bytes(8, "little") + values.tobytes() for values in storages.values()]
    path.write_bytes(b"".join([*head, content, _pickle(list(storages)), *body]))
    return path


VALUES = np.arange(6, dtype=np.float32)
WRITERS = [_torch_zip, _torch_legacy]


@pytest.mark.parametrize("write", WRITERS)
def test_torch_file(write: Any, tmp_path: Path) -> None:
    """A tensor, its transpose that shares the storage, and the wrappings of a training script."""
    content = {"a.weight": _Tensor("0", (2, 3), (3, 1), 6), "a.transposed": _Tensor("0", (3, 2), (1, 3), 6)}
    wrapped = {"state_dict": collections.OrderedDict((f"module.{key}", value) for key, value in content.items())}
    read = read_state_dict(write(tmp_path / "weights.pth", _pickle(wrapped), {"0": VALUES}))
    np.testing.assert_array_equal(read["a.weight"], VALUES.reshape(2, 3))
    np.testing.assert_array_equal(read["a.transposed"], VALUES.reshape(2, 3).T)


@pytest.mark.parametrize("write", WRITERS)
def test_a_pickle_that_runs_code_is_refused(write: Any, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = write(tmp_path / "weights.pth", pickle.dumps({"a": Attack()}, protocol=2), {})
    with pytest.raises(pretrained.PretrainedError, match=r"weights\.pth: it holds a posix\.system, and only tensors"):
        read_state_dict(path)
    assert not (tmp_path / "ran").exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    path = _torch_zip(tmp_path / "model.pt", _pickle({"a": _Global("torchvision.models.resnet", "ResNet")}), {})
    with pytest.raises(pretrained.PretrainedError, match="save the state dict alone"):
        read_state_dict(path)


@pytest.mark.parametrize(("shape", "strides"), [((2, 4), (4, 1)), ((1000, 1000), (0, 0)), ((2, 3), (3, -1))])
def test_a_tensor_that_does_not_fit_its_storage_is_refused(
    shape: tuple[int, ...], strides: tuple[int, ...], tmp_path: Path
) -> None:
    path = _torch_zip(tmp_path / "weights.pth", _pickle({"a": _Tensor("0", shape, strides, 6)}), {"0": VALUES})
    with pytest.raises(pretrained.PretrainedError, match="a tensor"):
        read_state_dict(path)


def test_what_is_not_a_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pretrained.PretrainedError, match="'epoch' is not a tensor"):
        read_state_dict(_torch_zip(tmp_path / "weights.pth", _pickle({"epoch": 3}), {}))
    with pytest.raises(pretrained.PretrainedError, match="a list where a dictionary"):
        read_state_dict(_torch_zip(tmp_path / "weights.pth", _pickle([3]), {}))


def _write_all(folder: Path) -> list[Path]:
    tensors = {"a": VALUES, "b": VALUES[:2].reshape(1, 2)}
    save_file(tensors, folder / "weights.safetensors")
    np.savez(folder / "weights.npz", **tensors)
    content = _pickle({"a": _Tensor("0", (6,), (1,), 6), "b": _Tensor("1", (1, 2), (2, 1), 2)})
    storages = {"0": VALUES, "1": VALUES[:2]}
    return [
        folder / "weights.safetensors",
        folder / "weights.npz",
        _torch_zip(folder / "zip.pth", content, storages),
        _torch_legacy(folder / "legacy.pth", content, storages),
    ]


def test_all_formats_hold_the_same(tmp_path: Path) -> None:
    for path in _write_all(tmp_path):
        read = read_state_dict(path)
        assert list(read) == ["a", "b"], path
        np.testing.assert_array_equal(read["b"], [[0, 1]])


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    for path in _write_all(tmp_path):
        whole = path.read_bytes()
        for length in (0, 1, 5, 20, len(whole) // 2, len(whole) - 3):
            path.write_bytes(whole[:length])
            with pytest.raises(pretrained.PretrainedError, match="cannot read weights from"):
                read_state_dict(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        pretrained.load(tmp_path / "absent.pth", "resnet18")


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """A state dict of timm's mobilenetv2_050."""
    return fill_state_dict("mobilenet_v2_050-timm")


def _load(tensors: dict[str, np.ndarray], folder: Path, **options: Any) -> Any:
    save_file(tensors, folder / "weights.safetensors")
    return pretrained.load(folder / "weights.safetensors", "mobilenet_v2_050", **options)


def test_missing_tensor(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    del (tensors := dict(tensors))["blocks.0.0.conv_dw.weight"]
    with pytest.raises(ValueError, match=r"missing tensor 'blocks\.0\.0\.conv_dw\.weight', .* shape \(16, 1, 3, 3\)"):
        _load(tensors, tmp_path)


def test_extra_tensor(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unexpected tensor 'blocks\.9\.bias' of shape \(2,\)"):
        _load(tensors | {"blocks.9.bias": VALUES[:2]}, tmp_path)


def test_wrong_shape(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'conv_stem\.weight' has shape \(6,\), expected \(16, 3, 3, 3\)"):
        _load(tensors | {"conv_stem.weight": VALUES}, tmp_path)
    with pytest.raises(
        ValueError, match=r"'classifier\.bias' has shape \(1000,\), expected \(10,\); give the num_classes"
    ):
        _load(tensors, tmp_path, num_classes=10)


def test_names_of_another_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tensor has a name that timm gives to mobilenet_v2_050; .* 'a'"):
        _load({"a": VALUES}, tmp_path)


def test_new_head(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    variables, _ = _load(tensors, tmp_path, num_classes=10, head_key=jax.random.key(0))
    head = variables["params"]["head"]
    assert head["kernel"].shape == (1280, 10)
    assert np.std(head["kernel"]) == pytest.approx(1280**-0.5, rel=0.05)
    np.testing.assert_array_equal(head["bias"], np.zeros(10))
    model = models.create("mobilenet_v2_050", num_classes=10)
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 32, 32, 3)), train=False))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, expected)


def test_unknown_network_and_origin(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no pretrained weights are known for 'digits': expected one of alexnet"):
        pretrained.load(tmp_path / "weights.pth", "digits")
    with pytest.raises(ValueError, match=r"unknown origin 'keras' of resnet50: expected one of torchvision, torch"):
        pretrained.load(tmp_path / "weights.pth", "resnet50", origin="keras")


def test_settings_follow_the_origin(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    _, settings = _load(tensors, tmp_path)
    assert (settings.origin, settings.top1, settings.crop_fraction) == ("timm", 65.95, 0.875)
    for row in WEIGHTS:
        models.create(row.network, **row.options)
    origins = [(row.network, row.origin) for row in WEIGHTS]
    assert len(set(origins)) == len(origins)


def test_the_digest_in_a_file_name_chooses_the_weights(tmp_path: Path) -> None:
    save_file(fill_state_dict("mobilenet_v2"), tmp_path / "model.safetensors")
    for name in ("mobilenet_v2-b0353104.pth", "mobilenet_v2-7ebf99e0.pth"):
        (tmp_path / name).hardlink_to(tmp_path / "model.safetensors")
    top1 = {path.stem: pretrained.load(path, "mobilenet_v2")[1].top1 for path in tmp_path.iterdir()}
    assert top1 == {"mobilenet_v2-b0353104": 71.878, "mobilenet_v2-7ebf99e0": 72.154, "model": 71.878}


def test_what_a_file_may_be_of_as_well() -> None:
    first, second, timm = pretrained.settings("resnet50")
    assert pretrained.alternatives("folder/model.safetensors", first) == ("torchvision-v2", "timm")
    assert pretrained.alternatives("folder/resnet50-0676ba61.pth", first) == ()
    assert pretrained.alternatives("resnet50-0676ba61.pth", second) == ("torchvision", "timm")
    assert timm.digest is None
    # Names of tensors tell these apart.
    assert pretrained.alternatives("model.pth", pretrained.settings("efficientnet_b0")[0]) == ()
    assert pretrained.alternatives("model.pth", pretrained.settings("alexnet")[0]) == ()
