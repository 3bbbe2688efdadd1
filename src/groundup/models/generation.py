"""Generation: one token after the other from a cache, for one prompt or for many of unequal length.

Sampled tokens depend on (seed, prompt, step) alone, so a prompt gets the same continuation whatever else is in its batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from groundup.core.errors import ModelError, UserError
from groundup.data.order import CounterRandom
from groundup.data.tokenizers import Tokenizer
from groundup.models.decoder import MLP, Decoder
from groundup.models.language import Cache, LanguageModel, RMSNorm, capped
from groundup.models.native import Laid, Native, usable

Precision = Literal["float32", "bfloat16", "int8"]
LARGE = 1_500_000  # numbers of a matrix from which x86's int8 product is the quicker one


@dataclass
class Sampling:
    """How the next token is chosen.

    Args:
        max_tokens: new tokens at most.
        temperature: logits are divided by it; 0 is greedy.
        top_k: only the k likeliest (Fan et al., arXiv 1805.04833); top_p: only the likeliest that hold p of the probability (Holtzman et al., arXiv
            1904.09751, 3.1); min_p: only those at least min_p times as likely as the likeliest (Nguyen et al., arXiv 2407.01082).
        repetition_penalty: logits of tokens that are there already are divided by it, or multiplied where negative (Keskar et al., arXiv 1909.05858, 4.1).
        stop: texts after which to end; they are not given. stop_tokens: the same for tokens.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        bounds = {
            "max_tokens": (self.max_tokens >= 1, ">= 1"),
            "temperature": (self.temperature >= 0, ">= 0"),
            "top_k": (self.top_k is None or self.top_k >= 1, ">= 1"),
            "top_p": (self.top_p is None or 0 <= self.top_p <= 1, "0 .. 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "0 .. 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "> 0"),
            "stop": (all(self.stop), "!= ''"),
            "precision": (self.precision in get_args(Precision), " | ".join(get_args(Precision))),
        }
        for name, (good, expected) in bounds.items():
            if not good:
                raise UserError(
                    "{name} = {value}; expected: {expected}",
                    "{name} = {value}；应为 {expected}",
                    name=name,
                    value=getattr(self, name),
                    expected=expected,
                    fix="groundup generate --help",
                )


def choose(logits: Tensor, seen: Tensor | None, how: Sampling, rows: Tensor, step: int) -> Tensor:
    """The next token of each row, int64 [B].

    Args:
        logits: [B, vocabulary].
        seen: bool [B, vocabulary], tokens that are there already; needed for the repetition penalty.
        rows: int64 [B], the number of each row's prompt.
    """
    scores = logits.float()
    if how.repetition_penalty != 1.0 and seen is not None:
        scores = torch.where(seen, torch.where(scores > 0, scores / how.repetition_penalty, scores * how.repetition_penalty), scores)
    if how.temperature == 0:
        return scores.argmax(-1)
    scores = scores / how.temperature
    if how.top_k is not None and how.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(how.top_k).values[:, -1:], -torch.inf)
    if how.top_p is not None and how.top_p < 1:
        ordered, index = scores.sort(descending=True)
        share = ordered.softmax(-1)
        out = share.cumsum(-1) - share >= how.top_p
        out[..., 0] = False  # the first one always stays
        scores = scores.masked_fill(torch.zeros_like(out).scatter(1, index, out), -torch.inf)
    if how.min_p:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < how.min_p * p.amax(-1, keepdim=True), -torch.inf)
    p = scores.softmax(-1, dtype=torch.float64)
    draw = CounterRandom(how.seed, torch.full_like(rows, step), rows).uniform("token").to(p.device).double()
    cumulated = p.cumsum(-1)
    token = torch.searchsorted(cumulated, draw * cumulated[:, -1:], right=True)[:, 0]
    return token.clamp(max=p.shape[-1] - 1)


# -- one step --------------------------------------------------------------------------------------------------------------------
class _Matrix:
    """x [B, in] -> x @ weight.T + bias, with the weight laid out as this batch size and precision are read fastest on CPUs.

    One row is a product of a vector with a matrix, limited by reading memory: stored by inputs, torch reads it half as fast again. Several
    rows use oneDNN's packed form. int8: one scale per output; products in bfloat16, or, for one row and a large matrix on x86, in int8 with the row
    quantised as it comes (seven bits: without VNNI instructions eight would overflow).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, precision: Precision) -> None:
        self.bias, self.kind, self.weight = bias, "plain", weight
        if precision == "int8" and rows == 1 and weight.numel() >= LARGE and (packed := _packed_int8(weight)) is not None:
            self.weight, self.kind = packed, "dynamic int8"
        elif precision == "int8":
            self.scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12)
            self.extra = -weight.shape[1] % 32  # torch's product reads 32 numbers at a time, beyond the end of other widths
            self.weight = F.pad((weight.float() / self.scale[:, None]).round().to(torch.int8), (0, self.extra))
            self.scale = self.scale.to(torch.bfloat16)
            self.kind = "int8"
        elif precision == "bfloat16":
            self.weight, self.kind = weight.to(torch.bfloat16), "bfloat16"
        elif weight.device.type == "cpu" and rows == 1:
            self.weight, self.kind = weight.t().contiguous(), "by inputs"
        elif weight.device.type == "cpu" and weight.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            try:
                self.weight, self.kind = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows), "packed"
            except RuntimeError:  # a build of torch without oneDNN
                pass

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "by inputs":
            return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)
        if self.kind == "packed":
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]
        if self.kind == "plain":
            return F.linear(x, self.weight, self.bias)
        if self.kind == "dynamic int8":
            y = torch.ops.quantized.linear_dynamic(x, self.weight, reduce_range=True)
        elif self.kind == "int8":
            x = F.pad(x, (0, self.extra)) if self.extra else x
            y = torch._weight_int8pack_mm(x.to(torch.bfloat16), self.weight, self.scale).float()
        else:
            y = F.linear(x.to(torch.bfloat16), self.weight).float()
        return y if self.bias is None else y + self.bias


def _packed_int8(weight: Tensor) -> Any:
    """A matrix for torch's dynamic int8 product; None where this machine or this torch has none."""
    if torch.backends.quantized.engine != "x86":
        return None
    scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12).double()
    try:
        with warnings.catch_warnings(action="ignore"):  # quantised tensors are to leave torch one day: then there is none
            quantised = torch.quantize_per_channel(weight.float(), scale, torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(quantised, None)
    except (AttributeError, RuntimeError):
        return None


@dataclass
class _LayerPlan:
    norm: RMSNorm
    qkv: _Matrix
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    out: _Matrix
    second_norm: RMSNorm
    gate_up: _Matrix
    down: _Matrix
    window: int | None


class _Dense(Laid):
    """The decoder's forward pass for one token per row, with matrices that are read together stored together."""

    any_rows = False

    def __init__(self, model: Decoder, rows: int, precision: Precision) -> None:
        super().__init__(model, rows, precision)
        self.table, self.norm = model.model.embed_tokens.weight, model.model.norm

        def matrix(*linears: Any) -> _Matrix:
            biased = linears[0].bias is not None
            weight = torch.cat([m.weight for m in linears]) if len(linears) > 1 else linears[0].weight
            return _Matrix(weight.detach(), torch.cat([m.bias for m in linears]).detach() if biased else None, rows, precision)

        self.layers = []
        stack: Any = model.model.layers
        for layer in stack:
            a, m = layer.self_attn, layer.mlp
            self.layers.append(
                _LayerPlan(
                    layer.input_layernorm, matrix(a.q_proj, a.k_proj, a.v_proj), a.q_norm, a.k_norm, matrix(a.o_proj),
                    layer.post_attention_layernorm, matrix(m.gate_proj, m.up_proj), matrix(m.down_proj), a.window,
                )
            )  # fmt: skip
        self.head = _Matrix(model.output_weight.detach(), None, rows, precision)

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits [B, vocabulary] after one more token of each row, int64 [B]."""
        b, end = len(tokens), (cache.same or 0) + 1
        h, kv, d = self.heads, self.kv_heads, self.head_dim
        x = F.embedding(tokens, self.table)
        cos, sin = (t[end - 1] if cache.same is not None else t[cache.lengths][:, None] for t in (self.cos, self.sin))
        may = rows = None
        if cache.same is None:
            end = int(cache.lengths.max()) + 1
            rows = torch.arange(b, device=x.device)
            seen = torch.arange(end, device=x.device)
            may = (seen <= cache.lengths[:, None])[:, None, None]
        for layer, (keys, values) in zip(self.layers, cache.layers):
            qkv = layer.qkv(_rms(x, layer.norm)).view(b, h + 2 * kv, d)
            if layer.q_norm is not None and layer.k_norm is not None:
                qk = torch.cat([_rms(qkv[:, :h], layer.q_norm), _rms(qkv[:, h : h + kv], layer.k_norm)], 1)
            else:
                qk = qkv[:, : h + kv]
            first, second = qk[..., : d // 2], qk[..., d // 2 :]
            qk = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
            if rows is None:
                keys[:, :, end - 1], values[:, :, end - 1] = qk[:, h:], qkv[:, h + kv :]
            else:
                keys[rows, :, cache.lengths], values[rows, :, cache.lengths] = qk[:, h:], qkv[:, h + kv :]
            begin = max(0, end - layer.window) if layer.window is not None and rows is None else 0
            near = may
            if may is not None and layer.window is not None:
                near = may & (seen > cache.lengths[:, None] - layer.window)[:, None, None]
            attended = F.scaled_dot_product_attention(
                qk[:, :h, None], keys[:, :, begin:end], values[:, :, begin:end], attn_mask=near, enable_gqa=h != kv
            )
            x = x + layer.out(attended.view(b, h * d))
            gate, up = layer.gate_up(_rms(x, layer.second_norm)).chunk(2, -1)
            x = x + layer.down(F.silu(gate).mul_(up))
        cache.advance(1)
        return capped(self.head(_rms(x, self.norm)), self.softcap)


def _rms(x: Tensor, norm: RMSNorm) -> Tensor:
    if x.shape[0] == 1 and x.ndim == 2 and x.device.type == "cpu" and x.dtype == torch.float32:  # three small operations instead of seven
        return (x * (float(torch.dot(x[0], x[0])) / x.shape[1] + norm.eps) ** -0.5).mul_(norm.weight)
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)


class _Any:
    """One token per row through the model as it is."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        return self.model.head(self.model.features(tokens[:, None], cache=cache))[:, -1]


def _stepper(model: LanguageModel, rows: int, capacity: int, how: Sampling, *, keep: bool = False) -> Native | _Dense | _Any:
    """Laying the matrices out anew pays from some dozens of tokens on."""
    plain = (
        isinstance(model, Decoder) and all(isinstance(layer.mlp, MLP) for layer in model.model.layers) and not hasattr(model, "peft_config")
    )
    if how.precision != "float32" and not plain:
        raise ModelError(
            "{precision} weights are for decoders without experts",
            "{precision} 权重只用于不含专家的 decoder",
            precision=how.precision,
            fix="--precision float32",
        )
    if isinstance(model, Decoder) and plain and (how.max_tokens >= 32 or how.precision != "float32"):
        return (Native if usable(model) else _Dense).of(model, rows, capacity, how.precision, keep=keep)
    return _Any(model)


# -- many tokens -----------------------------------------------------------------------------------------------------------------
def check_prompts(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
    """Raises ModelError for a prompt without tokens, or one that leaves no room in the model's context."""
    if any(not p for p in prompts):
        raise ModelError("a prompt holds no tokens", "提示中没有词元", fix='groundup generate MODEL "Once upon a time"')
    for prompt in prompts:
        if len(prompt) >= model.context:
            raise ModelError(
                "the prompt has {n} tokens; the model's context is {context}, and an answer needs room in it",
                "提示有 {n} 个词元；模型的上下文是 {context}，其中还要留出回答的空间",
                n=len(prompt),
                context=model.context,
                fix="a shorter prompt",
                fix_zh="缩短提示",
            )


@torch.inference_mode()
def stream(model: LanguageModel, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[list[int | None]]:
    """Yields, step by step, the new token of each prompt, None for those that are done.

    Args:
        prompts: token numbers, of any lengths, none empty.

    Raises:
        ModelError: see `check_prompts`; or NaN instead of logits.
    """
    check_prompts(model, prompts)
    longest = max((len(p) for p in prompts), default=0)
    device = model.output_weight.device
    steps = min(how.max_tokens, model.context - min(len(p) for p in prompts))
    training = model.training
    model.eval()
    try:
        cache, logits = _read(model, prompts, min(longest + steps, model.context), device)
        stepper = _stepper(model, len(prompts), cache.capacity if cache.capacity < 2**62 else 1, how, keep=not training)
        numbers, alive = torch.arange(len(prompts), device=device), list(range(len(prompts)))
        room = [model.context - len(p) for p in prompts]
        seen = None
        if how.repetition_penalty != 1.0:
            seen = torch.zeros(len(prompts), logits.shape[-1], dtype=torch.bool, device=device)
            for i, prompt in enumerate(prompts):
                seen[i, list(prompt)] = True
        stops = set(how.stop_tokens)
        for step in range(steps):
            if bool(logits.amax().isnan()):
                raise ModelError(
                    "the model answers with NaN: its weights hold NaN, or numbers that are too large for {precision}",
                    "模型输出 NaN：权重中含有 NaN，或数值超出 {precision} 的范围",
                    precision=how.precision,
                    fix="groundup runs verify RUN   (or take an earlier checkpoint)",
                    fix_zh="groundup runs verify RUN（或使用更早的检查点）",
                )
            tokens = choose(logits, seen, how, numbers, step)
            if seen is not None:
                seen[torch.arange(len(tokens), device=device), tokens] = True
            told: list[int | None] = [None] * len(prompts)
            keep = []
            for place, (i, token) in enumerate(zip(alive, tokens.tolist())):
                if token not in stops and step < room[i]:
                    told[i] = token
                    if step + 1 < room[i]:
                        keep.append(place)
            wanted = yield told  # the caller sends the numbers of prompts that it has enough of
            if wanted:
                keep = [place for place in keep if alive[place] not in wanted]
            if not keep or step + 1 == steps:
                return
            if len(keep) < len(alive):
                rows = torch.tensor(keep, device=device)
                cache.select(rows)
                alive, numbers, tokens = [alive[p] for p in keep], numbers[rows], tokens[rows]
                seen = None if seen is None else seen[rows]
            logits = stepper.step(tokens, cache)
    finally:
        model.train(training)


def _read(model: LanguageModel, prompts: Sequence[Sequence[int]], capacity: int, device: torch.device) -> tuple[Cache, Tensor]:
    """The prompts read into a cache, those of equal length together; and the logits after each, [B, vocabulary]."""
    lengths = sorted({len(p) for p in prompts})
    made, logits, order = [], [], []
    for length in lengths:
        chosen = [i for i, p in enumerate(prompts) if len(p) == length]
        cache = model.new_cache(len(chosen), capacity)
        hidden = model.features(torch.tensor([list(prompts[i]) for i in chosen], device=device), cache=cache)
        logits.append(model.head(hidden[:, -1]))
        made.append(cache)
        order += chosen
    if len(made) == 1:
        return made[0], logits[0]
    back = torch.tensor(order, device=device).argsort()
    return type(made[0]).joined(made, back), torch.cat(logits)[back]


def generate(model: LanguageModel, prompts: Sequence[Sequence[int]], how: Sampling) -> list[list[int]]:
    """The new tokens of each prompt. See `stream`."""
    found: list[list[int]] = [[] for _ in prompts]
    for told in stream(model, prompts, how):
        for row, token in zip(found, told):
            if token is not None:
                row.append(token)
    return found


@dataclass
class TextStream:
    """Text out of tokens as they come: whole characters only, and nothing of a stop text, not even its beginning.

    Args:
        prompt: the last tokens of a text that this one goes on from.
    """

    tokenizer: Tokenizer
    stop: Sequence[str] = ()
    text: str = ""
    given: int = 0
    done: bool = False
    ids: list[int] = field(default_factory=list)
    read: tuple[int, int] = (0, 0)
    prompt: Sequence[int] = ()

    def add(self, token: int | None) -> str:
        """The new piece of text; None ends the text and gives what was held back."""
        if self.done:
            return ""
        if token is not None:
            self.ids.append(token)
        # Only the last tokens are decoded, after those before them: some decoders write a token otherwise where a text begins.
        before, behind = self.read
        head = list(self.prompt) if before == 0 else []
        told, text = (self.tokenizer.decode(head + part) for part in (self.ids[before:behind], self.ids[before:]))
        if token is None or not text.endswith("\ufffd"):  # else the bytes of a character that is not whole yet
            self.text += text[len(told) :]
            self.read = (behind, len(self.ids))
        end = len(self.text)
        for stop in self.stop:
            if (at := self.text.find(stop, max(0, self.given - len(stop)))) >= 0:
                end, self.done = min(end, at), True
        if token is None:
            self.done = True
        elif not self.done:
            held = max((n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
            end = max(self.given, end - held)
        piece, self.given = self.text[self.given : end], max(self.given, end)
        return piece


def write(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    texts: list[TextStream] | None = None,
    *,
    continued: bool = False,
) -> Iterator[tuple[int, str]]:
    """Pieces of text as (prompt's number, text), as they come.

    Args:
        continued: the text stands right behind its prompt; some decoders would leave out the space between them where a text begins.
        texts: an empty list that gets the streams of the prompts, to see what became of them.
    """
    texts = [] if texts is None else texts
    texts += [TextStream(tokenizer, how.stop, prompt=p[-4:] if continued else ()) for p in prompts]
    source: Any = stream(model, prompts, how)
    ended: set[int] = set()
    try:
        told = next(source)
        while True:
            for i, token in enumerate(told):
                if i in ended:
                    continue
                if piece := texts[i].add(token):
                    yield i, piece
                if texts[i].done:
                    ended.add(i)
            told = source.send(ended)
    except StopIteration:
        pass
    for i, text in enumerate(texts):
        if piece := text.add(None):
            yield i, piece
