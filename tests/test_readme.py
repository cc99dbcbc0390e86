"""The README's snippets, run as they stand there."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import ltp_jax as ltp
from ltp_jax.trail import Entry, Trail


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Dense(64)(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(4)(x)


def test_the_training_loop(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", Path(__file__).parents[1].joinpath("README.md").read_text(), re.DOTALL)
    (loop,) = (block for block in blocks if "make_train_step(" in block)
    (step,) = (block for block in blocks if "def loss_fn(" in block)
    (save,) = (block for block in blocks if "trail.save(" in block)
    (ship,) = (block for block in blocks if "savez_compressed(" in block)
    model, steps, rng = Network(), 40, np.random.default_rng(0)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32)), train=False)
    images = rng.normal(size=(steps, 16, 32)).astype(np.float32)
    batches = [{"image": image, "label": np.argmax(image[:, :4], -1)} for image in images]
    names = {"model": model, "params": variables["params"], "batch_stats": variables["batch_stats"]}
    names |= {"steps": steps, "batches": batches}
    exec(loop, names)  # the names of its text, and those that it defines
    kept = sum(np.count_nonzero(w) for path, w in ltp.named_leaves(names["hard"]) if path.endswith("kernel"))
    assert kept == (32 * 64 + 64 * 4) // 16
    trail = Trail(tmp_path, create=True)
    first = names["create_state"](
        names["params"], names["batch_stats"], names["optimizer"], names["pruner"], jax.random.key(0)
    )
    for epoch, state in enumerate((first, names["state"])):
        exec(save, names | {"Entry": Entry, "trail": trail, "epoch": epoch, "state": state})
    trail.close()
    assert Trail(tmp_path).dense.compression == 1
    for picked in (Trail(tmp_path).pick(min_compression=16), Trail(tmp_path).pick(max_top1_drop=1.0)):
        assert picked.compression == (32 * 64 + 64 * 4) / kept
    picked = Trail(tmp_path).restore(Trail(tmp_path).pick(min_compression=16))
    monkeypatch.chdir(tmp_path)
    exec(ship, {"network": picked})
    with np.load("network.npz") as shipped:
        assert sum(np.count_nonzero(shipped[name]) for name in shipped if name.endswith("kernel")) == kept
    exec(step, names)
    assert all(np.any(grad != 0) for grad in jax.tree.leaves(names["grads"]))
    assert all(grad != 0 for grad in names["threshold_grads"].values())
    assert names["updated"]["batch_stats"].keys() == variables["batch_stats"].keys()
