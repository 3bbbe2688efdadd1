"""Texts that many begin with: Shakespeare in one file, and classical Chinese poems. They do not come with the package."""

from __future__ import annotations

from pathlib import Path

from groundup.core.errors import DataError
from groundup.core.registry import DATASETS, Card
from groundup.data.items import TextSource
from groundup.data.named import find_folder


def _folder(name: str, holds: str, holds_zh: str) -> Path:
    found, places = find_folder(name)
    if found is None:
        raise DataError(
            "'{name}' was not found: looked in $GROUNDUP_DATA/{name} and {places}; it is not fetched from the hub",
            "没有找到 '{name}'：查过 $GROUNDUP_DATA/{name} 和 {places}；不会从 hub 下载",
            name=name,
            places=", ".join(map(str, places)),
            fix=f"put {holds} into a folder FOLDER/{{name}} and set GROUNDUP_DATA=FOLDER",
            fix_zh=f"把{holds_zh}放进 目录/{{name}}，并设置 GROUNDUP_DATA=目录",
        )
    return found


@DATASETS.register(
    "tinyshakespeare",
    Card(
        summary="40,000 lines of Shakespeare in one file, 1.1 MB",
        summary_zh="莎士比亚剧本约 4 万行，单个文件，1.1 MB",
        source="Karpathy, char-rnn, 2015, data/tinyshakespeare/input.txt",
        shapes="one document",
        licence="public domain",
        limits="one long text: validation is its last part",
    ),
)
def tinyshakespeare() -> TextSource:
    return TextSource("tinyshakespeare", (_folder("tinyshakespeare", "input.txt", " input.txt "),), (".txt",))


@DATASETS.register(
    "banking77",
    Card(
        summary="13,000 questions to a bank and the intent of each, one of 77; as questions with their answers",
        summary_zh="一万三千条银行客户提问及其意图（77 类）；作为问答使用",
        source="Casanueva et al., Efficient Intent Detection, arXiv 2003.04807",
        shapes="one conversation for each row of train.csv and test.csv",
        licence="CC BY 4.0",
        limits="English",
    ),
)
def banking77() -> TextSource:
    return TextSource("banking77", (_folder("banking77", "train.csv and test.csv", " train.csv 与 test.csv "),), (".csv",))


def _demonstration(name: str) -> TextSource:
    return TextSource(name, (_folder("instruct_llamafactory", f"{name}.json", f" {name}.json ") / f"{name}.json",), (".json",))


DEMONSTRATION = {
    "source": "the demonstration data of LlamaFactory, https://github.com/hiyouga/LLaMA-Factory",
    "shapes": "one conversation for each record",
    "licence": "Apache-2.0 (of the repository)",
    "limits": "some 850 examples: enough to see that tuning works",
}


@DATASETS.register(
    "alpaca_en_demo", Card(summary="850 English instructions with answers", summary_zh="850 条英文指令与回答", **DEMONSTRATION)
)
def alpaca_en_demo() -> TextSource:
    return _demonstration("alpaca_en_demo")


@DATASETS.register(
    "alpaca_zh_demo", Card(summary="850 Chinese instructions with answers", summary_zh="850 条中文指令与回答", **DEMONSTRATION)
)
def alpaca_zh_demo() -> TextSource:
    return _demonstration("alpaca_zh_demo")


@DATASETS.register(
    "chinese_poetry",
    Card(
        summary="Tang poems, Song ci and older classics, from the chinese-poetry collection",
        summary_zh="唐诗、宋词与先秦典籍，来自 chinese-poetry 项目",
        source="the chinese-poetry project, https://github.com/chinese-poetry/chinese-poetry",
        shapes="one document for each poem: its title, then its lines",
        licence="MIT; the texts are public domain",
        limits="Tang poems in traditional, Song ci in simplified characters",
    ),
)
def chinese_poetry() -> TextSource:
    return TextSource(
        "chinese_poetry", (_folder("chinese_poetry", "its JSON files or their zip", "它的 JSON 文件或 zip "),), (".json", ".zip")
    )
