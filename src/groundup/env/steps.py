"""Running one command of an installation: what it is, signs of life, how long, and in plain words why it failed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from groundup.env import probe
from groundup.env.language import pick, text
from groundup.env.layout import shown

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
WINDOWS = os.name == "nt"
NETWORK_SIGNS = (
    "failed to establish a new connection",
    "max retries exceeded",
    "name resolution",
    "name or service not known",
    "getaddrinfo failed",
    "network is unreachable",
    "connection refused",
    "connection reset",
    "connection timed out",
    "connecttimeout",
    "read timed out",
    "proxyerror",
    "dns error",
    "error sending request",
)


class Refused(Exception):
    """This machine, folder or request cannot work: nothing was tried."""


class Failed(Exception):
    """A step was tried and failed."""


def say(en: str, zh: str) -> str:
    """In the language that GROUNDUP_LANG or the system asks for."""
    return text(en, zh)[pick()]


def step(title: str, command: Sequence[str], cwd: str, explain: Optional[Callable[[int, str], Optional[str]]] = None) -> str:
    """Runs one command: says what and how long; its output is shown only when it fails. Returns the output.

    `explain(status, output)` names the cause of a failure; the general walls are known here.
    """
    print("\n" + title + "\n$ " + shown([relative(word, cwd) for word in command], WINDOWS), flush=True)
    began = time.time()
    status, output = captured(command, cwd)
    if status != 0:
        cause = (explain(status, output) if explain else None) or known_cause(status, output)
        lines = [say("this step failed with status {0}: {1}", "此步失败，状态 {0}：{1}").format(status, title)]
        lines += [say("Cause: ", "原因：") + cause] if cause else []
        lines += [say("Its last lines:", "最后的输出：")] + ["  " + line for line in meaningful_lines(output)]
        lines += [say("To repeat it: ", "重复此步：") + repeatable(command, cwd)]
        raise Failed("\n  ".join(lines))
    print(say("  done in {0:.1f} s", "  完成，用时 {0:.1f} 秒").format(time.time() - began), flush=True)
    return output


def captured(command: Sequence[str], cwd: str) -> Tuple[int, str]:
    """(status, output) of a long command, with a sign of life: on a terminal one changing line, in a log a line a minute."""
    child = subprocess.Popen(
        list(command), cwd=cwd, env=child_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines: List[str] = []

    def read() -> None:
        for raw in child.stdout or ():
            lines.append(raw.decode("utf-8", "replace").rstrip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    on_terminal = sys.stdout.isatty()
    began, last = time.time(), 0
    try:
        while reader.is_alive():
            reader.join(0.2)
            seconds = int(time.time() - began)
            if seconds > last and (on_terminal or seconds % 60 == 0):
                last = seconds
                sign = say("  still working, {0} s", "  进行中，{0} 秒").format(seconds) + heading(lines)
                print("\r" + sign + "\x1b[K" if on_terminal else sign, end="" if on_terminal else "\n", flush=True)
        return child.wait(), "\n".join(lines)
    except (KeyboardInterrupt, SystemExit):
        end(child)
        raise
    finally:
        reader.join(5)  # a grandchild that outlives the command would hold the pipe open
        if not reader.is_alive() and child.stdout:
            child.stdout.close()
        if on_terminal and last:
            print("\r\x1b[K", end="", flush=True)


def heading(lines: Sequence[str]) -> str:
    """What pip or uv is at, from its latest line that tells."""
    for line in reversed(lines[-20:]):
        words = line.split()
        if words and words[0] in ("Collecting", "Downloading", "Installing", "Building", "Using", "Preparing", "Prepared", "Resolved"):
            return ": " + line.strip()[:60]
    return ""


def end(child: "subprocess.Popen[bytes]") -> None:
    """Waits for a child that got the same Ctrl-C; one that did not hear it is told, and in the end made to."""
    for seconds, tell in ((3, child.terminate), (10, child.kill)):
        try:
            child.wait(timeout=seconds)
            return
        except subprocess.TimeoutExpired:
            tell()
    child.wait()


def child_environment() -> Dict[str, str]:
    """The environment for another Python: without what would lead it, or pip, to another place."""
    environment = {name: value for name, value in probe.clean_environment().items() if name not in ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")}
    # pip refuses --user in a venv, and some systems set it for everybody.
    environment["PIP_USER"] = "0"
    return environment


def known_cause(status: int, output: str) -> Optional[str]:
    """The wall behind a failed command, in a sentence with what to do; None for an unknown one. The surest signs come first."""
    low = output.lower()
    version = "{}.{}".format(*sys.version_info[:2])

    def has(*signs: str) -> bool:
        return any(sign in low for sign in signs)

    if has("no space left on device", "errno 28", "disk quota exceeded", "not enough space on the disk"):
        return say(
            "the disk is full. Free some space and run this again: what is downloaded stays.",
            "磁盘已满。请腾出空间后重新运行，已下载的部分会保留。",
        )
    if has("read-only file system"):
        return say("the disk is read-only. Work in a place that you can write to.", "磁盘为只读。请换到可写的位置。")
    if has("permission denied", "errno 13", "access is denied"):
        return say(
            "no permission to write there (a file of another user, or one that is in use). Make the folder your own, or work on a copy.",
            "没有写权限（文件属于其他用户，或正被占用）。请取得该文件夹的权限，或改用副本。",
        )
    if has("ensurepip is not available", "no module named ensurepip"):
        return say(
            "Python's venv package is missing. Fix: ", "缺少 Python 的 venv 软件包。解决："
        ) + "sudo apt install python{}-venv".format(version)
    if has("externally-managed-environment", "externally managed"):
        return say(
            "this Python belongs to the system, which lets nobody else install into it. Leave --system away to get a venv.",
            "该 Python 由系统管理，不允许直接安装。请去掉 --system，改用 venv。",
        )
    if has("long path support"):
        return say(
            "a path is longer than Windows allows. Enable long paths (pip's hint below), or work in a short path such as C:\\gu.",
            "路径长度超过 Windows 的限制。请启用长路径支持（见下方 pip 的提示），或换到较短的路径，如 C:\\gu。",
        )
    if has("certificate_verify_failed", "certificate verify failed"):
        return say(
            "the server's certificate is not trusted, as happens behind a company proxy. Set PIP_CERT to your company's certificate file.",
            "服务器证书不受信任，常见于公司代理之后。请把 PIP_CERT 设为公司的证书文件。",
        )
    # Told not to retry, pip is silent about servers that do not answer: it just knows no version at all.
    if has("(from versions: none)", *NETWORK_SIGNS) and not has("looking in links"):
        return say(
            "the network: no answer from a server that is needed. Behind a proxy set HTTPS_PROXY; "
            "where the servers are slow or blocked use a mirror: "
            "PIP_INDEX_URL for packages, GROUNDUP_TORCH_INDEX for PyTorch's own wheels. Running this again continues.",
            "网络问题：所需的服务器没有应答。使用代理时请设置 HTTPS_PROXY；访问缓慢或受限时请使用镜像："
            "PIP_INDEX_URL 用于普通软件包，GROUNDUP_TORCH_INDEX 用于 PyTorch 安装包。重新运行即可继续。",
        )
    if has("no matching distribution found", "could not find a version", "no solution found"):
        return say(
            "the package sources do not have this version for Python {0} on this system (a mirror that is behind, a folder without it?).",
            "软件源中没有适用于本系统 Python {0} 的该版本（镜像未同步，或文件夹中缺少？）。",
        ).format(version)
    if has("do not match the hashes", "badzipfile", "incompleteread"):
        return say("a download arrived damaged. Run this again.", "下载的文件已损坏。请重新运行。")
    if status in (-9, 137) or has("memoryerror"):
        return say(
            "memory ran out and the system ended the command. Close other programs and run this again.",
            "内存不足，命令被系统终止。请关闭其他程序后重新运行。",
        )
    return None


def meaningful_lines(output: str, most: int = 6) -> List[str]:
    """The lines of a failed command that tell something: its errors, else its last words."""
    lines = [
        line.strip() for line in output.splitlines() if line.strip() and not line.strip().startswith(("[notice]", "WARNING: Retrying"))
    ]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines)[-most:]


def relative(word: str, cwd: str) -> str:
    """A path inside `cwd` as it is typed there; any other word as it is."""
    return os.path.relpath(word, cwd) if word.startswith(cwd + os.sep) else word


def repeatable(command: Sequence[str], cwd: str) -> str:
    return change_folder(cwd) + " && " + shown([relative(word, cwd) for word in command], WINDOWS)


def change_folder(cwd: str) -> str:
    return ("cd /d " if WINDOWS else "cd ") + shown([cwd], WINDOWS)
