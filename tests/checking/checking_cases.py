"""A wrong program for each finding, and the change that mends it: small trainings as people write them.

`CASES`: finding -> (program, [(wrong, right), ...]). Programs begin with `PRELUDE`.
"""

from __future__ import annotations

PRELUDE = '''
import math, random
from types import SimpleNamespace
import numpy as np, torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, WeightedRandomSampler

torch.manual_seed(0)

def blobs(n=192, classes=3, dim=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(classes, dim, generator=torch.Generator().manual_seed(5))
    y = torch.randint(0, classes, (n,), generator=g)
    x = middle[y] + 0.6 * torch.randn(n, dim, generator=g)
    return (x - x.mean(0)) / x.std(0), y

def curve(n=192, dim=4, seed=2):
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return x, torch.sin(x.sum(1, keepdim=True))

def pictures(n=96, classes=4, channels=3, size=12, seed=3):
    g = torch.Generator().manual_seed(seed)
    pattern = torch.randn(classes, channels, size, size, generator=torch.Generator().manual_seed(6))
    y = torch.randint(0, classes, (n,), generator=g)
    return (pattern[y] + 0.7 * torch.randn(n, channels, size, size, generator=g)) / 1.2, y

def signals(n=160, steps=9, dim=3, classes=3, seed=4):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    x = torch.randn(n, steps, dim, generator=g)
    x[:, :, 0] += y[:, None].float() - 1
    return x, y

def loader(x, y, size=32, **more):
    return DataLoader(TensorDataset(x, y), batch_size=size, **{"shuffle": True, **more})

def walks(n=160, length=9, top=20, seed=7):
    """Token sequences in which the next token is the last one plus a step that the first two tell."""
    g = torch.Generator().manual_seed(seed)
    start, step = torch.randint(0, top - 3, (n, 1), generator=g), torch.randint(1, 4, (n, 1), generator=g)
    return 3 + (start + step * torch.arange(length)) % (top - 3)

class LM(nn.Module):
    """A causal decoder of one layer."""
    def __init__(self, vocab=20, dim=24, longest=16, causal=True):
        super().__init__()
        self.token, self.place = nn.Embedding(vocab, dim), nn.Embedding(longest, dim)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm, self.head, self.causal = nn.LayerNorm(dim), nn.Linear(dim, vocab), causal
    def hidden(self, ids):
        h = self.token(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        return self.norm(h + F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h), is_causal=self.causal))
    def forward(self, ids):
        return self.head(self.hidden(ids))

'''

TABLE = """
x, y = blobs()
train_loader = loader(x, y)
model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
"""
BINARY = """
x, y = blobs(classes=2)
y = y.float()[:, None]
train_loader = loader(x, y)
model = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 1))
loss_fn = nn.BCEWithLogitsLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
"""
REGRESSION = """
x, y = curve()
train_loader = loader(x, y)
model = nn.Sequential(nn.Linear(4, 48), nn.Tanh(), nn.Linear(48, 1))
loss_fn = nn.MSELoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
"""
VISION = """
x, y = pictures()
train_loader = loader(x, y)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.fc = nn.Linear(16 * 3 * 3, 4)
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))
model = Net()
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
"""
SEQUENCE = """
x, y = signals()
train_loader = loader(x, y)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 16, batch_first=True)
        self.head = nn.Linear(16, 3)
    def forward(self, x):
        out, _ = self.rnn(x)
        return self.head(out.mean(dim=1))
model = Net()
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
"""
LANGUAGE = """
ids = walks()
train_loader = DataLoader(TensorDataset(ids), batch_size=32, shuffle=True)
model = LM()
def compute_loss(model, batch):
    ids = batch[0]
    logits = model(ids)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
loss_fn = None
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
"""
CHAT = """
PAD, BOS, EOS, USER, BOT = 0, 1, 2, 3, 4
tokenizer = SimpleNamespace(vocab_size=30, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, user_token_id=USER, assistant_token_id=BOT, chat_template="...")
def encode(question, answer):
    prompt = [BOS, USER, *question, BOT]
    return prompt + answer + [EOS], len(prompt)
rows = []
for i in range(160):
    a = 5 + torch.randint(0, 20, (int(torch.randint(2, 6, ())),)).tolist()[0]
    question = [(a + k) % 20 + 5 for k in range(2 + i % 4)]
    rows.append(encode(question, [(t + 1) % 20 + 5 for t in question]))
def collate(batch):
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([r + [PAD] * (width - len(r)) for r, _ in batch])
    labels = torch.tensor([[-100] * p + r[p:] + [-100] * (width - len(r)) for r, p in batch])
    return {"input_ids": ids, "labels": labels}
train_loader = DataLoader(rows, batch_size=32, shuffle=True, collate_fn=collate)
model = LM(vocab=30, longest=24)
def compute_loss(model, batch):
    logits = model(batch["input_ids"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
loss_fn = None
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
"""
PADDED = """
texts = [(torch.randint(2, 18, (int(torch.randint(3, 11, ())),)).tolist(), i % 2) for i in range(192)]
texts = [(ids[:-1] + [18 + label], label) for ids, label in texts]
def collate(batch):
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    return (ids, (ids > 0).long()), torch.tensor([label for _, label in batch])
train_loader = DataLoader(texts, batch_size=32, shuffle=True, collate_fn=collate)
class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(20, 16), nn.Embedding(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 2)
    def forward(self, batch):
        ids, mask = batch
        h = self.token(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        h = h + self.attention(h, h, h, key_padding_mask=mask == 0, need_weights=False)[0]
        keep = mask.unsqueeze(-1).float()
        return self.head((h * keep).sum(1) / keep.sum(1))
model = Reader()
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
"""
LORA = """
class Low(nn.Module):
    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features ** 0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)
ids = walks()
train_loader = DataLoader(TensorDataset(ids), batch_size=32, shuffle=True)
model = LM()
for p in model.parameters():
    p.requires_grad_(False)
lora_targets = ["query", "value", "head"]
for name, child in list(model.named_children()):
    if name in lora_targets:
        setattr(model, name, Low(child))
def compute_loss(model, batch):
    ids = batch[0]
    logits = model(ids)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
loss_fn = None
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
"""
STEP = (
    TABLE
    + """
def train_step(model, batch, loss_fn, optimizer):
    x, y = batch
    optimizer.zero_grad()
    loss = loss_fn(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()
"""
)
FIT = (
    TABLE
    + """
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
def fit(epochs=1):
    history = []
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        scheduler.step()
        history.append(total / len(train_loader))
    return history
if __name__ == "__main__":
    fit(8)
"""
)
EVALUATED = (
    VISION
    + """
val_loader = loader(*pictures(seed=31), shuffle=False)
def evaluate(model, loader):
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    model.train()
    return right
"""
)
CHECKPOINTED = VISION.replace("x = F.max_pool2d(F.relu(self.conv2(x)), 2)", "x = F.max_pool2d(F.relu(self.conv2(x)), 2)")

CASES: dict[str, list[tuple[str, list[tuple[str, str]]]]] = {
    # -- shapes
    "shape.linear_in_features": [(VISION, [("nn.Linear(16 * 6 * 6, 4)", "nn.Linear(16 * 3 * 3, 4)")]), (SEQUENCE, [("nn.LSTM(3, 16, batch_first=True, bidirectional=True)", "nn.LSTM(3, 16, batch_first=True)")])],
    "shape.missing_flatten": [(VISION, [("return self.fc(x)", "return self.fc(x.flatten(1))")])],
    "shape.conv_in_channels": [(VISION, [("self.conv1 = nn.Conv2d(1, 8", "self.conv1 = nn.Conv2d(3, 8")])],
    "shape.channels_last": [(VISION, [("train_loader = loader(x.permute(0, 2, 3, 1).contiguous(), y)", "train_loader = loader(x, y)")])],
    "shape.missing_batch_dim": [(TABLE, [("train_loader = loader(x, y, None, shuffle=False)", "train_loader = loader(x, y)")]), (TABLE, [("train_loader = [(a, b) for a, b in zip(x, y)]", "train_loader = loader(x, y)")])],
    "shape.batch_dim_changed": [(VISION, [("return self.fc(x.view(-1, 16 * 9 * 2)[:, :144])", "return self.fc(x.flatten(1))")])],
    "shape.batch_first": [(SEQUENCE, [("nn.LSTM(3, 16)", "nn.LSTM(3, 16, batch_first=True)")])],
    "shape.batch_mixing": [(TABLE.replace("nn.ReLU()", "nn.Softmax(dim=1)"), [("model = nn.Sequential(nn.Linear(6, 32), nn.Softmax(dim=0), nn.Linear(32, 3))", "model = nn.Sequential(nn.Linear(6, 32), nn.Softmax(dim=1), nn.Linear(32, 3))")]), (SEQUENCE, [("self.head(out.mean(dim=1) - out.mean(dim=(0, 1)))", "self.head(out.mean(dim=1))")])],
    "shape.loss_broadcast": [(REGRESSION, [("x, y = curve(); y = y.squeeze(1)", "x, y = curve()")])],
    "shape.view_as_permute": [(SEQUENCE, [("out, _ = self.rnn(x.reshape(x.shape[0], 3, 9)[:, :, :3])", "out, _ = self.rnn(x)")])],
    "shape.norm_features": [(VISION, [("self.bn1 = nn.BatchNorm2d(16)", "self.bn1 = nn.BatchNorm2d(8)")])],
    "shape.kernel_too_large": [(VISION, [("x = F.max_pool2d(F.relu(self.conv2(x)), 2)\n        x = nn.functional.max_pool2d(x, 4)", "x = F.max_pool2d(F.relu(self.conv2(x)), 2)")])],
    "shape.target_ndim": [(TABLE, [("train_loader = loader(x, y[:, None])", "train_loader = loader(x, y)")])],
    "shape.seq_logits_layout": [("ids = walks()\ntrain_loader = loader(ids, ids % 4)\nmodel = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))\nce = nn.CrossEntropyLoss()\nloss_fn = lambda out, y: ce(out.transpose(1, 2), y)\noptimizer = torch.optim.Adam(model.parameters(), lr=1e-2)\n", [("loss_fn = ce", "loss_fn = lambda out, y: ce(out.transpose(1, 2), y)")])],
    "shape.residual_mismatch": [(VISION, [("x = F.max_pool2d(x + F.relu(self.conv2(x)), 2)", "x = F.max_pool2d(F.relu(self.conv2(x)), 2)")])],
    # -- types and devices
    "dtype.class_labels_float": [(TABLE, [("train_loader = loader(x, y.double())", "train_loader = loader(x, y)")])],
    "dtype.int_inputs": [(VISION, [("train_loader = loader((x * 30 + 128).clamp(0, 255).byte(), y)", "train_loader = loader(x, y)")])],
    "dtype.float64_inputs": [(TABLE, [("train_loader = loader(torch.from_numpy(x.numpy().astype('float64')), y)", "train_loader = loader(x, y)")])],
    "dtype.onehot_int_labels": [(TABLE, [("train_loader = loader(x, F.one_hot(y, 3))", "train_loader = loader(x, y)")])],
    "dtype.bce_int_targets": [(BINARY, [("y = y[:, None]", "y = y.float()[:, None]")])],
    "dtype.embedding_float_ids": [("ids = walks()\ntrain_loader = loader(ids, ids[:, 0] % 2)\nmodel = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(72, 2))\nloss_fn = nn.CrossEntropyLoss()\noptimizer = torch.optim.Adam(model.parameters(), lr=1e-2)\n", [("loader(ids.float(), ids[:, 0] % 2)", "loader(ids, ids[:, 0] % 2)")])],
    "device.tensor_not_buffer": [(VISION.replace("self.fc =", "self.register_buffer('shift', torch.full((1, 3, 1, 1), 0.1))\n        self.fc =").replace("x = F.max_pool2d(F.relu(self.bn1", "x = x - self.shift\n        x = F.max_pool2d(F.relu(self.bn1"), [("self.shift = torch.full((1, 3, 1, 1), 0.1)", "self.register_buffer('shift', torch.full((1, 3, 1, 1), 0.1))")])],
    "device.tensor_created_on_cpu": [(SEQUENCE.replace("out, _ = self.rnn(x)", "start = torch.zeros(1, x.shape[0], 16, device=x.device)\n        out, _ = self.rnn(x, (start, start))"), [("start = torch.zeros(1, x.shape[0], 16)", "start = torch.zeros(1, x.shape[0], 16, device=x.device)")])],
    # -- labels
    "label.one_based": [(TABLE, [("train_loader = loader(x, y + 1)", "train_loader = loader(x, y)")])],
    "label.out_of_range": [(TABLE, [("train_loader = loader(x, y * 10)", "train_loader = loader(x, y)")])],
    "label.missing_class": [(TABLE.replace("nn.Linear(32, 3)", "nn.Linear(32, 3)"), [("x, y = x[y != 1], y[y != 1]\ntrain_loader", "train_loader")])],
    "label.unused_outputs": [(TABLE, [("nn.Linear(32, 1000)", "nn.Linear(32, 3)")])],
    "label.ignore_index_mismatch": [("x, y = pictures(channels=1)\ny = (x[:, 0] > 0).long()\ny[:, 0] = 255\ntrain_loader = loader(x, y)\nmodel = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, padding=1))\nloss_fn = nn.CrossEntropyLoss(ignore_index=255)\noptimizer = torch.optim.Adam(model.parameters(), lr=1e-2)\n", [("loss_fn = nn.CrossEntropyLoss()", "loss_fn = nn.CrossEntropyLoss(ignore_index=255)")])],
    "label.ignore_index_drops_class": [(TABLE, [("nn.CrossEntropyLoss(ignore_index=0)", "nn.CrossEntropyLoss()")])],
    "label.binary_not_zero_one": [(BINARY, [("y = y.float()[:, None] + 1", "y = y.float()[:, None]")])],
    "label.nan": [(REGRESSION, [("y[5] = float('inf')\ntrain_loader", "train_loader")])],
    # -- loss
    "loss.softmax_before_ce": [(VISION, [("return F.softmax(self.fc(x.flatten(1)), dim=-1)", "return self.fc(x.flatten(1))")])],
    "loss.sigmoid_before_bce_logits": [(BINARY, [("nn.Linear(24, 1), nn.Sigmoid())", "nn.Linear(24, 1))")])],
    "loss.log_softmax_before_ce": [(TABLE, [("nn.Linear(32, 3), nn.LogSoftmax(dim=1))", "nn.Linear(32, 3))")])],
    "loss.nll_on_logits": [(TABLE, [("loss_fn = nn.NLLLoss()", "loss_fn = nn.CrossEntropyLoss()")])],
    "loss.nll_on_probs": [(TABLE.replace("nn.Linear(32, 3))\nloss_fn = nn.CrossEntropyLoss()", "nn.Linear(32, 3), nn.LogSoftmax(-1))\nloss_fn = nn.NLLLoss()"), [("nn.Softmax(-1)", "nn.LogSoftmax(-1)")])],
    "loss.bce_on_logits": [(BINARY, [("loss_fn = nn.BCELoss()", "loss_fn = nn.BCEWithLogitsLoss()")])],
    "loss.ce_single_output": [(TABLE.replace("blobs()", "blobs(classes=2)").replace("nn.Linear(32, 3)", "nn.Linear(32, 2)"), [("train_loader = loader(x, y * 0)\nmodel = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))", "train_loader = loader(x, y)\nmodel = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))")])],
    "loss.softmax_single_output": [(BINARY.replace("nn.Linear(24, 1))\nloss_fn = nn.BCEWithLogitsLoss()", "nn.Linear(24, 1), nn.Sigmoid())\nloss_fn = nn.MSELoss()"), [("nn.Softmax(dim=-1)", "nn.Sigmoid()")])],
    "loss.activation_on_logits": [(VISION, [("return F.relu(self.fc(x.flatten(1)))", "return self.fc(x.flatten(1))")])],
    "loss.bounded_output": [(REGRESSION.replace("y = curve()", "y = curve(); y = 2 * y"), [("nn.Linear(48, 1), nn.Tanh())", "nn.Linear(48, 1))")])],
    "loss.kldiv_input_not_log": [("x, y = blobs()\ny = F.softmax(3 * F.one_hot(y, 3).float(), dim=1)\ntrain_loader = loader(x, y)\nmodel = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3), nn.LogSoftmax(1))\nloss_fn = nn.KLDivLoss(reduction='batchmean')\noptimizer = torch.optim.Adam(model.parameters(), lr=3e-3)\n", [("nn.Softmax(1))", "nn.LogSoftmax(1))")])],
    "loss.mse_on_class_ids": [(TABLE, [("train_loader = loader(x, y.float()[:, None])\nmodel = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))\nloss_fn = nn.MSELoss()", "train_loader = loader(x, y)\nmodel = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))\nloss_fn = nn.CrossEntropyLoss()")])],
    "loss.not_scalar": [(TABLE, [("nn.CrossEntropyLoss(reduction='none')", "nn.CrossEntropyLoss()")])],
    "loss.ce_on_multilabel": [("x = blobs(dim=8)[0]\ny = (x[:, :4] > 0).float()\ntrain_loader = loader(x, y)\nmodel = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))\nloss_fn = nn.BCEWithLogitsLoss()\noptimizer = torch.optim.Adam(model.parameters(), lr=3e-3)\n", [("nn.CrossEntropyLoss()", "nn.BCEWithLogitsLoss()")])],
    "loss.class_weight_shape": [(TABLE.replace("Loss()", "Loss(weight=torch.ones(3))"), [("torch.ones(2)", "torch.ones(3)")])],
    # -- architecture and weights
    "model.missing_nonlinearity": [(VISION, [("x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)\n        x = F.avg_pool2d(self.conv2(x), 2)", "x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)\n        x = F.max_pool2d(F.relu(self.conv2(x)), 2)")]), (TABLE, [("nn.Linear(6, 32), nn.Dropout(0.1), nn.Linear(32, 3)", "nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)")])],
    "model.bias_before_norm": [(VISION, [("padding=1, bias=True)", "padding=1, bias=False)")])],
    "init.zeros": [(TABLE, [("nn.init.zeros_(model[0].weight); nn.init.zeros_(model[0].bias)\nloss_fn", "loss_fn")]), (VISION, [("for m in model.modules():\n    if isinstance(m, (nn.Conv2d, nn.Linear)): nn.init.zeros_(m.weight)\nloss_fn", "loss_fn")])],
    "init.constant": [(TABLE, [("for p in model.parameters(): nn.init.constant_(p, 0.05)\nloss_fn", "loss_fn")])],
    "init.exploding": [(TABLE.replace("nn.Linear(6, 32), nn.ReLU(), ", "nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), "), [("for p in model.parameters(): nn.init.normal_(p)\nloss_fn", "loss_fn")])],
    "init.vanishing": [(TABLE.replace("nn.Linear(6, 32), nn.ReLU(), ", "nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), "), [("for p in model.parameters(): nn.init.normal_(p, std=1e-3)\nloss_fn", "loss_fn")])],
    "init.initial_loss": [(TABLE, [("nn.init.normal_(model[2].weight, std=5.0)\nloss_fn", "loss_fn")])],
    # -- optimisation
    "optim.lr_too_high": [(TABLE, [("torch.optim.SGD(model.parameters(), lr=60.0)", "torch.optim.Adam(model.parameters(), lr=3e-3)")]), (REGRESSION, [("Adam(model.parameters(), lr=3.0)", "Adam(model.parameters(), lr=3e-3)")])],
    "optim.lr_too_low": [(VISION, [("torch.optim.SGD(model.parameters(), lr=1e-8)", "torch.optim.Adam(model.parameters(), lr=2e-3)")])],
    "optim.zero_grad_missing": [(STEP, [("x, y = batch\n    loss =", "x, y = batch\n    optimizer.zero_grad()\n    loss =")]), (FIT, [("for x, y in train_loader:\n            loss =", "for x, y in train_loader:\n            optimizer.zero_grad()\n            loss =")])],
    "optim.zero_grad_before_step": [(STEP, [("loss.backward()\n    model.zero_grad()\n", "loss.backward()\n")])],
    "optim.step_missing": [(STEP, [("    loss.backward()\n    return", "    loss.backward()\n    optimizer.step()\n    return")]), (FIT, [("            loss.backward()\n", "            loss.backward()\n            optimizer.step()\n")])],
    "optim.params_missing": [(VISION, [("torch.optim.Adam([*model.fc.parameters(), *model.conv2.parameters()], lr=2e-3)", "torch.optim.Adam(model.parameters(), lr=2e-3)")])],
    "optim.stale_params": [(TABLE, [("optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)\nmodel[2] = nn.Linear(32, 3)\n", "optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)\n")])],
    "optim.all_frozen": [(TABLE, [("model.requires_grad_(False)\nloss_fn", "loss_fn")])],
    "optim.weight_decay_on_norm": [(VISION, [("torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)", "torch.optim.Adam(model.parameters(), lr=2e-3)")])],
    "optim.weight_decay_too_large": [(TABLE, [("Adam(model.parameters(), lr=3e-3, weight_decay=1.0)", "Adam(model.parameters(), lr=3e-3)")]), (VISION, [("torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=5.0)", "torch.optim.Adam(model.parameters(), lr=2e-3)")])],
    "optim.scheduler_order": [(FIT, [("model.train()\n        scheduler.step()", "model.train()"), ("        history.append(total / len(train_loader))\n    return", "        scheduler.step()\n        history.append(total / len(train_loader))\n    return")])],
    "optim.scheduler_per_batch": [(FIT, [("            scheduler.step()\n        history", "        scheduler.step()\n        history")]), (FIT.replace("StepLR(optimizer, step_size=4, gamma=0.5)", "CosineAnnealingLR(optimizer, T_max=8)"), [("CosineAnnealingLR(optimizer, T_max=8 * 60)", "CosineAnnealingLR(optimizer, T_max=8)")])],
    "optim.momentum_too_high": [(TABLE, [("torch.optim.SGD(model.parameters(), lr=1e-2, momentum=1.0)", "torch.optim.Adam(model.parameters(), lr=3e-3)")])],
    "optim.clip_no_effect": [(STEP.replace("    optimizer.step()\n", "    nn.utils.clip_grad_norm_(model.parameters(), 0.5)\n    optimizer.step()\n"), [("optimizer.step()\n    nn.utils.clip_grad_norm_(model.parameters(), 0.5)\n", "nn.utils.clip_grad_norm_(model.parameters(), 0.5)\n    optimizer.step()\n")])],
    "optim.accumulation_not_scaled": [(TABLE + """
def train_step(model, batch, loss_fn, optimizer):
    x, y = batch
    optimizer.zero_grad()
    for a, b in zip(x.chunk(4), y.chunk(4)):
        loss = loss_fn(model(a), b) / 4
        loss.backward()
    optimizer.step()
    return loss.item()
""", [("loss = loss_fn(model(a), b)\n", "loss = loss_fn(model(a), b) / 4\n")])],
    # -- numerics
    "numerics.log_zero": [("x, y = blobs()\ny = F.one_hot(y, 3).float()\ntrain_loader = loader(x, y)\nmodel = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3), nn.Softmax(1))\nloss_fn = lambda p, y: (torch.xlogy(y, y) - y * p.clamp(min=1e-8).log()).sum(1).mean()\noptimizer = torch.optim.Adam(model.parameters(), lr=3e-3)\n", [("(y * y.log() - y * p.clamp", "(torch.xlogy(y, y) - y * p.clamp")])],
    "numerics.sqrt_zero_grad": [("x, y = blobs()\ntrain_loader = loader(x, y)\nmodel = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))\ndef compute_loss(model, batch):\n    x, y = batch\n    z = model(x)\n    d = torch.sqrt((z[:, None] - z[None]).square().sum(-1) + 1e-8)\n    same = (y[:, None] == y[None]).float()\n    return (same * d + (1 - same) * F.relu(2 - d)).mean()\nloss_fn = None\noptimizer = torch.optim.Adam(model.parameters(), lr=3e-3)\n", [(".sum(-1))", ".sum(-1) + 1e-8)")])],
    "numerics.div_by_zero_std": [(SEQUENCE.replace("x, y = signals()", "x, y = signals()\nx[7] = 0.5").replace("out, _ = self.rnn(x)", "x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-4)\n        out, _ = self.rnn(x)").replace("x[:, :, 0] += y", "x[:, :, 0] += y"), [("x.std(1, keepdim=True)", "(x.std(1, keepdim=True) + 1e-4)")])],
    "numerics.exp_overflow": [("x, y = blobs()\ntrain_loader = loader(x, y)\nmodel = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))\ndef compute_loss(model, batch):\n    x, y = batch\n    z = 400 * model(x)\n    return -(z[torch.arange(len(y)), y] - z.logsumexp(1)).mean() / 400\nloss_fn = None\noptimizer = torch.optim.Adam(model.parameters(), lr=3e-3)\n", [("z.exp().sum(1).log()", "z.logsumexp(1)")])],
    "numerics.fp16_overflow": [("x, y = curve()\ntrain_loader = loader(x, y)\nmodel = nn.Sequential(nn.Linear(4, 48), nn.Tanh(), nn.Linear(48, 1))\ndef compute_loss(model, batch):\n    x, y = batch\n    e = (300 * (model(x) - y)).float()\n    return e.square().mean() / 9e4\nloss_fn = None\noptimizer = torch.optim.Adam(model.parameters(), lr=3e-3)\n", [("(300 * (model(x) - y)).half()\n    return e.square().mean().float() / 9e4", "(300 * (model(x) - y)).float()\n    return e.square().mean() / 9e4")])],
    "numerics.pure_fp16": [(TABLE, [("train_loader = loader(x.half(), y)\nmodel = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).half()", "train_loader = loader(x, y)\nmodel = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))")])],
    "numerics.where_nan_grad": [(REGRESSION.replace("model = nn.Sequential(nn.Linear(4, 48), nn.Tanh(), nn.Linear(48, 1))", "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 1)\n    def forward(self, x):\n        h = self.a(x)\n        h = torch.where(h > 0, torch.sqrt(h.clamp(min=1e-6)), torch.zeros_like(h))\n        return self.b(h)\nmodel = Net()"), [("torch.sqrt(h)", "torch.sqrt(h.clamp(min=1e-6))")])],
    "numerics.fully_masked_row": [(PADDED.replace("i % 2) for i in range(192)]\ntexts = [(ids[:-1] + [18 + label], label) for ids, label in texts]", "i % 2) for i in range(192)]\ntexts = [(ids[:-1] + [18 + label], label) for ids, label in texts]\ntexts += [([1], 0)]"), [("texts += [([], 0)] * 6", "texts += [([1], 0)]"), ("keep.sum(1).clamp(min=1)", "keep.sum(1)")])],
    "numerics.fp16_mask_value": [(SEQUENCE.replace("return self.head(out.mean(dim=1))", "s = out[:, :, 0].half()\n        w = s.masked_fill(x[:, :, 0] > 3, float('-inf')).float().softmax(1)\n        return self.head((out * w.unsqueeze(-1)).sum(1))"), [("-1e9", "float('-inf')")])],
    # -- gradients
    "grad.detached": [(VISION, [("F.relu(self.conv2(x.detach()))", "F.relu(self.conv2(x))")]), (SEQUENCE, [("out = torch.from_numpy(out.detach().numpy())\n        return", "return")])],
    "grad.inplace_error": [(REGRESSION.replace("model = nn.Sequential(nn.Linear(4, 48), nn.Tanh(), nn.Linear(48, 1))", "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.a, self.b = nn.Linear(4, 48), nn.Linear(48, 1)\n    def forward(self, x):\n        h = torch.sigmoid(self.a(x))\n        h = h + 0.5\n        return self.b(h)\nmodel = Net()"), [("h += 0.5", "h = h + 0.5")])],
    "grad.data_attribute": [(SEQUENCE, [("out.data = out.data * 2\n        return", "return")])],
    "grad.graph_rewrapped": [(SEQUENCE, [("return self.head(torch.tensor(out.mean(dim=1).tolist()))", "return self.head(out.mean(dim=1))")])],
    "grad.graph_reused": [(SEQUENCE.replace("self.head = nn", "self.state = None\n        self.head = nn").replace("out, _ = self.rnn(x)", "out, state = self.rnn(x, self.state)\n        self.state = tuple(s.detach() for s in state)"), [("self.state = state", "self.state = tuple(s.detach() for s in state)")])],
    "grad.loss_history_kept": [(FIT, [("total += loss\n", "total += loss.item()\n")]), (FIT, [("total += loss.item()\n            history.append(loss)", "total += loss.item()")])],
    "grad.non_differentiable": [(VISION, [("x = torch.round(F.max_pool2d(F.relu(self.conv2(x)), 2))\n        return self.fc(x.flatten(1)).round()", "x = F.max_pool2d(F.relu(self.conv2(x)), 2)\n        return self.fc(x.flatten(1))")]), (BINARY.replace("loss_fn = nn.BCEWithLogitsLoss()", "loss_fn = nn.BCEWithLogitsLoss()"), [("loss_fn = lambda out, y: ((out > 0).float() - y).abs().mean()", "loss_fn = nn.BCEWithLogitsLoss()")])],
    "grad.dead_relu": [(TABLE, [("nn.init.constant_(model[0].bias, -20.0)\nloss_fn", "loss_fn")])],
    "grad.vanishing": [("x, y = blobs()\ntrain_loader = loader(x, y)\nlayers = [nn.Linear(6, 24)]\nfor _ in range(9):\n    layers += [nn.ReLU(), nn.Linear(24, 24)]\n    nn.init.kaiming_normal_(layers[-1].weight)\nmodel = nn.Sequential(*layers, nn.ReLU(), nn.Linear(24, 3))\nloss_fn = nn.CrossEntropyLoss()\noptimizer = torch.optim.Adam(model.parameters(), lr=3e-3)\n", [("layers += [nn.Sigmoid(), nn.Linear(24, 24)]\nmodel = nn.Sequential(*layers, nn.Sigmoid()", "layers += [nn.ReLU(), nn.Linear(24, 24)]\n    nn.init.kaiming_normal_(layers[-1].weight)\nmodel = nn.Sequential(*layers, nn.ReLU()")])],
    "grad.exploding": [("x = torch.randn(160, 50, 2)\ny = x[:, -4:, 0].sum(1, keepdim=True) / 2\ntrain_loader = loader(x, y)\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.cell = nn.Linear(2 + 24, 24)\n        self.head = nn.Linear(24, 1)\n        nn.init.normal_(self.cell.weight, std=0.1)\n    def forward(self, x):\n        h = torch.zeros(x.shape[0], 24, device=x.device)\n        for t in range(x.shape[1]):\n            h = F.relu(self.cell(torch.cat([x[:, t], h], 1)))\n        return self.head(h)\nmodel = Net()\nloss_fn = nn.MSELoss()\noptimizer = torch.optim.Adam(model.parameters(), lr=1e-3)\n", [("std=0.6)", "std=0.1)")])],
    "grad.unregistered_modules": [(VISION.replace("self.conv2 =", "self.parts = nn.ModuleDict({'a': nn.Conv2d(8, 8, 1)})\n        self.conv2 =").replace("self.conv2(x))", "self.conv2(F.relu(self.parts['a'](x))))"), [("self.parts = {'a': nn.Conv2d(8, 8, 1)}", "self.parts = nn.ModuleDict({'a': nn.Conv2d(8, 8, 1)})")])],
    "grad.unused_module": [(VISION, [("self.extra = nn.Linear(4, 4)\n        self.fc =", "self.fc =")])],
    "grad.parameter_not_registered": [(SEQUENCE.replace("self.head =", "self.scale = nn.Parameter(0.5 * torch.ones(16))\n        self.head =").replace("out.mean(dim=1)", "self.scale * out.mean(dim=1)"), [("self.scale = 0.5 * nn.Parameter(torch.ones(16))", "self.scale = nn.Parameter(0.5 * torch.ones(16))")])],
    "grad.tie_broken": [(LANGUAGE.replace("model = LM()", "model = LM()\nnn.init.normal_(model.token.weight, std=0.1)\nmodel.head.weight = model.token.weight"), [("model.head.weight = nn.Parameter(model.token.weight.detach().clone())", "model.head.weight = model.token.weight")])],
    "grad.shared_module": [(TABLE.replace("nn.ReLU(), ", "nn.ReLU(), nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(3)]), "), [("nn.ReLU())] * 3)", "nn.ReLU()) for _ in range(3)])")])],
    "grad.module_created_in_forward": [(SEQUENCE, [("return nn.Linear(16, 3)(self.head(out.mean(dim=1)).repeat(1, 6)[:, :16])", "return self.head(out.mean(dim=1))")])],
    # -- data
    "data.unnormalised_inputs": [(TABLE, [("train_loader = loader(torch.cat([x[:, :5], 40000 + 9000 * x[:, 5:]], 1), y)", "train_loader = loader(x, y)")]), (VISION, [("train_loader = loader((x * 40 + 128).clamp(0, 255).round(), y)", "train_loader = loader(x, y)")])],
    "data.inputs_too_small": [(VISION, [("train_loader = loader((x * 0.15 + 0.5).clamp(0, 1) / 255, y)", "train_loader = loader(x, y)")])],
    "data.not_shuffled": [(TABLE, [("order = y.argsort()\ntrain_loader = loader(x[order], y[order], 16, shuffle=False)", "train_loader = loader(x, y)")])],
    "data.train_val_overlap": [(TABLE + "val_loader = loader(*blobs(80, seed=77))\n", [("val_loader = loader(*(t[100:150] for t in (x, y)))", "val_loader = loader(*blobs(80, seed=77))")])],
    "data.label_misaligned": [(TABLE.replace("blobs()", "blobs(400)"), [("train_loader = loader(x, y[torch.randperm(len(y))])", "train_loader = loader(x, y)")])],
    "data.class_imbalance": [(BINARY.replace("blobs(classes=2)", "blobs(900, classes=2)"), [("keep = (y == 0) | (torch.rand(900) < 0.04)\nx, y = x[keep], y[keep]\ny = y.float()", "y = y.float()")])],
    "data.constant_feature": [(TABLE, [("x[:, 2] = 1.5\ntrain_loader", "train_loader")])],
    "data.augmentation_on_val": [(VISION + """
class Jitter(Dataset):
    def __init__(self, x, y, noise): self.x, self.y, self.noise = x, y, noise
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i] + self.noise * torch.randn(3, 12, 12), self.y[i]
train_loader = DataLoader(Jitter(x, y, 0.1), batch_size=32, shuffle=True)
val_loader = DataLoader(Jitter(*pictures(seed=33), 0.0), batch_size=32)
""", [("Jitter(*pictures(seed=33), 0.1)", "Jitter(*pictures(seed=33), 0.0)")])],
    "data.batch_size_one_norm": [(VISION, [("train_loader = loader(x, y, 1)", "train_loader = loader(x, y)")])],
    "data.last_batch_of_one": [(TABLE.replace("nn.ReLU()", "nn.BatchNorm1d(32), nn.ReLU()").replace("nn.Linear(6, 32)", "nn.Linear(6, 32, bias=False)"), [("train_loader = loader(x[:161], y[:161])", "train_loader = loader(x, y)")])],
    "data.train_val_stats_mismatch": [(TABLE + "val_loader = loader(*blobs(80, seed=77))\n", [("val_loader = loader(*((a * 5 + 3) if a.is_floating_point() else a for a in blobs(80, seed=77)))", "val_loader = loader(*blobs(80, seed=77))")])],
    "data.wrong_norm_stats": [(VISION, [("train_loader = loader(((x * 40 + 128).clamp(0, 255).round() - 0.45) / 0.25, y)", "train_loader = loader(x, y)")])],
    "data.nan_inputs": [(TABLE, [("x[11, 3] = float('nan')\ntrain_loader", "train_loader")])],
    "data.same_sample": [(TABLE + """
class Rows(Dataset):
    def __len__(self): return len(y)
    def __getitem__(self, i): return x[i], y[i]
train_loader = DataLoader(Rows(), batch_size=32, shuffle=True)
""", [("return x[0], y[0]", "return x[i], y[i]")])],
    "data.worker_rng_duplicated": [(TABLE + """
class Noise(Dataset):
    def __init__(self): self.random = random.Random(0)
    def __len__(self): return len(y)
    def __getitem__(self, i): return x[i] + 0.1 * torch.randn(6), y[i]
train_loader = DataLoader(Noise(), batch_size=32, shuffle=True, num_workers=2)
""", [("x[i] + 0.1 * self.random.gauss(0, 1)", "x[i] + 0.1 * torch.randn(6)")])],
    "data.unscaled_targets": [(REGRESSION, [("train_loader = loader(x, 4000 + 900 * y)", "train_loader = loader(x, y)")])],
    "data.target_leakage": [(REGRESSION, [("x = torch.cat([x[:, :3], 3 * y - 1], 1)\ntrain_loader", "train_loader")])],
    "data.conflicting_labels": [(TABLE, [("x, y = torch.cat([x, x[:60]]), torch.cat([y, (y[:60] + 1) % 3])\ntrain_loader", "train_loader")])],
    "data.split_class_gap": [(TABLE.replace("train_loader = loader(x, y)", "order = torch.randperm(len(y))\nx, y = x[order], y[order]\ntrain_loader = loader(x[:130], y[:130])\nval_loader = loader(x[130:], y[130:], shuffle=False)"), [("order = y.argsort()", "order = torch.randperm(len(y))")])],
    # -- modes
    "mode.eval_missing": [(EVALUATED, [("def evaluate(model, loader):\n    with", "def evaluate(model, loader):\n    model.eval()\n    with")])],
    "mode.train_in_eval": [(EVALUATED + """
def fit(epochs=1):
    for _ in range(epochs):
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
        evaluate(model, val_loader)
""", [("    for _ in range(epochs):\n        for x", "    for _ in range(epochs):\n        model.train()\n        for x"), ("    return right", "    model.train()\n    return right")])],
    "mode.dropout_rate": [(TABLE, [("nn.ReLU(), nn.Dropout(1.0)", "nn.ReLU()")])],
    "mode.functional_dropout": [(LM_DROP := LANGUAGE.replace("model = LM()", "class Drop(LM):\n    def hidden(self, ids):\n        h = self.token(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))\n        h = F.dropout(h, 0.1, self.training)\n        return self.norm(h + F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h), is_causal=True, dropout_p=0.1 if self.training else 0.0))\nmodel = Drop()"), [("dropout_p=0.1)", "dropout_p=0.1 if self.training else 0.0)")])],
    "mode.no_grad_in_training": [(VISION, [("with torch.no_grad():\n            x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)", "x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)")])],
    "mode.bn_stats_never_update": [(VISION, [("nn.BatchNorm2d(8, momentum=0.0)", "nn.BatchNorm2d(8)")])],
    "mode.frozen_bn_updating": [(VISION.replace("model = Net()", "model = Net()\nmodel.conv1.requires_grad_(False)\nmodel.bn1.requires_grad_(False)\nmodel.bn1.eval()"), [("model.bn1.requires_grad_(False)\nloss", "model.bn1.requires_grad_(False)\nmodel.bn1.eval()\nloss")])],
    "mode.dropout_on_output": [(TABLE, [("nn.Linear(32, 3), nn.Dropout(0.3))", "nn.Linear(32, 3))")])],
    # -- language models
    "lm.labels_not_shifted": [(LANGUAGE, [("F.cross_entropy(logits.flatten(0, 1), ids.flatten())", "F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())")])],
    "lm.labels_double_shift": [(LANGUAGE, [("F.cross_entropy(logits[:, :-2].flatten(0, 1), ids[:, 2:].flatten())", "F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())")])],
    "lm.pad_in_loss": [(CHAT, [("labels = torch.tensor([[-100] * p + r[p:] + [PAD] * (width - len(r)) for r, p in batch])", "labels = torch.tensor([[-100] * p + r[p:] + [-100] * (width - len(r)) for r, p in batch])")])],
    "lm.causal_mask_missing": [(LANGUAGE, [("model = LM(causal=False)", "model = LM()")])],
    "lm.attention_mask_ignored": [(PADDED, [("self.attention(h, h, h, need_weights=False)", "self.attention(h, h, h, key_padding_mask=mask == 0, need_weights=False)")]), (PADDED, [("return self.head(h.mean(1))", "return self.head((h * keep).sum(1) / keep.sum(1))")])],
    "lm.mask_inverted": [(PADDED, [("key_padding_mask=mask.bool()", "key_padding_mask=mask == 0")])],
    "lm.missing_eos": [(CHAT, [("return prompt + answer, len(prompt)", "return prompt + answer + [EOS], len(prompt)")])],
    "lm.pad_is_eos": [(CHAT.replace("labels = torch.tensor([[-100] * p + r[p:] + [-100] * (width - len(r)) for r, p in batch])", "labels = torch.tensor([[-100] * p + r[p:] + [PAD] * (width - len(r)) for r, p in batch])\n    labels[labels == PAD] = -100"), [("PAD, BOS, EOS, USER, BOT = 2, 1, 2, 3, 4", "PAD, BOS, EOS, USER, BOT = 0, 1, 2, 3, 4")])],
    "lm.chat_template_missing": [(CHAT.replace("return prompt + answer", "return prompt + answer"), [("prompt = [BOS, *question]", "prompt = [BOS, USER, *question, BOT]")])],
    "lm.prompt_not_masked": [(CHAT, [("labels = torch.tensor([r + [-100] * (width - len(r)) for r, p in batch])", "labels = torch.tensor([[-100] * p + r[p:] + [-100] * (width - len(r)) for r, p in batch])")])],
    "lm.double_bos": [(CHAT, [("prompt = [BOS, BOS, USER, *question, BOT]", "prompt = [BOS, USER, *question, BOT]")])],
    "lm.vocab_too_small": [(LANGUAGE, [("model = LM(vocab=15)", "model = LM()")])],
    "lm.position_table_too_short": [(LANGUAGE, [("model = LM(longest=6)", "model = LM()")])],
    "lm.all_labels_masked": [(CHAT, [("width = 7\n    batch = [(r[:7], min(p, 7)) for r, p in batch]", "width = max(len(ids) for ids, _ in batch)")])],
    "lm.lora_no_match": [(LORA, [("for p in model.head.parameters(): p.requires_grad_(True)\nlora_targets = ['q_proj', 'v_proj']", "lora_targets = [\"query\", \"value\", \"head\"]")])],
    "lm.lora_all_frozen": [(LORA, [("model.requires_grad_(False)\nmodel.norm.requires_grad_(True)\ndef compute_loss", "def compute_loss")])],
    "lm.lora_both_zero": [(LORA, [("self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features))", "self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features ** 0.5)")])],
    "lm.new_tokens_frozen": [(LORA.replace("def compute_loss", "added_token_ids = [18, 19]\nmodel.token.requires_grad_(True)\ndef compute_loss"), [("added_token_ids = [18, 19]\ndef", "added_token_ids = [18, 19]\nmodel.token.requires_grad_(True)\ndef")])],
    "lm.checkpoint_no_grad": [(LORA.replace("model = LM()", "from torch.utils.checkpoint import checkpoint\nclass Saving(LM):\n    def forward(self, ids):\n        return self.head(checkpoint(self.hidden, ids, use_reentrant=False))\nmodel = Saving()"), [("use_reentrant=True", "use_reentrant=False")])],
    "lm.padding_idx_used": [("ids = walks()\ntrain_loader = loader(ids, ids[:, 0] % 2)\nmodel = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(72, 2))\nloss_fn = nn.CrossEntropyLoss()\noptimizer = torch.optim.Adam(model.parameters(), lr=1e-2)\n", [("nn.Embedding(20, 8, padding_idx=7)", "nn.Embedding(20, 8)")])],
    "lm.pool_on_padding": [(PADDED.replace("return self.head((h * keep).sum(1) / keep.sum(1))", "return self.head(h[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1])"), [("h[:, -1]", "h[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]")])],
    "lm.no_positions": [("ids = torch.stack([torch.randperm(9) for _ in range(512)])\ny = (ids[:, 0] > ids[:, 8]).long()\ntrain_loader = loader(ids, y)\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.token, self.place = nn.Embedding(9, 16), nn.Embedding(9, 16)\n        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 2)\n    def forward(self, ids):\n        h = self.token(ids) + self.place(torch.arange(9, device=ids.device))\n        return self.head((h + self.attention(h, h, h)[0]).amax(1))\nmodel = Net()\nloss_fn = nn.CrossEntropyLoss()\noptimizer = torch.optim.Adam(model.parameters(), lr=3e-3)\n", [("h = self.token(ids) + 0 * self.place(ids[:, :1])", "h = self.token(ids) + self.place(torch.arange(9, device=ids.device))")])],
}  # fmt: skip


def programs(finding: str, number: int) -> tuple[str, str]:
    """(wrong, right): the text of the two programs."""
    base, changes = CASES[finding][number]
    right = base
    wrong = base
    for bad, good in changes:
        wrong = _put(wrong, bad, good)
    return PRELUDE + wrong, PRELUDE + right


def _put(text: str, bad: str, good: str) -> str:
    assert good in text, good
    return text.replace(good, bad, 1)
