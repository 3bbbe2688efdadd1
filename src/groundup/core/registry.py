"""One registry for everything that has a name: models, tasks, datasets, methods.

A registered thing is one file in its package's folder. Its decorator carries its card; the folder is searched when a name is
first looked up, so adding a file is the only edit. User code joins as `path/to/file.py:Name`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from groundup.core.errors import DataError, ModelError, RecipeError, UserError, did_you_mean

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a reader must know of a registered thing before using it.

    Args:
        summary, summary_zh: one sentence.
        source: paper and section, or where the data comes from.
        shapes: what goes in and what comes out, with the meaning of each axis.
        limits: where it stops being right.
        licence: of data or weights, where there are any.
    """

    summary: str
    summary_zh: str
    source: str
    shapes: str = ""
    limits: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered object with its name and card; `file` is user code's, None for our own."""

    name: str
    target: T
    card: Card | None
    file: Path | None = None

    def arguments(self) -> dict[str, inspect.Parameter]:
        """The keyword arguments that a recipe may give, by name (those that the data decide are left out)."""
        given = {"self", "input_shape", "num_outputs", "dataset", "model"}
        parameters = inspect.signature(self.target).parameters.values()
        return {p.name: p for p in parameters if p.name not in given and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}

    def describe(self) -> dict[str, Any]:
        """The card and the arguments with their defaults, JSON-able."""
        defaults = {n: None if p.default is p.empty else p.default for n, p in self.arguments().items()}
        return {"name": self.name, **(asdict(self.card) if self.card else {}), "arguments": defaults}


class Registry(Generic[T]):
    """Names of one kind, found in the modules of one package.

    Args:
        kind: the word for messages, as 'model'.
        package: the package whose files are searched, as 'groundup.models'.
        error: the error type for an unknown name.
    """

    def __init__(self, kind: str, kind_zh: str, package: str, error: type[UserError]) -> None:
        self.kind, self.kind_zh, self.package, self.error = kind, kind_zh, package, error
        self._entries: dict[str, Entry[T]] = {}
        self._searched = False

    def register(self, name: str, card: Card) -> Callable[[T], T]:
        """Decorator: puts a class or function under a name, with its card. A name can be taken once."""

        def add(target: T) -> T:
            taken = self._entries.get(name)
            if taken is not None and taken.target.__module__ != target.__module__:
                raise ValueError(f"{self.kind} '{name}' is registered twice: {taken.target.__module__} and {target.__module__}")
            self._entries[name] = Entry(name, target, card)
            return target

        return add

    def _search(self) -> None:
        if self._searched:
            return
        self._searched = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")

    def names(self) -> list[str]:
        self._search()
        return sorted(self._entries)

    def entries(self) -> list[Entry[T]]:
        return [self._entries[name] for name in self.names()]

    def get(self, name: str) -> Entry[T]:
        """The entry of a name, or of user code `path/to/file.py:Name`.

        Raises:
            UserError: (its subclass for this kind) no such name, file or attribute.
        """
        if ".py:" in name:
            return self._from_file(name)
        self._search()
        if name not in self._entries:
            hint, hint_zh = did_you_mean(name, self._entries)
            if name.endswith(".py"):
                hint, hint_zh = " Your own is written {name}:Name.", "自己的代码写作 {name}:名字。"
            raise self.error(
                "unknown {kind} '{name}'." + hint,
                "没有名为 '{name}' 的{kind_zh}。" + hint_zh,
                fix="groundup {kind}s" if self.kind in ("model", "task") else None,
                kind=self.kind,
                kind_zh=self.kind_zh,
                name=name,
            )
        return self._entries[name]

    def _from_file(self, spec: str) -> Entry[T]:
        path, _, attribute = spec.rpartition(":")
        module = load_user_module(Path(path))
        target = getattr(module, attribute, None)
        if not callable(target):
            public = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
            hint, hint_zh = did_you_mean(attribute, public)
            raise self.error(
                "{path} has no {kind} '{attribute}'." + hint,
                "{path} 里没有{kind_zh} '{attribute}'。" + hint_zh,
                path=path,
                kind=self.kind,
                kind_zh=self.kind_zh,
                attribute=attribute,
            )
        return Entry(spec, target, None, Path(path).expanduser().resolve())

    def build_arguments(self, entry: Entry[T], given: dict[str, Any], where: str) -> dict[str, Any]:
        """Checks a recipe's arguments against the signature.

        Raises:
            RecipeError: an argument that the signature does not have, or one it needs and was not given.
        """
        parameters = inspect.signature(entry.target).parameters.values()
        known = entry.arguments()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return given
        for name in given:
            if name not in known:
                hint, hint_zh = did_you_mean(name, known) if known else (" It takes none.", "它不接受任何参数。")
                raise RecipeError(
                    "unknown key '{where}.{name}' for {kind} '{entry}'." + hint,
                    "{kind_zh} '{entry}' 没有参数 '{where}.{name}'。" + hint_zh,
                    where=where,
                    name=name,
                    kind=self.kind,
                    kind_zh=self.kind_zh,
                    entry=entry.name,
                )
        given = {name: self._fitting(entry, name, value, where) for name, value in given.items()}
        missing = [n for n, p in known.items() if p.default is p.empty and n not in given]
        if missing:
            raise RecipeError(
                "{kind} '{entry}' needs '{where}.{name}'.",
                "{kind_zh} '{entry}' 缺少参数 '{where}.{name}'。",
                fix="--set {where}.{name}=...",
                where=where,
                name=missing[0],
                kind=self.kind,
                kind_zh=self.kind_zh,
                entry=entry.name,
            )
        return given

    def _fitting(self, entry: Entry[T], name: str, value: Any, where: str) -> Any:
        """The value as the argument's annotation has it; as it is where there is none that can be checked."""
        from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

        from groundup.core.problems import expectations

        try:
            annotation = inspect.signature(entry.target, eval_str=True).parameters[name].annotation
            if annotation is inspect.Parameter.empty:
                return value
            fitted = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            english, chinese = expectations(error.errors())
        except (NameError, TypeError, AttributeError, SyntaxError, PydanticUserError):
            return value
        else:
            if not isinstance(value, bool) or isinstance(fitted, bool):
                return fitted
            english, chinese = "expected a number, not true or false", "应为数字，而不是 true 或 false"
        raise RecipeError(
            "{where}.{name} = {value} for {kind} '{entry}': {expected}",
            "{kind_zh} '{entry}' 的参数 {where}.{name} = {value}：{expected_zh}",
            where=where,
            name=name,
            value=repr(value),
            kind=self.kind,
            kind_zh=self.kind_zh,
            entry=entry.name,
            expected=english,
            expected_zh=chinese,
        )


def load_user_module(path: Path) -> ModuleType:
    """Imports a user's file under a name made from its contents, so that two files of one name do not meet.

    Raises:
        RecipeError: the file is missing or fails while it is imported (the original error is its cause).
    """
    path = path.expanduser()
    if not path.is_file():
        raise RecipeError(
            "no file {path} (looked in {where})",
            "找不到文件 {path}（在 {where} 里找过）",
            path=path,
            where=Path.cwd(),
            fix="write user code as path/to/file.py:Name",
            fix_zh="用户代码写作 path/to/file.py:名字",
        )
    digest = hashlib.sha256(path.read_bytes() + str(path.resolve()).encode()).hexdigest()[:12]
    name = f"groundup_user_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError("{path} is not a Python file", "{path} 不是 Python 文件", path=path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script without `if __name__ == "__main__"` may end the process
        sys.modules.pop(name, None)
        raise RecipeError(
            "{path} failed while it was imported: {cause}",
            "导入 {path} 时出错：{cause}",
            path=path,
            cause=f"{type(error).__name__}: {error}",
            fix="python {path}   (and --traceback shows where)",
            fix_zh="python {path}   （加 --traceback 可看到位置）",
        ) from error
    return module


MODELS: Registry[Any] = Registry("model", "模型", "groundup.models", ModelError)
TASKS: Registry[Any] = Registry("task", "任务", "groundup.tasks", RecipeError)
DATASETS: Registry[Any] = Registry("dataset", "数据集", "groundup.data.builtin", DataError)
METHODS: Registry[Any] = Registry("method", "微调方法", "groundup.tuning", RecipeError)
