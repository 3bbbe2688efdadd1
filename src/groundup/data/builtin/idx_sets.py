"""MNIST and Fashion-MNIST, from the four IDX files as their authors publish them (gzip or plain)."""

from __future__ import annotations

from groundup.core.registry import DATASETS, Card
from groundup.data.dataset import Dataset
from groundup.data.idx import read_folder
from groundup.data.named import locate


@DATASETS.register(
    "mnist",
    Card(
        summary="60,000 + 10,000 handwritten digits, 28x28 grey, 10 classes",
        summary_zh="60000 + 10000 张手写数字，28x28 灰度，10 类",
        source="LeCun, Cortes and Burges, The MNIST database",
        shapes="image uint8 [1, 28, 28], label '0'..'9'",
        licence="CC BY-SA 3.0",
        limits="solved: differences below 0.2 points are noise",
    ),
)
def mnist() -> Dataset:
    return locate("mnist", "ylecun/mnist", lambda folder: read_folder(folder, "mnist", classes=10))


@DATASETS.register(
    "fashion_mnist",
    Card(
        summary="60,000 + 10,000 pictures of clothes, 28x28 grey, 10 classes",
        summary_zh="60000 + 10000 张服饰图片，28x28 灰度，10 类",
        source="Xiao, Rasul and Vollgraf, arXiv 1708.07747",
        shapes="image uint8 [1, 28, 28], label '0'..'9'",
        licence="MIT",
        limits="about one label in a hundred is doubtful",
    ),
)
def fashion_mnist() -> Dataset:
    return locate("fashion_mnist", "zalando-datasets/fashion_mnist", lambda folder: read_folder(folder, "fashion_mnist", classes=10))
