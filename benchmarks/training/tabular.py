"""Networks for tables: categories as embeddings, and SAINT."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from methods.base import Model, Spec

MOST_DIMENSIONS = 16
"""of the embedding of a category in a perceptron"""
HIDDEN = 100
"""Width of the layer that embeds a number in SAINT, as its authors have it."""
HEAD_HIDDEN = 1000
"""Width of the layer before SAINT's head, as its authors have it."""
COLUMN_HEAD, ROW_HEAD = 16, 64
"""Width of each head of SAINT's attention between columns and between rows, as its authors have
it."""


class Columns(nn.Module):
    """The columns of a table as one vector: numbers as they are, categories as embeddings.

    A category of n values has min(16, n // 2 + 1) dimensions, so that the vector is longer than the
    row if there is any: what has its length is an embedded row already, and stays.
    """

    def __init__(self, categories: Sequence[int], columns: int) -> None:
        super().__init__()
        counts = list(categories) or [0] * columns
        self._numbers = [place for place, count in enumerate(counts) if not count]
        self._coded = [place for place, count in enumerate(counts) if count]
        widths = [min(MOST_DIMENSIONS, count // 2 + 1) for count in counts if count]
        self.embeddings = nn.ModuleList(
            nn.Embedding(count, width)
            for count, width in zip(filter(None, counts), widths, strict=True)
        )
        self.columns = columns
        self.width = len(self._numbers) + sum(widths)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) or (B, ``width``) to (B, ``width``)."""
        if not self._coded or x.shape[1] != self.columns:
            return x
        coded = zip(self._coded, self.embeddings, strict=True)
        parts = [embed(x[:, place].long()) for place, embed in coded]
        return torch.cat([x[:, self._numbers], *parts], dim=1)


class Attention(nn.Module):
    """Attention with several heads, written out, because fused kernels have no forward derivative.

    Queries, keys and values have no bias.
    """

    def __init__(self, width: int, heads: int, each: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, each**-0.5
        self.into = nn.Linear(width, 3 * heads * each, bias=False)
        self.out = nn.Linear(heads * each, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same shape: each of T places attends to all of them."""
        q, k, v = self.into(x).unflatten(2, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
        share = (q @ k.transpose(2, 3) * self.scale).softmax(dim=3)
        return self.out((share @ v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """A feed-forward layer four times as wide, in which one half gates the other (GEGLU)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same shape."""
        value, gate = self.into(x).chunk(2, dim=2)
        return self.out(self.dropout(value * nn.functional.gelu(gate)))


class Attended(nn.Module):
    """A stage of SAINT: attention and a feed-forward layer, each f(n) + n with n the layer norm.

    Across the columns of a row, or with ``rows`` across the rows of the batch, whose columns are
    then one long vector.
    """

    def __init__(self, tokens: int, width: int, heads: int, dropout: float, rows: bool) -> None:
        super().__init__()
        self.rows = rows
        width, each = (tokens * width, ROW_HEAD) if rows else (width, COLUMN_HEAD)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width, heads, each)
        self.feed = Gated(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, T), the T embedded columns of B rows, to the same shape."""
        tokens = x.transpose(1, 2)
        seen = tokens.flatten(1)[None] if self.rows else tokens
        for norm, layer in zip(self.norms, (self.attention, self.feed), strict=True):
            even = norm(seen)
            seen = layer(even) + even
        return seen.reshape(tokens.shape).transpose(1, 2)


class Tokens(nn.Module):
    """Each column of a row as a vector of ``width`` numbers, behind one for the whole row.

    A category has an embedding, a number a layer of 100 and one of ``width`` of its own column.
    """

    def __init__(self, categories: Sequence[int], columns: int, width: int) -> None:
        super().__init__()
        counts = list(categories) or [0] * columns
        self._coded = [place for place, count in enumerate(counts) if count]
        self._numbers = [place for place, count in enumerate(counts) if not count]
        order = [*self._coded, *self._numbers]
        self._place = [order.index(place) for place in range(columns)]
        known = [counts[place] for place in self._coded]
        starts = torch.tensor([0, *itertools.accumulate(known)][: len(known)], dtype=torch.int64)
        self.register_buffer("starts", starts, persistent=False)
        self.embedding = nn.Embedding(max(1, sum(known)), width)
        self.whole = nn.Parameter(torch.randn(1, 1, width))
        number = len(self._numbers)
        self.first = nn.Parameter(torch.empty(number, 2, HIDDEN).uniform_(-1, 1))
        bound = HIDDEN**-0.5
        self.second = nn.Parameter(torch.empty(number, HIDDEN + 1, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) to (B, ``width``, 1 + D); what has this shape already stays."""
        if x.dim() == 3:
            return x
        number = x[:, self._numbers, None]
        hidden = torch.relu(number * self.first[:, 0] + self.first[:, 1])
        made = torch.einsum("bnh,nhd->bnd", hidden, self.second[:, :-1]) + self.second[:, -1]
        if self._coded:
            codes = x[:, self._coded].long() + self.get_buffer("starts")
            made = torch.cat([self.embedding(codes), made], dim=1)
        whole = self.whole.expand(len(x), 1, -1)
        return torch.cat([whole, made[:, self._place]], dim=1).transpose(1, 2)


class SaintTrunk(nn.Module):
    """Embedded columns, then stages of attention."""

    def __init__(self, stem: Tokens, stages: list[nn.Module]) -> None:
        super().__init__()
        self.stem, self.stages = stem, nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Output (B, width, 1 + D) of each stage."""
        x = self.stem(x)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class Saint(Model):
    """The trunk, a layer on the vector of the whole row, and the head."""

    rows_apart = False

    def __init__(self, trunk: SaintTrunk, width: int, classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.hidden = nn.Linear(width, HEAD_HIDDEN)
        self.head = nn.Linear(HEAD_HIDDEN, classes)

    def entered(self, x: Tensor) -> Tensor:
        """(B, width, 1 + D)"""
        return self.trunk.get_submodule("stem")(x)

    def embed(self, features: list[Tensor]) -> Tensor:
        """(B, 1000)"""
        return torch.relu(self.hidden(features[-1][:, :, 0]))


def saint(
    spec: Spec,
    *,
    depth: int = 1,
    width: int = 32,
    heads: int = 4,
    dropout: float = 0.8,
) -> Saint:
    """SAINT: attention across the columns of a row and across the rows of a batch, ``depth`` times.

    Without its pretraining. As its authors train it: depth 1, width 32 (8 above 100 columns), 4
    heads, dropout .8 in the feed-forward layers. A row's output depends on the rows beside it.

    **Deviations** from the authors' code (somepago/saint at 0a836b7): none known but the initial
    values of the layers that embed numbers, which are drawn column by column here.

    Source: Somepalli et al., SAINT, arXiv:2106.01342; the equations are those of the authors' code.
    """
    for name, value in (("depth", depth), ("width", width), ("heads", heads)):
        if value < 1:
            raise ValueError(f"{name}: expected a whole number above 0, got {value}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
    columns = math.prod(spec.shape)
    stem = Tokens(spec.categories, columns, width)
    stages: list[nn.Module] = [
        Attended(1 + columns, width, heads, dropout, rows)
        for _ in range(depth)
        for rows in (False, True)
    ]
    return Saint(SaintTrunk(stem, stages), width, spec.classes)
