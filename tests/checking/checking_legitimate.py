"""Trainings that are right, with the oddities of real ones: nothing may be found in them."""

from __future__ import annotations

from checking_cases import PADDED as PADDED_ENCODER

RIGHT: dict[str, str] = {
    "vae": """
x = torch.rand(192, 16) * 0.5 + 0.25 * torch.randint(0, 2, (192, 1))
train_loader = DataLoader(TensorDataset(x), batch_size=32, shuffle=True)
class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
        self.mu, self.logvar = nn.Linear(32, 4), nn.Linear(32, 4)
        self.dec = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16), nn.Sigmoid())
    def forward(self, x):
        h = self.enc(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.dec(z), mu, logvar
model = VAE()
def compute_loss(model, batch):
    x = batch[0]
    out, mu, logvar = model(x)
    return F.binary_cross_entropy(out, x) + 1e-3 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()
loss_fn = None
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
""",
    "resnet with zero-initialised branches": """
x, y = pictures()
train_loader = loader(x, y, drop_last=True)
class Block(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.c2, self.n2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.skip = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)) if a != b or stride > 1 else nn.Identity()
        nn.init.zeros_(self.n2.weight)
    def forward(self, x):
        return F.relu(self.skip(x) + self.n2(self.c2(F.relu(self.n1(self.c1(x))))), inplace=True)
model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=6 * len(train_loader))
def fit(epochs=6):
    losses = []
    for _ in range(epochs):
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    return losses
if __name__ == "__main__":
    fit(6)
""",
    "transformer encoder": PADDED_ENCODER,
    "siamese": """
x, y = blobs(classes=4)
train_loader = loader(x, y)
class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 8))
        self.temperature = nn.Parameter(torch.tensor(2.0))
    def forward(self, x):
        return F.normalize(self.body(x), dim=-1)
model = Tower()
def compute_loss(model, batch):
    x, y = batch
    a, b = model(x + 0.1 * torch.randn_like(x)), model(x + 0.1 * torch.randn_like(x))
    logits = a @ b.T * model.temperature.exp()
    return F.cross_entropy(logits, torch.arange(len(x), device=x.device))
loss_fn = None
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
""",
    "unet-like segmentation": """
x, _ = pictures(channels=1, size=16)
y = (F.avg_pool2d(x, 3, 1, 1)[:, 0] > 0).long()
y[:, :1] = 255
train_loader = loader(x, y, 16)
class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.up, self.c, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.b(F.max_pool2d(a, 2)))
        c = F.relu(self.c(torch.cat([a, F.relu(self.up(b))], 1)))
        return self.out(c)
model = UNet()
loss_fn = nn.CrossEntropyLoss(ignore_index=255)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
""",
    "distillation": """
x, y = blobs()
train_loader = loader(x, y)
teacher = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)).eval().requires_grad_(False)
model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
def compute_loss(model, batch):
    x, y = batch
    out = model(x)
    with torch.no_grad():
        told = teacher(x)
    return F.cross_entropy(out, y) + F.kl_div(F.log_softmax(out, 1), F.softmax(told, 1), reduction="batchmean")
loss_fn = None
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
""",
    "frozen backbone": """
x, y = pictures()
train_loader = loader(x, y)
val_loader = loader(*pictures(64, seed=40), shuffle=False)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(144, 4))
        self.backbone.requires_grad_(False)
    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self
    def forward(self, x):
        with torch.no_grad():
            h = self.backbone(x)
        return self.head(h)
model = Net().train()
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.head.parameters(), lr=3e-3)
@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    found = [(model(x).argmax(1) == y).float().mean().item() for x, y in loader]
    model.train()
    return sum(found) / len(found)
""",
    "gan-like with two optimizers": """
x = torch.randn(192, 2) @ torch.tensor([[1.0, 0.4], [0.0, 0.6]])
train_loader = DataLoader(TensorDataset(x), batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(4, 32), nn.LeakyReLU(0.2), nn.Linear(32, 2))
critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
loss_fn = nn.BCEWithLogitsLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.999))
critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.999))
def train_step(model, batch, loss_fn, optimizer):
    real = batch[0]
    fake = model(torch.randn(len(real), 4))
    critic_optimizer.zero_grad()
    loss = loss_fn(critic(real), torch.ones(len(real), 1)) + loss_fn(critic(fake.detach()), torch.zeros(len(real), 1))
    loss.backward()
    critic_optimizer.step()
    optimizer.zero_grad()
    loss = loss_fn(critic(fake), torch.ones(len(real), 1))
    loss.backward()
    optimizer.step()
    return loss.item()
""",
    "accumulation in fit": """
x, y = blobs(256)
train_loader = loader(x, y, 16)
model = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 3))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
def fit(epochs=1, every=4):
    history = []
    for _ in range(epochs):
        optimizer.zero_grad()
        for i, (x, y) in enumerate(train_loader):
            loss = loss_fn(model(x), y) / every
            loss.backward()
            if (i + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()
            history.append(loss.item() * every)
    return history
""",
    "weighted sampler": """
x, y = blobs(600, classes=2)
keep = (y == 0) | (torch.rand(600) < 0.06)
x, y = x[keep], y[keep]
weight = torch.where(y == 1, (y == 0).sum() / (y == 1).sum(), torch.tensor(1.0))
train_loader = DataLoader(TensorDataset(x, y), batch_size=32, sampler=WeightedRandomSampler(weight, 320))
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
""",
    "tied autoencoder": """
x = torch.randn(192, 4) @ torch.randn(4, 12) / 2
train_loader = loader(x, x)
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(12, 5)
        self.bias = nn.Parameter(torch.zeros(12))
    def forward(self, x):
        return F.linear(torch.tanh(self.enc(x)), self.enc.weight.T, self.bias)
model = Tied()
loss_fn = nn.MSELoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
""",
    "tied language model": """
ids = walks()
train_loader = DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=32, shuffle=True)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(20, 32)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)
    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        h = self.token(ids) + self.place[:, : ids.shape[1]]
        return self.head(self.blocks(h, mask=mask, is_causal=True)).transpose(1, 2)
model = Model()
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
""",
    "tagger with padding": """
rows = [torch.randint(2, 18, (int(torch.randint(4, 11, ())),)) for _ in range(160)]
def collate(batch):
    ids = nn.utils.rnn.pad_sequence(batch, batch_first=True)
    tags = nn.utils.rnn.pad_sequence([b % 3 for b in batch], batch_first=True, padding_value=-100)
    return ids, tags
train_loader = DataLoader(rows, batch_size=32, shuffle=True, collate_fn=collate)
class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(18, 16, padding_idx=0)
        self.rnn = nn.GRU(16, 16, batch_first=True, bidirectional=True, num_layers=2, dropout=0.1)
        self.head = nn.Linear(32, 3)
    def forward(self, ids):
        return self.head(self.rnn(self.token(ids))[0]).transpose(1, 2)
model = Tagger()
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
""",
    "packed text classifier": """
rows = [(torch.randint(2, 18, (int(torch.randint(3, 11, ())),)), i % 2) for i in range(160)]
for ids, label in rows:
    ids[-1] = 2 + label
def collate(batch):
    lengths = torch.tensor([len(ids) for ids, _ in batch])
    return (nn.utils.rnn.pad_sequence([ids for ids, _ in batch], batch_first=True), lengths), torch.tensor([l for _, l in batch])
train_loader = DataLoader(rows, batch_size=32, shuffle=True, collate_fn=collate)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.rnn, self.head = nn.Embedding(18, 16, padding_idx=0), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 2)
    def forward(self, batch):
        ids, lengths = batch
        packed = nn.utils.rnn.pack_padded_sequence(self.token(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0][-1])
model = Net()
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
""",
    "vision transformer": """
x, y = pictures(size=12)
train_loader = loader(x, y, 16)
class ViT(nn.Module):
    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.place = nn.Parameter(0.02 * torch.randn(1, 10, dim))
        self.norm1, self.norm2, self.heads = nn.LayerNorm(dim), nn.LayerNorm(dim), heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim))
        self.head = nn.Linear(dim, 4)
        nn.init.zeros_(self.head.weight)
    def attend(self, h):
        b, t, d = h.shape
        q, k, v = self.qkv(h).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
    def forward(self, x):
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls.expand(len(h), -1, -1), h], 1) + self.place
        h = h + self.attend(self.norm1(h))
        h = h + self.mlp(self.norm2(h))
        return self.head(h[:, 0])
model = ViT()
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
""",
    "regression with batch norm and mixed columns": """
x, y = curve(200)
x = torch.cat([x, (torch.rand(200, 3) < 0.3).float()], 1)
train_loader = loader(x[:160], y[:160])
val_loader = loader(x[160:], y[160:], shuffle=False)
model = nn.Sequential(nn.Linear(7, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))
loss_fn = nn.SmoothL1Loss()
optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
def fit(epochs=10):
    out = []
    for _ in range(epochs):
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
        scheduler.step()
        model.eval()
        with torch.no_grad():
            out.append(sum(loss_fn(model(x), y).item() for x, y in val_loader) / len(val_loader))
    return out
if __name__ == "__main__":
    fit(10)
""",
    "multi-label": """
x = torch.randn(240, 10)
y = (x[:, :5] + 0.2 * torch.randn(240, 5) > 0.8).float()
train_loader = loader(x, y)
model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 5))
loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.full((5,), 3.0))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
""",
    "graph network on a whole graph": """
n = 60
a = (torch.rand(n, n) < 0.1).float(); a = ((a + a.T) > 0).float() + torch.eye(n)
a = a / a.sum(1, keepdim=True)
x = torch.randn(n, 8)
y = (a @ x)[:, 0].gt(0).long()
train_loader = [((x, a), y)]
class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2)
    def forward(self, batch):
        x, adjacency = batch
        return adjacency @ self.b(F.relu(adjacency @ self.a(x)))
model = GCN()
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
""",
    "lora with a trained head": """
ids = walks()
train_loader = DataLoader(TensorDataset(ids), batch_size=32, shuffle=True)
model = LM()
for p in model.parameters():
    p.requires_grad_(False)
class Low(nn.Module):
    def __init__(self, base, r=4):
        super().__init__()
        self.base, self.lora_down, self.lora_up = base, nn.Linear(base.in_features, r, bias=False), nn.Linear(r, base.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)
    def forward(self, x):
        return self.base(x) + 2.0 * self.lora_up(self.lora_down(x))
model.query, model.value = Low(model.query), Low(model.value)
model.head.requires_grad_(True)
def compute_loss(model, batch):
    ids = batch[0]
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
loss_fn = None
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
""",
    "hand-written rnn": """
x, y = signals()
train_loader = loader(x, y)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 16), nn.Linear(16, 3)
    def forward(self, x):
        h = x.new_zeros(x.shape[0], 16)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)
model = Net()
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
""",
    "streaming with workers": """
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        seed = 0 if info is None else info.id
        g = torch.Generator().manual_seed(seed)
        for _ in range(128):
            x = torch.randn(6, generator=g)
            yield x, int(x.sum() > 0)
train_loader = DataLoader(Stream(), batch_size=32, num_workers=2)
model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
""",
    "half-precision forward": """
x, y = blobs()
train_loader = loader(x, y)
model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
def compute_loss(model, batch):
    x, y = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    return F.cross_entropy(out.float(), y)
loss_fn = None
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
""",
    "mobile convolutions": """
x, y = pictures()
train_loader = loader(x, y, 24)
def step(a, b):
    return [nn.Conv2d(a, a, 3, padding=1, groups=a, bias=False), nn.BatchNorm2d(a), nn.ReLU6(), nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU6()]
model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), *step(8, 16), *step(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 4))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
""",
    "ema and manual averages": """
x, y = blobs()
train_loader = loader(x, y)
model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
import copy
average = copy.deepcopy(model).requires_grad_(False)
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
def train_step(model, batch, loss_fn, optimizer):
    x, y = batch
    loss = loss_fn(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    with torch.no_grad():
        for p, q in zip(average.parameters(), model.parameters()):
            p.mul_(0.99).add_(q, alpha=0.01)
    return loss.item()
""",
    "two looks at each batch (sharpness-aware)": """
x, y = blobs()
train_loader = loader(x, y)
model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
def train_step(model, batch, loss_fn, optimizer, rho=0.05):
    x, y = batch
    optimizer.zero_grad()
    loss = loss_fn(model(x), y)
    loss.backward()
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        moves = [rho * p.grad / (norm + 1e-12) for p in model.parameters()]
        for p, e in zip(model.parameters(), moves):
            p.add_(e)
    optimizer.zero_grad()
    loss_fn(model(x), y).backward()
    with torch.no_grad():
        for p, e in zip(model.parameters(), moves):
            p.sub_(e)
    optimizer.step()
    return loss.item()
""",
    "a closure for L-BFGS": """
x, y = blobs()
train_loader = loader(x, y)
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
def train_step(model, batch, loss_fn, optimizer):
    x, y = batch
    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss
    return optimizer.step(closure).item()
""",
    "a new BERT": """
from transformers import BertConfig, BertForSequenceClassification
torch.manual_seed(0)
config = BertConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=32, num_labels=2)
model = BertForSequenceClassification(config)
class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 128
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        ids = torch.randint(5, 120, (16,), generator=g)
        return {"input_ids": ids, "attention_mask": torch.ones(16, dtype=torch.long), "labels": (ids[:4].sum() % 2).long()}
train_loader = DataLoader(Texts(), batch_size=16, shuffle=True)
def compute_loss(model, batch):
    return model(**batch).loss
loss_fn = None
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
""",
}
