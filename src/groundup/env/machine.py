"""A machine as the doctor sees it, read from any text: a collect_env report, ours, nvidia-smi, pip or conda lists, a traceback, an issue.

Texts come truncated, translated, in any order and with chat between the lines, so nothing here expects a format: each fact is looked
for by the several ways in which it is written, the surest first, and stays None where no line says it. `seen` keeps the line that each
fact was read from.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

from groundup.env import knowledge
from groundup.env.knowledge import Version, version

MAX_CHARACTERS = 60_000  # of each end, about what an issue can hold; of what is between, the lines that tell of errors
_MAX_LINE = 2_000
_MAX_BYTES = 4_000_000  # of the start, and a fourth of it of the end: more is not even decoded
# A sentence that goes on in the next line, as wrapped prose does and lists do not.
_PROSE = re.compile(r"(?<=[a-z,])\n(?=[a-z]+[.,]? [a-z]+ |[a-z]+\. )")
_TELLING = re.compile(
    r"^[^\n]{0,400}(?:error|cannot|undefined|fatal|exception|no such|not found|failed|version)[^\n]{0,400}$", re.IGNORECASE | re.MULTILINE
)

_PLAIN = str.maketrans(
    {"\u00a0": " ", "‘": "'", "’": "'", "“": '"', "”": '"', "\u200b": None}
)  # what chat programs make of quotes and spaces
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07")
_NUMBER = r"\d+(?:\.\d+)+"
_TORCH = r"\d+\.\d+(?:\.\d+)?(?:(?:\.?dev|a|b|rc|\.post)\d+)?(?:\+[0-9a-z]+(?:\.[0-9a-z]+)*)?"


@dataclass
class Gpu:
    """One GPU: `sm` is the compute capability without the dot, `gfx` AMD's target."""

    name: str
    vendor: str
    sm: Optional[int] = None
    gfx: Optional[str] = None


@dataclass
class Package:
    """One installed distribution; `source` is 'pip' or 'conda' where the list tells."""

    version: str
    source: Optional[str] = None
    build: Optional[str] = None


@dataclass
class Machine:
    """What a text says about a machine. None and empty mean: not said.

    Args:
        system: 'linux', 'windows' or 'macos'; arch: 'x86_64' or 'aarch64'.
        torch: the installed version with its local part; build: its tag ('cpu', 'cu126', 'rocm6.3', 'xpu').
        cuda_available: what torch answered.
        driver_cuda: the newest CUDA that the driver supports, (major, minor).
        toolkit: versions of the CUDA toolkits that are named (nvcc, CUDA_HOME).
        asked: requirements that an installer was given, such as 'torch==2.6.0'.
        offered: the versions that pip says it found instead.
        symptom: what the user calls the problem; part of `text` too.
    """

    text: str = ""
    symptom: str = ""
    truncated: bool = False
    lines: List[str] = field(default_factory=list)
    system: Optional[str] = None
    distribution: Optional[str] = None
    arch: Optional[str] = None
    wsl: bool = False
    container: bool = False
    jetson: bool = False
    libc: Optional[str] = None
    glibc: Optional[Version] = None
    macos: Optional[Version] = None
    python: Optional[Version] = None
    conda: bool = False
    torch: Optional[str] = None
    build: Optional[str] = None
    cuda_available: Optional[bool] = None
    gpus: List[Gpu] = field(default_factory=list)
    driver: Optional[Version] = None
    driver_text: Optional[str] = None
    driver_cuda: Optional[Version] = None
    toolkit: List[Version] = field(default_factory=list)
    packages: Dict[str, List[Package]] = field(default_factory=dict)
    variables: Dict[str, str] = field(default_factory=dict)
    asked: List[str] = field(default_factory=list)
    offered: Optional[List[str]] = None
    seen: Dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def low(self) -> str:
        return self.text.lower()

    @property
    def likely_build(self) -> Optional[str]:
        """The build, or where no text names it the one that the default package index has for this platform."""
        if self.build or not self.torch or "dev" in self.torch or "+" in self.torch or self.jetson or self.manager == "conda":
            return self.build
        entry = knowledge.release(self.torch)
        if entry is None or self.system == "macos":
            return None
        return "cpu" if self.system == "windows" or self.arch == "aarch64" else str(entry["default_linux"])

    @property
    def manager(self) -> str:
        """What installed torch here: 'pip', 'uv' or 'conda'."""
        torch = self.installed("torch")
        if torch and torch.source == "conda":
            return "conda"
        return "uv" if re.search(r"\buv (?:pip|add|sync|run|venv)\b|installer\W+uv\b", self.low) else "pip"

    @property
    def windows_driver(self) -> bool:
        """Whether the NVIDIA driver is a Windows one: its numbers differ from Linux's."""
        return self.system == "windows" or self.wsl

    @property
    def nvidia(self) -> List[Gpu]:
        return [gpu for gpu in self.gpus if gpu.vendor == "nvidia"]

    @property
    def amd(self) -> List[Gpu]:
        return [gpu for gpu in self.gpus if gpu.vendor == "amd"]

    def find(self, pattern: str, flags: int = re.IGNORECASE) -> Optional["re.Match[str]"]:
        return re.search(pattern, self.text, flags)

    def evidence(self, pattern: str, most: int = 3) -> List[str]:
        """The lines that a pattern occurs in, without repeats."""
        compiled = re.compile(pattern, re.IGNORECASE)
        found: List[str] = []
        for line in self.lines:
            if compiled.search(line) and line.strip()[:300] not in found:
                found.append(line.strip()[:300])
                if len(found) == most:
                    break
        return found

    def installed(self, name: str) -> Optional[Package]:
        """The distribution of that name, the first listed."""
        return next(iter(self.packages.get(name, [])), None)


# --- reading ---------------------------------------------------------------------------------------------------------------------


def decode(raw: bytes) -> str:
    """Bytes of any kind as text: a byte order mark or zero bytes tell UTF-16, UTF-8 comes next, then GB18030; what is none becomes marks."""
    if len(raw) > _MAX_BYTES * 5 // 4:
        raw = raw[:_MAX_BYTES] + b"\n...\n" + raw[-_MAX_BYTES // 4 :]
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16", "replace")
    head = raw[:2000]
    if len(head) > 20 and head[1::2].count(0) > 0.6 * len(head[1::2]):
        return raw.decode("utf-16-le", "replace")
    if len(head) > 20 and head[0::2].count(0) > 0.6 * len(head[0::2]):
        return raw.decode("utf-16-be", "replace")
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("utf-8", "replace")


def clean(text: str) -> Tuple[str, bool]:
    """Without colours and control characters, in lines of bounded length; whether the middle was left out."""
    truncated = len(text) > 2 * MAX_CHARACTERS
    if truncated:
        between = text[MAX_CHARACTERS : min(len(text) - MAX_CHARACTERS, 30 * MAX_CHARACTERS)]
        told = dict.fromkeys(found.group(0) for found in itertools.islice(_TELLING.finditer(between), 2000))
        text = "\n".join([text[:MAX_CHARACTERS], *told, text[-MAX_CHARACTERS:]])[: 3 * MAX_CHARACTERS]
    text = _ANSI.sub("", text) if "\x1b" in text else text
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "").translate(_PLAIN)
    text = _PROSE.sub(" ", text)
    return "\n".join(line[:_MAX_LINE] for line in text.split("\n")), truncated


def read(report: str, symptom: str = "") -> Machine:
    """The machine that a report and a symptom tell of; never raises on any text."""
    cleaned, truncated = clean(report)
    symptom = clean(symptom)[0]
    m = Machine(text=(cleaned + "\n" + symptom).strip("\n"), symptom=symptom, truncated=truncated)
    m.lines = m.text.split("\n")
    _system(m)
    _python(m)
    _packages(m)
    _torch(m)
    _accelerators(m)
    _driver(m)
    _requirements(m)
    for name, value in re.findall(
        r"\b(CUDA_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES|LD_LIBRARY_PATH|CUDA_HOME|CUDA_PATH|PYTHONPATH|HSA_OVERRIDE_GFX_VERSION|TMPDIR|LD_PRELOAD|"
        r"TORCH_CUDA_ARCH_LIST|KMP_DUPLICATE_LIB_OK|BNB_CUDA_VERSION)\b['\"\]]*\s*[=:]\s*(['\"]?[^\s'\",;)]*)",
        m.text,
    ):
        m.variables.setdefault(name, value.strip("'\""))
    echoed = re.search(r"echo \$\{?CUDA_VISIBLE_DEVICES\}?\s*\n+\s*(-?\d[\d,]*)\s*$", m.text, re.MULTILINE)
    if echoed:
        m.variables["CUDA_VISIBLE_DEVICES"] = echoed.group(1)
    return m


def _first(m: Machine, fact: str, patterns: Iterable[str]) -> Optional[str]:
    """The first group of the first pattern that hits, and its line kept as evidence."""
    for pattern in patterns:
        found = re.search(pattern, m.text, re.IGNORECASE | re.MULTILINE)
        if found:
            start = m.text.rfind("\n", 0, found.start(1)) + 1
            end = m.text.find("\n", found.end(1))
            m.seen[fact] = m.text[start : end if end >= 0 else None].strip()[:300]
            return found.group(1).strip()
    return None


def _system(m: Machine) -> None:
    stated = _first(
        m,
        "system",
        (
            r"^\W*(?:OS|Os|Operating System|System|Platform|Python platform|操作系统|系统)\W*?\s*[:：]\s*(\S.*)$",
            r"^\W*(?:os)\W*(ubuntu.*|windows.*|mac ?os.*|debian.*|centos.*|fedora.*)$",
        ),
    )
    low = m.low
    for source in (stated.lower() if stated else "", low):
        if re.search(r"\bwsl\s?2?\b|microsoft-standard", source):
            m.system, m.wsl = "linux", True
        elif re.search(r"windows|\bwin(?:32|10|11|64|_amd64)\b|\bwin-64\b", source):
            m.system = "windows"
        elif re.search(r"mac ?os|darwin|os ?x\b|\bmacbook|\bi?mac\b(?! addr)", source):
            m.system = "macos"
        elif re.search(r"linux|ubuntu|debian|centos|fedora|red hat|\brhel\b|rocky|arch\b|suse|alpine|jetson|manjaro|colab|kaggle", source):
            m.system = "linux"
        if m.system:
            break
    if m.system is None or (m.system == "windows" and not stated):
        if re.search(r"[a-z]:\\\\?(?:users|program|windows|python)|\.dll\b|winerror|powershell|msc v\.", low):
            m.system = "windows"
        elif re.search(r"\.dylib|/opt/homebrew|/library/frameworks|macosx_", low):
            m.system = "macos"
        elif re.search(r"\.so\b|/usr/lib|/home/|apt(?:-get)? |manylinux|nvidia-smi|/dev/shm", low):
            m.system = m.system or "linux"
    m.wsl = m.wsl or bool(re.search(r"\bwsl\s?2?\b|microsoft-standard|/usr/lib/wsl", low) and m.system != "windows")
    if re.search(r"\bwsl ?2?\b", low) and m.system == "windows" and re.search(r"libcuda|ubuntu|/usr/|\.so\b|linux", low):
        m.system, m.wsl = "linux", True
    if re.search(r"aarch64|\barm64\b|apple silicon|\bgh200\b|\bgb200\b|\bgb10\b|grace|jetson|tegra", low):
        m.arch = "aarch64"
    if re.search(r"x86_64|\bamd64\b|win_amd64|x64\b|intel mac|intel\(r\)|genuineintel|authenticamd", low) and not (
        m.arch == "aarch64" and re.search(r"aarch64|jetson|tegra", low)
    ):
        m.arch = m.arch if m.arch == "aarch64" and m.system == "macos" and "rosetta" not in low and "x86_64" not in low else "x86_64"
    if m.system == "macos" and re.search(r"macosx_\d+_\d+_x86_64|x86_64-i386|intel[- ]based mac|intel mac|mac[^\n]{0,30}\bintel\b", low):
        m.arch = "x86_64"
    m.jetson = bool(re.search(r"jetson|tegra|jetpack|\bl4t\b|\borin\b|xavier(?! )|nvgpu", low))
    if m.jetson:
        m.system, m.arch = "linux", "aarch64"
    m.container = bool(
        re.search(
            r"\bdocker|\bcontainer\b|containerd|podman|kubernetes|\bk8s\b|\bpods?\b|singularity|apptainer|\bcompose\b|runpod|nvcr\.io|容器|-(?:devel|runtime)-(?:ubuntu|debian)|cudnn\d?-(?:devel|runtime)",
            low,
        )
    )
    m.conda = bool(re.search(r"conda", low))
    libc = _first(
        m,
        "glibc",
        (
            r"libc version\W*\s*[:：]\s*glibc[- ](\d+\.\d+)",
            r"\bglibc[- =]*v?(\d+\.\d+)\b",
            r"\bldd \(.*\) (\d+\.\d+)",
            r"with-glibc(\d+\.\d+)",
        ),
    )
    m.glibc = version(libc) or None if libc else None
    if m.glibc and m.glibc < (2, 5):
        m.glibc = None  # 'glibc-2.2.5' is the symbol version that an old collect_env prints, not the library's
    if re.search(r"\bmusl\b|\balpine\b", low):
        m.libc = "musl"
    if m.system == "macos":
        found = _first(
            m, "macos", (r"mac ?os(?: \w+)?[ -]+(\d+(?:\.\d+)*)", r"darwin.*?macos (\d+(?:\.\d+)*)", r"mac os x (\d+(?:\.\d+)*)")
        )
        m.macos = version(found) or None if found else None
    elif m.glibc is None and m.system == "linux":
        # The C library of the releases that people name instead of it.
        for name, number in (("ubuntu 14.04", (2, 19)), ("ubuntu 16.04", (2, 23)), ("ubuntu 18.04", (2, 27)), ("ubuntu 20.04", (2, 31)),
                             ("ubuntu 22.04", (2, 35)), ("ubuntu 24.04", (2, 39)), ("centos 7", (2, 17)), ("centos linux 7", (2, 17)), ("rhel 7", (2, 17)),
                             ("centos 8", (2, 28)), ("debian 10", (2, 28)), ("debian 11", (2, 31)), ("debian 12", (2, 36))):  # fmt: skip
            if name in low:
                m.glibc, m.seen["glibc"] = number, (m.evidence(re.escape(name), 1) or [name])[0]
                break
    m.distribution = stated


def _python(m: Machine) -> None:
    found = _first(
        m,
        "python",
        (
            rf"python ?(?:version|版本)\W*?\s*[:：=]?\s*v?({_NUMBER})",
            rf"^\W*python\W{{0,6}}\s*[:：=]?\s*v?({_NUMBER})",
            r"\(you have (\d\.\d+(?:\.\d+)?)\)",
            r"[-_]cp(3\d{1,2})[-_]",
            rf"\bpython[ =@-]*v?(3{_NUMBER[1:]}|3\.\d+)\b",
            r"python(3\.\d+)/(?:site|dist)-packages",
            r"[\\/]python(3\d{1,2})[\\/]",
            r"\bpy(?:thon)? ?(3\.\d+)\b",
            r"cpython-(3\d{1,2})-",
        ),
    )
    if found:
        numbers = version(found)
        if len(numbers) == 1 and 30 < numbers[0] < 400:
            numbers = (3, int(found[1:]))
        m.python = numbers


_NAMES = (
    r"torch|pytorch|torchvision|torchaudio|torchtext|torchdata|triton|pytorch-triton(?:-rocm)?|triton-windows|numpy|xformers|flash[-_]attn|bitsandbytes|"
    r"vllm|deepspeed|nvidia-[a-z0-9-]+|mkl|intel-openmp|pytorch-cuda|pytorch-nightly|cpuonly|pytorch-mutex|cudatoolkit|cuda-version|pyg[-_]lib|torch[-_]scatter|torch[-_]sparse|"
    r"torch[-_]cluster|apex|transformers|accelerate|peft|onnxruntime(?:-gpu)?|tensorflow(?:-gpu)?|ctranslate2|faster-whisper|libtorch|nccl|cudnn|sgl[-_]kernel|torchao"
)
_LISTED = re.compile(
    rf"^\s*(?:[-*+]\s+)?(?:\[(pip3?|conda)\]\s*)?[`'\"]?({_NAMES})[`'\"]?(?:==|[ \t]+|[ \t]*[:=][ \t]*|-)v?({_TORCH}|\d[\w.+]*)(?:[ \t]+([\w.+<>-]+))?(?:[ \t]+([\w./:-]+))?[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
_SHOWN = re.compile(rf"^Name:\s*({_NAMES})\s*\n(?:.*\n){{0,2}}?Version:\s*(\S+)", re.IGNORECASE | re.MULTILINE)


def _packages(m: Machine) -> None:
    def add(name: str, number: str, source: Optional[str], build: Optional[str]) -> None:
        name = name.lower().replace("_", "-")
        name = {"pytorch": "torch", "pytorch-nightly": "torch"}.get(name, name)
        entry = Package(number.rstrip(".,"), source, build)
        entries = m.packages.setdefault(name, [])
        if all((e.version, e.source) != (entry.version, entry.source) for e in entries):
            entries.append(entry)

    for tag, name, number, build, channel in _LISTED.findall(m.text):
        source = {"pip": "pip", "pip3": "pip", "conda": "conda"}.get(tag.lower()) if tag else None
        if build == "<pip>" or (source == "conda" and "pypi" in (build, channel)):
            source = "pip"
        elif source is None and (channel or re.search(r"py3|cuda|cpu_|h[0-9a-f]{7}", build or "")):
            source = "pip" if "pypi" in (build, channel) else "conda"
        add(name, number, source, build or None)
    for number in re.findall(r"\btorch-(\d[\w.+]*)\.dist-info", m.text):
        add("torch", number, None, None)
    for name, number in _SHOWN.findall(m.text):
        add(name, number, "pip", None)


def _torch(m: Machine) -> None:
    found = _first(
        m,
        "torch",
        (
            rf"^\W*pytorch version\W*?(?:\(GPU\?\))?\s*[:：]?\s*({_TORCH})",
            rf"\(you have ({_TORCH})\)",
            rf"torch\.__version__\W*\s*(?:[:=>]|->)*\s*['\"]?({_TORCH})",
            rf"torch\.version\W{{1,5}}({_TORCH})",
        ),
    )
    listed = m.installed("torch")
    if found is None and listed:
        found, m.seen["torch"] = listed.version, (m.evidence(rf"torch.*{re.escape(listed.version)}", 1) or [listed.version])[0]
    if found is None:
        found = _first(
            m,
            "torch",
            (
                rf"(?:py)?torch(?: ?version| 版本)?\W{{0,4}}\s*[:：=]\s*(?:torch)?\W?v?({_TORCH})",
                rf"(?:py)?torch(?: ?version)?\s+(?:is|was|version|v)\s*v?({_TORCH})",
                rf"(?:py)?torch version \(e\.g\.[^)]*\)\s*[:：]\s*({_TORCH})",
                rf"installed (?:version |torch==|torch )\W?({_TORCH})",
                rf"you have torch\W+({_TORCH})",
                rf"(?<!install )(?<!requires )(?<!for )\b(?:py)?torch[ =]{{1,3}}v?({_TORCH})(?!\S*\.whl)",
                rf"\btorch-({_TORCH})-cp3",
                r"\bpytorch[:/](\d+\.\d+\.\d+)",
                rf"\btorch ?({_TORCH})",
            ),
        )
    m.torch = found
    cuda = _first(
        m,
        "build",
        (
            r"cuda used to build pytorch\W*\s*[:：]?\s*(\S[^\n]*)",
            r"pytorch has cuda version[ :=]*(\d+\.\d+)",
            r"torch\.version\.cuda\W*\s*(?:[:=>]|->)*\s*['\"]?(\d+\.\d+|none)",
        ),
    )
    rocm = re.search(r"rocm used to build pytorch\W*\s*[:：]?\s*(\d+\.\d+(?:\.\d+)?)", m.low)
    local = (found or "").partition("+")[2]
    if re.match(r"(?:cu\d{2,3}|cpu|rocm[\d.]+|xpu)", local):
        m.build = re.match(r"(?:cu\d{2,3}|cpu|rocm[\d.]+|xpu)", local).group(0)  # type: ignore[union-attr]
    elif rocm:
        m.build = "rocm" + rocm.group(1)
    elif cuda and re.match(r"\d", cuda):
        m.build = knowledge.tag_of(cuda)
    elif cuda and re.match(r"none|could not collect|n/?a|-", cuda.lower()) and (found or "version.cuda" in m.seen.get("build", "")):
        m.build = "cpu"
    elif listed and listed.build:
        conda = re.search(r"cuda(\d+)\.?(\d)", listed.build) or re.search(r"cuda_?(\d{2})(\d)", listed.build)
        m.build = "cpu" if "cpu" in listed.build else "cu{}{}".format(*conda.groups()) if conda else None
    if m.build is None and found and not local and "dev" not in found:
        # 'torch 2.7 with cuda 12.8': a CUDA version that this release has a build of, in a line that is not about driver or toolkit.
        for line in m.lines:
            stated = re.search(r"\bcuda(?:/cudnn)?(?: version)?\W{0,6}(\d{1,2}\.\d)\b", line, re.IGNORECASE)
            if (
                stated
                and knowledge.tag_of(stated.group(1)) in knowledge.builds(found)
                and not re.search(r"driver|smi|nvcc|toolkit|\|", line, re.IGNORECASE)
            ):
                m.build = knowledge.tag_of(stated.group(1))
                break
    patterns = (
        r"is cuda available\W*?\s*[:：]\s*(true|false|yes|no)\b",
        r"torch\.cuda\.is_available\(\)[\s\S]{0,25}?(?<![a-z])(true|false)(?![a-z])",
        r"cuda[ _]available\W*?\s*[:：=]\s*(true|false|yes|no)\b",
        r"pytorch version \(gpu\?\)\W*\s*\S+ \((true|false)\)",
        r"\bgpu available\W*?\s*[:：]\s*(true|false)",
    )
    of_symptom = next((found for found in (re.search(p, m.symptom, re.IGNORECASE) for p in patterns) if found), None)
    available = of_symptom.group(1) if of_symptom else _first(m, "cuda_available", patterns)  # what is complained of counts first
    if available:
        m.cuda_available = available.lower() in ("true", "yes")


_SHORT = r"A2|A10|A16|A30|A40|L4|L20|T4|P4|P40|K10|K20|K40|K80|M4|M40|M60|H20|T400|T600|T1000|T1200"
_NVIDIA = re.compile(
    r"(?:nvidia\s+)?(?:geforce\s+)?\b(?:rtx\s*pro\s*\d{4}(?:\s*blackwell)?|(?:rtx|gtx|gt)\s*-?(?:titan\s*\w*|[a-z]?\d{3,4}))(?:\s*(?:ti|super|ada|d|laptop gpu|max-q)\b)*"
    r"|(?:nvidia\s+)?\btitan\s+(?:rtx|xp|v|x)\b(?:\s*\(pascal\))?"
    r"|\bquadro\s+[a-z]{0,3}\s?\d{3,4}\b"
    r"|(?:nvidia\s+|tesla\s+|dgx\s+(?:station\s+)?)?\b(?:a100|a800|h100|h200|h800|b100|b200|b300|gb200|gb300|gh200|gb10|v100s?|p100|l40s?|a10g|k80)\b[\w-]*"
    rf"|(?:nvidia|tesla|gpu\s*\d*\s*:?)\s+(?:tesla\s+)?(?:{_SHORT})\b"
    r"|\bjetson\s+(?:agx\s+|orin\s+|xavier\s+)?\w+(?:\s+\w+)?|\borin\b(?:\s*\(nvgpu\))?|\bdgx spark\b"
    r"|(?:geforce\s+)?\bmx\s?\d{3}\b|\b(?:nvidia|geforce)\s+(?:rtx\s+)?\d{4}(?:\s*ti)?\b|\b(?:50[5-9]0|40[6-9]0|30[5-9]0|20[678]0|10[678]0)(?:\s?ti)?\b(?=.{0,20}\b(?:gpu|graphics|card|显卡))|(?<=\bmy )(?:50[5-9]0|40[6-9]0|30[5-9]0)\b|(?<=\ba )(?:50[5-9]0|40[6-9]0|30[5-9]0)\b",
    re.IGNORECASE,
)
_AMD = re.compile(
    r"(?:amd\s+)?(?:radeon|instinct)\s+(?:pro\s+|graphics\s+|\(tm\)\s+)*(?:rx\s*)?(?:vega\s*\d*|vii|\w*\d{2,4}\w*)(?:\s*(?:xtx|xt|gre|m)\b)?|\brx\s?-?\d{3,4}(?:\s*(?:xtx|xt|gre|m)\b)?"
    r"|\bmi\s?\d{2,3}[ax]?\b|\bstrix (?:halo|point)\b|\b(?:8060s|8050s|890m|780m|760m|680m)\b|\bamd\b[^\n]{0,20}\b(?:gpu|igpu|apu)\b",
    re.IGNORECASE,
)


def _accelerators(m: Machine) -> None:
    names: Dict[str, Gpu] = {}
    for found in _NVIDIA.finditer(m.text):
        name = re.sub(r"\s+", " ", found.group(0)).strip()
        sm = knowledge.sm_of(name)
        key = re.sub(r"nvidia |geforce |tesla |[- ]", "", name.lower())
        if key not in names and (sm is not None or "nvidia" in name.lower()):
            names[key] = Gpu(name, "nvidia", sm)
            m.seen.setdefault("gpu", m.text[m.text.rfind("\n", 0, found.start()) + 1 :].split("\n", 1)[0].strip()[:300])
    stated = re.search(
        r"with cuda capability sm_(\d{2,3})|(?:of cuda capability|compute capability|计算能力|capability)\W{0,4}(?:is |of )?(\d{1,2})\.(\d)\b(?!\s*or|\+|\s*and (?:above|higher|newer))|\bgpu\b[^\n]{0,40}\bsm_(\d{2,3})\b",
        m.low,
    )
    if stated and not re.search(
        r"(?:minimum|at least|requires?|>=|supports?)\W+(?:\w+\W+){0,6}$", m.low[max(0, stated.start() - 60) : stated.start()]
    ):
        sm = int(stated.group(1) or stated.group(4) or "{}{}".format(stated.group(2), stated.group(3)))
        if 30 <= sm < 130:
            if len(names) == 1:
                next(iter(names.values())).sm = sm
            elif not names:
                names["?"] = Gpu("compute capability {}.{}".format(sm // 10, sm % 10), "nvidia", sm)
    gfx = list(re.findall(r"\bgfx([0-9]{3,4}[a-f]?|90a|90c)\b", m.low))
    for found in _AMD.finditer(m.text):
        name = re.sub(r"\s+", " ", found.group(0)).strip()
        key = re.sub(r"amd |radeon |[- ]", "", name.lower())
        if key not in names and not re.search(r"ryzen|epyc", name.lower()):
            names[key] = Gpu(name, "amd", None, knowledge.gfx_of(name) or (gfx[0] if gfx else None))
    if gfx and not any(g.vendor == "amd" for g in names.values()):
        names["gfx" + gfx[0]] = Gpu("gfx" + gfx[0], "amd", None, gfx[0])
    if re.search(r"\bintel\b[^\n]{0,30}\b(?:arc|iris|uhd|graphics|xe|gpu)\b|\barc\W{0,5}(?:a[357]\d0|b[57]\d0)\b", m.low):
        names["intel"] = Gpu("Intel GPU", "intel")
    if m.system == "macos" and re.search(r"apple silicon|apple m[1-5]|\bm[1-5](?: (?:pro|max|ultra))?\b|arm64", m.low):
        names["apple"] = Gpu("Apple GPU", "apple")
    m.gpus = list(names.values())


def _driver(m: Machine) -> None:
    found = _first(
        m,
        "driver",
        (
            r"nvidia driver version\W*\s*[:：]\s*(\d{3}\.\d+(?:\.\d+)?)",
            r"driver version\W*\s*[:：]?\s*(\d{3}\.\d+(?:\.\d+)?)",
            r"nvidia-smi\W+(\d{3}\.\d+(?:\.\d+)?)",
            r"(?:driver|驱动)[^\n\d]{0,30}?v?(\d{3}\.\d+(?:\.\d+)?)\b",
            r"\bnvidia[- ](?:driver[- ]|kernel module[^\n\d]{0,20})(\d{3}(?:\.\d+)*)\b",
            r"kernel module\W+(\d{3}\.\d+(?:\.\d+)?)",
            r"(?:driver|驱动)[^\n\d]{0,20}?\b([3-6]\d{2})\b(?!\.\d*\s*(?:mb|gb))",
        ),
    )
    if found:
        m.driver, m.driver_text = version(found), found
    number = re.search(r"found version (\d{4,5})\b", m.low)
    if number:
        value = int(number.group(1))
        m.driver_cuda = (value // 1000, value % 1000 // 10)
    else:
        smi = re.search(r"cuda version\W*\s*[:：]\s*(\d{1,2}\.\d)\b", m.text) if "NVIDIA-SMI" in m.text else None
        smi = smi or re.search(r"NVIDIA-SMI.{0,200}?CUDA Version\W*\s*[:：]\s*(\d{1,2}\.\d)", m.text, re.DOTALL)
        smi = smi or re.search(r"cuda version\W*(\d{1,2}\.\d)\W*\(?driver|cuda driver\W*\s*[:：]\s*(\d{1,2}\.\d)", m.low)
        if smi:
            m.driver_cuda = version(next(g for g in smi.groups() if g))
    for pattern in (
        r"release (\d{1,2}\.\d),",
        r"nvcc(?: version|:|\W+--version)[^\d\n]{0,40}(\d{1,2}\.\d)",
        r"cuda runtime version\W*\s*[:：]\s*(\d{1,2}\.\d)",
        r"/usr/local/cuda-(\d{1,2}\.\d)",
        r"cuda[\\/]+v(\d{1,2}\.\d)",
        r"detected cuda version \((\d{1,2}\.\d)\)",
        r"cuda[- ]?toolkit\W{0,3}\s*(?:version)?\W*(\d{1,2}\.\d)",
    ):
        for value in re.findall(pattern, m.low):
            if version(value) not in m.toolkit:
                m.toolkit.append(version(value))


def _requirements(m: Machine) -> None:
    for found in re.findall(
        r"(?:requirement|distribution found for|satisfies the requirement|package|install(?:ing)?|collecting|requires)\s+['\"]?((?:py)?torch(?:vision|audio)?\s*(?:[=<>~!]=|===)\s*[^\s'\",;()\]]+)",
        m.text,
        re.IGNORECASE,
    ):
        m.asked.append(re.sub(r"\s", "", found))
    for found in re.findall(r"\b(torch(?:vision|audio)?==[^\s'\",;()\]]+)", m.text):
        if found not in m.asked and re.search(
            r"(?:install|requires|requirement|distribution)[^\n]*" + re.escape(found), m.text, re.IGNORECASE
        ):
            m.asked.append(found)
    listed = re.search(r"from versions:\s*([^)\n]*)\)?", m.text)
    if listed:
        m.offered = [] if listed.group(1).strip().lower() == "none" else [v.strip() for v in listed.group(1).split(",") if v.strip()]


def from_facts(facts: Mapping[str, Any], report: str, symptom: str = "") -> Machine:
    """A machine from the facts of `probe.facts()`, with its own text report as the text that rules look for signs in."""
    m = read(report, symptom)
    system = facts["os"]
    m.system = {"Darwin": "macos"}.get(system["system"], str(system["system"]).lower())
    m.arch, m.wsl, m.jetson = system["machine"], bool(system["wsl"]), bool(system["jetson"])
    m.container = bool(system["container"])
    m.python = version(facts["python"]["version"])
    m.conda = facts["python"]["environment"] == "conda"
    found = re.match(r"glibc (\d+\.\d+)", system["libc"] or "")
    m.glibc, m.libc = version(found.group(1)) if found else None, "musl" if system["libc"] == "musl" else None
    nvidia, amd, apple = facts["nvidia"], facts["amd"], facts["apple"]
    m.gpus = [
        Gpu(g["name"], "nvidia", int(g["compute_capability"].replace(".", "")) if g["compute_capability"] else knowledge.sm_of(g["name"]))
        for g in nvidia["gpus"]
    ]
    m.gpus += [Gpu("AMD " + g, "amd", None, g.replace("gfx", "")) for g in amd["gfx"]]
    m.driver, m.driver_text = version(nvidia["driver"]) or None, nvidia["driver"]
    m.macos = version(apple["macos"]) or None
    torch = facts["torch"]
    m.torch = torch["version"] if torch else None
    m.build = None
    if torch:
        local = str(torch["version"]).partition("+")[2]
        m.build = local or knowledge.tag_of(torch.get("cuda")) or ("rocm" + str(torch["hip"]) if torch.get("hip") else "cpu")
    return m
