"""What torch says of itself: imported in a child process, so that this one survives a torch that crashes or hangs."""

from __future__ import annotations

import json
import signal
from typing import Any, Dict, List, Mapping, Optional, Sequence

from groundup.env import libraries
from groundup.env.host import HUNG, Host, Later, public_text

# Imports torch and, one by one, what has to fit it. Each answer is a line of its own, said before the next thing can end the process.
# The first entry of the path is the current folder: whatever is called torch.py there must not be run by a question.
ASK_TORCH = r"""
import sys
sys.path[:] = [folder for folder in sys.path if folder]
import json, time, warnings
def say(**what):
    sys.stdout.write("\nGROUNDUP " + json.dumps(what) + "\n")
    sys.stdout.flush()
seen = []
warnings.simplefilter("always")
warnings.showwarning = lambda message, *rest, **more: seen.append(str(message)[:600])
start = time.perf_counter()
import torch
say(import_seconds=round(time.perf_counter() - start, 2), version=str(torch.__version__))
def attempt(function):
    try:
        return function()
    except Exception as error:
        return "{}: {}".format(type(error).__name__, str(error).strip())[:600]
def known(function):
    try:
        return function()
    except Exception:
        return None
answer = {"cuda_build": known(lambda: torch.version.cuda), "hip_build": known(lambda: torch.version.hip),
          "cxx11_abi": known(lambda: bool(torch._C._GLIBCXX_USE_CXX11_ABI)), "arch_list": known(torch.cuda.get_arch_list) or [],
          "mps_available": bool(known(lambda: torch.backends.mps.is_available())), "xpu_available": bool(known(lambda: torch.xpu.is_available())),
          "cuda_available": bool(known(torch.cuda.is_available)), "numpy": attempt(lambda: torch.ones(1).numpy() is None or None)}
if answer["cuda_available"]:
    count = range(torch.cuda.device_count())
    answer["devices"] = known(lambda: [torch.cuda.get_device_name(i) for i in count]) or []
    answer["capabilities"] = known(lambda: ["%d.%d" % torch.cuda.get_device_capability(i) for i in count]) or []
    answer["compute_error"] = attempt(lambda: (torch.ones(8, device="cuda") @ torch.ones(8, device="cuda")).item() and None)
    answer["cudnn"] = known(torch.backends.cudnn.version)
    answer["nccl"] = known(lambda: ".".join(str(part) for part in torch.cuda.nccl.version()))
elif answer["cuda_build"] or answer["hip_build"]:
    answer["compute_error"] = attempt(lambda: torch.ones(8, device="cuda").sum().item() and None)
try:
    with open("/proc/self/maps") as maps:
        answer["mapped"] = sorted({line.split(None, 5)[-1].strip() for line in maps if ".so" in line})
except OSError:
    pass
say(answer=answer, warnings=seen[:10])
for name in sys.argv[1:]:
    say(importing=name)
    error = attempt(lambda: __import__(name) and None)
    say(imported=name, error=error)
"""
_ANSWER: Mapping[str, Any] = {
    "import_seconds": None, "version": None, "devices": [], "capabilities": [], "cuda_build": None, "hip_build": None, "cuda_available": False, "arch_list": [],
    "mps_available": False, "xpu_available": False, "cxx11_abi": None, "cudnn": None, "nccl": None, "numpy": None, "compute_error": None, "warnings": [],
    "loaded": [], "imports": {}, "details": [], "error": None,
}  # fmt: skip


class TorchProbe:
    """Imports torch in a child process, so that this one survives whatever that does. Starts at once; `answer()` waits.

    Args:
        python: the interpreter to ask; another one than this is asked without this one's variables.
        timeout: seconds.
        companions: modules to import after torch.
    """

    def __init__(
        self, python: Optional[str] = None, timeout: float = 60.0, host: Optional[Host] = None, companions: Sequence[str] = ()
    ) -> None:
        self._host = host or Host()
        own = python in (None, self._host.executable)
        # As the user would run it, with PYTHONPATH and the user's own site-packages: they are part of what may be wrong.
        command = [self._host.executable if own else str(python), *([] if own else ["-I"]), "-c", ASK_TORCH, *companions]
        without = () if own else ("PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__")
        self._timeout = timeout
        self._asking = Later(self._host.run, command, timeout, without)

    def answer(self) -> Dict[str, Any]:
        """torch's own view of the machine; `error` is None when it could be imported, else its last line, with `details` before it."""
        status, out = self._asking.result()
        return parse_torch_answer(status, out, self._host)


def parse_torch_answer(status: int, out: str, host: Optional[Host] = None) -> Dict[str, Any]:
    """The answer of the child process that imported torch, whatever it and torch printed."""
    host = host or Host()
    answer: Dict[str, Any] = {}
    imports: Dict[str, Any] = {}
    noise: List[str] = []
    finished = False
    for line in out.splitlines():
        said = _said(line)
        if said is None:
            if line.strip():
                noise.append(public_text(line.rstrip()[:500], host))
        elif "importing" in said:
            imports[str(said["importing"])] = "ended the process" + _ending(status)
        elif "imported" in said:
            imports[str(said["imported"])] = public_text(said["error"], host) if said.get("error") else None
        elif isinstance(said.get("answer"), dict):
            finished = True
            answer.update(said["answer"], warnings=[public_text(str(warning), host) for warning in said.get("warnings") or []])
        else:
            answer.update(said)
    if "import_seconds" not in answer:
        if status == HUNG and noise:
            return {"error": noise[-1].replace("did not answer", "did not end importing torch"), "details": noise[-20:]}
        return {"error": noise[-1] if noise else "importing torch ended" + _ending(status), "details": noise[-20:]}
    if not finished:
        answer["compute_error"] = (
            noise[-1] if status == HUNG and noise else "asking torch for its devices ended the process" + _ending(status)
        )
    for key in ("compute_error", "numpy"):
        answer[key] = public_text(str(answer[key]), host) if answer.get(key) else None
    loaded = [libraries.describe(host, str(path)) for path in answer.pop("mapped", [])]
    return {**_ANSWER, **answer, "loaded": [item for item in loaded if item], "imports": imports, "details": noise[-20:]}


def _said(line: str) -> Optional[Dict[str, Any]]:
    if not line.startswith("GROUNDUP {"):
        return None
    try:
        return dict(json.loads(line[len("GROUNDUP ") :]))
    except ValueError:
        return None


def _ending(status: int) -> str:
    if status < 0:
        try:
            return " with signal {}".format(signal.Signals(-status).name)
        except ValueError:
            pass
    # Windows writes a crash as a large number: 0xC0000005 is an access violation.
    return " with status {}".format(hex(status & 0xFFFFFFFF) if status > 255 else status)
