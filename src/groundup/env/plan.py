"""Which torch to install here, why, and by which commands: facts in, Plan out, no side effects.

The kernels inside a wheel, the driver, Python, the C library and the platform decide together. Deciding from the driver alone, as
most tools do, gives a Pascal card with a new driver a CUDA 13 build that has no kernels for it. Every number comes from `knowledge`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from groundup.env import knowledge
from groundup.env.constraints import (
    COMPANIONS,
    Candidate,
    Constraint,
    Target,
    capability_text,
    described,
    intel_gpus,
    joined,
    machine_refusal,
    plain,
)
from groundup.env.knowledge import dotted, version
from groundup.env.language import Text, pick, text
from groundup.env.layout import columns, shown, wrapped

if TYPE_CHECKING:
    import argparse

TORCH = "2.13.0"  # what groundup is tested with: the first choice
OLDEST = "2.10"  # what groundup needs; a plan for torch alone may be older
WHEEL_INDEX = "https://download.pytorch.org/whl"
MANAGERS = ("pip", "uv", "conda")
_CONDA_TORCH = ("pytorch", "pytorch-gpu", "pytorch-cpu", "libtorch")

# Room for torch, its libraries and groundup's other dependencies, with pip's temporary copies.
DISK_GB = {"cpu": 2.5, "mps": 2.5, "cu": 8.0, "rocm": 18.0, "xpu": 8.0}


@dataclass(frozen=True)
class Change:
    """What happens to one distribution; `before` None: it is not there yet."""

    name: str
    before: Optional[str]
    after: str

    @property
    def action(self) -> str:
        """'install', 'keep' or 'replace'."""
        return "install" if self.before is None else "keep" if same_version(self.before, self.after) else "replace"


@dataclass(frozen=True)
class Alternative:
    """Another way, with its commands where there are any."""

    says: Text
    commands: Tuple[Tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Plan:
    """What to install, why, and how. When `refused` is set, nothing fits as asked.

    `device` is what torch must then be able to compute on. `pip_args` follow `pip install`. `pip_args_without_index` are for the
    case that PyTorch's own wheel index does not answer; None: there is no other source. `uninstall` goes first when the commands
    are typed; `install` leaves that to pip, which removes the old one only when the new one is there. `disk_gb` in 10^9 bytes.
    """

    backend: str
    torch_version: str
    reason: Text
    pip_args: Tuple[str, ...] = ()
    refused: Optional[Text] = None
    device: str = "cpu"
    disk_gb: float = 0.0
    index_url: Optional[str] = None
    pip_args_without_index: Optional[Tuple[str, ...]] = None
    manager: str = "pip"
    constraints: Tuple[Constraint, ...] = ()
    changes: Tuple[Change, ...] = ()
    uninstall: Tuple[str, ...] = ()
    commands: Tuple[Tuple[str, ...], ...] = ()
    notes: Tuple[Text, ...] = ()
    alternatives: Tuple[Alternative, ...] = ()
    windows: bool = False

    def fits(self, installed: Optional[Mapping[str, Any]]) -> bool:
        """True when the torch already there (see `probe.installed_torch`) is the planned version and build."""
        if installed is None:
            return False
        number, _, build = str(installed["version"]).partition("+")
        if self.backend in ("cpu", "mps"):
            # What the default index gave is right for the CPU, even where (on Linux) that is a CUDA build.
            build = str(installed.get("distribution", installed["version"])).partition("+")[2]
            return number == self.torch_version and build in ("", "cpu")
        return number == self.torch_version and build == self.backend


# --- choosing --------------------------------------------------------------------------------------------------------------------


def backends(oldest: Optional[str] = None) -> List[str]:
    """Every build that the table knows, in releases from `oldest` on."""
    known = [entry["torch"] for entry in knowledge.releases() if version(entry["torch"]) >= version(oldest)]
    cuda = {tag for torch in known for tag in knowledge.builds(torch)}
    rocm = {tag for torch in known for tag in knowledge.rocm_builds(torch)}
    newest_first = sorted(cuda, key=lambda tag: knowledge.cuda_of(tag) or (), reverse=True)
    return ["cpu", *newest_first, *sorted(rocm, key=lambda tag: version(tag[4:]), reverse=True), "mps", "xpu"]


def _builds(host: Target, torch: str, backend: str) -> List[str]:
    """Builds of a release in the order of preference; 'auto' leaves out those for GPUs that are not here."""
    known = torch if knowledge.release(torch) else knowledge.releases()[0]["torch"]
    cuda = sorted(knowledge.builds(known), key=lambda tag: not knowledge.is_stable(known, tag))
    # 'auto' takes no ROCm build whose targets are not known.
    rocm = [tag for tag in knowledge.rocm_builds(known) if backend != "auto" or knowledge.rocm_gfx(tag[4:])]
    if backend != "auto":
        return [backend] if backend in ("cpu", "mps", "xpu", *cuda, *rocm) else []
    mac = host.system == "Darwin" and host.machine == "aarch64" and knowledge.mps_minimum(known)
    return [*(cuda if host.gpus else ()), *(rocm if host.gfx else ()), *(["mps"] if mac else ()), "cpu"]


def _candidates(host: Target, releases: Sequence[str], backend: str) -> Iterator[List[Candidate]]:
    for torch in releases:
        yield [Candidate(host, torch, build) for build in _builds(host, torch, backend)]


def _search(host: Target, releases: Sequence[str], backend: str) -> Optional[Candidate]:
    """The first release with a build that computes on a GPU of this machine, else the first with one that can be installed.

    Within a release: the build that serves the most GPUs; of equals the first.
    """
    possible: List[Candidate] = []
    for found in _candidates(host, releases, backend):
        good = [candidate for candidate in found if not candidate.failed]
        on_gpu = [candidate for candidate in good if candidate.device != "cpu"]
        if on_gpu:
            return max(on_gpu, key=lambda candidate: candidate.rank)
        possible += good
    return possible[0] if possible else None


def _releases(oldest: Optional[str]) -> List[str]:
    """Releases in the order of preference: the tested one, then older ones, last those that are newer than the tested one."""
    known = [
        TORCH if knowledge.minor(TORCH) == entry["torch"] else knowledge.newest_patch(entry["torch"]) for entry in knowledge.releases()
    ]
    known = [torch for torch in known if version(torch) >= version(oldest)]
    return [torch for torch in known if version(torch) <= version(TORCH)] + [torch for torch in known if version(torch) > version(TORCH)]


def make_plan(
    facts: Mapping[str, Any],
    torch: Optional[str] = None,
    backend: str = "auto",
    manager: str = "pip",
    index: Optional[str] = None,
    find_links: Optional[str] = None,
    companions: Sequence[str] = (),
    upgrade: bool = False,
    switch: Optional[str] = None,
    oldest: Optional[str] = None,
) -> Plan:
    """The plan for a machine.

    Args:
        facts: what `probe.facts()` returns, or a part of it; anything may be missing. Read are os: system, machine, libc, wsl,
            container, jetson, rosetta; python: version, implementation, bits, free_threaded, environment; nvidia: driver, problem,
            on_bus, gpus with name and compute_capability; amd: gfx, on_bus; intel: names; apple: chip, macos; torch; packages; disk: free_gb.
        torch: a wished version, '2.9' or '2.9.1'. Without one an installed torch that works is kept, unless `upgrade`.
        backend: a wished build ('cpu', 'cu126', 'rocm7.2', 'mps', 'xpu') or 'auto'; `switch` is the same for an existing environment.
        manager: 'pip', 'uv' or 'conda'.
        index: base address of PyTorch's wheel index or of a mirror of it; else GROUNDUP_TORCH_INDEX.
        find_links: a folder or page with wheels; without an `index` given here, no index is asked.
        companions: torchvision and torchaudio where they are wanted; those that are installed are kept fitting anyway.
        oldest: releases before this one do not count.
    """
    host = Target(facts)
    if torch and "+" in torch:
        torch, _, backend = torch.partition("+")
    backend = switch or backend
    torch = knowledge.newest_patch(torch) if torch else None
    wall = machine_refusal(facts)
    if wall:
        return _refuse(wall, host, manager)
    if backend not in ("auto", *backends(oldest)):
        listed = ", ".join(backends(oldest))
        return _refuse(
            text(f"there is no build '{backend}'. Expected one of: {listed}.", f"没有名为 {backend} 的构建。可选：{listed}。"),
            host,
            manager,
        )
    if torch and knowledge.release(torch) is None and version(torch) < version(knowledge.releases()[0]["torch"]):
        listed = ", ".join(entry["torch"] for entry in knowledge.releases())
        return _refuse(text(f"torch {torch} is not known. Known: {listed}.", f"未知的 torch 版本 {torch}。已知：{listed}。"), host, manager)

    have, _, have_build = host.installed.get("torch", "").partition("+")
    order = [torch] if torch else _releases(oldest)
    chosen = _search(host, order, backend)
    # An upgrade never goes back.
    if have and not torch and chosen and (not upgrade or version(have) > version(TORCH)):
        chosen = _kept(host, have, have_build, backend, chosen, oldest)
    usable = chosen
    if torch and backend == "auto" and (chosen is None or chosen.device == "cpu"):
        usable = _search(host, _releases(oldest), backend)
    if chosen is None or (usable and usable.device != chosen.device):
        return _impossible(host, order, backend, torch, manager, oldest)
    return _compose(chosen, backend, order, manager, index, find_links, companions)


def _kept(host: Target, have: str, build: str, backend: str, best: Candidate, oldest: Optional[str]) -> Candidate:
    """The smallest change: the installed build, else another build of the installed release, else the best of all."""
    if version(have) < version(oldest):
        return best
    installed = [build] if build else ["mps", "cpu"] if host.system == "Darwin" else []
    for wish in [*(installed if backend == "auto" else ()), backend]:
        found = _search(host, [have], wish)
        if found and found.device == best.device:
            return found
    return best


def _impossible(host: Target, order: Sequence[str], backend: str, torch: Optional[str], manager: str, oldest: Optional[str]) -> Plan:
    """The refusal of a wish that cannot be had: the nearest miss, what it lacks, and what would work."""
    missed = [candidate for found in _candidates(host, order, backend) for candidate in found if candidate.failed]
    ways: List[Alternative] = []
    if missed:
        nearest = min(missed, key=lambda candidate: len(candidate.failed))
        here = joined([joined([row.what, row.here], " ", " ") for row in nearest.failed])
        lacks = joined([row.why for row in nearest.failed if row.why], " and ", "，且")
        why = text(
            f"torch {nearest.label} {lacks['en']}. This machine: {here['en']}.",
            f"torch {nearest.label} {lacks['zh']}。本机：{here['zh']}。",
        )
        rows = nearest.constraints
        ways += [Alternative(row.fix) for row in nearest.failed if row.fix]
    else:
        wish, rows = "+".join(filter(None, [torch, backend if backend != "auto" else None])), ()
        why = text(f"torch {wish} does not exist.", f"不存在 torch {wish}。")
    for wished, tag in ((torch, "auto"), (None, backend), (None, "auto"), (torch, "cpu")):
        found = _search(host, [wished] if wished else _releases(oldest), tag)
        other = make_plan(host.facts, found.torch, found.build, manager, oldest=oldest) if found else None
        if found and other and not other.refused and all(other.commands != way.commands for way in ways):
            does = text("computes on the CPU", "用 CPU 计算") if found.device == "cpu" else text("uses the GPU", "可使用 GPU")
            ways.append(Alternative(text(f"torch {found.label} {does['en']}", f"torch {found.label} {does['zh']}"), other.commands))
    return _refuse(why, host, manager, rows, tuple(ways))


def _refuse(
    why: Text, host: Target, manager: str, constraints: Tuple[Constraint, ...] = (), alternatives: Tuple[Alternative, ...] = ()
) -> Plan:
    return Plan("none", "", why, refused=why, manager=manager, constraints=constraints, alternatives=alternatives, windows=host.windows)


# --- the reason ------------------------------------------------------------------------------------------------------------------


def _reason(chosen: Candidate, backend: str, order: Sequence[str]) -> Text:
    """What was found, then why each better build is out."""
    host, parts = chosen.host, []  # type: Target, List[Text]
    if backend != "auto":
        parts.append(text(f"{backend} was asked for", f"按要求使用 {backend}"))
        if chosen.kind in ("cu", "rocm", "xpu") and chosen.device == "cpu":
            parts.append(
                text(
                    "no GPU for it answers here, so it will compute on the CPU until one does",
                    "目前没有适用的 GPU 应答，暂时只能在 CPU 上计算",
                )
            )
    if host.gpus:
        parts.append(text(f"{host.names}, driver {host.driver_text or '?'}", f"{host.names}，驱动 {host.driver_text or '?'}"))
    if host.gfx:
        parts.append(plain("AMD " + ", ".join("gfx" + name for name in host.gfx)))
    if host.system == "Darwin":
        parts.append(plain(", ".join(filter(None, [host.chip, "macOS " + (dotted(host.macos) or "?")]))))
    if chosen.device == "cpu" and backend == "auto" and not (host.gpus or host.gfx or host.system == "Darwin"):
        parts.append(silent_gpu(host.facts) or text("no GPU that torch can use was found", "没有找到 torch 可用的 GPU"))
    if backend == "auto":
        parts += _rejected(chosen, order)
    if chosen.torch != order[0]:
        if chosen.torch == host.installed.get("torch", "").partition("+")[0]:
            parts.append(text(f"torch {chosen.torch} is the installed one", f"torch {chosen.torch} 即已安装的版本"))
        else:
            parts.append(text(f"torch {chosen.torch} is the newest that fits", f"torch {chosen.torch} 是适用的最新版本"))
    unused = [gpu for gpu in host.gpus if gpu not in chosen.served] if chosen.device == "cuda" and chosen.kind == "cu" else []
    if unused:
        names = ", ".join(described(gpu) for gpu in unused)
        parts.append(
            text(f"{chosen.label} has no kernels for {names}, which stays unused", f"{chosen.label} 没有适用于 {names} 的内核，该卡将闲置")
        )
    return joined(parts)


def _rejected(chosen: Candidate, order: Sequence[str]) -> List[Text]:
    """Why each build of the first release that comes before the chosen one is out; what all of them lack is said once."""
    found = next(_candidates(chosen.host, order, "auto"), [])
    before = []
    for candidate in found:
        if (candidate.torch, candidate.build) == (chosen.torch, chosen.build):
            break
        # An experimental build is not missed where a stable one is out for the same reason.
        if candidate.failed and (candidate.kind != "cu" or knowledge.is_stable(candidate.known, candidate.build)):
            before.append(candidate)
    common = [row.why for row in found[-1].failed if all(row.why in [r.why for r in c.failed] for c in found)] if found else []
    said = [_lacking(order[0], common)] if common else []
    for candidate in before:
        whys = [row.why for row in candidate.failed if row.why not in common]
        said += [_lacking(candidate.label, whys)] if whys else []
    return said


def _lacking(label: str, whys: Sequence[Optional[Text]]) -> Text:
    lacks = joined([why for why in whys if why], " and ", "，且")
    return text(f"{label} {lacks['en']}", f"{label} {lacks['zh']}")


def silent_gpu(facts: Mapping[str, Any]) -> Optional[Text]:
    """What to say when there are signs of a GPU but none answers."""
    nvidia, amd, system = (facts.get(key) or {} for key in ("nvidia", "amd", "os"))
    driver = nvidia.get("driver")
    if nvidia.get("problem"):
        return text(
            f"an NVIDIA driver is here but no GPU answers ({nvidia['problem']})", f"有 NVIDIA 驱动，但没有 GPU 应答（{nvidia['problem']}）"
        )
    if driver and system.get("container"):
        return text(
            f"the host has NVIDIA driver {driver}, but this container was started without its GPUs (docker run --gpus all)",
            f"宿主机有 NVIDIA 驱动 {driver}，但容器启动时没有带上 GPU（docker run --gpus all）",
        )
    if driver:
        return text(f"NVIDIA driver {driver} is loaded, but no GPU answers", f"已加载 NVIDIA 驱动 {driver}，但没有 GPU 应答")
    if nvidia.get("on_bus"):
        return text(
            "an NVIDIA GPU is built in, but its driver is not installed or not loaded (how: groundup env driver)",
            "本机装有 NVIDIA GPU，但驱动未安装或未加载（方法：groundup env driver）",
        )
    if amd.get("on_bus") and system.get("machine") == "x86_64":
        return text(
            "an AMD GPU is built in, but ROCm's kernel driver does not offer it for computing",
            "本机有 AMD GPU，但 ROCm 内核驱动没有把它用于计算",
        )
    return None


# --- the commands ----------------------------------------------------------------------------------------------------------------


def _compose(
    chosen: Candidate,
    backend: str,
    order: Sequence[str],
    manager: str,
    index: Optional[str],
    find_links: Optional[str],
    companions: Sequence[str],
) -> Plan:
    host, tag = chosen.host, "cpu" if chosen.build == "mps" else chosen.build
    if manager == "conda" and chosen.kind in ("rocm", "xpu"):
        why = text(
            f"conda-forge has no {chosen.build} build; use --manager pip.", f"conda-forge 没有 {chosen.build} 构建，请用 --manager pip。"
        )
        return _refuse(why, host, manager)
    fitting = knowledge.companions(chosen.known)
    names = [name for name in COMPANIONS if name in fitting and (name in companions or name in host.installed)]
    versions = {"torch": chosen.torch, **{name: fitting[name] for name in names}}
    # What is compiled against one build is pinned to it, so that pip replaces the CPU build of the same version instead of keeping it.
    local = "" if host.system == "Darwin" or tag == "cpu" else "+" + tag
    changes = []
    for name, number in versions.items():
        free = name == "torchaudio" and knowledge.companion_fits(chosen.known, name, number) and version(number) >= (2, 11)
        changes.append(Change(name, host.installed.get(name), number + ("" if free or manager == "conda" else local)))
    changes = [_with_cpu_build(change, host) for change in changes]
    replaced = [change for change in changes if change.action == "replace"]

    base = (index or os.environ.get("GROUNDUP_TORCH_INDEX") or WHEEL_INDEX).rstrip("/")
    url = base if re.search(r"/(cpu|xpu|cu\d+|rocm[\d.]+)$", base) else f"{base}/{tag}"
    pins = [_pin(change.name, change.after) for change in changes]
    if knowledge.numpy_1_only(chosen.torch, host.windows):
        pins.append("numpy<2")
    source: Tuple[str, ...] = ("--index-url", url)
    without: Optional[Tuple[str, ...]] = None
    if find_links:
        source = ("--find-links", find_links, *(("--index-url", url) if index else ("--no-index",)))
        url = url if index else ""
    elif host.system == "Darwin":
        source, url = (), ""
    elif tag == "cpu":
        # An extra index, not the only one: where it cannot be reached the default index has the same release (on Linux with CUDA's libraries).
        source = ("--extra-index-url", url)
        # Every package of the installation asks every index: with pip's five retries an index that is away costs minutes.
        without = (*pins, *source, "--retries", "0")
    elif (host.system, host.machine) == ("Linux", "x86_64") and tag == knowledge.default_build(chosen.known):
        without = tuple(pin.partition("+")[0] for pin in pins)

    free_gb, disk_gb = (host.facts.get("disk") or {}).get("free_gb"), DISK_GB[chosen.kind]
    disk = Constraint(
        "disk",
        text("Disk", "磁盘"),
        text(f"{free_gb:g} GB free", f"剩余 {free_gb:g} GB") if free_gb is not None else plain("?"),
        plain(f">= {disk_gb:g} GB"),
        free_gb >= disk_gb if free_gb is not None else None,
    )
    rows = [
        Constraint(change.name, plain(change.name), plain(change.before or "-"), plain(change.after), change.action != "replace")
        for change in changes
        if change.name != "torch"
    ]
    uninstall = tuple(change.name for change in replaced if _local(change.before) != _local(change.after))
    changed = any(change.action != "keep" for change in changes)
    return Plan(
        backend=chosen.build,
        torch_version=chosen.torch,
        reason=_reason(chosen, backend, order),
        pip_args=(*pins, *source),
        device=chosen.device,
        disk_gb=disk_gb,
        index_url=url or None,
        pip_args_without_index=without,
        manager=manager,
        constraints=(*chosen.constraints, *rows, disk),
        changes=tuple(changes),
        uninstall=uninstall,
        commands=_commands(host, chosen, manager, changes, uninstall, (*pins, *source)) if changed else (),
        notes=tuple(_notes(chosen, manager, replaced)),
        alternatives=tuple(_better(chosen, order)) if backend == "auto" else (),
        windows=host.windows,
    )


def _with_cpu_build(change: Change, host: Target) -> Change:
    """A CPU pin names its build only where pip would keep another build of the same version."""
    if host.system == "Darwin" or "+" in change.after or not change.before:
        return change
    number, _, build = change.before.partition("+")
    return Change(change.name, change.before, change.after + "+cpu") if number == change.after and build not in ("", "cpu") else change


def _local(number: Optional[str]) -> str:
    return (number or "").partition("+")[2] or "cpu"


def same_version(before: str, after: str) -> bool:
    """Whether what is installed is what is planned; '0.24' stands for any patch, and no build means the CPU's."""
    number, wanted = before.partition("+")[0], after.partition("+")[0]
    return (number == wanted or (len(version(wanted)) < 3 and version(number)[:2] == version(wanted))) and (
        "+" not in after or _local(before) == _local(after)
    )


def _pin(name: str, number: str) -> str:
    public, plus, local = number.partition("+")
    return f"{name}=={public}{plus}{local}" if len(version(public)) >= 3 else f"{name}=={public}.*"


def _commands(
    host: Target, chosen: Candidate, manager: str, changes: Sequence[Change], uninstall: Sequence[str], pip_args: Sequence[str]
) -> Tuple[Tuple[str, ...], ...]:
    """What a person types, in order."""
    found: List[Tuple[str, ...]] = []
    fresh = host.environment == "system"
    python = "python" if host.windows or host.environment in ("venv", "conda") or fresh else "python3"
    activate = (".venv\\Scripts\\activate",) if host.windows else ("source", ".venv/bin/activate")
    if manager == "conda":
        if uninstall:
            found.append((python, "-m", "pip", "uninstall", "-y", *uninstall))
        found.append(("conda", "install", "-c", "conda-forge", *_conda_specs(chosen, changes)))
    elif manager == "uv":
        found += [("uv", "venv"), activate] if fresh else []
        if uninstall:
            found.append(("uv", "pip", "uninstall", *uninstall))
        found.append(("uv", "pip", "install", *pip_args))
    else:
        found += [("py" if host.windows else "python3", "-m", "venv", ".venv"), activate] if fresh else []
        if uninstall:
            found.append((python, "-m", "pip", "uninstall", "-y", *uninstall))
        found.append((python, "-m", "pip", "install", *pip_args))
    quote = "'" if host.windows else '"'
    found.append((python, "-c", f"import torch; print(torch.__version__, torch.ones(8).to({quote}{chosen.device}{quote}).sum().item())"))
    return tuple(found)


def _conda_specs(chosen: Candidate, changes: Sequence[Change]) -> List[str]:
    specs = []
    for change in changes:
        number = dotted(version(change.after)[:2]) + ".*"
        name = {"torch": "pytorch-gpu" if chosen.kind == "cu" else "pytorch"}.get(change.name, change.name)
        specs.append(f"{name}={number}")
    if chosen.kind == "cu":
        specs.append("cuda-version={}".format((knowledge.cuda_of(chosen.build) or (0,))[0]))
    return specs


def _notes(chosen: Candidate, manager: str, replaced: Sequence[Change]) -> Iterator[Text]:
    host = chosen.host
    if knowledge.release(chosen.torch) is None:
        known = knowledge.releases()[0]["torch"]
        yield text(
            f"torch {chosen.torch} is newer than this program's table ({knowledge.load()['updated']}): judged as {known}",
            f"torch {chosen.torch} 比本程序的数据（{knowledge.load()['updated']}）更新，按 {known} 判断",
        )
    if version(chosen.torch) < version(OLDEST):
        yield text(f"groundup itself needs torch {OLDEST} or newer", f"groundup 自身需要 torch {OLDEST} 以上")
    if host.gpus and chosen.kind == "cu" and not host.driver:
        yield text("the driver's version is not known: see nvidia-smi", "驱动版本未知，请用 nvidia-smi 查看")
    if manager == "conda":
        conda = knowledge.load()["platforms"]["conda"]
        yield text(conda["en"], conda["zh"])
        yield text(
            "conda-forge compiles its own builds: which GPUs they have kernels for is not in this program's table, so verify afterwards",
            "conda-forge 自行编译，其内核支持哪些 GPU 不在本程序的数据中，请在安装后验证",
        )
    if manager != "conda" and any(
        item.get("where") == "conda" and item["name"] in _CONDA_TORCH for item in host.facts.get("packages") or []
    ):
        yield text(
            "torch is here by conda: use --manager conda, or take it out first (conda remove pytorch), so that the two do not mix",
            "本环境的 torch 由 conda 安装：请用 --manager conda，或先执行 conda remove pytorch，避免混装",
        )
    orphans = _orphans(host, chosen) if any(change.name == "torch" for change in replaced) else []
    if orphans:
        listed = ", ".join(orphans)
        yield text(
            f"no longer needed by torch, and removable unless something else uses them: {listed}",
            f"torch 不再需要，且若无其他软件使用即可卸载：{listed}",
        )
    override = [name for name in host.gfx if chosen.kind == "cpu" and knowledge.rocm_override(name)]
    for name in override:
        value = knowledge.rocm_override(name)
        yield text(
            f"unofficial: some users of gfx{name} run the ROCm build with HSA_OVERRIDE_GFX_VERSION={value}",
            f"非官方做法：部分 gfx{name} 用户设置 HSA_OVERRIDE_GFX_VERSION={value} 后使用 ROCm 版",
        )
    if chosen.kind == "cpu" and intel_gpus(host.facts):
        yield text("an Intel GPU is here: --backend xpu gives the build for it", "本机有 Intel GPU，可用 --backend xpu 安装对应的构建")


def _orphans(host: Target, chosen: Candidate) -> List[str]:
    """CUDA libraries of another major version, or all of them when the new torch has none of its own."""
    major = (knowledge.cuda_of(chosen.build) or (0,))[0]
    found = []
    for name in sorted(host.installed):
        suffix = re.search(r"-cu(\d\d)$", name)
        if name.startswith("nvidia-") and (major == 0 or (suffix and int(suffix.group(1)) != major)):
            found.append(name)
    return found


def _better(chosen: Candidate, order: Sequence[str]) -> Iterator[Alternative]:
    """What a newer driver or system would give: stable GPU builds of the first release, and what each of them lacks."""
    if chosen.torch == order[0] and chosen.device != "cpu":
        return
    for candidate in next(_candidates(chosen.host, order, "auto"), []):
        fixes = [row.fix for row in candidate.failed if row.fix and row.key != "gpu"]
        stable = candidate.kind == "mps" or knowledge.is_stable(candidate.known, candidate.build)
        if stable and fixes and len(fixes) == len(candidate.failed):
            what = joined(fixes)
            yield Alternative(text(f"torch {candidate.label} with: {what['en']}", f"torch {candidate.label}，需要：{what['zh']}"))


# --- showing ---------------------------------------------------------------------------------------------------------------------


def as_dict(plan: Plan) -> Dict[str, Any]:
    """The plan for JSON."""

    def lines(commands: Sequence[Sequence[str]]) -> List[str]:
        return [shown(command, plan.windows) for command in commands]

    return {
        "schema": "groundup.env.plan/1",
        "backend": plan.backend,
        "torch": plan.torch_version,
        "device": plan.device,
        "manager": plan.manager,
        "pip_args": [shown([word], plan.windows).strip("'\"") for word in plan.pip_args],
        "reason": plan.reason,
        "refused": plan.refused,
        "disk_gb": plan.disk_gb,
        "constraints": [
            {
                "key": row.key,
                "what": row.what,
                "here": row.here,
                "needed": row.needed,
                "satisfied": row.satisfied,
                "fix": row.fix if row.satisfied is False else None,
            }
            for row in plan.constraints
        ],
        "changes": [{"name": c.name, "from": c.before, "to": c.after, "action": c.action} for c in plan.changes],
        "uninstall": list(plan.uninstall),
        "commands": lines(plan.commands),
        "notes": list(plan.notes),
        "alternatives": [{"says": way.says, "commands": lines(way.commands)} for way in plan.alternatives],
    }


def report(plan: Plan, language: str) -> str:
    """The plan for a person."""
    zh = language == "zh"
    lines: List[str] = []
    if plan.refused:
        lines += wrapped(("无法安装：" if zh else "Refused: ") + plan.refused[language], 80)
    else:
        build = {"cpu": "", "mps": ""}.get(plan.backend, "+" + plan.backend)
        lines.append(
            ("方案：torch {}{}，在 {} 上计算" if zh else "Plan: torch {}{}, computes on {}").format(plan.torch_version, build, plan.device)
        )
        lines += wrapped(("原因：" if zh else "Why:  ") + plan.reason[language], 80)
    marks = {True: "符合" if zh else "ok", False: "不符" if zh else "NO", None: "?"}
    rows = [(marks[row.satisfied], row.what[language], row.here[language], row.needed[language]) for row in plan.constraints]
    if rows:
        lines += ["", *columns([("", "条件", "本机", "要求") if zh else ("", "Constraint", "Here", "Needed"), *rows])]
    replaced = [change for change in plan.changes if change.action == "replace"]
    if replaced:
        lines += ["", "变更" if zh else "Changes", *columns([(change.name, f"{change.before} -> {change.after}") for change in replaced])]
    if plan.commands:
        lines += ["", "命令" if zh else "Commands", *("  " + shown(command, plan.windows) for command in plan.commands)]
    elif not plan.refused:
        lines += ["", "已经满足，无需再做。" if zh else "Already so: nothing to do."]
    for title, entries in (
        ("说明" if zh else "Notes", [Alternative(note) for note in plan.notes]),
        ("其他办法" if zh else "Alternatives", plan.alternatives),
    ):
        if entries:
            lines += ["", title]
            for entry in entries:
                lines += columns([("-", entry.says[language])])
                lines += ["      " + shown(command, plan.windows) for command in entry.commands]
    return "\n".join(lines)


# --- the verb --------------------------------------------------------------------------------------------------------------------


def configure(parser: "argparse.ArgumentParser") -> None:
    """The options of `env plan`."""
    add_options(parser)
    parser.add_argument(
        "--for",
        dest="report",
        metavar="FILE",
        help="plan for another machine: its report, or - for stdin / 为另一台机器制定方案：其报告文件，- 为标准输入",
    )


def add_options(parser: "argparse.ArgumentParser") -> None:
    """What `env plan` and `env install` share."""
    parser.add_argument("--torch", metavar="VERSION", help="a version instead of the best one / 指定版本，而不是最合适的")
    parser.add_argument("--backend", default="auto", metavar="BUILD", help="auto, cpu, cu126, ..., rocm7.2, mps, xpu / 指定构建：auto、cpu、cu126、……、rocm7.2、mps、xpu")
    parser.add_argument("--manager", default="pip", choices=MANAGERS, help="package manager / 包管理器")
    parser.add_argument("--with", dest="companions", action="append", default=[], choices=COMPANIONS, help="install this too / 一并安装")
    parser.add_argument(
        "--upgrade", action="store_true", help="newest that works here instead of keeping what is installed / 升级到可用的最新版本"
    )
    parser.add_argument("--switch", metavar="BUILD", help="another build of the installed release / 把已安装的版本换成另一种构建")
    parser.add_argument(
        "--index-url", metavar="URL", help="mirror of PyTorch's wheel index; else GROUNDUP_TORCH_INDEX / PyTorch 安装包索引的镜像；也可用 GROUNDUP_TORCH_INDEX"
    )
    parser.add_argument("--find-links", metavar="FOLDER", help="wheels on this disk; no index is asked / 使用本地安装包，不访问网络")


def from_options(options: "argparse.Namespace", facts: Mapping[str, Any]) -> Plan:
    """The plan that the options of `add_options` ask for."""
    return make_plan(
        facts,
        torch=options.torch,
        backend=options.backend,
        manager=options.manager,
        index=options.index_url,
        find_links=options.find_links,
        companions=options.companions,
        upgrade=options.upgrade,
        switch=options.switch,
    )


def read_facts(source: str) -> Dict[str, Any]:
    """Facts of another machine: the JSON of `env info --json`, else any text that `machine.read` understands."""
    from groundup.env import machine

    try:
        found = json.loads(source)
    except ValueError:
        found = None
    if isinstance(found, dict) and "os" in found:
        return found
    m = machine.read(source)
    arch = m.arch or ("aarch64" if any(gpu.vendor == "apple" for gpu in m.gpus) else None)
    nvidia = [{"name": gpu.name, "compute_capability": capability_text(gpu.sm) if gpu.sm else None} for gpu in m.nvidia]
    listed = [(name, entry) for name, entries in m.packages.items() for entry in entries]
    return {
        "os": {
            "system": {"linux": "Linux", "windows": "Windows", "macos": "Darwin"}.get(m.system or ""),
            "machine": arch,
            "libc": "glibc " + dotted(m.glibc) if m.glibc else m.libc,
            "wsl": m.wsl,
            "container": m.container or None,
            "jetson": m.jetson,
        },
        "python": {"version": dotted(m.python) if m.python else None, "environment": "conda" if m.conda else None},
        "nvidia": {"driver": m.driver_text, "gpus": nvidia},
        "amd": {"gfx": ["gfx" + gpu.gfx for gpu in m.amd if gpu.gfx]},
        "intel": {"names": [gpu.name for gpu in m.gpus if gpu.vendor == "intel"]},
        "apple": {"macos": dotted(m.macos) if m.macos else None},
        "torch": {"version": m.torch, "build": m.build} if m.torch else None,
        "packages": [{"name": name, "version": entry.version, "build": entry.version.partition("+")[2] or None} for name, entry in listed],
    }


def run(options: "argparse.Namespace") -> int:
    """`env plan`: 0, or 2 when nothing fits as asked."""
    language = pick(options.lang)
    if options.report:
        try:
            raw = sys.stdin.buffer.read() if options.report == "-" else Path(options.report).read_bytes()
        except OSError as error:
            says = text("cannot read {}: {}", "无法读取 {}：{}")[language]
            print(says.format(options.report, error.strerror), file=sys.stderr)
            return 2
        from groundup.env.machine import decode

        facts = read_facts(decode(raw))
    else:
        from groundup.env import probe

        facts = probe.facts()
    plan = from_options(options, facts)
    print(json.dumps(as_dict(plan), ensure_ascii=False) if options.json else report(plan, language))
    return 2 if plan.refused else 0
