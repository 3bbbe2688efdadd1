"""The C files beside this one as libraries, each compiled at first use where the machine has a C compiler.

Without a compiler, or where anything goes wrong, `why_not` tells the reason, and what would use one stays on torch. GROUNDUP_NATIVE=0 switches them off.
They are kept in the cache folder under the hash of all that they were made from.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from groundup.data.cache import cache_folder

HERE = Path(__file__).parent
OPTIMIZE = {"decode": "-O2", "train": "-O3"}
FLAGS = ["-ftree-vectorize", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast"]

_number, _float, _at = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
FUNCTIONS: dict[str, dict[str, list[Any]]] = {
    "decode": {
        "scratch": [_at, *[_number] * 3],
        "step": [_at, *[_number] * 3, *[_at] * 8],
    },
    "train": {
        "norm": [_number, _number, _float, *[_at] * 4, _number],
        "norm_back": [_number, _number, *[_at] * 7, _number],
        "swiglu": [_number, *[_at] * 3, _number],
        "swiglu_back": [_number, *[_at] * 5, _number],
        "turn": [*[_number] * 4, *[_at] * 4, *[_number] * 2, *[_at] * 2, _number],
        "softmax": [*[_number] * 3, _at, _float, _at, *[_number] * 2],
        "softmax_back": [*[_number] * 2, *[_at] * 2, _float, *[_number] * 2],
        "attend": [*[_number] * 5, *[_at] * 4, _number, _float, *[_at] * 3, _number],
        "attend_back": [*[_number] * 5, *[_at] * 4, _number, _float, *[_at] * 6, _number],
        "cross_entropy": [*[_number] * 2, *[_at] * 2, _float, _at, *[_number] * 2],
        "token_loss_scratch": [_number] * 3,
        "token_loss": [*[_number] * 3, *[_at] * 3, _float, *[_at] * 4, _number],
        "squares": [_number, *[_at] * 4, _number],
        "scale": [_number, *[_at] * 2, _float, _number],
        "adamw": [_number, _at, *[ctypes.c_double] * 5, _number],
        "layer_kept": [_at],
        "layer_scratch": [_at, *[_number] * 2],
        "layers": [_at, _number, *[_at] * 4, _number],
        "layers_back": [_at, _number, *[_at] * 5, _number],
    },
}


class _Unusable(Exception):
    pass


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL).stdout
    except subprocess.CalledProcessError as error:
        raise _Unusable(f"{command[0]}: {error.stderr.strip()[:500]}") from error


def _compiler() -> str:
    for name in (os.environ.get("CC"), "gcc", "cc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    raise _Unusable("no C compiler")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(("model", "cpu family", "flags", "Features", "CPU ")))
    except OSError:
        return platform.processor()


def _checked(path: Path) -> bool:
    """Whether a library is whole: a hash of it stands behind its end, where the loader does not look."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return len(data) > 32 and hashlib.sha256(data[:-32]).digest() == data[-32:]


def _build(compiler: str, name: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix="making-") as folder:
        made, library = str(Path(folder) / f"{name}.o"), Path(folder) / path.name
        command = [compiler, OPTIMIZE[name], *FLAGS, "-c", str(HERE / f"{name}.c"), "-o", made]
        try:
            _run(*command, "-march=native")
        except _Unusable:
            _run(*command)
        # Linked without OpenMP's library: its names are found in the one that torch has loaded. A second team of threads would fight for the same cores.
        _run(compiler, "-shared", made, "-lm", "-o", str(library))
        data = library.read_bytes()
        library.write_bytes(data + hashlib.sha256(data).digest())
        os.replace(library, path)  # whole or not at all, whoever else makes it meanwhile


def _load(name: str) -> ctypes.CDLL:
    compiler = _compiler()
    made_from = [
        *((HERE / f).read_text() for f in (f"{name}.c", "vectors.h")),
        _run(compiler, "--version"),
        _processor(),
        platform.machine(),
    ]
    key = hashlib.sha256("\0".join([*made_from, OPTIMIZE[name], *FLAGS]).encode())
    path = cache_folder() / "native" / key.hexdigest()[:32] / f"{name}.so"
    if not _checked(path):
        _build(compiler, name, path)
    library = ctypes.CDLL(str(path))
    for function, arguments in FUNCTIONS[name].items():
        found = getattr(library, f"groundup_{function}")
        found.argtypes, found.restype = arguments, _number if function.endswith(("scratch", "kept")) else None
    return library


@functools.cache
def _loaded(name: str) -> ctypes.CDLL | str:
    """The library, or why there is none; asked once for the process."""
    import torch  # noqa: F401  its OpenMP has to be there before

    try:
        return _load(name)
    except (_Unusable, OSError, AttributeError, RuntimeError, subprocess.SubprocessError, UnicodeError) as error:
        return str(error) or type(error).__name__


def why_not(name: str) -> str | None:
    """Why there is no such library on this machine; None where there is."""
    if os.environ.get("GROUNDUP_NATIVE") == "0":
        return "GROUNDUP_NATIVE=0"
    library = _loaded(name)
    return library if isinstance(library, str) else None


def version(name: str) -> str | None:
    """What tells one build from another, which may round otherwise; None where there is none."""
    return None if why_not(name) else Path(loaded(name)._name).parent.name[:8]


def loaded(name: str) -> ctypes.CDLL:
    """The library, where `why_not` says that there is one."""
    library = _loaded(name)
    assert not isinstance(library, str), library
    return library
