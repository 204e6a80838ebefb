"""scikit-learn's handwritten digits as a task for two inputs: half of each image as numbers, the other half as text.

The upper four rows of an image are 32 features. The lower four are written down, one letter a pixel for how dark it is
and a stroke at the end of each row. Neither half shows the whole digit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LETTERS = " .:+#|"
VOCAB_SIZE, TEXT_LENGTH, NUM_FEATURES, NUM_CLASSES = len(LETTERS), 36, 32, 10


@dataclass(frozen=True, slots=True)
class Digits:
    """tokens int64 [N, 36], features float32 [N, 32], labels int64 [N]."""

    tokens: Tensor
    features: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Digits:
        return Digits(self.tokens[rows], self.features[rows], self.labels[rows])


def load() -> tuple[Digits, Digits]:
    """1,437 images to train on and 360 others to test on; they lie in scikit-learn's package."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)  # 0 to 16
    tokens = torch.tensor([encode(describe(image[4:])) for image in images])
    features = torch.from_numpy(images[:, :4].reshape(-1, NUM_FEATURES) / 8 - 1).float()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    every = Digits(tokens, features, torch.from_numpy(labels).long())[order]
    return every[:1437], every[1437:]  # type: ignore[index]


def describe(rows: np.ndarray) -> str:
    """Four rows of eight numbers from 0 to 16 as text, such as " .:+#..  |"."""
    levels = len(LETTERS) - 2
    return "".join("".join(LETTERS[round(ink / 16 * levels)] for ink in row) + "|" for row in rows)


def encode(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]
