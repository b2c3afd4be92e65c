"""Rows from elsewhere: images that a generator made, in place of a share of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from methods.base import Batch, Context, Method
from methods.functional import joined, rows_of

KINDS = ("npz:", "folder:")


class Generated(Method):
    """Replace a share of each batch by rows from elsewhere, such as those that a generator made.

    ``data`` is ``npz:FILE``, with the arrays images and labels (``npz:DIR``: the file in it that is
    named as the data set is), or ``folder:DIR``, with one folder per class; ``augbench generate``
    makes such rows. The last round(``share`` B) of a batch's B rows, at most as many as ``data``
    has, are replaced by rows of ``data``, drawn afresh at each step. A batch stays as large as it
    was, so a step costs what it did, and the row ``none`` has real images in their place. With
    ``share`` 1 all are replaced, as saflex expects it, whose clean rows are real ones.

    The new rows have numbers of their own in ``Batch.index``, after those of the training split, so
    that a method over this one, such as saflex(upstream=generated(...)), keeps state for each of
    them and learns weights and labels for them.
    """

    kinds = frozenset({"image"})
    needs = frozenset({"generated"})
    comes_first = True
    source = "Dunlap et al., ALIA, NeurIPS 2023, arXiv:2305.16289"
    space: ClassVar = {"share": ("uniform", 0.1, 0.9)}

    def __init__(self, *, data: str = "", share: float = 0.5) -> None:
        super().__init__()
        if data and not any(data.startswith(kind) and data != kind for kind in KINDS):
            raise ValueError(f"data: expected 'npz:FILE' or 'folder:DIR', got {data!r}")
        if not 0 < share <= 1:
            raise ValueError(f"share: expected a share of the batch in (0, 1], got {share}")
        self.rows_from, self.share = data, share
        self._told: list[str] = []

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The first rows as drawn, and rows from elsewhere in place of the others.

        Raises:
            ValueError: the context has none.
        """
        if ctx.generated is None:
            raise ValueError("generated takes rows from elsewhere, but the context has none")
        count = min(round(self.share * len(batch)), len(ctx.generated))
        own = rows_of(batch, slice(len(batch) - count))
        self._told = [*[""] * len(own), *["from elsewhere"] * count]
        return replace(joined(own, ctx.generated.draw(count)), w=batch.w)

    def captions(self) -> list[str]:
        """Which rows of the last batch are from elsewhere."""
        return self._told
