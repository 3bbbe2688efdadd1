"""GPUs, their drivers, and what stands between the two. No serial number, UUID or bus address is read into the facts."""

from __future__ import annotations

import json
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from groundup.env.host import HUNG, MISSING, Host, Later, join, scrub

_GB = 1e9
_PCI_NVIDIA, _PCI_AMD, _PCI_INTEL = 0x10DE, 0x1002, 0x8086
_DISPLAY, _NVSWITCH = 0x03, 0x0680
_WSL_NVIDIA_SMI = "/usr/lib/wsl/lib/nvidia-smi"
_WINDOWS_DISPLAYS = r"SYSTEM\CurrentControlSet\Control\Class\{4d36e968-e325-11ce-bfc1-08002be10318}"
_SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
# A first nvidia-smi wakes every GPU: seconds on a server without the persistence daemon.
_SMI_TIMEOUT = 8.0

_FIELDS = ("name", "memory.total", "compute_cap", "driver_version", "mig.mode.current")
_OLD_FIELDS = ("name", "memory.total", "driver_version")

# Run in a child process: a broken driver can hang or kill whoever opens libcuda.
ASK_LIBCUDA = """
import ctypes, json, sys
lib = ctypes.CDLL(sys.argv[1])
version = ctypes.c_int()
lib.cuDriverGetVersion(ctypes.byref(version))
answer = {"error": lib.cuInit(0), "version": version.value, "gpus": []}
count = ctypes.c_int()
if answer["error"] == 0 and lib.cuDeviceGetCount(ctypes.byref(count)) == 0:
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, size = ctypes.create_string_buffer(100), ctypes.c_size_t()
        lib.cuDeviceGet(ctypes.byref(device), index)
        lib.cuDeviceGetName(name, 100, device)
        lib.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        lib.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        lib.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        answer["gpus"].append({"name": name.value.decode("utf-8", "replace"), "memory_gb": round(size.value / 1e9, 1),
                               "compute_capability": "%d.%d" % (major.value, minor.value)})
print(json.dumps(answer))
"""

NVIDIA: Mapping[str, Any] = {
    "driver": None, "gpus": [], "problem": None, "on_bus": None, "bus_names": [], "bus_drivers": [], "cuda_version": None, "cuinit": None,
    "kernel_module": None, "open_module": None, "module_built": None, "library": None, "mismatch": None, "nouveau": False, "secure_boot": None,
    "devices": [], "fabricmanager": {"needed": None, "running": None}, "smi": False,
}  # fmt: skip
AMD: Mapping[str, Any] = {"gfx": [], "on_bus": None, "names": [], "rocm": None, "kfd": None, "module": None}
INTEL: Mapping[str, Any] = {"on_bus": None, "names": [], "module": None, "render": None}
APPLE: Mapping[str, Any] = {"chip": None, "macos": None}


# --- the bus ---------------------------------------------------------------------------------------------------------------------


class PciDevice(NamedTuple):
    vendor: int
    device: int
    kind: int  # the 24-bit class code
    driver: Optional[str]


def pci(host: Host) -> Optional[List[PciDevice]]:
    """Devices on the PCI bus; None where that cannot be read."""
    bus = "/sys/bus/pci/devices"
    if host.system != "Linux" or not host.is_folder(bus):
        return None
    devices = (parse_uevent(host.read(join(bus, name, "uevent"), 2000)) for name in host.names(bus))
    return [device for device in devices if device]


def parse_uevent(source: str) -> Optional[PciDevice]:
    """/sys/bus/pci/devices/*/uevent: identity, class and bound driver in one file."""
    values = dict(re.findall(r"^(DRIVER|PCI_CLASS|PCI_ID)=(\S+)$", source, re.MULTILINE))
    found = re.match(r"([0-9A-Fa-f]{4}):([0-9A-Fa-f]{4})$", values.get("PCI_ID", ""))
    if not found or not re.fullmatch(r"[0-9A-Fa-f]{1,6}", values.get("PCI_CLASS", "")):
        return None
    return PciDevice(int(found.group(1), 16), int(found.group(2), 16), int(values["PCI_CLASS"], 16), values.get("DRIVER"))


def _displays(devices: Optional[List[PciDevice]], vendor: int) -> Optional[List[PciDevice]]:
    return None if devices is None else [item for item in devices if item.vendor == vendor and item.kind >> 16 == _DISPLAY]


def _bus_names(host: Host, devices: List[PciDevice], quick: bool) -> List[str]:
    """Names from the system's list of PCI devices; 'PCI device 10de:2684' without it."""
    source = ""
    if devices and not quick:
        source = next(filter(None, (host.read(path) for path in ("/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids"))), "")
    return [
        parse_pci_ids(source, item.vendor, item.device) or "PCI device {:04x}:{:04x}".format(item.vendor, item.device) for item in devices
    ]


def parse_pci_ids(source: str, vendor: int, device: int) -> Optional[str]:
    """'AD102 [GeForce RTX 4090]' from a pci.ids file."""
    start = re.search(r"^{:04x}  \S.*$".format(vendor), source, re.MULTILINE)
    if not start:
        return None
    rest = source[start.end() :]
    end = re.search(r"^[0-9a-f]{4}  ", rest, re.MULTILINE)
    found = re.search(r"^\t{:04x}  (\S.*)$".format(device), rest[: end.start()] if end else rest, re.MULTILINE)
    return found.group(1).strip()[:100] if found else None


# --- NVIDIA ----------------------------------------------------------------------------------------------------------------------


def nvidia(host: Host, quick: bool, deep: bool, devices: Optional[List[PciDevice]], found: Dict[str, Any]) -> None:
    """Fills `found` (as `NVIDIA`). `driver` may be known while `gpus` is empty: a container without GPU access sees the host's driver."""
    smi = None if quick and host.system == "Linux" else _smi(host)
    header = Later(host.run, [smi], _SMI_TIMEOUT) if smi else None
    asked = Later(_query, host, smi) if smi else None
    cuda = Later(_ask_libcuda, host) if deep else None

    on_bus = _displays(devices, _PCI_NVIDIA)
    _from_files(host, quick, devices, on_bus, found)
    found["smi"] = bool(smi or _smi(host))
    if asked and header:
        _from_smi(asked.result(), header.result(), found)
    elif quick:
        cards = host.glob("/proc/driver/nvidia/gpus/*/information")
        names = (parse_proc_gpu_name(host.read(card, 10_000)) for card in cards)
        found["gpus"] = [{"name": name, "memory_gb": None, "compute_capability": None, "mig": None} for name in names if name]

    signs = smi or found["driver"] or on_bus
    incomplete = not found["gpus"] or any(gpu["compute_capability"] is None for gpu in found["gpus"])
    answer = cuda.result() if cuda else _ask_libcuda(host) if signs and incomplete and not quick else None
    if answer:
        _from_libcuda(answer, found)
    if found["cuda_version"] is None and found["driver"]:
        found["cuda_version"] = _cuda_of_driver(found["driver"])


def _smi(host: Host) -> Optional[str]:
    found = host.which("nvidia-smi")
    for path in (_WSL_NVIDIA_SMI, "C:/Windows/System32/nvidia-smi.exe", "C:/Program Files/NVIDIA Corporation/NVSMI/nvidia-smi.exe"):
        found = found or (path if host.exists(path) else None)
    return found


def _query(host: Host, smi: str) -> Tuple[int, str]:
    status, out = 0, ""
    for fields in (_FIELDS, _FIELDS[:4], _OLD_FIELDS):
        status, out = host.run([smi, "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits"], _SMI_TIMEOUT)
        if "not a valid field" not in out:
            break
    return status, out


def _from_files(
    host: Host, quick: bool, devices: Optional[List[PciDevice]], on_bus: Optional[List[PciDevice]], found: Dict[str, Any]
) -> None:
    source = host.read("/proc/driver/nvidia/version", 2000)
    module = parse_driver_version(host.read("/sys/module/nvidia/version", 200) or source)
    found["driver"] = found["kernel_module"] = module
    found["open_module"] = "Open Kernel Module" in source if source else None
    found["library"] = _library(host)
    if module and found["library"]:
        found["mismatch"] = module != found["library"]
    found["on_bus"] = None if on_bus is None else len(on_bus)
    found["bus_names"] = _bus_names(host, on_bus or [], quick)
    found["bus_drivers"] = sorted({item.driver for item in on_bus or [] if item.driver})
    found["nouveau"] = host.exists("/sys/module/nouveau")
    boot = host.read(_SECURE_BOOT, 16)
    found["secure_boot"] = None if len(boot) < 5 else boot[4] == "\x01"
    if host.system == "Linux":
        found["devices"] = [name for name in host.names("/dev") if re.fullmatch(r"nvidia\d+|nvidiactl|nvidia-uvm|nvhost-gpu|dxg", name)]
        built = any(
            host.glob("/lib/modules/{}/{}/nvidia*.ko*".format(host.release, folder))
            for folder in (
                "updates/dkms",
                "extra",
                "extra/nvidia",
                "extra/nvidia-open",
                "kernel/drivers/video",
                "kernel/nvidia-*",
                "updates",
            )
        )
        # In a container and under WSL the folder of the kernel's modules is not there: nothing can be said.
        found["module_built"] = built if host.is_folder("/lib/modules/" + host.release) else None
        _fabric(host, devices, found)
    if host.system == "Windows":
        displays = [name for name in _windows_displays(host) if name[0] == _PCI_NVIDIA]
        found["bus_names"] = [name for _, name, _ in displays]
        found["driver"] = next((parse_windows_driver(number) for _, _, number in displays if parse_windows_driver(number)), None)


def _fabric(host: Host, devices: Optional[List[PciDevice]], found: Dict[str, Any]) -> None:
    """NVSwitch machines (HGX, DGX) compute only while the fabric manager runs."""
    if devices is None:
        return
    needed = any(item.vendor == _PCI_NVIDIA and item.kind >> 8 == _NVSWITCH for item in devices)
    running: Optional[bool] = None
    if needed:
        comms = (host.read(path, 100).strip() for path in host.glob("/proc/[0-9]*/comm"))
        running = any(comm.startswith("nv-fabricmanag") for comm in comms) or None
        if running is None and not host.exists("/.dockerenv"):  # a container sees no process of its host
            running = False
    found["fabricmanager"] = {"needed": needed, "running": running}


def _library(host: Host) -> Optional[str]:
    """The version of the driver's user-space library, from the name of the file that libcuda.so.1 or libnvidia-ml.so.1 links to."""
    for name in ("libnvidia-ml", "libcuda"):
        for folder in (
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib/aarch64-linux-gnu",
            "/usr/lib64",
            "/usr/lib",
            "/usr/lib/x86_64-linux-gnu/nvidia/current",
        ):
            link = join(folder, name + ".so.1")
            found = re.search(r"\.so\.(\d{3,4}\.\d+(?:\.\d+)?)$", host.real(link)) if host.exists(link) else None
            if found:
                return found.group(1)
    return None


def _from_smi(asked: Tuple[int, str], header: Tuple[int, str], found: Dict[str, Any]) -> None:
    status, out = asked
    gpus = parse_nvidia_smi(out) if status == 0 else []
    shown = parse_smi_header(header[1]) if header[0] == 0 else {}
    if gpus:
        # Under WSL and on Windows there is no kernel module to read, and what answers is what counts.
        found["driver"] = gpus[0]["driver"] or shown.get("driver") or found["driver"]
        found["gpus"] = [{key: value for key, value in gpu.items() if key != "driver"} for gpu in gpus]
    elif status not in (0, MISSING) or out.strip():
        found["problem"] = scrub(" ".join(out.split())[:300]) or "nvidia-smi ended with status {}".format(status)
    found["driver"] = found["driver"] or shown.get("driver")
    found["cuda_version"] = shown.get("cuda")
    library = re.search(r"NVML library version:\s*(\d{3,4}\.\d+(?:\.\d+)?)", out)
    if library and (found["library"] is None or not found["library"].startswith(library.group(1))):
        found["library"] = library.group(1)
    if status not in (0, HUNG) and "version mismatch" in out:
        found["mismatch"] = True


def parse_smi_header(source: str) -> Dict[str, str]:
    """{'driver', 'cuda'} from the first lines of `nvidia-smi`."""
    found = {}
    for key, pattern in (("driver", r"Driver Version:\s*(\d{3,4}\.\d+(?:\.\d+)?)"), ("cuda", r"CUDA (?:UMD )?Version:\s*(\d+\.\d+)")):
        value = re.search(pattern, source[:5000])
        if value:
            found[key] = value.group(1)
    return found


def parse_driver_version(source: str) -> Optional[str]:
    """'550.144.03' from /sys/module/nvidia/version or /proc/driver/nvidia/version."""
    found = re.search(r"(?:Kernel Module(?: for \S+)?\s+|^)(\d{3,4}\.\d+(?:\.\d+)?)\b", source.strip(), re.MULTILINE)
    return found.group(1) if found else None


def parse_windows_driver(number: Optional[str]) -> Optional[str]:
    """'560.94' from Windows' own number of the driver, '32.0.15.6094': its last five digits."""
    digits = re.sub(r"\D", "", ".".join((number or "").split(".")[-2:]))
    return "{}.{}".format(int(digits[-5:-2]), digits[-2:]) if len(digits) >= 5 else None


def parse_proc_gpu_name(source: str) -> Optional[str]:
    """The model in /proc/driver/nvidia/gpus/*/information (the file also has a serial number: nothing else is read)."""
    found = re.search(r"^Model:[ \t]*(\S.*)$", source, re.MULTILINE)
    return found.group(1).strip() if found else None


def parse_nvidia_smi(source: str) -> List[Dict[str, Any]]:
    """Lines of `nvidia-smi --query-gpu=name,memory.total[,compute_cap],driver_version[,mig.mode.current] --format=csv,noheader,nounits`."""
    gpus = []
    for line in source.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) not in (3, 4, 5) or not parts[0]:
            continue
        name, memory, driver = parts[0], parts[1], parts[2] if len(parts) == 3 else parts[3]
        capability = parts[2] if len(parts) > 3 else ""
        mig = parts[4] if len(parts) == 5 else ""
        # '[N/A]' and '[Not Supported]' are normal on integrated GPUs, where the memory is the machine's own.
        gpus.append(
            {
                "name": name,
                "memory_gb": round(float(memory) * 1024 * 1024 / _GB, 1) if re.fullmatch(r"\d{1,9}(\.\d+)?", memory) else None,
                "compute_capability": capability if re.fullmatch(r"\d+\.\d+", capability) else None,
                "driver": driver if re.match(r"\d", driver) else None,
                "mig": {"Enabled": True, "Disabled": False}.get(mig),
            }
        )
    return gpus


def _ask_libcuda(host: Host) -> Optional[Dict[str, Any]]:
    name = "nvcuda.dll" if host.system == "Windows" else "libcuda.so.1"
    command = [host.executable, "-I", "-S", "-c", ASK_LIBCUDA, name]
    # A hidden device would look like an absent one.
    status, out = host.run(command, 10, without=("CUDA_VISIBLE_DEVICES", "PYTHONHOME"))
    try:
        answer = json.loads(out) if status == 0 else None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and isinstance(answer.get("gpus"), list) else None


def _from_libcuda(answer: Mapping[str, Any], found: Dict[str, Any]) -> None:
    found["cuinit"] = answer.get("error")
    if answer["gpus"] and any(gpu["compute_capability"] is None for gpu in found["gpus"] or [{"compute_capability": None}]):
        found["gpus"] = [dict(gpu, mig=None) for gpu in answer["gpus"]]
    elif answer.get("error") and not found["gpus"]:
        found["problem"] = "{} [cuInit: error {}]".format(found["problem"] or "", answer["error"]).strip()
    version = answer.get("version")
    if found["cuda_version"] is None and version:
        found["cuda_version"] = "{}.{}".format(version // 1000, version % 1000 // 10)


def _cuda_of_driver(driver: str) -> Optional[str]:
    from groundup.env import knowledge

    found = knowledge.cuda_of_driver(knowledge.version(driver))
    return knowledge.dotted(found) if found else None


def _windows_displays(host: Host) -> List[Tuple[int, str, Optional[str]]]:
    """(vendor, name, driver number) of the display adapters in the registry."""
    found = []
    for key in host.registry_keys(_WINDOWS_DISPLAYS):
        if not re.fullmatch(r"\d{4}", key):
            continue
        place = _WINDOWS_DISPLAYS + "\\" + key
        vendor = re.search(r"VEN_([0-9A-F]{4})", (host.registry(place, "MatchingDeviceId") or "").upper())
        name = host.registry(place, "DriverDesc")
        if vendor and name:
            found.append((int(vendor.group(1), 16), name[:100], host.registry(place, "DriverVersion")))
    return found


# --- AMD, Intel, Apple -----------------------------------------------------------------------------------------------------------


def amd(host: Host, quick: bool, deep: bool, devices: Optional[List[PciDevice]], found: Dict[str, Any]) -> None:
    """AMD GPUs that the ROCm kernel driver (KFD) offers for computing, and those that are only built in. Fills `found` (as `AMD`)."""
    on_bus = _displays(devices, _PCI_AMD)
    found["on_bus"] = None if on_bus is None else len(on_bus)
    found["names"] = _bus_names(host, on_bus or [], quick)
    if host.system == "Windows":
        found["names"] = [name for vendor, name, _ in _windows_displays(host) if vendor == _PCI_AMD]
    nodes = host.glob("/sys/class/kfd/kfd/topology/nodes/*/properties")
    found["gfx"] = [name for name in (parse_kfd_properties(host.read(path, 20_000)) for path in nodes) if name]
    for path in (join(host.environ.get("ROCM_PATH") or "/opt/rocm", ".info/version"), *host.glob("/opt/rocm-*/.info/version")):
        numbers = re.match(r"\d+\.\d+(?:\.\d+)?", host.read(path, 200).strip())
        found["rocm"] = found["rocm"] or (numbers.group(0) if numbers else None)
    module = re.match(r"[\d.]+", host.read("/sys/module/amdgpu/version", 200))
    # The kernel's own module has no version; AMD's DKMS one has.
    found["module"] = module.group(0) if module else "kernel" if host.exists("/sys/module/amdgpu") else None
    if on_bus or found["gfx"]:
        found["kfd"] = "ok" if host.can_use("/dev/kfd") else "no access" if host.exists("/dev/kfd") else "absent"
    if quick:
        return
    if not found["gfx"]:
        tool = host.which("rocm_agent_enumerator") or host.which("/opt/rocm/bin/rocm_agent_enumerator")
        if tool:
            found["gfx"] = parse_agent_enumerator(host.run([tool], 8)[1])
    tool = host.which("rocminfo") or host.which("/opt/rocm/bin/rocminfo")
    if deep and tool:
        agents = parse_rocminfo(host.run([tool], 10)[1])
        found["gfx"] = [gfx for gfx, _ in agents] or found["gfx"]
        found["names"] = [name for _, name in agents if name] or found["names"]


def parse_kfd_properties(source: str) -> Optional[str]:
    """'gfx90a' from one KFD node; None for a CPU node, whose version is 0."""
    found = re.search(r"^gfx_target_version\s+(\d{1,9})$", source, re.MULTILINE)
    number = int(found.group(1)) if found else 0
    # 90010 is major 9, minor 0, stepping 10; the name writes minor and stepping in hexadecimal: gfx90a.
    return "gfx{}{:x}{:x}".format(number // 10000, number // 100 % 100, number % 100) if number else None


def parse_agent_enumerator(source: str) -> List[str]:
    """Lines of rocm_agent_enumerator; gfx000 is the CPU."""
    return [line.strip() for line in source.splitlines() if re.fullmatch(r"gfx[0-9a-f]+", line.strip()) and line.strip() != "gfx000"]


def parse_rocminfo(source: str) -> List[Tuple[str, Optional[str]]]:
    """(gfx, marketing name) of each GPU in rocminfo's output."""
    found = []
    for block in re.split(r"^\*+\s*\nAgent \d+\s*\n\*+\s*$", source, flags=re.MULTILINE)[1:]:
        gfx = re.search(r"^\s*Name:\s+(gfx[0-9a-f]+)\s*$", block, re.MULTILINE)
        name = re.search(r"^\s*Marketing Name:[ \t]+(\S.*?)\s*$", block, re.MULTILINE)
        if gfx and gfx.group(1) != "gfx000":
            found.append((gfx.group(1), name.group(1)[:100] if name else None))
    return found


def intel(host: Host, quick: bool, devices: Optional[List[PciDevice]], found: Dict[str, Any]) -> None:
    """Intel GPUs on the bus, integrated ones too. Fills `found` (as `INTEL`)."""
    on_bus = _displays(devices, _PCI_INTEL)
    found["on_bus"] = None if on_bus is None else len(on_bus)
    found["names"] = _bus_names(host, on_bus or [], quick)
    if host.system == "Windows":
        found["names"] = [name for vendor, name, _ in _windows_displays(host) if vendor == _PCI_INTEL]
    found["module"] = next((name for name in ("xe", "i915") if host.exists("/sys/module/" + name)), None)
    if on_bus:
        nodes = host.glob("/dev/dri/renderD*")
        found["render"] = any(host.can_use(node) for node in nodes) if nodes else None


def apple(host: Host, sysctls: Mapping[str, str], found: Dict[str, Any]) -> None:
    """Fills `found` (as `APPLE`)."""
    if host.system == "Darwin":
        found["chip"] = sysctls.get("machdep.cpu.brand_string")
        found["macos"] = host.version
