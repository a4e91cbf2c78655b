"""A small byte-level decoder: attention and feed-forward, a vector-quantised bottleneck, a graph over the tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256


class CausalAttention(nn.Module):
    """Causal self-attention with heads of 64 features."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed


class FeedForward(nn.Module):
    """Two layers with a GELU between, four times as wide."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.up = nn.Linear(features, 4 * features)
        self.down = nn.Linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class TokenGraph(nn.Module):
    """Each token gathers from the ``neighbours`` tokens up to itself that its query fits best: a sparse graph."""

    def __init__(self, features: int, neighbours: int = 8) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.qkv = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        tokens = x.shape[1]
        q, k, v = self.qkv(x).chunk(3, -1)
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).float().masked_fill(later, -torch.inf)
        edges = scores.topk(min(self.neighbours, tokens), -1)
        # The first tokens have fewer neighbours than edges; the others of their edges have weight 0.
        weights = edges.values.softmax(-1).to(v.dtype)
        adjacency = torch.zeros_like(scores, dtype=v.dtype).scatter(-1, edges.indices, weights)
        y: Tensor = self.out(adjacency @ v)
        return y


class VectorQuantizer(nn.Module):
    """A bottleneck whose narrow vectors are replaced by the nearest of a codebook.

    With the straight-through gradient and the loss of van den Oord, Vinyals and Kavukcuoglu, "Neural discrete
    representation learning" (2017, arXiv:1711.00937), whose commitment weight is 0.25.
    """

    def __init__(self, features: int, codes: int = 64) -> None:
        super().__init__()
        self.down = nn.Linear(features, features // 4)
        self.codebook = nn.Parameter(torch.randn(codes, features // 4))
        self.up = nn.Linear(features // 4, features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, D] to [B, S, D], and the loss of codebook and commitment."""
        z = self.down(x).float()
        code = self.codebook[torch.cdist(z.detach(), self.codebook.detach()[None]).argmin(-1)]
        loss = F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, code.detach())
        return self.up((z + (code - z).detach()).to(x.dtype)), loss


class SmokeModel(nn.Module):
    """Embedding, attention, feed-forward, then the blocks that are on, and a head.

    Args:
        features: D, a multiple of 64.
        vq: whether there is a vector-quantised bottleneck.
        graph: whether there is a graph over the tokens.
    """

    def __init__(self, *, features: int = 256, vq: bool = True, graph: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, features)
        mixers: list[nn.Module] = [CausalAttention(features), FeedForward(features)]
        if graph:
            mixers.append(TokenGraph(features))
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.RMSNorm(features) for _ in mixers)
        self.vq = VectorQuantizer(features) if vq else None
        self.norm = nn.RMSNorm(features)
        self.lm_head = nn.Linear(features, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting each next token, in nats, and of the quantiser: int64 [B, S + 1] to a scalar."""
        x = self.embed(tokens[:, :-1])
        for mixer, norm in zip(self.mixers, self.norms, strict=True):
            x = x + mixer(norm(x))
        quantiser_loss = x.new_zeros(())
        if self.vq is not None:
            y, quantiser_loss = self.vq(x)
            x = x + y
        logits = self.lm_head(self.norm(x)).flatten(0, 1).float()
        loss: Tensor = F.cross_entropy(logits, tokens[:, 1:].flatten()) + quantiser_loss
        return loss
