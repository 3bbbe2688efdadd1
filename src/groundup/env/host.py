"""Every access of the probes to the outside: files, tools, variables, the running Python. Tests put another machine in its place.

Nothing here raises for what is absent or forbidden: a file that cannot be read is "", a tool that is missing or hangs is a status.
"""

from __future__ import annotations

import ctypes
import glob
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

MISSING, HUNG = 127, 124  # exit statuses as shells and `timeout` give them

_READ_LIMIT = 2_000_000
_NO_WINDOW = 0x08000000 if sys.platform == "win32" else 0  # a probe must not flash a console window


class Host:
    """This machine and the Python that runs. Paths are text with either separator, so that any machine can be described anywhere."""

    def __init__(self) -> None:
        self.environ: Mapping[str, str] = dict(os.environ)
        if sys.platform == "win32":
            # platform.uname() asks WMI on new Pythons, which can take seconds.
            number = sys.getwindowsversion()
            self.system, self.version = "Windows", "{}.{}.{}".format(number.major, number.minor, number.build)
            self.release = "11" if number.build >= 22000 else str(number.major)
            self.machine = os.environ.get("PROCESSOR_ARCHITEW6432") or os.environ.get("PROCESSOR_ARCHITECTURE", "")
        else:
            names = os.uname()
            self.system, self.release, self.machine = names.sysname, names.release, names.machine
            self.version = platform.mac_ver()[0] if sys.platform == "darwin" else names.version
        self.python_version = platform.python_version()
        self.implementation = platform.python_implementation()
        self.bits = struct.calcsize("P") * 8
        self.free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
        self.executable = sys.executable or ""
        self.prefix, self.base_prefix = sys.prefix, sys.base_prefix
        self.path: List[str] = [folder for folder in sys.path if folder]
        self.stdlib = os.path.dirname(os.__file__)
        self.include = sysconfig.get_paths().get("include", "")
        self.cores = os.cpu_count()
        self.cwd = _quiet(os.getcwd) or "."

    @property
    def home(self) -> str:
        # A container's user may have no entry in the user table.
        return str(_quiet(Path.home) or "")

    @property
    def temporary(self) -> str:
        """Where pip unpacks."""
        return _quiet(tempfile.gettempdir) or ""

    @property
    def user_site(self) -> Optional[str]:
        """The user's own site-packages when this Python reads it."""
        import site

        return site.getusersitepackages() if site.ENABLE_USER_SITE else None

    def cores_usable(self) -> Optional[int]:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else self.cores

    def libc(self) -> Optional[str]:
        """'glibc 2.36', 'musl', or None where the question has no meaning."""
        if self.system != "Linux":
            return None
        if "musl" in str(sysconfig.get_config_var("HOST_GNU_TYPE")) or "musl" in str(sysconfig.get_config_var("EXT_SUFFIX")):
            return "musl"
        try:
            return os.confstr("CS_GNU_LIBC_VERSION")
        except (ValueError, OSError):
            return "musl"

    # --- files -------------------------------------------------------------------------------------------------------------------

    def read(self, path: str, limit: int = _READ_LIMIT) -> str:
        """The first `limit` bytes as text; "" when the file cannot be read."""
        try:
            with open(path, "rb") as stream:
                return stream.read(limit).decode("utf-8", "replace")
        except (OSError, ValueError):
            return ""

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def names(self, folder: str) -> List[str]:
        """Names in a folder, sorted; [] when it cannot be read."""
        try:
            return sorted(os.listdir(folder))
        except (OSError, ValueError):
            return []

    def glob(self, pattern: str) -> List[str]:
        return sorted(glob.glob(pattern))

    def real(self, path: str) -> str:
        """The file behind symbolic links."""
        return os.path.realpath(path)

    def can_use(self, path: str) -> bool:
        """Whether this user may read and write a device."""
        return os.access(path, os.R_OK | os.W_OK)

    def disk(self, folder: str) -> Optional[Tuple[int, int]]:
        """(free, total) bytes of the file system that a folder is on."""
        try:
            usage = shutil.disk_usage(folder)
        except (OSError, ValueError):
            return None
        return usage.free, usage.total

    # --- tools -------------------------------------------------------------------------------------------------------------------

    def which(self, name: str) -> Optional[str]:
        path = self.environ.get("PATH")
        return shutil.which(name, path=path and os.pathsep.join(self.path_folders()))

    def path_folders(self) -> List[str]:
        """Folders that programs are looked for in."""
        folders = [folder for folder in self.environ.get("PATH", "").split(";" if self.system == "Windows" else ":") if folder]
        if "microsoft" in self.release.lower():
            # WSL appends Windows' own path: dozens of folders that answer in milliseconds each, and no Linux program in them.
            folders = [folder for folder in folders if not re.match(r"/mnt/[a-z](?:/|$)", folder)]
        return folders

    def run(self, command: Sequence[str], timeout: float, without: Sequence[str] = ()) -> Tuple[int, str]:
        """Exit status and output (both streams) of a tool; a tool that is missing or hangs is a fact, not an error.

        Args:
            timeout: seconds.
            without: names of variables that it must not see.
        """
        environ = {name: value for name, value in self.environ.items() if name not in without}
        try:
            child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environ,
                creationflags=_NO_WINDOW,
            )
        except (OSError, ValueError) as error:
            return MISSING, str(getattr(error, "strerror", None) or error)
        try:
            out, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            try:
                # What hangs inside a driver does not die when it is killed; it is left behind then.
                child.communicate(timeout=0.5)
            except (subprocess.TimeoutExpired, OSError, ValueError):
                pass
            return HUNG, "{} did not answer within {:g} s".format(Path(command[0]).name, timeout)
        return child.returncode, out.decode("utf-8", "replace")

    # --- Windows -----------------------------------------------------------------------------------------------------------------

    def registry(self, key: str, name: str) -> Optional[str]:
        """A value under HKEY_LOCAL_MACHINE as text; None where there is none, and on other systems."""
        if sys.platform != "win32":
            return None
        import winreg

        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as opened:
                return str(winreg.QueryValueEx(opened, name)[0])
        except OSError:
            return None

    def registry_keys(self, key: str) -> List[str]:
        """Names of the keys below a key, of the machine and of the user."""
        found: List[str] = []
        if sys.platform != "win32":
            return found
        import winreg

        for root in (winreg.HKEY_LOCAL_MACHINE, winreg.HKEY_CURRENT_USER):
            try:
                with winreg.OpenKey(root, key) as opened:
                    found += [winreg.EnumKey(opened, index) for index in range(winreg.QueryInfoKey(opened)[0])]
            except OSError:
                continue
        return found

    def processor_feature(self, number: int) -> Optional[bool]:
        """IsProcessorFeaturePresent; None on other systems."""
        if sys.platform != "win32":
            return None
        return bool(getattr(ctypes, "windll").kernel32.IsProcessorFeaturePresent(number))  # noqa: B009 - windll exists on Windows only

    def windows_memory(self) -> Tuple[int, int]:
        """(total, available) bytes."""

        class MemoryStatus(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
                (name, ctypes.c_ulonglong)
                for name in ("total", "available", "page_total", "page_free", "virtual", "virtual_free", "extended")
            ]

        status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
        getattr(ctypes, "windll").kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # noqa: B009
        return int(status.total), int(status.available)


class Later:
    """A call that runs beside the others; `result()` waits for it and raises what it raised."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._value: Any = None
        self._error: Optional[BaseException] = None
        # A daemon: what hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, args=(function, args), daemon=True)
        self._thread.start()

    def _work(self, function: Callable[..., Any], args: Tuple[Any, ...]) -> None:
        try:
            self._value = function(*args)
        except BaseException as error:  # handed on by result()
            self._error = error

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


def _quiet(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (OSError, RuntimeError):
        return None


# --- paths and privacy -----------------------------------------------------------------------------------------------------------


def join(folder: str, *parts: str) -> str:
    """A path below a folder; the forward slash works on Windows too."""
    return "/".join([folder.rstrip("/\\"), *parts])


def last(path: str) -> str:
    """The last part of a path with either separator."""
    return re.split(r"[\\/]", path.rstrip("/\\"))[-1]


def below(path: str, folder: Optional[str]) -> bool:
    """Whether a path is a folder or in it."""
    if not folder:
        return False
    one, other = (text.replace("\\", "/").rstrip("/") for text in (path, folder))
    if re.match(r"[A-Za-z]:", other):
        one, other = one.lower(), other.lower()
    return one == other or one.startswith(other + "/")


def scrub(message: str, host: Optional[Host] = None) -> str:
    """Takes home folders, the user's name in paths, and credentials in addresses out of a text that ends in a report."""
    home, user = _home_and_user(host)
    if len(home) > 1:
        message = message.replace(home, "~")
        if "\\" in home:
            message = message.replace(home.replace("\\", "/"), "~").replace(home.replace("\\", "\\\\"), "~")
    message = re.sub(r"(/home/|/Users/|[A-Za-z]:[\\/]{1,2}Users[\\/]{1,2})(?!Shared\b|Public\b|\*)[^\\/\s:;,'\"]+", r"\1***", message)
    if user:
        message = re.sub(r"(?<=[\\/])" + re.escape(user) + r"(?=[\\/]|$|[\s:;,'\"])", "***", message)
    message = re.sub(r"(?<!\S)(\\\\)[^\\\s]+(?=\\)", r"\1***", message)
    return re.sub(r"(?<=://)[^/@\s]{1,300}@", "***@", message)


def scrub_all(value: Any, host: Optional[Host] = None) -> Any:
    """`scrub` on every text inside lists and dicts."""
    if isinstance(value, str):
        return scrub(value, host) if "/" in value or "\\" in value else value
    if isinstance(value, dict):
        return {key: scrub_all(item, host) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub_all(item, host) for item in value]
    return value


def _home_and_user(host: Optional[Host]) -> Tuple[str, str]:
    environ: Mapping[str, str] = os.environ if host is None else host.environ
    home = str(_quiet(Path.home) or "") if host is None else host.home
    user = environ.get("USER") or environ.get("LOGNAME") or environ.get("USERNAME") or last(home)
    # 'root', 'python' or 'torch' as a user's name tells nothing, and taking it out of paths would.
    return home, user if len(user) > 1 and not _PUBLIC_PART.fullmatch(user) else ""


# Parts of a path that say what it is and not whose: everything else is masked outside the system's own folders.
_PUBLIC_PART = re.compile(
    r"~|[A-Za-z]:|root|opt|apps?|software|sw|modules?|cvmfs|scratch|data|mnt|media|tmp|temp|var|home|users|work|workspace|content|kaggle|shared|nfs|gpfs|lustre"
    r"|lib|lib64|lib32|bin|include|site-packages|dist-packages|python(?:[\d.]+)?|py\d+|venvs?|\.venv|\.?virtualenvs?|env|envs|\.local|\.cache|\.conda|pkgs"
    r"|(?:ana|mini)conda\d*|miniforge\d*|mambaforge|micromamba|conda|\.?pyenv|versions|cuda(?:[-_][\w.]+)?|cudnn\w*|nccl|nvidia|tensorrt[-\w.]*|hpc_sdk|nvhpc"
    r"|compat|stubs|extras|cupti|targets|[\w]+-linux(?:-gnu)?|rocm[-\w.]*|hip|intel|oneapi|mkl|torch\w*|triton|openmpi|ompi|mpi|gcc|src|dev|shm|usr|local|v?\d+(?:\.\d+)*"
    r"|\.?jupyter|wsl|appdata|roaming|programs|windows|system32|program files(?: \(x86\))?|nvidia gpu computing toolkit",
    re.IGNORECASE,
)
_SYSTEM_ROOT = re.compile(
    r"/(?:usr|lib|lib64|bin|sbin|etc|proc|sys|dev|run|System)(?=/|$)|/Library/Frameworks(?=/|$)|[A-Za-z]:[\\/](?:Windows|Program Files(?: \(x86\))?)(?=[\\/]|$)",
    re.IGNORECASE,
)


_LIBRARY = re.compile(r"[\w.+-]+\.(?:so(?:\.\d+)*|dll|dylib|pyd)")
_PATH_IN_TEXT = re.compile(
    r"(?<=\")(?:~|[A-Za-z]:)?[\\/][^\"\n]+(?=\")|(?<=')(?:~|[A-Za-z]:)?[\\/][^'\n]+(?=')|(?<![\w.:/\\\"'])(?:~|[A-Za-z]:)?[\\/](?![\\/\s])[^\s:;,'\"()]+"
)


def public_path(path: str, host: Optional[Host] = None) -> str:
    """A path with everything masked that is neither the system's nor says what kind of folder it is: '~/***/lib'."""
    path = scrub(path.strip(), host)
    if not path or _SYSTEM_ROOT.match(path):
        return path
    parts: List[str] = []
    words = re.split(r"[\\/]", path)
    for index, part in enumerate(words):
        if part in ("site-packages", "dist-packages"):
            parts += words[index:]  # what was installed there is public
            break
        shown = part if not part or _PUBLIC_PART.fullmatch(part) or _LIBRARY.fullmatch(part) else "***"
        if shown != "***" or parts[-1:] != ["***"]:
            parts.append(shown)
    return ("\\" if "\\" in path else "/").join(parts)


def public_text(message: str, host: Optional[Host] = None) -> str:
    """`public_path` on every path in what a program said."""
    return _PATH_IN_TEXT.sub(lambda found: public_path(found.group(0), host), scrub(message, host))


def table(source: str, separator: str = ":") -> Dict[str, str]:
    """Lines 'name<separator>value' as a dict."""
    pairs = (line.split(separator, 1) for line in source.splitlines() if separator in line)
    return {key.strip(): value.strip() for key, value in pairs}
