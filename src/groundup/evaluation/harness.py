"""The bridge to lm-evaluation-harness: its tasks asked of our models (`groundup evaluate MODEL --harness arc_easy,hellaswag`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.core.errors import DataError, ModelError
from groundup.data.tokenizers import Tokenizer
from groundup.data.tokens import IGNORED
from groundup.models.generation import Sampling, write
from groundup.models.language import LanguageModel
from groundup.tasks.token_loss import token_scores

ROWS = 16  # texts of one forward pass


def harness(
    model: LanguageModel, tokenizer: Tokenizer, tasks: Sequence[str], *, limit: int | None = None, chat: bool = False
) -> dict[str, Any]:
    """Values and standard errors of the harness' tasks.

    Args:
        tasks: names, or the path of a task's YAML file.
        limit: questions of each task at most.
        chat: questions go through the model's chat template.

    Returns:
        task -> {metric: value, metric_stderr: ..., 'questions': n}.

    Raises:
        ModelError: lm-eval is not installed. DataError: a task that is not known, or whose data cannot be reached.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ModelError(
            "--harness needs lm-eval, which is not installed", "--harness 需要 lm-eval，尚未安装", fix="pip install 'groundup[harness]'"
        )
    import lm_eval
    from lm_eval.tasks import TaskManager

    files = [Path(t).expanduser() for t in tasks if t.endswith((".yaml", ".yml"))]
    names = [_name(Path(t).expanduser()) if t.endswith((".yaml", ".yml")) else t for t in tasks]
    manager = TaskManager(include_path=[str(f.parent) for f in files] or None)  # type: ignore[no-untyped-call, unused-ignore]
    if unknown := [n for n in names if not manager.match_tasks([n])]:
        raise DataError("lm-eval has no task '{name}'", "lm-eval 没有任务 '{name}'", name=unknown[0], fix="lm_eval ls tasks   lists them", fix_zh="lm_eval ls tasks   可列出全部")
    try:
        found: Any = lm_eval.simple_evaluate(
            bridge(model, tokenizer), tasks=list(names), limit=limit, task_manager=manager, apply_chat_template=chat, bootstrap_iters=1000,
            log_samples=False,
        )  # fmt: skip
    except (ConnectionError, OSError) as error:
        raise DataError(
            "the data of {tasks} cannot be reached: {why}",
            "无法取得 {tasks} 的数据：{why}",
            tasks=", ".join(names),
            why=str(error).splitlines()[0],
        ) from error
    plain = {}
    for name, values in found["results"].items():
        plain[name] = {str(k).replace(",none", ""): v for k, v in values.items() if isinstance(v, int | float)}
        plain[name]["questions"] = found["n-samples"].get(name, {}).get("effective")
    return plain


def _name(path: Path) -> str:
    import yaml

    class Plain(yaml.SafeLoader):
        """Tags of the harness (functions in files beside it) are left alone."""

    Plain.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        return str(yaml.load(path.read_text(encoding="utf-8"), Plain)["task"])
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError("{path} is no task of lm-eval: {why}", "{path} 不是 lm-eval 的任务：{why}", path=path, why=error) from error


def bridge(model: LanguageModel, tokenizer: Tokenizer) -> Any:
    """Our model as the harness sees models."""
    from lm_eval.api.model import TemplateLM

    class Bridge(TemplateLM):
        tokenizer_name = "groundup"

        @property
        def eot_token_id(self) -> int:
            return tokenizer.end if tokenizer.end is not None else 0

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.begin if tokenizer.begin is not None else self.eot_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
            return tokenizer.encode(string)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return tokenizer.render(chat_history, prompt=add_generation_prompt)

        def _loglikelihood_tokens(self, requests: Any, **more: Any) -> list[tuple[float, bool]]:
            rows = [(before, after) for _, before, after in requests]
            order = np.argsort([-len(a) - len(b) for a, b in rows], kind="stable")
            out: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
            for start in range(0, len(rows), ROWS):
                part = order[start : start + ROWS]
                for i, answer in zip(part, scored([rows[i] for i in part])):
                    out[i] = answer
            return out

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            found = []
            for request in requests:
                ids = [self.prefix_token_id, *tokenizer.encode(request.args[0])]
                cuts = [
                    ids[i : i + model.context + 1] for i in range(0, max(1, len(ids) - 1), model.context)
                ]  # each window sees only itself
                found.append(sum(value for value, _ in scored([(cut[:1], cut[1:]) for cut in cuts])))
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            out = []
            for request in requests:
                prompt, wanted = request.args
                until = wanted.get("until") or []
                how = Sampling(
                    max_tokens=int(wanted.get("max_gen_toks", 256)), temperature=float(wanted.get("temperature") or 0) if wanted.get("do_sample") else 0.0,
                    stop=[until] if isinstance(until, str) else until, stop_tokens=tokenizer.turn_ends(),
                )  # fmt: skip
                ids = tokenizer.encode_rendered(prompt) if "<|" in prompt else tokenizer.encode_prompt(prompt)
                room = max(1, model.context - how.max_tokens)
                out.append("".join(piece for _, piece in write(model, tokenizer, [ids[-room:]], how)))
            return out

    @torch.no_grad()
    def scored(rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the log-probability of the continuation, and whether it is what greedy choice would say."""
        device = model.output_weight.device
        cut = [([*before, *after][-(model.context + 1) :], len(after)) for before, after in rows]
        longest = max(len(ids) for ids, _ in cut) - 1
        tokens = torch.zeros(len(cut), longest, dtype=torch.int64)
        targets = torch.full((len(cut), longest), IGNORED)
        for row, (ids, count) in enumerate(cut):
            tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            at = slice(max(0, len(ids) - 1 - count), len(ids) - 1)
            targets[row, at] = torch.tensor(ids[1:])[at]
        targets = targets.to(device)
        hidden = model.features(tokens.to(device))
        nll, hit = token_scores(hidden.flatten(0, 1), model.output_weight, targets.flatten(), model.softcap)
        seen = targets != IGNORED
        greedy = (hit.view_as(targets) | ~seen).all(1)
        return [(float(v), bool(g)) for v, g in zip(-nll.view_as(targets).sum(1), greedy)]

    model.eval()
    return Bridge()
