"""A tape of one computation: every torch operation with its tensors, the module it ran in and the line that called it.

It is recorded through `torch.overrides.TorchFunctionMode`, so it sees functions as they are written (`softmax(dim=0)`, `cross_entropy`, `.data`), not the
kernels below them, and it needs nothing of the program that it looks at.
"""

from __future__ import annotations

import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

HERE = str(Path(__file__).parent)
TORCH = str(Path(torch.__file__).parent)
LIBRARY = sysconfig.get_paths()["stdlib"]  # Python's own
# Operations that hand values on as they are, in another shape or type.
VIEWS = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "transpose",
        "permute",
        "squeeze",
        "unsqueeze",
        "contiguous",
        "T",
        "mT",
        "t",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
        "ravel",
        "unflatten",
        "expand",
        "view_as",
        "reshape_as",
        "chunk",
        "split",
        "unbind",
        "narrow",
        "select",
        "__getitem__",
        "float",
        "to",
        "type",
        "double",
        "half",
        "bfloat16",
        "clone",
        "type_as",
        "identity",
    ]
)
PROPERTIES = frozenset({"data", "T", "mT", "real"})
QUIET = frozenset(
    [
        "size",
        "dim",
        "numel",
        "stride",
        "is_floating_point",
        "is_complex",
        "element_size",
        "storage_offset",
        "data_ptr",
        "__len__",
        "__hash__",
        "__repr__",
        "__format__",
        "get_device",
        "is_contiguous",
        "__dir__",
        "register_hook",
        "is_inference",
        "_is_view",
        "untyped_storage",
        "requires_grad_",
        "retain_grad",
    ]
)
ALIASES = {
    "__add__": "add", "__radd__": "add", "__iadd__": "add_", "__sub__": "sub", "__rsub__": "sub", "__isub__": "sub_", "__mul__": "mul",
    "__rmul__": "mul", "__imul__": "mul_", "__truediv__": "div", "__rtruediv__": "div", "__rdiv__": "div", "__div__": "div", "__itruediv__": "div_",
    "__idiv__": "div_", "true_divide": "div", "__matmul__": "matmul", "__rmatmul__": "matmul", "mm": "matmul", "bmm": "matmul", "__pow__": "pow",
    "__rpow__": "pow", "__ipow__": "pow_", "__neg__": "neg", "concat": "cat", "subtract": "sub", "multiply": "mul", "divide": "div",
    "_softmax": "softmax", "special_softmax": "softmax", "expit": "sigmoid", "swapaxes": "transpose", "__eq__": "eq", "__ne__": "ne",
    "__gt__": "gt", "__lt__": "lt", "__ge__": "ge", "__le__": "le", "__setitem__": "setitem_", "__invert__": "bitwise_not",
}  # fmt: skip
INPLACE = frozenset({"add_", "sub_", "mul_", "div_", "pow_", "setitem_"})


@dataclass
class Op:
    """One operation.

    Args:
        sources: per input tensor the number of the operation that made it, None for what came from outside.
        file, line, function: of the code that called it, outside torch.
        module: path of the innermost module it ran in, '' for the model itself, None outside of it.
        finite: of the outputs; the inputs' are those of their sources.
    """

    number: int
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    sources: list[int | None]
    outputs: list[Tensor]
    module: str | None
    file: str
    line: int
    function: str
    grad_enabled: bool
    finite: bool = True
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def output(self) -> Tensor | None:
        return self.outputs[0] if self.outputs else None

    @property
    def inplace(self) -> bool:
        return self.name in INPLACE or self.kwargs.get("inplace") is True or (self.name.endswith("_") and not self.name.endswith("__"))

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.kwargs.get(name, self.args[position] if len(self.args) > position else default)


@dataclass
class Call:
    """One run of a module: its place, what went in and came out, and the modes of that moment."""

    module: nn.Module
    path: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad_enabled: bool
    training: bool
    at: int
    output: Any = None
    end: int = -1


def tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and simple objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part, depth)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part, depth)
    elif depth == 0 and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        yield from tensors(vars(value), 1)


def _name(func: Callable[..., Any], known: dict[Any, str] = {}) -> str:  # noqa: B006
    try:
        return known[func]
    except (KeyError, TypeError):
        pass
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        prop = getattr(getattr(func, "__self__", None), "__name__", "")
        name = (f"{prop}.set" if name == "__set__" else prop) if prop in PROPERTIES else "?"
    name = ALIASES.get(name, name)
    if name in QUIET:
        name = "?"
    try:
        known[func] = name
    except TypeError:
        pass
    return name


class Tape(TorchFunctionMode):
    """Records while it is entered.

    Args:
        model: whose modules get names.
        values: also look whether every result is finite (slower).
    """

    def __init__(self, model: nn.Module, *, values: bool = False) -> None:
        super().__init__()
        self.values = values
        self.paths = {id(m): name for name, m in model.named_modules()}
        self.model = model
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.stack: list[Call] = []
        self.maker: dict[int, int] = {}
        self.failed: Op | None = None
        self.failed_in: list[Call] = []
        self._handles: list[Any] = []
        self._busy = False

    def __enter__(self) -> Tape:
        self._handles = [
            hooks.register_module_forward_pre_hook(self._enter_module),
            hooks.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        call = Call(module, self.paths.get(id(module)), args, {}, torch.is_grad_enabled(), module.training, len(self.ops))
        self.calls.append(call)
        self.stack.append(call)

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while self.stack:
            call = self.stack.pop()
            if call.module is module:
                call.output, call.end = output, len(self.ops)
                return

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name == "?" or self._busy:
            return func(*args, **kwargs)
        self._busy = True
        try:
            inputs = list(tensors(args)) + list(tensors(kwargs))
            file, line, function = _caller()
            where = self._where()
            op = Op(
                len(self.ops), name, args, kwargs, inputs, [self.maker.get(id(t)) for t in inputs], [], where, file, line, function,
                torch.is_grad_enabled(), shapes=[tuple(t.shape) for t in inputs],
            )  # fmt: skip
        finally:
            self._busy = False
        try:
            result = func(*args, **kwargs)
        except BaseException:
            if self.failed is None:
                self.failed, self.failed_in = op, list(self.stack)
            raise
        self._busy = True
        try:
            op.outputs = list(tensors(result))
            if op.name == "setitem_":
                op.outputs = inputs[:1]
            if self.values:
                op.finite = all(not t.is_floating_point() or bool(t.detach().isfinite().all()) for t in op.outputs)
            self.ops.append(op)
            for t in op.outputs:
                self.maker[id(t)] = op.number
        finally:
            self._busy = False
        return result

    def _where(self) -> str | None:
        for call in reversed(self.stack):
            if call.path is not None:
                return call.path
        return None

    # -- questions -------------------------------------------------------------------------------------------------------------
    def made(self, tensor: Tensor) -> Op | None:
        """The operation that made this tensor (the last one that wrote into it)."""
        number = self.maker.get(id(tensor))
        return None if number is None else self.ops[number]

    def origin(self, op: Op | None, through: frozenset[str] = VIEWS) -> Op | None:
        """The operation before views and conversions."""
        while op is not None and op.name in through and op.sources and op.sources[0] is not None:
            op = self.ops[op.sources[0]]
        return None if op is not None and op.name in through else op

    def source(self, op: Op, position: int = 0) -> Op | None:
        number = op.sources[position] if len(op.sources) > position else None
        return None if number is None else self.ops[number]

    def ancestors(self, op: Op) -> set[int]:
        """Numbers of all operations that this one's value came from, itself among them."""
        seen: set[int] = set()
        todo = [op.number]
        while todo:
            number = todo.pop()
            if number not in seen:
                seen.add(number)
                todo += [s for s in self.ops[number].sources if s is not None]
        return seen

    def users(self, op: Op) -> list[Op]:
        return [o for o in self.ops[op.number + 1 :] if op.number in o.sources]

    def root(self) -> Call | None:
        """The first run of the model itself."""
        return next((c for c in self.calls if c.module is self.model), None)

    def runs(self, module: nn.Module) -> list[Call]:
        return [c for c in self.calls if c.module is module]


def _caller() -> tuple[str, int, str]:
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((TORCH, HERE)) and not (file.startswith(LIBRARY) and "-packages" not in file):
            return file, frame.f_lineno, frame.f_code.co_name
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "", 0, ""


@dataclass
class Silence:
    """Warnings of what runs inside are kept instead of shown."""

    kept: list[str] = field(default_factory=list)

    def __enter__(self) -> Silence:
        self._catch = warnings.catch_warnings(record=True)
        self._seen = self._catch.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *error: Any) -> None:
        self.kept += [str(w.message) for w in self._seen or ()]
        self._catch.__exit__(*error)
