"""An adapter added into its base's matrices, behind a gate: the merged folder, opened again, must say what base and adapter say together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from groundup import modelfolder
from groundup.core import files
from groundup.core.errors import GateError, UserError
from groundup.core.recipe import load
from groundup.models import lora
from groundup.models.generation import Sampling, generate
from groundup.training.checkpoint import commit

TOLERANCE = 1e-3  # greatest difference of a logit, as a share of the largest logit
PROMPTS = (
    "What is the capital of France?",
    "def add(a, b):",
    "请用一句话介绍你自己。",
    "List three colours, one per line.",
    "Once upon a time, there was",
    "1 2 3 4 5",
    "春眠不觉晓，",
    "Translate into English: 谢谢",
)
GREEDY = 32  # tokens of each prompt's answer that are compared


def merge(model: str, out: str | Path | None = None, *, force: bool = False, trust_code: bool = False) -> dict[str, Any]:
    """Writes a model folder that needs neither the adapter nor its base.

    Returns:
        {'model', 'to', 'file', 'bytes', 'largest_difference', 'tolerance', 'kl', 'greedy_agreement', 'prompts'}.

    Raises:
        GateError: the merged model answers otherwise; no folder is left.
        UserError: no adapter there, or the folder exists.
    """
    loaded = modelfolder.load(model, trust_code=trust_code)
    task: Any = loaded.task
    if not lora.adapted(loaded.model):
        raise UserError("{model} has no adapter to merge", "{model} 没有可合并的适配器", model=loaded.path)
    run = loaded.path.resolve().parent if loaded.path.name == "model" else loaded.path  # the run's folder: names of runs may be alike
    path = Path(out).expanduser() if out is not None else Path("exports") / f"{run.name}-merged"
    if path.exists() and not force:
        raise UserError("{path} exists already", "{path} 已经存在", path=path, fix="--force replaces it, or give another --out", fix_zh="--force 会替换它，或另选一个 --out")
    rows = [_tokens(task, prompt) for prompt in PROMPTS]
    before, said = _outputs(loaded.model, rows), _answers(loaded.model, task, rows)
    lora.merge(loaded.model)
    card = loaded.card
    recipe = load(
        {
            "name": card["source_run"],
            "task": {"name": card["task"]["name"], **card["task"]["arguments"]},
            "data": card["data"]["spec"] if "data" in card else {"source": str(loaded.path)},
            "model": {"name": loaded.architecture, **loaded.arguments},
        }
    )
    facts: dict[str, Any] = {k: card[k] for k in ("source_run", "metrics", "intervals", "seed", "data", "views") if k in card}
    path.parent.mkdir(parents=True, exist_ok=True)
    final, path = path, files.temporary_sibling(path)  # what stands there is replaced only by what has passed
    readme = f"# {card['source_run']}\n\nAn adapter merged into its base. Both belong to the same model family and licence.\n"
    modelfolder.save(
        path, model=loaded.model, weights=loaded.model.state_dict(), task=task, recipe=recipe, facts={**facts, "parent": {"sha256": card["parent"]["sha256"]}},
        readme=readme, model_arguments={},
    )  # fmt: skip
    merged = modelfolder.load(path)
    own: Any = merged.task
    after, says = _outputs(merged.model, rows), _answers(merged.model, own, rows)
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before))
    kl = max(float(F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="batchmean", log_target=True)) for a, b in zip(after, before))
    agreed = sum(a == b for a, b in zip(says, said)) / len(rows)
    same_text = own.tokenizer.chat_template == task.tokenizer.chat_template and own.tokenizer.end == task.tokenizer.end
    if not (difference <= TOLERANCE and same_text and [_tokens(own, p) for p in PROMPTS] == rows):
        shutil.rmtree(path)
        raise GateError(
            "the merged model is not base and adapter: logits differ by {difference:.1e} (at most {tolerance:g}), {agreed:.0%} of answers alike, template and "
            "end token {same}; no folder was written",
            "合并后的模型与“基座＋适配器”不一致：logits 相差 {difference:.1e}（最多 {tolerance:g}），{agreed:.0%} 的回答相同，模板与结束词元{same_zh}；没有写出目录",
            difference=difference,
            tolerance=TOLERANCE,
            agreed=agreed,
            same="alike" if same_text else "different",
            same_zh="相同" if same_text else "不同",
            fix="groundup generate {model}   (or evaluate, serve: the adapter works without being merged)",
            fix_zh="groundup generate {model}   （evaluate、serve 也一样：不合并也能使用适配器）",
            model=loaded.path,
        )
    commit(path, final)
    return {
        "model": str(loaded.path),
        "to": "merged",
        "file": str(final),
        "bytes": sum(f.stat().st_size for f in final.iterdir()),
        "largest_difference": difference,
        "tolerance": TOLERANCE,
        "kl": kl,
        "greedy_agreement": agreed,
        "prompts": len(rows),
    }


def _tokens(task: Any, prompt: str) -> list[int]:
    """A prompt as serving renders it: through the chat template where there is one."""
    tokenizer = task.tokenizer
    if tokenizer.chat_template:
        ids = tokenizer.encode_rendered(tokenizer.render([{"role": "user", "content": prompt}]))
    else:
        ids = tokenizer.encode_prompt(prompt)
    return list(ids[: task.input_shape[0] // 2])


@torch.no_grad()
def _outputs(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    return [model(torch.tensor([row]))[0].float() for row in rows]


def _answers(model: Any, task: Any, rows: list[list[int]]) -> list[list[int]]:
    how = Sampling(max_tokens=GREEDY, temperature=0, stop_tokens=task.tokenizer.turn_ends())
    return [generate(model, [row], how)[0] for row in rows]
