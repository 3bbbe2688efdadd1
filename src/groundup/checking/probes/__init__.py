"""The probes: each looks at one kind of mistake and yields what it found. Adding one is writing a function and listing it here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from groundup.checking.findings import Finding
from groundup.checking.probes import data, gradients, labels, language, layers, losses, modes, numerics, optimisation, shapes, types
from groundup.checking.trial import Trial

Probe = Callable[[Trial], Iterator[Finding]]

# What a probe looks at, in the order of the reports.
PROBES: list[tuple[str, str, Probe]] = [
    ("shapes", "形状", shapes.probe),
    ("data types", "数据类型", types.probe),
    ("devices", "设备", types.devices),
    ("labels", "标签", labels.probe),
    ("loss and output", "损失与输出", losses.probe),
    ("data", "数据", data.probe),
    ("training and validation data", "训练与验证数据", data.both),
    ("the loader's workers", "加载进程", data.workers),
    ("architecture", "结构", layers.architecture),
    ("initial weights", "初始权重", layers.initial),
    ("registration of parameters", "参数注册", layers.registration),
    ("gradients", "梯度", gradients.probe),
    ("numbers that overflow or vanish", "数值溢出与消失", numerics.probe),
    ("modes", "训练与评估模式", modes.probe),
    ("optimizer and parameters", "优化器与参数", optimisation.parameters),
    ("the training step", "训练步骤", optimisation.loop),
    ("learning rate", "学习率", optimisation.rates),
    ("independence of samples", "样本独立性", shapes.independence),
    ("language model", "语言模型", language.probe),
    ("adapters and vocabulary", "适配器与词表", language.adapters),
    ("padding and positions", "填充与位置", language.positions),
]

# One step and nothing else: what every training of some length begins with.
FAST = [p for p in PROBES if p[0] in ("shapes", "data types", "loss and output", "registration of parameters", "optimizer and parameters")]
