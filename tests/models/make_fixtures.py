"""Writes the reference numbers of ``test_parity.py``: ``python -m tests.models.make_fixtures``.

Runs where torch, torchvision and timm are installed; versions 2.14, 0.29 and 1.0.31 made the numbers in ``fixtures``.
The reference is computed in float64, so that the tests measure the error of our float32 alone.
"""

import json
from typing import Any

import numpy as np
import timm  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import torchvision  # pyright: ignore[reportMissingImports]

from tests.models.filling import FIXTURES, fill_images, fill_labels, fill_tensor, sample

# fixture, library, name in the library, batch, image size
CASES = (
    ("alexnet", "torchvision", "alexnet", 2, 224),
    ("resnet18", "torchvision", "resnet18", 4, 64),
    ("resnet50", "torchvision", "resnet50", 4, 64),
    ("mobilenet_v2", "torchvision", "mobilenet_v2", 4, 64),
    ("mobilenet_v2_050-timm", "timm", "mobilenetv2_050", 4, 64),
    ("efficientnet_b0", "torchvision", "efficientnet_b0", 4, 64),
    ("efficientnet_b0-timm", "timm", "efficientnet_b0", 4, 64),
    ("efficientnet_lite0-timm", "timm", "efficientnet_lite0", 4, 64),
    ("efficientnet_lite0-timm-tf", "timm", "tf_efficientnet_lite0", 4, 75),
    ("mixnet_s-timm", "timm", "mixnet_s", 4, 64),
)


def _pack(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def reference(library: str, name: str, batch: int, size: int) -> dict[str, Any]:
    model = (timm.create_model if library == "timm" else torchvision.models.get_model)(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(fill_tensor(key, shape)) for key, shape in shapes.items()})
    model.double()
    images = torch.from_numpy(fill_images(batch, size)).double().permute(0, 3, 1, 2).contiguous()

    numbers: dict[str, Any] = {"tensors": _pack(shapes), "batch": batch, "size": size}
    model.eval()
    with torch.no_grad():
        logits = model(images).numpy()
    numbers["logits"] = sample(logits, 512).astype(np.float32)
    numbers["largest_logit"] = np.float32(np.abs(logits).max())

    model.train()
    norms: dict[str, torch.nn.BatchNorm2d] = {}
    counts: dict[torch.nn.Module, int] = {}

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        counts[module] = inputs[0].numel() // inputs[0].shape[1]

    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if type(module).__name__ in ("StochasticDepth", "DropPath"):
            module.eval()
        if isinstance(module, torch.nn.BatchNorm2d):
            norms[key] = module
            module.register_forward_hook(count)
    logits = model(images)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(fill_labels(batch)).long())
    loss.backward()
    numbers["loss"] = np.float32(loss.item())
    kernels = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    for key, kernel in (("first", kernels[0]), ("last", kernels[-1])):
        gradient = kernel.grad.numpy()
        numbers[f"{key}_gradient_norm"] = np.float32(np.linalg.norm(gradient))
        numbers[f"{key}_gradient"] = sample(gradient).astype(np.float32)
    # Of each batch normalisation: the values that a statistic was taken over, and the statistics after this one step.
    numbers["norms"] = _pack({key: counts[module] for key, module in norms.items()})
    for statistic in ("running_mean", "running_var"):
        values = [getattr(module, statistic).numpy() for module in norms.values()]
        numbers[statistic] = np.array([np.linalg.norm(value) for value in values], np.float32)
        numbers[f"last_{statistic}"] = sample(values[-1] if values else np.zeros(0)).astype(np.float32)
    return numbers


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    for fixture, library, name, batch, size in CASES:
        numbers = reference(library, name, batch, size)
        np.savez_compressed(FIXTURES / f"{fixture}.npz", **numbers)
        print(fixture, (FIXTURES / f"{fixture}.npz").stat().st_size, "bytes")
