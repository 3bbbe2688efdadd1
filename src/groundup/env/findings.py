"""What a diagnosis is made of: rules give hits, a hit with its texts from `causes.json` is a finding, and the advice fits the machine."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

from groundup.env import knowledge
from groundup.env.knowledge import dotted, version
from groundup.env.machine import Machine

TORCH = "2.13.0"  # what is recommended where nothing speaks for another release
INDEX = "https://download.pytorch.org/whl"

Values = Dict[str, Any]


@dataclass
class Finding:
    """One cause. `confidence` 0 to 1; `severity` 'blocking', 'warning' or 'info'; texts in one language."""

    cause_id: str
    severity: str
    confidence: float
    evidence: List[str]
    title: str = ""
    explanation: str = ""
    fix: List[str] = field(default_factory=list)
    commands: List[str] = field(default_factory=list)
    changes: str = ""
    verify: List[str] = field(default_factory=list)
    steps: List[Tuple[str, str]] = field(default_factory=list)

    def as_dict(self) -> Dict[str, Any]:
        """For JSON: `fix` has the steps as text, `commands` what of them can be typed."""
        return {name: value for name, value in self.__dict__.items() if name != "steps"}


@dataclass
class Hit:
    """What a rule found: `marks` choose among the steps of the fix, `values` fill the texts."""

    cause_id: str
    confidence: float
    evidence: List[str]
    values: Values = field(default_factory=dict)
    marks: Set[str] = field(default_factory=set)
    severity: Optional[str] = None


Rule = Callable[[Machine], Iterator[Hit]]
SIGNS: List[Rule] = []
CONCLUSIONS: List[Rule] = []


def sign(rule: Rule) -> Rule:
    SIGNS.append(rule)
    return rule


def conclusion(rule: Rule) -> Rule:
    CONCLUSIONS.append(rule)
    return rule


@functools.lru_cache(maxsize=None)
def causes() -> Dict[str, Any]:
    """cause_id -> its texts in both languages."""
    return dict(json.loads(Path(__file__).with_name("causes.json").read_text(encoding="utf-8"))["causes"])


# --- texts -----------------------------------------------------------------------------------------------------------------------


class _Lacking(Exception):
    """A text needs a value that is not known."""


class _Filled(Dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        raise _Lacking(key)


def render(hit: Hit, m: Machine, language: str) -> Finding:
    """The finding with its texts; sentences and steps whose values are not known are left out."""
    entry = causes()[hit.cause_id]
    values = _Filled({k: v for k, v in {**common_values(m), **hit.values}.items() if v not in (None, "")})
    values["addon_space"] = (
        (" " + hit.values["addon"]) if hit.cause_id == "torch_cpu_build_on_gpu_machine" and hit.values.get("addon") else ""
    )
    marks = marks_of(m) | hit.marks

    def filled(text: str) -> Optional[str]:
        try:
            return re.sub(r"\{([a-z_]+)\}", lambda found: str(values[found.group(1)]), text)
        except _Lacking:
            return None

    explanation: List[str] = []
    for sentence in entry["explain"]:
        told = filled(sentence[language])
        # Two sentences with the same beginning are one with and one without a value.
        if told and not any(told[:24] == other[:24] for other in explanation):
            explanation.append(told)
    steps: List[Tuple[str, str]] = []
    for step in entry["fix"]:
        if ("if" in step and not marks & set(step["if"])) or marks & set(step.get("not", [])):
            continue
        told, run = filled(step[language]), filled(step.get("run", ""))
        if told is not None and run is not None:
            steps.append((told, by_manager(run, m.manager)))
    return Finding(
        hit.cause_id,
        hit.severity or entry["severity"],
        round(hit.confidence, 2),
        list(dict.fromkeys(hit.evidence)) or [m.symptom.strip()[:300] or m.text.strip()[:300]],
        title=filled(entry["title"][language])
        or entry["title"][language].replace("{addon}", "the extension" if language == "en" else "该扩展"),
        explanation=(" " if language == "en" else "").join(explanation),
        fix=[told + (": " + run if run else "") for told, run in steps],
        commands=[run for _, run in steps if run],
        steps=steps,
        changes=(entry["changes"] or {}).get(language, ""),
        verify=list(entry["verify"]),
    )


def by_manager(command: str, manager: str) -> str:
    """A pip command in the words of what installed torch here: conda's packages cannot be removed by pip, a uv environment may have no pip."""
    if manager == "uv":
        command = re.sub(r"python -m pip (un)?install (-y )?", lambda found: "uv pip {}install ".format(found.group(1) or ""), command)
        return command.replace("python -m pip", "uv pip").replace("uv pip cache purge", "uv cache clean")
    if manager == "conda":
        return re.sub(r"python -m pip uninstall -y torch\b", "conda remove -y pytorch", command)
    return command


def marks_of(m: Machine) -> Set[str]:
    """What the steps of a fix may depend on."""
    low = (m.distribution or m.text).lower()
    marks = {m.system or "linux"}
    if m.system == "linux" or m.system is None:
        marks.add("dnf" if re.search(r"red hat|rhel|centos|rocky|alma|fedora|amazon linux|oracle linux", low) else "")
        marks.add("apt" if re.search(r"ubuntu|debian|mint|pop!?_os", low) and not m.wsl else "")
    for name in ("wsl", "container", "jetson", "conda"):
        marks.add(name if getattr(m, name) else "")
    amd = bool(m.amd) and not m.nvidia
    marks |= {
        "amd_windows" if amd and m.system == "windows" else "amd_linux" if amd else "",
        "intel" if any(g.vendor == "intel" for g in m.gpus) else "",
    }
    marks.add("no_gpu" if not m.gpus else "")
    marks.add("no_torch_cuda" if knowledge.cuda_of(m.likely_build) is None else "")
    return marks - {""}


def sm_text(sm: int) -> str:
    return "{}.{}".format(sm // 10, sm % 10)


def arch_name(sm: int) -> str:
    """NVIDIA's name of the generation."""
    for limit, name in (
        (50, "Kepler"),
        (60, "Maxwell"),
        (70, "Pascal"),
        (75, "Volta"),
        (80, "Turing"),
        (89, "Ampere"),
        (90, "Ada"),
        (100, "Hopper"),
    ):
        if sm < limit:
            return name
    return "Blackwell"


def recommended(m: Machine, torch: Optional[str] = None, system: Optional[str] = None) -> Tuple[str, Optional[str]]:
    """(torch version, CUDA tag) for this machine: the present release where one of its builds fits, else the newest that has one.

    Kernels, driver, Python and platform decide together. Without a known driver a build of CUDA 12 or 11 is preferred to one of 13.
    The tag is None where no GPU is known that could use one.
    """
    start = torch or (m.torch if m.torch and "dev" not in m.torch and "nv" not in m.torch and "a0" not in m.torch else None)
    releases = knowledge.releases_for_python(m.python) if m.python and len(m.python) > 1 else [e["torch"] for e in knowledge.releases()]
    releases = [r for r in releases if version(r) <= version(TORCH)[:2]]
    if not releases:  # a Python that no listed release has wheels for: the advice about it comes elsewhere
        releases = [knowledge.minor(TORCH)]
    wished = knowledge.minor(start) if start else knowledge.minor(m.torch) if m.torch else None
    order = ([wished] if wished in releases else []) + [r for r in releases if r != wished]
    sm = next((g.sm for g in m.nvidia if g.sm), None)
    driver = m.driver
    if driver is None and m.driver_cuda:
        driver = (
            (580,)
            if m.driver_cuda[0] >= 13
            else (528, 33)
            if m.driver_cuda[0] == 12
            else (452, 39)
            if m.driver_cuda[0] == 11
            else (440, 33)
        )
    if (system or m.system) == "macos":
        return patch(order[0], start), None
    system, arch = system or m.system or "linux", m.arch or "x86_64"
    for careful in (True, False):
        for release in order:
            for tag in knowledge.builds(release):
                cuda = knowledge.cuda_of(tag) or (0, 0)
                carried = knowledge.kernels(release, tag, system, arch)
                if carried is None or (sm is not None and not knowledge.runs(carried, sm)):
                    continue
                if driver is not None and knowledge.driver_runs(tag, driver, m.windows_driver) is False:
                    continue
                if driver is None and careful and cuda[0] > 12:
                    continue
                if careful and not (knowledge.release(release) or {})["cuda"][tag]["stable"]:
                    continue
                return patch(release, start), tag
    return patch(order[0], start), None


def patch(release: str, present: Optional[str]) -> str:
    """The full version of a release: the present one where it is of that release, else the last patch that is listed."""
    if present and knowledge.minor(present) == release and len(version(present)) >= 3 and "dev" not in present:
        return dotted(version(present)[:3])
    if knowledge.minor(TORCH) == release:
        return TORCH
    return next((str(e["torch"]) for e in knowledge.load()["companions"] if knowledge.minor(e["torch"]) == release), release + ".0")


def since_cuda(sm: int) -> str:
    """The first CUDA version that compiles for a compute capability (NVIDIA, CUDA toolkit release notes)."""
    for least, cuda in ((100, "12.8"), (89, "11.8"), (86, "11.1"), (80, "11.0"), (75, "10.0"), (70, "9.0"), (60, "8.0")):
        if sm >= least:
            return cuda
    return "7.0"


def install(torch: Optional[str], tag: Optional[str], m: Machine, companions: bool = True) -> str:
    """The pip command for a release and build, with the companions that this machine has or is likely to want."""
    names = ["torch==" + torch] if torch else ["torch"]
    wanted = knowledge.companions(torch)
    for name in ("torchvision", "torchaudio"):
        if companions and wanted.get(name) and (name == "torchvision" or m.installed(name) or name in m.low):
            number = wanted[name]
            names.append("{}=={}".format(name, number + (".*" if number.count(".") == 1 else "")))
    index = " --index-url {}/{}".format(INDEX, tag) if tag else ""
    return "python -m pip install " + " ".join(names) + index


def common_values(m: Machine) -> Values:
    """The values that every text may use."""
    torch, tag = recommended(m)
    gpu = next((g for g in m.gpus if g.vendor in ("nvidia", "amd")), m.gpus[0] if m.gpus else None)
    cuda = knowledge.cuda_of(m.likely_build)
    companions = knowledge.companions(m.torch) if m.torch else {}
    values: Values = {
        "torch": (m.torch or "").partition("+")[0],
        "torch_minor": knowledge.minor(m.torch) or "<release>",
        "torch_text": (m.torch or "") + ("" if not m.build or "+" in (m.torch or "") or not m.torch else " ({})".format(m.build)) or None,
        "torch_pin": "torch=={}".format(m.torch.partition("+")[0]) if m.torch else "torch",
        "torch_cuda": dotted(cuda) if cuda else None,
        "torch_cuda_major": cuda[0] if cuda else None,
        "gpu_text": gpu.name if gpu else None,
        "driver": m.driver_text,
        "driver_branch": m.driver[0] if m.driver else None,
        "driver_cuda": dotted(m.driver_cuda) if m.driver_cuda else dotted(knowledge.cuda_of_driver(m.driver) or ()) if m.driver else None,
        "python": dotted(m.python[:2]) if m.python else None,
        "tag": tag,
        "index": "{}/{}".format(INDEX, tag or "cpu"),
        "install": install(torch, tag, m),
        "install_all": install(torch, tag if m.nvidia or cuda else None, m),
        "want_tv": companions.get("torchvision"),
        "want_ta": companions.get("torchaudio"),
        "glibc_text": "glibc " + dotted(m.glibc) if m.glibc else "an older one",
        "macos": dotted(m.macos) if m.macos else None,
        "pip_what": m.asked[0] if m.asked else "torch=={}".format(m.torch) if m.torch else "torch",
    }
    for name in ("numpy", "torchvision", "torchaudio", "bitsandbytes", "mkl"):
        package = m.installed(name)
        values[name] = package.version if package else None
    if gpu and gpu.sm:
        values.update(sm=sm_text(gpu.sm), smtag="sm_{}".format(gpu.sm), since_cuda=since_cuda(gpu.sm), arch_name=arch_name(gpu.sm))
    if gpu and gpu.gfx:
        values["gfx"] = "gfx" + gpu.gfx
    return values
