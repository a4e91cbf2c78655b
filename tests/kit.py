"""What the tests of ternarize share: a small model, and what its report says."""

import torch
from torch import Tensor, nn

from ternarize.report import TernaryReport


def report_of(model: nn.Module) -> TernaryReport:
    report = model.__dict__["ternary_report"]
    assert isinstance(report, TernaryReport)
    return report


def skipped(model: nn.Module) -> dict[str, str | None]:
    return {row.name: row.reason for row in report_of(model).skipped}


def swapped(model: nn.Module) -> list[str]:
    return [row.name for row in report_of(model).swapped]


class Block(nn.Module):
    """A mixture of experts in small: a gate, two experts, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.gate = nn.Linear(16, 2)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        weights = torch.softmax(self.gate(x), -1)
        y = sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        out: Tensor = self.lm_head(self.norm(y))
        return out
