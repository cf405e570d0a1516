"""The same models in torch, for Opacus and curvlinops; imported only where torch is installed."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from experiments.benchmarks.cases import Case
from experiments.benchmarks.libraries import as_torch, torch_device
from experiments.benchmarks.timing import Calls


class LowRank(nn.Module):
    """A frozen matrix and its low-rank update."""

    def __init__(self, width: int, features: int, rank: int) -> None:
        """Named as in `cases.Dense`."""
        super().__init__()
        self.frozen = nn.Linear(width, features, bias=False)
        self.lora_a = nn.Linear(width, rank, bias=False)
        self.lora_b = nn.Linear(rank, features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, length, width) -> (n, length, features)."""
        return self.frozen(x) + self.lora_b(self.lora_a(x))


class Block(nn.Module):
    """A layer of `cases.Transformer`."""

    def __init__(self, width: int, heads: int, rank: int) -> None:
        """Pre-norm attention and MLP."""
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.q = LowRank(width, width, rank)
        self.v = LowRank(width, width, rank)
        self.k = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, length, width) -> the same."""
        y = self.norms[0](x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """As `cases.Transformer`."""

    def __init__(self, length: int, layers: int = 2, width: int = 128, heads: int = 4, rank: int = 2) -> None:
        """Low-rank updates alone are trained."""
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Block(width, heads, rank) for _ in range(layers)])
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, length) -> (n, 2)."""
        return self.head(self.blocks(self.embed(tokens) + self.positions).mean(1))


def make(case: Case) -> nn.Module:
    """The twin of the case's model, all its parameters trainable but a transformer's frozen ones."""
    if case.name == "linear":
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    elif case.name == "mlp":
        model = nn.Sequential(nn.Flatten(), nn.Linear(196, 48), nn.ReLU(), nn.Linear(48, 10))
    elif case.name == "cnn":
        model = nn.Sequential(
            nn.Unflatten(1, (1, 28)),
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(7 * 7 * 32, 16), nn.ReLU(), nn.Linear(16, 10),
        )  # fmt: skip
    else:
        model = Transformer(case.records["x"].shape[1])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
    return model.to(torch_device())


def opacus_clips(case: Case, clip_norm: float, *, head_only: bool) -> Calls:
    """The clipped sum with per-record gradients (hooks), and by two backward passes (ghost clipping)."""
    x = as_torch(case.records["x"])
    labels = as_torch(case.records["label"])
    found = {}
    for name, one in (("hooks", _hooks), ("ghost", _ghost)):
        torch.manual_seed(0)
        model = make(case)
        if head_only and case.name == "cnn":
            for layer in model[:-1]:
                layer.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = one(model, x, labels, clip_norm)
    return found


def _options(model: nn.Module, n: int, clip_norm: float) -> dict[str, Any]:
    """Of Opacus's optimizers, without noise."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return {"optimizer": optimizer, "noise_multiplier": 0.0, "max_grad_norm": clip_norm, "expected_batch_size": n}


def _hooks(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, clip_norm: float) -> Callable[[], None]:
    """Opacus with every record's gradient formed."""
    module = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(**_options(module, len(x), clip_norm), loss_reduction="sum")

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(module(x), labels, reduction="sum").backward()
        optimizer.clip_and_accumulate()
        _wait()

    return _quiet(run)


def _ghost(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, clip_norm: float) -> Callable[[], None]:
    """Opacus with norms first, and a second backward pass for the clipped sum."""
    module = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=clip_norm)
    optimizer = DPOptimizerFastGradientClipping(**_options(module, len(x), clip_norm), loss_reduction="sum")
    criterion = DPLossFastGradientClipping(
        module, optimizer, nn.CrossEntropyLoss(reduction="sum"), loss_reduction="sum"
    )

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        criterion(module(x), labels).backward()
        _wait()

    return _quiet(run)


def _quiet(run: Callable[[], None]) -> Callable[[], None]:
    """Torch warns at each backward pass of a hooked module; the tests take warnings for errors."""

    def quietly() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()

    return quietly


def _wait() -> None:
    if torch_device().type == "cuda":
        torch.cuda.synchronize()


def hessian_columns(case: Case, dim: int) -> Callable[[], None]:
    """P^T H P with curvlinops; its operator takes the columns of a matrix itself."""
    from curvlinops import HessianLinearOperator

    model = make(case)
    parameters = [p for p in model.parameters() if p.requires_grad]
    data = [(as_torch(case.records["x"]), as_torch(case.records["label"]))]
    operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
    basis = torch.linalg.qr(torch.randn(operator.shape[0], dim, device=torch_device()))[0]

    def run() -> None:
        basis.T @ (operator @ basis)
        _wait()

    return run
