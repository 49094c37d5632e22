"""Small models with every normalization, and dense curvature matrices as references."""

import torch
import torch.nn.functional as F
from torch import nn

from normscope import norms

CLASSES = 3


def conv(norm, inplace=False):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        norm,
        nn.ReLU(inplace=inplace),
        nn.Conv2d(4, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def mlp(norm):
    return nn.Sequential(nn.Linear(6, 4), norm, nn.Tanh(), nn.Linear(4, CLASSES))


class Shared(nn.Module):
    """One layer used twice, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.inside, self.twice, self.norm, self.out = (
            nn.Linear(6, 4),
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 3),
        )
        self.out.weight.requires_grad_(False)

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.twice(torch.tanh(self.twice(self.inside(x)))))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.norm = nn.Linear(2, 4), nn.LayerNorm(4)
        self.attention, self.out = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.inside(x.reshape(len(x), 3, 2))
        y = self.norm(x)
        return self.out((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))


MAPS, ROWS = (6, 2, 5, 5), (8, 6)

# name -> (model, shape of the inputs)
MODELS = {
    "batch": (lambda: conv(nn.BatchNorm2d(4)), MAPS),
    "batch, in place": (lambda: conv(nn.BatchNorm2d(4), inplace=True), MAPS),
    "layer": (lambda: mlp(nn.LayerNorm(4)), ROWS),
    "group": (lambda: conv(nn.GroupNorm(2, 4)), MAPS),
    "instance": (lambda: conv(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), MAPS),
    "rms": (lambda: mlp(nn.RMSNorm(4)), ROWS),
    "decorrelated-batch": (lambda: conv(norms.build("decorrelated-batch", 4)), MAPS),
    "iterative": (lambda: conv(norms.build("iterative", 4)), MAPS),
    "group-whitening": (lambda: conv(norms.build("group-whitening", 4, groups=2)), MAPS),
    "shared and frozen": (Shared, ROWS),
    "attention": (Attention, ROWS),
}


def make(name, seed=0):
    """Return a model in float64, moved off its initial statistics, and a batch."""
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    model = build().double()
    for _ in range(3):
        model(torch.randn(shape, dtype=torch.float64) + 0.5)
    draw = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(shape, generator=draw, dtype=torch.float64)
    return model, (inputs, torch.randint(CLASSES, shape[:1], generator=draw))


def loss_at(model, theta, batches, mode, names):
    """Return L and its gradient at a flat vector of parameters, of a copy, without any of normscope's code."""
    import copy

    model = copy.deepcopy(model).train(mode == "train")
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
            module.training = False
    params = [p for name, p in model.named_parameters() if name in names]
    with torch.no_grad():
        for p, part in zip(params, theta.split([p.numel() for p in params]), strict=True):
            p.copy_(part.view_as(p))
    total = sum(len(x) for x, _ in batches)
    loss = sum(F.cross_entropy(model(x), y) * len(x) for x, y in batches) / total
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)])


def flat(model, names):
    return torch.cat([p.detach().reshape(-1) for name, p in model.named_parameters() if name in names])


def differences(model, batches, mode, names, vector, step=1e-4):
    """Return H v by central differences of the gradient, of fourth order."""
    theta, v = flat(model, names), vector / vector.norm()

    def slope(distance):
        return loss_at(model, theta + distance * v, batches, mode, names)

    found = (8 * (slope(step) - slope(-step)) - (slope(2 * step) - slope(-2 * step))) / (12 * step)
    return found * vector.norm()


def quadratic(eigenvalues, dtype=torch.float64):
    """Return a Problem whose Hessian has these eigenvalues, and the Hessian."""
    import normscope as ns

    values = torch.tensor(eigenvalues, dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=draw, dtype=torch.float64))
    matrix = (basis * values @ basis.T).to(dtype)
    model = nn.Linear(len(values), 1, bias=False).to(dtype)

    def loss(output, _):
        w = model.weight[0]
        return 0.5 * w @ matrix @ w + 0.0 * output.sum()

    return ns.Problem(model, loss, [(torch.zeros(1, len(values), dtype=dtype), None)]), matrix
