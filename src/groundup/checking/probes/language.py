"""Language models: what each position is trained to say, what it may see, padding, templates, vocabulary and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from groundup.checking.findings import Finding
from groundup.checking.probes.numerics import ignored
from groundup.checking.probes.shapes import _from_table, _position, _replaced
from groundup.checking.subject import first_tensor
from groundup.checking.tape import Op, tensors
from groundup.checking.trial import CLASSES, Trial

ATTENTION = {"multi_head_attention_forward", "scaled_dot_product_attention", "_transformer_encoder_layer_fwd"}


@dataclass
class Positions:
    """What is trained at each position of a batch of sequences, read from the gradient of the logits: p - onehot(target).

    Args:
        ids: the tokens (N, T); targets: the token that each position is trained to say; trained: where any is.
    """

    ids: Tensor
    targets: Tensor
    trained: Tensor
    vocabulary: int


@lru_cache(maxsize=4)
def sequences(t: Trial) -> Positions | None:
    """None where the model gives no logits for each position of token sequences."""
    made = t.step
    ids = _ids(t)
    op = made.criterion
    if ids is None or op is None or op.name not in CLASSES or made.output is None or made.slope is None or made.output.dim() != 3:
        return None
    logits, slope = made.output.detach(), made.slope
    n, steps = ids.shape
    if logits.shape[0] != n:
        return None
    if (logits.shape[1] != steps and logits.shape[2] == steps) or (
        logits.shape[1] == logits.shape[2] == steps and op.shapes[0] == tuple(logits.shape)
    ):
        slope = slope.transpose(1, 2)
    if slope.shape[1] != steps or slope.shape[-1] not in op.shapes[0]:
        return None
    return Positions(ids, slope.argmin(-1), slope.abs().amax(-1) > 0, slope.shape[-1])


def _ids(t: Trial) -> Tensor | None:
    """The token ids (N, T) of the batch: what an embedding reads."""
    x = first_tensor(t.subject.pair(t.batch)[0]) if t.batch is not None else None
    if x is None or x.is_floating_point() or x.dim() != 2 or not any(isinstance(m, nn.Embedding) for m in t.subject.model.modules()):
        return None
    return x


def _pad(t: Trial, ids: Tensor) -> int | None:
    """The padding token: the tokenizer's, an embedding's padding_idx, or what stands where the attention mask is 0."""
    tokenizer = t.subject.tokenizer
    if tokenizer is not None and getattr(tokenizer, "pad_token_id", None) is not None:
        return int(tokenizer.pad_token_id)
    mask = _mask(t, ids)
    if mask is not None and bool((mask == 0).any()):
        found = torch.unique(ids[mask == 0])
        if len(found) == 1:
            return int(found[0])
    for module in t.subject.model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return int(module.padding_idx)
    return None


def _mask(t: Trial, ids: Tensor) -> Tensor | None:
    """A mask of zeros and ones beside the ids."""
    x, _ = t.subject.pair(t.batch)
    if isinstance(x, dict):
        named = x.get("attention_mask", x.get("mask"))
        return named if isinstance(named, Tensor) and named.shape == ids.shape else None
    for tensor in tensors(x):
        if tensor is not ids and tensor.shape == ids.shape and bool(((tensor == 0) | (tensor == 1)).all()):
            return tensor
    return None


def probe(t: Trial) -> Iterator[Finding]:
    ids = _ids(t)
    if ids is None:
        return
    tokenizer = t.subject.tokenizer
    all_ids = [x for x in t.data.x if not x.is_floating_point() and x.dim() == 2]
    where = _source(t)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and ids.shape[1] > 2:
        double = sum(int(((x[:, :-1] == bos) & (x[:, 1:] == bos)).any(1).sum()) for x in all_ids)
        pads = getattr(tokenizer, "pad_token_id", None)
        if double and pads != bos:
            yield t.found("lm.double_bos", where, count=double, bos=int(bos))
    yield from _empty(t)
    p = sequences(t)
    if p is None:
        return
    yield from _pads(t, p, where)
    kind = _offset(p)
    causal = kind in (0, 1, 2) and p.vocabulary >= int(p.ids.max())
    if kind == 0:
        yield t.found(
            "lm.labels_not_shifted",
            t.outside() if t.subject.compute_loss is not None else "train_loader",
            t.step.criterion,
            share=100 * _agree(p, 0),
        )
    elif kind == 2:
        yield t.found("lm.labels_double_shift", where, share=100 * _agree(p, 2))
    if causal and kind != 0:
        yield from _future(t, p)
        yield from _ends(t, p, all_ids, where)
        yield from _prompts(t, p, where)
    if tokenizer is not None:
        yield from _template(t, all_ids, where)


def _source(t: Trial) -> str:
    return "collate" if "collate" in t.subject.namespace else "train_loader"


def _agree(p: Positions, offset: int) -> float:
    steps = p.ids.shape[1]
    if steps <= offset:
        return 0.0
    there = p.trained[:, : steps - offset]
    right = (p.targets[:, : steps - offset] == p.ids[:, offset:])[there]
    return float(right.float().mean()) if right.numel() >= 4 else 0.0


def _offset(p: Positions) -> int | None:
    """How many tokens ahead the targets are; None where they are something else (tags, another text)."""
    scores = {k: _agree(p, k) for k in (0, 1, 2)}
    best = max(scores, key=lambda k: scores[k])
    others = max(v for k, v in scores.items() if k != best)
    return best if scores[best] > 0.97 and others < 0.95 else None


def _empty(t: Trial) -> Iterator[Finding]:
    """Samples without any label that counts."""
    op = t.step.criterion
    labels = [(b.get("labels") if isinstance(b, dict) else t.subject.pair(b)[1]) for b in t.data.batches]
    ignored = int(op.argument(4, "ignore_index", -100)) if op is not None and op.name in CLASSES else -100
    found = [y for y in labels if isinstance(y, Tensor) and y.dim() == 2 and not y.is_floating_point()]
    empty = sum(int((y == ignored).all(1).sum()) for y in found)
    total = sum(len(y) for y in found)
    if empty:
        yield t.found("lm.all_labels_masked", _source(t), count=empty, total=total, ignored=ignored)


def _pads(t: Trial, p: Positions, where: str) -> Iterator[Finding]:
    pad = _pad(t, p.ids)
    if pad is None:
        return
    tokenizer = t.subject.tokenizer
    eos = getattr(tokenizer, "eos_token_id", None)
    padding = _tail(p.ids, pad)
    if eos == pad:  # the first one is an end of text
        padding = padding & torch.cat([torch.zeros_like(padding[:, :1]), padding[:, :-1]], 1)
    if int(padding.sum()) < 1:
        return
    follows = torch.cat([padding[:, 1:], torch.zeros_like(padding[:, :1])], 1)
    counted = (
        (p.trained & ((p.targets == pad) & (padding | follows) | padding))
        if t.subject.tokenizer is not None or _offset(p) is not None
        else p.trained & padding
    )
    if _offset(p) is not None:
        counted = p.trained & padding
    if int(counted.sum()) > 0.2 * int(padding.sum()):
        yield t.found("lm.pad_in_loss", "loss_fn" if t.subject.loss_fn is not None else t.outside(), t.step.criterion, count=int(counted.sum()), pad=pad,
                      share=100 * float(counted.sum()) / max(1, int(p.trained.sum())))  # fmt: skip


def _tail(ids: Tensor, pad: int) -> Tensor:
    """Where the runs of padding at the end or the beginning of the rows are."""
    there = ids == pad
    tail = there.flip(1).cumprod(1).flip(1).bool()
    head = there.cumprod(1).bool()
    return tail | head


def _lengths(t: Trial, ids: Tensor) -> Tensor:
    pad = _pad(t, ids)
    if pad is None:
        return torch.full((len(ids),), ids.shape[1])
    tail = (ids == pad).flip(1).cumprod(1).flip(1).bool()
    return (~tail).sum(1)


def _run(t: Trial, swap: dict[int, Tensor]) -> Tensor | None:
    if t.inputs is None:
        return None
    args, kwargs = t.inputs
    try:
        _, out = t.forward(*_replaced((args, kwargs), swap))
    except Exception:
        return None
    logits = getattr(out, "logits", None)
    return logits if isinstance(logits, Tensor) else next((o for o in tensors(out) if o.is_floating_point() and o.dim()), None)


def _given(t: Trial) -> Tensor | None:
    """The ids as the model itself is given them."""
    if t.inputs is None:
        return None
    args, kwargs = t.inputs
    if isinstance(kwargs.get("input_ids"), Tensor):
        return kwargs["input_ids"]  # type: ignore[no-any-return]
    return next((a for a in tensors((args, kwargs)) if not a.is_floating_point() and a.dim() == 2 and a.dtype != torch.bool), None)


def _future(t: Trial, p: Positions) -> Iterator[Finding]:
    """One token is changed: no output before it may move, outputs behind it should."""
    given = _given(t)
    if given is None or given.shape[1] < 4:
        return
    lengths = _lengths(t, given)
    before = _run(t, {})
    if before is None or before.dim() != 3:
        return
    out = before if before.shape[1] == given.shape[1] else before.transpose(1, 2)
    if out.shape[1] != given.shape[1]:
        return
    at = max(1, int(lengths.min()) // 2)
    changed = given.clone()
    changed[:, at] = _another(given[:, at], t)
    after = _run(t, {id(given): changed})
    if after is None:
        return
    after = after if after.shape[1] == given.shape[1] and after.shape == out.shape else after.transpose(1, 2)
    scale = float(out.abs().max()) + 1e-12
    moved = (after - out).abs().amax(-1) / scale
    early, late = float(moved[:, :at].max()), float(moved[:, at + 1 : int(lengths.min())].max()) if int(lengths.min()) > at + 1 else 1.0
    if early > 1e-4:
        op = next((o for o in t.step.tape.ops if o.name in ATTENTION or o.name == "softmax" or o.name in ("lstm", "gru")), None)
        place = t.place(op, "forward")
        if late < 1e-6:
            yield t.found("lm.mask_inverted", place, op, what="the causal mask", moved=early)
        else:
            yield t.found("lm.causal_mask_missing", place, op, position=at, moved=early)


def _another(tokens: Tensor, t: Trial) -> Tensor:
    """Other tokens that also occur in the batch."""
    ids = _ids(t)
    assert ids is not None
    pad = _pad(t, ids)
    known = torch.unique(ids)
    known = known[known != pad] if pad is not None and len(known) > 2 else known
    place = torch.searchsorted(known, tokens.clamp(max=int(known.max())))
    return known[(place + 1) % len(known)]


def _ends(t: Trial, p: Positions, all_ids: list[Tensor], where: str) -> Iterator[Finding]:
    tokenizer = t.subject.tokenizer
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        return
    if bool(((p.targets == eos) & p.trained).any()):
        return
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad == eos:
        yield t.found("lm.pad_is_eos", where if "tokenizer" not in t.subject.namespace else "tokenizer", eos=int(eos))
    elif not any(bool((x == eos).any()) for x in all_ids) or (all_ids and not t.data.error):
        yield t.found("lm.missing_eos", where, eos=int(eos), count=sum(len(x) for x in all_ids))


def _prompts(t: Trial, p: Positions, where: str) -> Iterator[Finding]:
    tokenizer = t.subject.tokenizer
    answer = getattr(tokenizer, "assistant_token_id", None)
    if answer is None or not bool((p.ids == answer).any()):
        return
    last = (p.ids == answer).float().flip(1).cummax(1).values.flip(1) > 0  # positions up to the last answer's beginning
    first = ~((p.ids == answer).float().cummax(1).values > 0)  # positions before the first
    counted = int((p.trained & first & last)[:, 1:].sum())
    if counted > 0.3 * int((first & last)[:, 1:].sum()) and counted:
        yield t.found("lm.prompt_not_masked", where, count=counted, share=100 * counted / max(1, int(p.trained.sum())))


def _template(t: Trial, all_ids: list[Tensor], where: str) -> Iterator[Finding]:
    tokenizer = t.subject.tokenizer
    roles: list[int] = [int(r) for n in ("user_token_id", "assistant_token_id") if (r := getattr(tokenizer, n, None)) is not None]
    if (
        not roles
        and getattr(tokenizer, "chat_template", None)
        and hasattr(tokenizer, "apply_chat_template")
        and hasattr(tokenizer, "all_special_ids")
    ):
        try:
            told = tokenizer.apply_chat_template([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenize=True)
            told = told["input_ids"] if isinstance(told, dict) else told
            plain = set(tokenizer("a b")["input_ids"])
            roles = [
                i
                for i in told
                if i in set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {})) and i not in plain
            ]
        except Exception:
            return
    if roles and all_ids and not any(bool(torch.isin(x, torch.tensor(roles)).any()) for x in all_ids):
        yield t.found("lm.chat_template_missing", where, roles=roles[:4])


# -- vocabulary and adapters -----------------------------------------------------------------------------------------------------
def adapters(t: Trial) -> Iterator[Finding]:
    s, made = t.subject, t.step
    named = dict(s.model.named_parameters())
    low = {n: p for n, p in named.items() if "lora" in n.lower()}
    targets = s.lora_targets
    if targets and not low:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        there = sorted(
            {
                n.rpartition(".")[2]
                for n, m in s.model.named_modules()
                if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)) and n
            }
        )
        if not any(n == w or n.endswith(f".{w}") for w in wanted for n, _ in s.model.named_modules()):
            yield t.found("lm.lora_no_match", "lora_targets", targets=wanted, names=there)
    groups: dict[str, list[str]] = {}
    for n in low:
        parts = n.split(".")
        cut = next((i for i, part in enumerate(parts) if "lora" in part.lower()), len(parts) - 1)
        groups.setdefault(".".join(parts[:cut]), []).append(n)
    for owner, members in groups.items():
        matrices = [m for m in members if low[m].dim() > 1]
        if len(matrices) >= 2 and not any(bool(low[m].any()) for m in matrices):
            yield t.found("lm.lora_both_zero", f"model.{owner}", layer=f"model.{owner}", names=matrices[:2])
            break
    added = s.added_token_ids
    tables = [(n, m) for n, m in s.model.named_modules() if isinstance(m, nn.Embedding)]
    if added is not None and tables:
        top = max(int(a) for a in added)
        name, table = max(tables, key=lambda m: m[1].num_embeddings)
        grad = made.grads.get(f"{name}.weight")
        used = [a for a in map(int, added) if any(bool((x == a).any()) for x in t.data.x[:8] if not x.is_floating_point())]
        frozen = not table.weight.requires_grad and not any(n.startswith(f"{name}.") and p.requires_grad for n, p in named.items())
        still = (
            grad is not None
            and used
            and made.error is None
            and not bool(grad[[a for a in used if a < len(grad)]].any())
            and len(t.data.x) == 1
        )
        if top < table.num_embeddings and (frozen or still):
            yield t.found("lm.new_tokens_frozen", f"model.{name}", layer=f"model.{name}", tokens=[int(a) for a in added][:8])
    yield from _vocabulary(t, tables)
    yield from _padding_index(t, tables)


def _vocabulary(t: Trial, tables: list[tuple[str, nn.Embedding]]) -> Iterator[Finding]:
    made = t.step
    op = made.tape.failed
    if made.error is None or op is None:
        later = t.data if t.step.error is None else None
        ids = _ids(t)
        reads = next(
            (o for o in made.tape.ops if o.name == "embedding" and ids is not None and o.inputs and o.inputs[0].shape == ids.shape), None
        )
        if later is None or reads is None or ids is None:
            return
        rows = reads.inputs[1].shape[0]
        top = max((int(x.max()) for x in later.x if not x.is_floating_point() and x.numel()), default=0)
        if top >= rows and made.tape.origin(reads) is not None:
            yield t.found("lm.vocab_too_small", t.place(reads), reads, layer=t.place(reads), rows=rows, largest=top, write=top + 1)
        elif t.trained.error is not None and t.subject.fit is None:
            yield from _table(t, t.trace_step(t.trained.bad_step))
        return
    yield from _table(t, made)


def _table(t: Trial, made: Any) -> Iterator[Finding]:
    op: Op | None = made.tape.failed
    if op is None:
        return
    tape = made.tape
    if op.name == "embedding" and not op.inputs[0].is_floating_point():
        index, rows = op.inputs[0], op.inputs[1].shape[0]
        if not index.numel() or (int(index.max()) < rows and int(index.min()) >= 0):
            return
        number = op.sources[0]
        made_by = {tape.ops[i].name for i in tape.ancestors(tape.ops[number])} if number is not None else set()
        if made_by & {"arange", "cumsum", "linspace"}:
            yield t.found("lm.position_table_too_short", t.place(op), op, layer=t.place(op), rows=rows, length=int(index.max()) + 1)
        else:
            yield t.found(
                "lm.vocab_too_small", t.place(op), op, layer=t.place(op), rows=rows, largest=int(index.max()), write=int(index.max()) + 1
            )
    elif op.name in ("add", "add_") and len(op.inputs) > 1 and _position(tape, op):
        shapes = op.shapes
        table = next((i for i, src in enumerate(op.sources) if src is None or _from_table(tape, tape.ops[src])), 1)
        other = 1 - table
        rows = shapes[table][-2] if len(shapes[table]) > 1 else shapes[table][0]
        length = shapes[other][-2] if len(shapes[other]) > 1 else shapes[other][0]
        source = tape.ops[op.sources[table]].inputs[0] if op.sources[table] is not None else op.inputs[table]
        owner = next((n for n, p in [*t.subject.model.named_parameters(), *t.subject.model.named_buffers()] if p is source), None)
        place = f"model.{owner}" if owner else t.place(op)
        yield t.found("lm.position_table_too_short", place, op, layer=place, rows=rows, length=length)


def _padding_index(t: Trial, tables: list[tuple[str, nn.Embedding]]) -> Iterator[Finding]:
    ids = _ids(t)
    if ids is None:
        return
    for name, table in tables:
        pad = table.padding_idx
        if pad is None or not any(
            o.name == "embedding" and o.inputs[0].shape == ids.shape and o.inputs[1] is table.weight for o in t.step.tape.ops
        ):
            continue
        inside = total = 0
        for x in t.data.x:
            if not x.is_floating_point() and x.dim() == 2:
                there = x == pad
                inside += int((there & ~_tail(x, pad)).sum())
                total += int(there.sum())
        if inside > 0.05 * max(1, total) and inside:
            yield t.found("lm.padding_idx_used", f"model.{name}", layer=f"model.{name}", token=pad, count=inside)


# -- padding and positions -------------------------------------------------------------------------------------------------------
def positions(t: Trial) -> Iterator[Finding]:
    given = _given(t)
    if given is not None and t.evaluated is not None and _ids(t) is not None:
        yield from _padding(t, given)
    yield from _order(t)


def _padding(t: Trial, given: Tensor) -> Iterator[Finding]:
    """The padding tokens are changed, and the real ones: which of them moves the outputs of the real positions?"""
    mask = _mask(t, given)
    pad = _pad(t, given)
    inputs = t.inputs
    masks = [
        a
        for a in tensors(inputs)
        if a.shape == given.shape and a is not given and (a.dtype == torch.bool or bool(((a == 0) | (a == 1)).all()))
    ]
    if masks and mask is None:
        mask = masks[0] if float((masks[0] != 0).float().mean()) > 0.3 else None
    real = (mask != 0) if mask is not None else None
    if pad is not None:
        tail = _tail(given, pad)
        by_pad = ~tail
        if real is None or (bool(tail.any()) and not bool((real == by_pad).all())):
            real = by_pad
    if real is None or bool(real.all()) or not bool(real.any()):
        return
    if (inverted := _attention_mask(t, real)) is not None:
        yield t.found("lm.mask_inverted", t.place(inverted, "forward"), inverted, what="the padding mask", moved="-")
        return
    before = _run(t, {})
    if before is None or not bool(before.isfinite().all()):
        return
    other = _another(given.flatten(), t).view_as(given)
    after = _run(t, {id(given): torch.where(real, given, other)})
    if after is None or after.shape != before.shape:
        return
    n, steps = given.shape
    scale = float(before.abs().max()) + 1e-12
    moved = (after - before).abs() / scale
    each = moved.dim() == 3 and (moved.shape[1] == steps or moved.shape[2] == steps)
    if each:
        moved = moved if moved.shape[1] == steps else moved.transpose(1, 2)
        effect = float(moved[real].max())
    else:
        effect = float(moved[~real.all(1)].max()) if moved.shape[0] == n else 0.0
    if effect < 1e-4:
        return
    # Do the real tokens count at all where padding does?
    keep = real.clone()
    keep[:, 0] = False
    swapped = _run(t, {id(given): torch.where(keep, other, given)})
    part = (~real.all(1)) & (real.sum(1) > 2)
    if swapped is not None and bool(part.any()) and not each:
        answer = float((swapped - before)[part].abs().max()) / scale
        if answer < 1e-5:
            op = next((o for o in t.evaluated[0].ops if o.name in ATTENTION), None) if t.evaluated else None
            yield t.found("lm.mask_inverted", t.place(op, "forward"), op, what="the padding mask", moved=effect)
            return
    last = None if each else _reads_last(t)
    if last is not None:
        yield t.found("lm.pool_on_padding", t.place(last, "forward"), last, count=int((~real[:, -1]).sum()), rows=n)
    elif masks or mask is not None or (t.evaluated is not None and any(o.name in ATTENTION for o in t.evaluated[0].ops)):
        yield t.found("lm.attention_mask_ignored", "forward", None, moved=effect)


def _attention_mask(t: Trial, real: Tensor) -> Op | None:
    """An attention that is told to ignore the real tokens and to read the padding."""
    assert t.evaluated is not None
    for op in t.evaluated[0].ops:
        if op.name == "multi_head_attention_forward":
            mask = op.kwargs.get("key_padding_mask")
            if isinstance(mask, Tensor) and mask.shape == real.shape and float((ignored(mask) == real).float().mean()) > 0.9:
                return op
        if op.name == "scaled_dot_product_attention":
            mask = op.kwargs.get("attn_mask", op.args[3] if len(op.args) > 3 else None)
            if isinstance(mask, Tensor) and mask.dim() >= 2 and mask.shape[-1] == real.shape[1] and mask.shape[0] == real.shape[0]:
                on = mask if mask.dtype == torch.bool else mask > -1e4
                keys = on.reshape(len(on), -1, on.shape[-1]).any(1)
                if float((keys == ~real).float().mean()) > 0.9:
                    return op
    return None


def _reads_last(t: Trial) -> Op | None:
    """A look at one fixed position of all rows, or the final state of a recurrent layer."""
    assert t.evaluated is not None
    tape = t.evaluated[0]
    for op in reversed(tape.ops):
        if op.name == "__getitem__" and len(op.shapes[0]) == 3 and op.outputs and op.outputs[0].dim() == 2:
            key = op.args[1]
            if isinstance(key, tuple) and len(key) >= 2 and isinstance(key[1], int) and key[1] != 0:
                return op
        if op.name == "select" and len(op.shapes[0]) == 3:
            return op
    packed = any(o.name.startswith("_pack_padded") for o in tape.ops)
    for op in tape.ops:
        if op.name in ("lstm", "gru", "rnn_tanh", "rnn_relu") and len(op.outputs) > 1 and not packed and op.inputs[0].dim() == 3:
            users = tape.users(op)
            if users and not any(i is op.outputs[0] for u in users for i in u.inputs):  # the final state alone is read
                return op
    return None


def _order(t: Trial) -> Iterator[Finding]:
    """Attention that gives the same for any order of its positions, though the labels depend on the order."""
    if t.inputs is None or t.evaluated is None:
        return
    tape, output = t.evaluated
    attention = next((o for o in tape.ops if o.name in ATTENTION or (o.name == "softmax" and o.outputs[0].dim() >= 3)), None)
    x = next((a for a in tensors(t.inputs) if a.dim() in (2, 3) and a.shape[0] == t.size and a.dtype != torch.bool), None)
    if attention is None or x is None or x.shape[1] < 3 or (x.dim() == 2 and x.is_floating_point()):
        return
    out = next((o for o in tensors(output) if o.is_floating_point() and o.dim()), None)
    mask = _mask(t, x) if len(list(tensors(t.inputs))) > 1 else None
    if out is None or (mask is not None and not bool((mask == 1).all())):
        return
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
    if bool((order == torch.arange(len(order))).all()):
        order = order.roll(1)
    moved = _run(t, {id(x): x[:, order]})
    if moved is None or moved.shape != out.shape:
        return
    if out.dim() == 3 and out.shape[1] == x.shape[1]:
        out = out[:, order]
    elif out.dim() == 3 and out.shape[2] == x.shape[1]:
        out = out[:, :, order]
    if float((moved - out).abs().max()) > 1e-4 * (float(out.abs().max()) + 1e-12):
        return
    labels = t.data.targets
    if labels is None or t.data.inputs is None or not _order_tells(t.data.inputs, labels):
        return
    place = t.place(attention, "forward")
    yield t.found("lm.no_positions", place if place != "model" else "forward", attention)


def _order_tells(x: Tensor, y: Tensor) -> bool:
    """Whether labels can be told better from tokens with their places than from the bag of tokens alone: two linear fits, on halves of the data."""
    if y.dim() == 2 and y.shape[1] == x.shape[1]:
        return _places_tell(x, y)
    y = y.flatten()
    if len(y) != len(x) or len(y) < 64:
        return False
    if x.is_floating_point():
        bag, placed = torch.cat([x.mean(1), x.std(1)], -1).flatten(1), x.flatten(1)
    else:
        values = torch.unique(x, return_inverse=True)
        if len(values[0]) > 512:
            return False
        one = nn.functional.one_hot(values[1], len(values[0])).float()
        bag, placed = one.sum(1), one.flatten(1)
    return _fit(placed, y) > _fit(bag, y) + 0.08


def _places_tell(x: Tensor, y: Tensor) -> bool:
    """Labels of each position: does the same token get other labels at other places?"""
    if x.is_floating_point() or y.is_floating_point():
        return False
    seen: dict[int, set[int]] = {}
    for token, label in zip(x.flatten().tolist(), y.flatten().tolist()):
        seen.setdefault(token, set()).add(label)
    return sum(len(v) > 1 for v in seen.values()) > 0.5 * len(seen)


def _fit(features: Tensor, y: Tensor) -> float:
    """Share of right answers of a ridge regression on one half, asked on the other; R^2 for real targets."""
    features = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], 1)
    half = len(features) // 2
    if y.is_floating_point():
        target = y.double()[:, None]
        target = target - target[:half].mean()
    else:
        target = nn.functional.one_hot(torch.unique(y, return_inverse=True)[1]).double()
    a = features[:half]
    w = torch.linalg.solve(a.T @ a + 1.0 * torch.eye(a.shape[1], dtype=torch.float64), a.T @ target[:half])
    told = features[half:] @ w
    if y.is_floating_point():
        return float(1 - (told - target[half:]).square().sum() / target[half:].square().sum().clamp(min=1e-12))
    return float((told.argmax(1) == target[half:].argmax(1)).double().mean())
