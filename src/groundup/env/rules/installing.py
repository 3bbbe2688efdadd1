"""Signs of a failed installation: disk, network, cache, Python, index."""

from __future__ import annotations

import re
from typing import Iterator, List, Optional, Tuple

from groundup.env import knowledge
from groundup.env.findings import INDEX, Hit, Values, install, patch, recommended, sign
from groundup.env.knowledge import dotted, version
from groundup.env.machine import Machine


@sign
def pip_disk(m: Machine) -> Iterator[Hit]:
    pattern = r"no space left on device|errno 28|disk quota exceeded|not enough space on the disk|winerror 112|no usable temporary directory|insufficient disk space|磁盘空间不足|空间不足"
    found = m.evidence(pattern)
    if not found:
        return
    shared = m.find(r"/dev/shm.{0,80}(?:no space|full|100%)|ncclshm|shm[_ -]?(?:open|size)|</torch_|shared memory|dataloader worker")
    installing = m.find(r"pip|install|download|whl|conda|extract|unpack|tar\b")
    if shared and not re.search(r"could not install packages|pip install", m.low):
        return
    values: Values = {}
    rooms: List[Tuple[float, str]] = []
    full: List[str] = []
    for size, _, free, percent, mount in re.findall(
        r"\s([\d.]+[KMGT]?)i?\s+([\d.]+[KMGT]?)i?\s+([\d.]+[KMGT]?)i?\s+(\d+)%\s+(/\S*)", m.text
    ):
        amount = float(re.match(r"[\d.]+", free).group(0)) * {"K": 1e-6, "M": 1e-3, "G": 1, "T": 1e3}.get(free[-1], 1e-9)  # type: ignore[union-attr]
        if mount == "/dev/shm":
            continue
        rooms.append((amount, mount))
        if amount < 4 or int(percent) > 90:
            full.append("{} ({} of {} free)".format(mount, free, size))
    if rooms and max(rooms)[0] >= 8:
        values["room_folder"] = max(rooms)[1]
        values["room"] = "{} ({:.0f} GB)".format(max(rooms)[1], max(rooms)[0])
    values.setdefault("room_folder", "/path/with/room")
    values["full"] = ", ".join(full)
    yield Hit("disk_or_tmp_full", 0.95 if installing else 0.8, found, values)


@sign
def pip_damaged(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"do not match the hashes|hash(?:es)? mismatch|badzipfile|file is not a zip file|bad crc-32|error -3 while decompressing|incorrect (?:data|header) check|"
        r"compressed file ended before|wheel .{0,120} is invalid|invalid wheel|bad magic number for (?:central directory|file header)|truncated (?:zip|file)"
    )
    if found and m.find(r"pip|whl|wheel|install|download|cache"):
        yield Hit("pip_corrupt_download", 0.96 if m.find(r"hash|badzip|crc|error -3") else 0.85, found)


@sign
def pip_network(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"readtimeouterror|read timed out|connecttimeout|connection timed out|wantreaderror|connectionreseterror|connection reset by peer|connection aborted|incompleteread|"
        r"connection broken|max retries exceeded|newconnectionerror|temporary failure in name resolution|name or service not known|getaddrinfo failed|network is unreachable|"
        r"remotedisconnected|proxyerror|sslerror|certificate_verify_failed|ssl: |protocolerror|operation timed out|connection was interrupted|failed to (?:download|fetch) .{0,80}(?:timeout|timed out)"
    )
    if found and m.find(r"pip|whl|install|download|conda|torch-\d|index|simple/"):
        yield Hit("pip_network_timeout", 0.9, found)


@sign
def windows_path(m: Machine) -> Iterator[Hit]:
    found = m.evidence(
        r"long path support|longpathsenabled|enable long ?paths?|file ?name too long|path (?:is )?too long|winerror 206|exceeds? (?:the )?(?:maximum|260)|路径过长|路径太长"
    )
    long = [
        line
        for line in m.lines
        if re.search(r"no such file or directory|errno 2\]", line, re.IGNORECASE) and re.search(r"[A-Za-z]:\\\\?[^'\"\n]{180,}", line)
    ]
    store = m.find(r"no such file or directory.{0,40}[a-z]:\\\\?.{0,80}PythonSoftwareFoundation")
    if (found or long or store) and m.system in ("windows", None):
        yield Hit("windows_long_path", 0.95, [line.strip()[:300] for line in long] or found)


@sign
def pip_nothing_found(m: Machine) -> Iterator[Hit]:
    """pip found no file to install: Python, platform, index or a version that is gone."""
    about = r"no matching distribution found|could not find a version that satisfies|is not a supported wheel on this platform|requires a different python|requires-python|packagesnotfounderror|unsatisfiableerror|no solution found when resolving|http error 40[34]|403 client error|404 client error|403 forbidden|404 not found|not available\b.{0,40}(?:dev|nightly)|(?:dev|nightly)\S*,? (?:is )?not available|no longer (?:available|exists)|python_requires|doesn't have a source distribution or wheel|unable to find installation candidates|only has wheels for|(?:install|get) (?:versions? )?up to|no wheels? (?:for|with a matching)|does not (?:have|provide) (?:wheels|a wheel)|(?:can'?t|cannot|couldn'?t) (?:find|install) .{0,40}torch"
    found = m.evidence(about)
    if not found:
        return
    if not re.search(r"torch|xformers|nvidia|whl", " ".join(found).lower() + " " + m.low):
        return
    if m.jetson:
        yield Hit("jetson_generic_wheel", 0.9, found)
        return
    asked = next((a for a in m.asked if re.match(r"torch\b", a)), m.asked[0] if m.asked else None)
    wish = re.search(r"([=<>~!]=+)(.+)", asked or "")
    wanted = wish.group(2) if wish else None
    upper = m.offered[-1] if m.offered else None
    values: Values = {"asked": asked.replace("==", " ").replace("torch ", "") if asked else None}
    python = m.python
    # What the installer lists is the strongest evidence; 'from versions: none' may also mean no network.
    if (
        upper
        and version(upper) <= (2, 2, 2)
        and (wanted is None or version(wanted) > (2, 2, 2))
        and (m.system == "macos" or m.find("rosetta"))
    ):
        yield Hit("macos_x86_no_wheel", 0.96, found)
        return
    if m.system == "macos" and m.arch == "x86_64" and not (wanted and version(wanted) <= (2, 2, 2)):
        yield Hit("macos_x86_no_wheel", 0.92, found)
        return
    nightly = m.evidence(r"\d\.?dev20\d{6}|nightly")
    failing = re.search(r"(?:satisfies the requirement|no matching distribution found for)\s+([A-Za-z][\w.-]*)", m.text, re.IGNORECASE)
    ours = failing and re.match(r"torch|nvidia|triton|pytorch|xformers", failing.group(1).lower())
    if failing and not ours and m.find(r"--index-url[^\n]*pytorch|looking in indexes: \S*pytorch\.org\S*$"):
        name = failing.group(1)
        values.update(other_package=name, install="python -m pip install {} --extra-index-url {}".format(name, INDEX))
        yield Hit("index_url_wrong_or_missing", 0.94, found, values)
        return
    if (
        nightly
        and re.search(r"\.dev20\d{6}", m.text)
        and (any("dev" in a for a in m.asked) or m.find(r"(?:no matching|not available|could not find|no longer)[^\n]*"))
    ):
        dev = re.search(r"(torch\w*)\W{1,4}(\d[\d.]*\.dev20\d{6}\S*?)(?=[\s,;)'\"]|$)", m.text)
        yield Hit("nightly_wheel_expired", 0.93, nightly + found, {"asked": " ".join(dev.groups()) if dev else "the pinned version"})
        return
    local = re.search(r"\+(cu\d{2,3}|rocm[\d.]+|cpu|xpu)", asked or "")
    tags = re.findall(
        r"(?:whl/(?:nightly/)?|<[A-Z_]*INDEX[A-Z_]*>/|index-url\S*[/ ])(cu\d{2,3}|rocm[\d.]+|cpu|xpu)\b", m.text, re.IGNORECASE
    )
    known = {tag for entry in knowledge.releases() for tag in entry["cuda"]}
    bad = [tag for tag in tags + ([local.group(1)] if local else []) if tag.startswith("cu") and tag not in known]
    entry = knowledge.release(wanted) if wanted else None
    if bad:
        values.update(bad_tag=bad[0], good_tags=", ".join(sorted({t for e in knowledge.releases()[:8] for t in e["cuda"]})))
        yield Hit("index_url_wrong_or_missing", 0.9, found, values)
    if m.arch == "aarch64" and m.system == "linux" and (local or tags) and not bad and m.nvidia and not m.jetson:
        yield Hit("aarch64_cpu_wheel", 0.7, found)
    minimum = knowledge.glibc_minimum(wanted, local.group(1) if local else None) if wanted else None
    if m.glibc and minimum and m.glibc < minimum:
        yield Hit("glibc_too_old", 0.88, found, {"needed": "glibc " + dotted(minimum), "file": "the wheel"}, {"torch_binary"})
    built = re.search(r"manylinux_2_(\d+)_\w+\.whl is not a supported wheel", m.low)
    if m.glibc and built and m.glibc < (2, int(built.group(1))):
        able = [e["torch"] for e in knowledge.releases() if version(e["glibc"]) <= m.glibc]
        facts = {"needed": "glibc 2." + built.group(1), "file": "the wheel", "install_glibc": install(patch(able[0], None), None, m)}
        yield Hit("glibc_too_old", 0.92, found, facts, {"torch_binary"})
    if m.libc == "musl":
        yield Hit("glibc_too_old", 0.8, found, {"needed": "glibc (this system has musl)", "file": "the wheel"})
    values.update(python_values(m, wanted))
    outside = bool(python and len(python) > 1 and entry and not version(entry["python"][0]) <= python[:2] <= version(entry["python"][1]))
    with_tag = [e for e in knowledge.releases() if any(t in e["cuda"] for t in tags)]
    tag_outside = bool(
        python
        and len(python) > 1
        and with_tag
        and all(not version(e["python"][0]) <= python[:2] <= version(e["python"][1]) for e in with_tag)
    )
    never = bool(python and len(python) > 1 and not knowledge.releases_for_python(python))
    lowest = m.offered[0] if m.offered else None
    too_old = bool(lowest and wanted and version(wanted) < version(lowest)) and not local
    wrong_python = m.find(
        r"requires a different python|requires-python|python_requires|not a supported wheel|32[- ]?bit|cp3\d+-\S+\.whl is not|python version"
    )
    if outside or tag_outside or never or wrong_python or too_old:
        sure = 0.93 if outside or never or tag_outside else 0.9 if too_old else 0.85
        if not (local and too_old and not outside):
            yield Hit("python_version_no_wheel", sure, found + m.evidence(r"^\W*python\b.{0,40}\d", 1), values)
    index_trouble = m.find(r"40[34] |forbidden|not found for url|index-url|-f https?|find-links|extra-index|torch_stable")
    if local or (tags and not tag_outside):
        tag = local.group(1) if local else tags[0]
        values.update(asked_local=asked if local else None, asked_tag=tag)
        torch = wanted.partition("+")[0] if wanted else None
        if torch and entry and tag in entry["cuda"]:
            values["install"] = install(torch, tag, m)
            values["index"] = "{}/{}".format(INDEX, tag)
        if m.system == "macos" and tag.startswith(("cu", "rocm")):
            kept = " ".join(a for a in m.asked if "+" not in a) or "torch"
            values.update(on_mac=tag, install="python -m pip install " + kept)
        if with_tag:
            versions = "{} to {}".format(with_tag[-1]["torch"], with_tag[0]["torch"]) if len(with_tag) > 1 else with_tag[0]["torch"]
            pythons = [version(n) for e in with_tag for n in e["python"]]
            values.update(tag_releases=versions, tag_pythons="{} to {}".format(dotted(min(pythons)), dotted(max(pythons))))
        yield Hit("index_url_wrong_or_missing", 0.88, found, values)
    elif index_trouble:
        yield Hit("index_url_wrong_or_missing", 0.8, found, values)
    if not (outside or tag_outside or never or too_old or local or index_trouble):
        if m.offered == [] or m.offered is None:
            yield Hit("python_version_no_wheel", 0.6, found, values)
            yield Hit("index_url_wrong_or_missing", 0.5, found, values)
        else:
            yield Hit("index_url_wrong_or_missing", 0.6, found, values)
            yield Hit("python_version_no_wheel", 0.5, found, values)


def python_values(m: Machine, wanted: Optional[str]) -> Values:
    """What the texts about Python say."""
    entry = knowledge.release(wanted) if wanted else None
    values: Values = {}
    if entry:
        values["range"] = "{} to {}".format(*entry["python"])
    if m.offered:
        values.update(offered_first=m.offered[0], offered_last=m.offered[-1])
    for_python = knowledge.releases_for_python(m.python) if m.python and len(m.python) > 1 else []
    if for_python:
        values["first_for_python"] = for_python[-1]
        torch, tag = recommended(m, torch=None if wanted else m.torch)
        gpu = bool(m.nvidia)
        values["install_python"] = install(torch, tag if gpu else None, m)
    number = entry["python"][1] if entry else "3.12"
    kept = "torch=={}".format(wanted) if wanted and "+" not in wanted else "torch"
    if m.system == "windows":
        values["make_env"] = "py -{0} -m venv .venv && .venv\\Scripts\\python -m pip install {1}".format(number, kept)
    else:
        values["make_env"] = (
            "python{0} -m venv .venv && .venv/bin/python -m pip install {1}   # or: uv venv --python {0}; conda create -n torch python={0}".format(
                number, kept
            )
        )
    return values
