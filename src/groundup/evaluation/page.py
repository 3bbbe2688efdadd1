"""The pieces an HTML report is built from. Texts from users pass through `esc`; everything else here is given HTML and gives HTML."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groundup.core.messages import language, say

# Light and dark by the reader's own setting. Plots are drawn on white: in the dark they are inverted with their hues turned back.
STYLE = """
:root { color-scheme: light dark; --back: #f4f5f7; --card: #fff; --text: #1d2129; --soft: #5c6370; --line: #e3e6ea; --accent: #0068a8; --bar: #cfe3f1; }
@media (prefers-color-scheme: dark) {
  :root { --back: #121418; --card: #1b1e24; --text: #e7e9ee; --soft: #9ba3b0; --line: #2e333c; --accent: #6db9ec; --bar: #23475f; }
  img.plot { filter: invert(.89) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); line-height: 1.5; -webkit-text-size-adjust: 100%;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 40px; }
header { margin: 0 0 22px; }
h1 { margin: 0; font-size: 27px; line-height: 1.25; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 17px; }
.kind, .note, figcaption { color: var(--soft); }
.kind { margin: 3px 0 0; overflow-wrap: anywhere; }
.note { margin: 4px 0 8px; font-size: 13.5px; max-width: 80ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 0 0 16px; }
section > :last-child { margin-bottom: 0; }
.headline { display: flex; flex-wrap: wrap; gap: 14px 44px; align-items: center; }
.headline .value { font-size: 46px; font-weight: 650; line-height: 1.1; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.headline .name { color: var(--accent); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 12px 26px; flex: 1 1 330px; margin: 0; }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { margin: 0; font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); gap: 14px 22px; margin: 8px 0; }
.gallery.one { grid-template-columns: minmax(0, 540px); }
.gallery.large { grid-template-columns: minmax(0, 800px); }
.gallery.wide { grid-template-columns: minmax(0, 1fr); }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: 14px 16px; margin: 8px 0 12px; }
.photos img { width: 144px; height: 144px; object-fit: contain; background: var(--back); }
.photos figcaption { overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption { font-size: 13px; margin-top: 2px; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
.split { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(360px, 100%), 1fr)); gap: 8px 28px; align-items: start; }
.scroll { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: min(100%, 360px); }
th, td { padding: 5px 20px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: 13px; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
td { max-width: 56ch; overflow-wrap: break-word; }
th.right, td.right { text-align: right; white-space: nowrap; overflow-wrap: normal; }
.small { display: block; min-width: 14ch; color: var(--soft); font-size: 12.5px; }
.meter { display: inline-block; min-width: 86px; padding: 0 6px; border-radius: 4px; text-align: right; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; }
code { overflow-wrap: anywhere; }
td code { overflow-wrap: break-word; }
pre { margin: 8px 0; padding: 10px 12px; background: var(--back); border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--accent); }
.spans { margin: 8px 0 14px; display: grid; gap: 7px; }
.spans .track { position: relative; height: 9px; background: var(--back); border-radius: 5px; }
.spans .track i { position: absolute; top: 0; bottom: 0; min-width: 4px; border-radius: 5px; background: var(--accent); }
.spans span { font-size: 13px; color: var(--soft); }
footer { color: var(--soft); font-size: 13px; text-align: center; }
@media (max-width: 560px) {
  main { padding: 18px 12px 28px; } section { padding: 14px; } h1 { font-size: 22px; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: 7px; } th, td { padding-right: 12px; }
  th, td.right { font-size: 13.5px; }
  .stack, .stack tbody, .stack tr, .stack td { display: block; } .stack thead { display: none; }
  .stack tr { padding: 6px 0; border-bottom: 1px solid var(--line); } .stack td { border: 0; padding: 0; } .stack td + td { color: var(--soft); }
}
@media print {
  :root { --back: #fff; --card: #fff; --text: #000; --soft: #444; --line: #ccc; }
  img.plot { filter: none; } body { font-size: 11pt; } main { max-width: none; padding: 0; }
  section { border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: 10px 0; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; } .scroll { overflow: visible; }
  .meter { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # HTML has no way to write them


def esc(value: Any) -> str:
    """Any text as HTML, also one with markup, control characters or half of a surrogate pair (an undecodable file name)."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return html.escape(_CONTROL.sub("\ufffd", text), quote=True)


def number(value: Any) -> str:
    """A value for a table; '–' for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return yes_no(value)
    if not isinstance(value, int | float):
        return esc(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 100 or value == 0 else f"{value:.4g}"


def interval(pair: Any) -> str:
    """'0.9619 – 0.9829'; empty where there is none."""
    known = pair and not any(p is None or math.isnan(p) for p in pair)
    return f"{number(pair[0])} – {number(pair[1])}" if known else ""


def code(text: Any) -> str:
    """A digest or a path."""
    return f"<code>{esc(text)}</code>"


def yes_no(value: Any) -> str:
    return "–" if value is None else say("yes", "是") if value else say("no", "否")


def document(title: str, kind: str, headline: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page; sections without content are left out."""
    body = "\n".join(f"<section>\n<h2>{esc(heading)}</h2>\n{content}\n</section>" for heading, content in sections if content)
    tongue = "zh-CN" if language() == "zh" else "en"
    made = say("made by groundup; this file fetches nothing and runs no scripts", "由 groundup 生成；本文件不访问网络，也不运行脚本")
    return f"""<!DOCTYPE html>
<html lang="{tongue}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{esc(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{esc(title)}</h1>
<p class="kind">{esc(kind)}</p>
</header>
<section class="headline">
{headline}
</section>
{body}
<footer>{made}</footer>
</main>
</body>
</html>
"""


def headline(name: str, value: str, interval: str, where: str, tiles: Sequence[tuple[str, str]]) -> str:
    """The figure that counts, large; beside it the size of the run."""
    small = "<br>".join(esc(t) for t in (interval, where) if t)
    figure = f'<div><div class="name">{esc(name)}</div><div class="value">{value}</div><div class="kind">{small}</div></div>'
    listed = "".join(f"<div><dt>{esc(k)}</dt><dd>{v}</dd></div>" for k, v in tiles)
    return figure + (f'<dl class="tiles">{listed}</dl>' if listed else "")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: tuple[int, ...] = (), stack: bool = False) -> str:
    """Cells are HTML; columns in `right` are numbers. Wide tables scroll inside their own box; on a narrow screen the cells of a `stack`
    (sentences) stand under each other instead. No row, no table."""
    if not rows:
        return ""
    side = ['class="right"' if i in right else "" for i in range(len(columns))]
    head = "".join(f"<th {s}>{c}</th>" for s, c in zip(side, columns)) if any(columns) else ""
    body = "\n".join("<tr>" + "".join(f"<td {s}>{c}</td>" for s, c in zip(side, row)) + "</tr>" for row in rows)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    kind = ' class="stack"' if stack else ""
    return f'<div class="scroll"><table{kind}>{head}<tbody>\n{body}\n</tbody></table></div>'.replace("<th >", "<th>").replace(
        "<td >", "<td>"
    )


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and their values (HTML)."""
    return '<dl class="facts">' + "".join(f"<dt>{esc(k)}</dt><dd>{v}</dd>" for k, v in rows) + "</dl>" if rows else ""


def note(text: str) -> str:
    return f'<p class="note">{esc(text)}</p>'


def small(text: str) -> str:
    return f'<span class="small">{esc(text)}</span>' if text else ""


def pre(text: str) -> str:
    return f"<pre>{esc(text)}</pre>"


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{esc(summary)}</summary>{content}</details>" if content else ""


def split(left: str, right: str) -> str:
    """Two pieces beside each other where there is room."""
    return f'<div class="split"><div>{left}</div><div>{right}</div></div>' if left and right else left + right


def meter(share: float, text: str) -> str:
    """A number on a bar of its size."""
    percent = min(max(share, 0.0), 1.0) * 100 if share == share else 0.0
    return f'<span class="meter" style="background: linear-gradient(to right, var(--bar) {percent:.1f}%, transparent 0)">{text}</span>'


def spans(rows: Sequence[tuple[int, int, str]]) -> str:
    """Ranges on a common axis, one under the other: (from, to, words)."""
    most = max((last for _, last, _ in rows), default=0) or 1
    bars = "".join(f'<div><span>{esc(text)}</span><div class="track"><i style="left: {first / most:.2%}; width: {(last - first) / most:.2%}"></i></div></div>'
                   for first, last, text in rows)  # fmt: skip
    return f'<div class="spans">{bars}</div>'


def gallery(folder: Path, names: Sequence[str], captions: dict[str, str], *, size: str = "") -> str:
    """The pictures among `names`.png that exist, inside the page; `size` is 'wide' (all of it), 'large' or nothing (side by side)."""
    found = [(n, folder / f"{n}.png") for n in names if (folder / f"{n}.png").is_file()]
    shown = "".join(
        f'<figure><img class="{"photo" if n == "samples" else "plot"}" alt="{esc(captions.get(n, n))}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{esc(captions.get(n, ""))}</figcaption></figure>'
        for n, path in found
    )
    size = size or ("one" if len(found) == 1 else "")
    return f'<div class="gallery {size}">{shown}</div>' if shown else ""


def photos(folder: Path, entries: Sequence[tuple[str, str, str]]) -> str:
    """Small pictures with words under them: (file, caption, the record's name). Files that are missing are left out."""
    shown = "".join(
        f'<figure><img class="photo" alt="{esc(caption)}" title="{esc(record)}" '
        f'src="data:image/png;base64,{base64.b64encode((folder / name).read_bytes()).decode()}">'
        f"<figcaption>{esc(caption)}{small(record)}</figcaption></figure>"
        for name, caption, record in entries
        if (folder / name).is_file()
    )
    return f'<div class="photos">{shown}</div>' if shown else ""
