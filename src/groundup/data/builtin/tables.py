"""Small real tables that scikit-learn carries, and a line for the first steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from groundup.core.registry import DATASETS, Card
from groundup.data.cache import bundled
from groundup.data.dataset import Dataset, from_arrays


def _table(name: str, loader: str) -> Dataset:
    def read(datasets: Any) -> dict[str, Any]:
        table = getattr(datasets, loader)()
        names = list(getattr(table, "target_names", []))
        y = np.asarray(names)[table.target] if names else table.target
        return {"x": table.data, "y": y, "features": np.asarray(table.feature_names)}

    arrays = bundled(name, read)
    return from_arrays(name, arrays["x"], arrays["y"], feature_names=[str(f) for f in arrays["features"]])


@DATASETS.register(
    "iris",
    Card(
        summary="150 iris flowers, 4 measurements, 3 species",
        summary_zh="150 朵鸢尾花，4 个测量值，3 个品种",
        source="Fisher, Annals of Eugenics 7, 1936",
        shapes="vector float [4], label of 3",
        licence="CC BY 4.0",
        limits="one duplicated flower; too small to compare good models",
    ),
)
def iris() -> Dataset:
    return _table("iris", "load_iris")


@DATASETS.register(
    "wine",
    Card(
        summary="178 Italian wines, 13 chemical measurements, 3 cultivars",
        summary_zh="178 种意大利葡萄酒，13 项化学指标，3 个品种",
        source="Aeberhard and Forina, Wine, UCI 1991",
        shapes="vector float [13], label of 3",
        licence="CC BY 4.0",
        limits="a test share has some 36 wines: its interval is wide",
    ),
)
def wine() -> Dataset:
    return _table("wine", "load_wine")


@DATASETS.register(
    "breast-cancer",
    Card(
        summary="569 cell samples, 30 measurements, benign or malignant",
        summary_zh="569 个细胞样本，30 个测量值，良性或恶性",
        source="Wolberg et al., Breast Cancer Wisconsin (Diagnostic), UCI 1995",
        shapes="vector float [30], label of 2",
        licence="CC BY 4.0",
        limits="for learning the method, not for medicine",
    ),
)
def breast_cancer() -> Dataset:
    return _table("breast-cancer", "load_breast_cancer")


@DATASETS.register(
    "diabetes",
    Card(
        summary="442 patients, 10 measurements, disease progression after a year (regression)",
        summary_zh="442 名患者，10 个测量值，一年后的病情进展（回归）",
        source="Efron et al., Least Angle Regression, Annals of Statistics 32, 2004",
        shapes="vector float [10], target real",
        limits="features come centred and scaled by the authors",
        licence="public in the paper's supplement",
    ),
)
def diabetes() -> Dataset:
    return _table("diabetes", "load_diabetes")


@DATASETS.register(
    "line",
    Card(
        summary="200 points of y = 2x on [-3, 3]: the first regression",
        summary_zh="[-3, 3] 上 y = 2x 的 200 个点：第一个回归任务",
        source="computed",
        shapes="vector float [1], target real",
        licence="none needed",
        limits="no noise: the error can reach zero",
    ),
)
def line() -> Dataset:
    x = np.linspace(-3, 3, 200)
    return from_arrays("line", x[:, None], 2 * x, feature_names=["x"])
