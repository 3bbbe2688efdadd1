"""Handwritten digits, 8x8 grey: the copy that scikit-learn carries."""

from __future__ import annotations

import numpy as np

from groundup.core.registry import DATASETS, Card
from groundup.data.cache import bundled
from groundup.data.dataset import Dataset, from_arrays


@DATASETS.register(
    "digits",
    Card(
        summary="1,797 handwritten digits, 8x8 grey, 10 classes; comes with scikit-learn",
        summary_zh="1797 张手写数字，8x8 灰度，10 类；随 scikit-learn 自带",
        source="Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (its test set)",
        shapes="image uint8 [1, 8, 8], label '0'..'9'",
        licence="CC BY 4.0",
        limits="43 writers are mixed over the splits: accuracy on new writers is lower",
    ),
)
def digits() -> Dataset:
    arrays = bundled("digits", lambda datasets: dict(zip(("x", "y"), datasets.load_digits(return_X_y=True))))
    # 17 grey levels (0..16) spread over 0..255.
    pixels = np.round(arrays["x"].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return from_arrays("digits", pixels, arrays["y"].astype(np.int64))
