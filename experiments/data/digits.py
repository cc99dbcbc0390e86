"""The handwritten digits that come with scikit-learn."""

import numpy as np

from experiments.data.in_memory import InMemoryDataset


def digits() -> InMemoryDataset:
    """The handwritten digits that come with scikit-learn: 8×8 grey, 1,257 to train on and 540 held out.

    The split is stratified by class and always the same. The original grey levels 0…16 are stretched to 0…255.
    """
    # It takes two seconds to import, for which --help and a refusal need not wait.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, classes = load_digits(return_X_y=True)
    images = np.rint(np.asarray(pixels) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(classes, np.int32)
    train, held_out = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    return InMemoryDataset(
        name="digits",
        num_classes=10,
        train_size=len(train),
        eval_size=len(held_out),
        image_shape=(8, 8, 1),
        mean=(float(images[train].mean()),),
        std=(float(images[train].std()),),
        padding=1,
        flip=False,
        train_images=images[train],
        train_labels=labels[train],
        eval_images=images[held_out],
        eval_labels=labels[held_out],
    )
