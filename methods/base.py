"""The contract between a method and the training loop."""

from __future__ import annotations

import itertools
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NEEDS = frozenset(
    {"meta", "unlabelled", "generated", "features", "auxiliary_norm", "stages", "frozen_trunk"}
)
IMAGES = frozenset({"image", "labels"})
"""``Method.kinds`` of what works on images alone."""
ANYTHING = frozenset({"image", "vector", "tokens", "categories", "several", "labels"})
"""``Method.kinds`` of what passes the inputs on without looking at them."""


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """A weighted batch with soft labels: what every method takes and returns.

    A training step minimises ``w @ losses(model(x), y)``.
    """

    x: Tensor
    """(B, *S) inputs in their natural range: images in [0, 1], never normalised; a tuple of tensors
    where a row has several inputs."""
    y: Tensor
    """(B, K) targets; rows on the simplex (MultiClass) or in [0, 1] (MultiLabel)."""
    w: Tensor
    """(B,) weight of each row; 1/B as drawn."""
    index: Tensor
    """(B,) int64 number of the row: those of the training split come first, then the unlabelled
    ones, then those from elsewhere; -1 for rows that have no state: meta rows, rows that a method
    adds, and rows that are not trained on in this step."""
    logits: Tensor | None = None
    """(B, K) with graph: ``ctx.forward(x)``, if the method ran it, so that it runs only once."""

    def __len__(self) -> int:
        return len(self.w)


class Added(NamedTuple):
    """Rows that a method added to a batch, and the rows that it made them from."""

    origin: Tensor
    """(n, *S)"""
    x: Tensor
    """(n, *S)"""
    y: Tensor
    """(n, K)"""


class Input(NamedTuple):
    """One of the inputs of a row."""

    kind: Literal["image", "vector", "tokens"]
    """Values of ``tokens`` are int64 numbers of words."""
    shape: tuple[int, ...]
    low: float
    high: float
    categories: tuple[int, ...] = ()
    """Of a vector with columns of categories: how many each column has, 0 where it is a number.
    Their values are codes, floats from 0 up."""


@dataclass(frozen=True)
class Spec:
    """What a method may know about the data before it sees a row.

    ``shape``, ``kind``, ``low``, ``high`` and ``categories`` are those of the first input.
    """

    rows: int
    """Number of rows that may have state: ``Batch.index`` is below it. Those of the training split,
    and the unlabelled ones and those from elsewhere if there are any."""
    classes: int
    """K, the width of logits and targets; 0 if there are as many as rows (contrastive)."""
    shape: tuple[int, ...]
    """Shape of one input: (C, H, W) for an image."""
    kind: Literal["image", "vector", "tokens"] = "image"
    low: float = 0.0
    high: float = 1.0
    categories: tuple[int, ...] = ()
    more: tuple[Input, ...] = ()
    """The inputs after the first, if there are any: then ``Batch.x`` is a tuple."""

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs of a row."""
        first = Input(self.kind, self.shape, self.low, self.high, self.categories)
        return (first, *self.more)


class Task(Protocol):
    """The loss that compares logits with targets."""

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """Loss per row (B,), affine in ``y`` (B, K)."""
        ...

    def labels(self, scores: Tensor, temperature: float = 1.0) -> Tensor:
        """Turn scores (B, K) into valid targets: softmax or sigmoid of scores / temperature."""
        ...


class Stream(Protocol):
    """The rows of one split; the run's seed determines the k-th draw within a call."""

    @property
    def targets(self) -> Tensor:
        """(N, K) targets of all rows."""
        ...

    @property
    def index(self) -> Tensor:
        """(len,) rows that may be drawn in this epoch: all except those that crossfit holds out."""
        ...

    def __len__(self) -> int: ...

    def rows(self, index: Tensor) -> Batch:
        """The rows ``index`` (B,), each with w = 1/B."""
        ...

    def draw(self, n: int, stratified: bool = False) -> Batch:
        """``n`` rows without replacement (all rows if the split has fewer)."""
        ...

    def batches(self, n: int) -> Iterator[Batch]:
        """One shuffled pass in batches of ``n``; the last batch may be smaller."""
        ...


class Model(nn.Module, ABC):
    """A network whose parts a method may use: ``head(embed(features(x))) == model(x)``."""

    trunk: nn.Module
    """Maps inputs (B, *S) to the list of stage outputs; the trainer counts its passes."""
    head: nn.Linear

    def features(self, x: Tensor) -> list[Tensor]:
        """Stage outputs for inputs (B, *S) in their natural range."""
        return self.trunk(x)

    rows_apart: ClassVar[bool] = True
    """Whether the output of a row depends on this row alone when the network is evaluated."""

    def entered(self, x: Tensor) -> Tensor:
        """Inputs as numbers that can be changed a little: categories as their embeddings.

        ``features`` and ``forward`` take these as well as inputs (B, *S).
        """
        return x

    @abstractmethod
    def embed(self, features: list[Tensor]) -> Tensor:
        """(B, D), the input of the head."""

    def pieces(self) -> list[nn.Module]:
        """The stages, if each but the first maps the previous output to its own; else empty.

        A method may run the last ones alone. They are those of the trunk's child ``stages``, an
        ``nn.ModuleList``.
        """
        inner = dict(self.trunk.named_children()).get("stages")
        return list(inner) if isinstance(inner, nn.ModuleList) else []

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.head(self.embed(self.features(x)))


class Context(Protocol):
    """Everything that a method may see of a run.

    It gives no access to the rows of the select and test splits, nor to which labels are corrupted.
    """

    epoch: int
    """From 0."""
    epochs: int
    batch_size: int
    """Rows of a training batch; the last one of a pass may be smaller."""
    step: int
    """Steps before this one, over all epochs."""
    drawn: Tensor | None
    """(B,) the ``index`` that the trainer drew for this step, all of it training rows; None in a
    your own training loop."""

    @property
    def task(self) -> Task:
        """The loss that compares logits with targets."""
        ...

    @property
    def spec(self) -> Spec:
        """What is known about the data."""
        ...

    @property
    def train(self) -> Stream:
        """The training rows; drawing from it does not affect the trainer's own order."""
        ...

    @property
    def optimizer(self) -> Optimizer:
        """For reading (Adam's second moments), never for stepping."""
        ...

    @property
    def model(self) -> nn.Module:
        """The network being trained; a ``Model`` if the method needs "features"."""
        ...

    @property
    def meta(self) -> Stream | None:
        """The meta rows; None unless the method needs "meta"."""
        ...

    @property
    def unlabelled(self) -> Stream | None:
        """Rows whose labels are out of reach; None unless the method needs "unlabelled"."""
        ...

    @property
    def generated(self) -> Stream | None:
        """Rows from elsewhere, with labels; None unless the method needs "generated"."""
        ...

    def forward(self, x: Tensor) -> Tensor:
        """The trainer's own forward pass (its seed, its autocast); at most once per step."""
        ...

    def applied(self, method: Method, batch: Batch) -> Batch:
        """For learners: the method's batch, with its random draws seeded, its time charged and its
        shapes checked."""
        ...

    def update(self, losses: Tensor, w: Tensor) -> Tensor:
        """For learners: a step of the optimiser down ``w @ losses``, both (B,); the loss ()."""
        ...

    def replay(self) -> AbstractContextManager[None]:
        """Sets the generators as in this step's ``forward``, so that dropout masks are the same."""
        ...

    @property
    def repeatable(self) -> bool:
        """Whether the model called under ``replay`` equals ``forward`` up to rounding.

        It does not under ``torch.compile`` or where the training step is not float32.
        """
        ...

    def uncharged(self) -> AbstractContextManager[None]:
        """Diagnostics: stops the clock, restores generators, draws, buffers and training mode."""
        ...

    def log(self, **scalars: float) -> None:
        """Log values, averaged over the epoch, to metrics.jsonl."""
        ...


class Part(nn.Module):
    """What methods and learners declare of themselves, and what they tell of a run.

    Hyper-parameters are keyword-only constructor arguments with defaults: the signature is the
    schema.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Of "meta", "unlabelled", "generated" (rows of ``rows_from``), "features" (stages and head of
    the network), "stages" (more than the last of them), "auxiliary_norm" and "frozen_trunk" (only
    the head is trained)."""
    rows_from: str = ""
    """Data from elsewhere whose rows it draws: ``npz:FILE`` or ``folder:DIR``."""
    kinds: frozenset[str] = IMAGES
    """What it works on: of "image", "vector", "tokens", "categories" (columns of codes in a
    vector), "several" (a tuple of inputs) and "labels" (several labels per row)."""
    called: str = ""
    """The name by which it was built, for sentences."""
    space: ClassVar[Mapping[str, Any]] = {}
    """Search space of the hyper-parameters."""
    source: ClassVar[str] = ""
    """Authors, title, venue and arXiv number."""
    short_name: ClassVar[str] = ""
    """Label that replaces its name in tables and figures; a legend gives the name."""
    version: ClassVar[int] = 1
    """Raise it whenever the method's numbers change; part of a run's id."""
    operations: ClassVar[tuple[str, ...]] = ()
    """Column names of "probability" and "magnitude", if ``learned`` returns them."""
    controls: tuple[str, ...] = ()
    """The control rows of a method that learns or adapts: the first keeps everything of it except
    what it learns, the others everything except a part of that. In their names ``{self}`` is the
    method and ``{upstream}`` its upstream: ``("frozen(upstream={self})",)``."""
    control: bool = False
    """Whether it is such a control, or is shown for orientation only."""
    extras: ClassVar[frozenset[str]] = frozenset()
    """Arguments of what it may do in addition: at equal passes the same method without them is what
    it is compared with, and not its upstream."""
    waits: str = ""
    """Why its steps read values from the device, for which the host waits; empty if they do not.
    Code inside ``ctx.uncharged()`` does not count."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Arguments that ``preset=NAME`` sets; the first preset is empty and means the bare name."""
    costs: Mapping[str, float] = {}
    """Measured time of a training step in plain steps, by preset; the first also holds for the bare
    name and for arguments outside any preset. Empty: as a plain step."""

    def __init__(self, upstream: Method | None = None) -> None:
        super().__init__()
        self.upstream = upstream

    def parts(self) -> Iterator[Part]:
        """This one and all methods that run before it."""
        if self.upstream is not None:
            yield from self.upstream.parts()
        yield self

    def requires(self) -> frozenset[str]:
        """Its ``needs`` and those of what runs before it; arguments may add to them."""
        return self.needs | (self.upstream.requires() if self.upstream is not None else set())

    def supports(self, task: Task, spec: Spec) -> str:
        """The reason why it cannot be used here, or an empty string."""
        above = self.upstream.supports(task, spec) if self.upstream is not None else ""
        return refusal(self, task, spec) or above

    def fits(self, model: nn.Module) -> str:
        """The reason why the method cannot be used on this network, or an empty string.

        The network has what ``requires`` names.
        """
        return self.upstream.fits(model) if self.upstream is not None else ""

    def setup(self, ctx: Context) -> None:
        """Allocate state that depends on the data; called once, before the first epoch."""
        if self.upstream is not None:
            self.upstream.setup(ctx)

    def begin_epoch(self, ctx: Context) -> None:
        """Run its own phase before the epoch's first step; clear caches."""
        if self.upstream is not None:
            self.upstream.begin_epoch(ctx)

    def finish(self, ctx: Context) -> None:
        """Called once after the last step: the only place where a method may change the model."""
        if self.upstream is not None:
            self.upstream.finish(ctx)

    def learned(self) -> dict[str, Tensor]:
        """What was learned, as arrays by name for learned.npz; empty if nothing was."""
        return self.upstream.learned() if self.upstream is not None else {}

    def as_policy(self, learned: Mapping[str, Any]) -> dict[str, Any]:
        """What ``augbench policy`` writes: the content of a file with which autoaugment draws as
        this method does; empty if there is none.

        ``learned`` has the arrays "probability" and "magnitude" of ``learned``, as far as there are
        any: a line for each class, or one for all.
        """
        return {}

    def learning(self) -> dict[str, float]:
        """How far learning went, by name, for result.json; empty if nothing is learned.

        ``outer_steps`` is a number of steps; ``probability``, ``magnitude``, ``weight`` and
        ``label`` are median distances from the start, over rows, as shares of their range.
        """
        return self.upstream.learning() if self.upstream is not None else {}

    def captions(self) -> list[str]:
        """What was done to each row of the last batch, for a figure; empty if not recorded."""
        return self.upstream.captions() if self.upstream is not None else []

    def added(self) -> Added | None:
        """The rows added to the last batch, for a figure; None if none are ever added."""
        return self.upstream.added() if self.upstream is not None else None


class Method(Part, ABC):
    """Turns a drawn batch into the batch that is trained on, and may learn while doing so.

    ``upstream`` is the augmentation that runs first, if there is one.
    """

    mixes_rows: bool = False
    """Whether an output row mixes several input rows."""
    comes_first: bool = False
    """Whether it must come first in a chain: it draws its own rows, or works on rows as drawn."""
    frozen: bool = False
    """Whether to stay at the start and learn nothing; set by the control ``frozen`` on methods that
    name it in ``controls``."""
    one_row: bool = False
    """Whether it remembers the network's output for each row: nothing before it may mix rows, nor
    after it if it takes the output from ``losses``."""
    hands_logits: bool = False
    """Whether the batch it returns holds the logits of the step's ``ctx.forward``."""
    before_forward: bool = False
    """Whether its upstream must leave the step's forward pass to it or to the trainer."""
    task_loss: bool = False
    """Whether it needs the task's loss, so that its upstream may have no loss of its own."""

    def __init__(self, upstream: Method | None = None) -> None:
        super().__init__(upstream)
        if upstream is not None:
            self.mixes_rows = self.mixes_rows or upstream.mixes_rows
            self.hands_logits = self.hands_logits or upstream.hands_logits

    def parts(self) -> Iterator[Method]:
        """This method and all methods that run before it."""
        if self.upstream is not None:
            yield from self.upstream.parts()
        yield self

    def supports(self, task: Task, spec: Spec) -> str:
        """The reason why the method cannot be used here, or an empty string."""
        if self.upstream is not None and self.before_forward and self.upstream.hands(spec):
            return (
                f"{named(self)} works on rows before this step's forward pass, which its upstream "
                "has already run"
            )
        if self.upstream is not None and self.task_loss and overrides(self.upstream, "losses"):
            return f"{named(self)} needs the task's loss, but its upstream has a loss of its own"
        return super().supports(task, spec)

    def hands(self, spec: Spec) -> bool:
        """Whether its batches hold logits on these data."""
        above = self.upstream is not None and self.upstream.hands(spec)
        return self.hands_logits or above

    @abstractmethod
    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Return the batch to train on; called at every step, never changes its input in place."""

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """Loss per row (B,), before weighting."""
        if self.upstream is not None:
            return self.upstream.losses(logits, batch, ctx)
        return ctx.task.losses(logits, batch.y)

    def weighted(self, rows: int) -> int:
        """How many of ``rows`` rows it works on, from the first on; others stay unchanged."""
        return self.upstream.weighted(rows) if self.upstream is not None else rows


class Chain(Method):
    """Several augmentations, one after the other: ``crop+flip+mixup``."""

    def __init__(self, links: list[Method]) -> None:
        super().__init__()
        if len(links) < 2:
            raise ValueError(f"a chain needs at least two links, got {len(links)}")
        own = [named(link) for link in links if overrides(link, "losses")]
        if len(own) > 1:
            raise ValueError(f"only one link of a chain may have its own loss, got {own}")
        late = [named(p) for link in links[1:] for p in link.parts() if p.comes_first]
        if late:
            raise ValueError(
                f"{late[0]} draws rows, or stores changes of rows as drawn, and must be the first "
                "link"
            )
        mixed = list(itertools.accumulate((link.mixes_rows for link in links), operator.or_))
        alone = [
            named(link)
            for link, before in zip(links[1:], mixed, strict=False)
            if before and any(p.one_row for p in link.parts())
        ]
        if alone:
            raise ValueError(
                f"{alone[0]} remembers the network's prediction for each row, but a link before it "
                "mixes rows"
            )
        seeing = [
            named(part)
            for link in links
            for part in link.parts()
            if part.one_row and type(part).losses is not Method.losses
        ]
        if seeing and any(mixed):
            raise ValueError(
                f"{seeing[0]} remembers the output on each row that is trained on, but another "
                "link mixes rows"
            )
        learning = [named(link) for link in links if "meta" in link.needs]
        if learning:
            raise ValueError(
                f"{learning[0]} sets meta rows aside and cannot be in a chain: write "
                f"{learning[0]}(upstream=...)"
            )
        early = [named(link) for link in links[:-1] if link.hands_logits]
        if early:
            raise ValueError(f"{early[0]} runs the step's forward pass and must be the last link")
        self.links = nn.ModuleList(links)
        self.control = any(link.control for link in links)
        self.mixes_rows = any(link.mixes_rows for link in links)
        self.hands_logits = links[-1].hands_logits

    def _each(self) -> Iterator[Method]:
        return (cast("Method", link) for link in self.links)

    def parts(self) -> Iterator[Method]:
        """The links and all methods that run before them."""
        for link in self._each():
            yield from link.parts()

    def requires(self) -> frozenset[str]:
        """The requirements of all links."""
        return frozenset().union(*(link.requires() for link in self._each()))

    def supports(self, task: Task, spec: Spec) -> str:
        """The first reason from any link."""
        links = list(self._each())
        for link in links[:-1]:
            if link.hands(spec):
                return f"{named(link)} runs the step's forward pass and must be the last link"
        return next(filter(None, (link.supports(task, spec) for link in links)), "")

    def hands(self, spec: Spec) -> bool:
        """Whether the last link's batches hold logits."""
        return list(self._each())[-1].hands(spec)

    def fits(self, model: nn.Module) -> str:
        """The first reason from any link."""
        return next(filter(None, (link.fits(model) for link in self._each())), "")

    def setup(self, ctx: Context) -> None:
        """Set up every link."""
        for link in self._each():
            link.setup(ctx)

    def begin_epoch(self, ctx: Context) -> None:
        """Begin the epoch in every link."""
        for link in self._each():
            link.begin_epoch(ctx)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Apply the links in order; only the last one may return logits."""
        for link in self._each():
            if batch.logits is not None:
                raise ValueError("only the last link of a chain may return logits")
            batch = link.augment(batch, ctx)
        return batch

    def weighted(self, rows: int) -> int:
        """The rows that every link works on."""
        return min(link.weighted(rows) for link in self._each())

    def finish(self, ctx: Context) -> None:
        """Finish every link."""
        for link in self._each():
            link.finish(ctx)

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """The loss of the link that defines one, or else the task's."""
        for link in self._each():
            if overrides(link, "losses"):
                return link.losses(logits, batch, ctx)
        return ctx.task.losses(logits, batch.y)

    def learned(self) -> dict[str, Tensor]:
        """What the links learned; for equal names the last link wins."""
        return {name: value for link in self._each() for name, value in link.learned().items()}

    def learning(self) -> dict[str, float]:
        """How far the links' learning went; for equal names the last link wins."""
        return {name: value for link in self._each() for name, value in link.learning().items()}

    def captions(self) -> list[str]:
        """The links' captions of each row, joined."""
        told = [texts for link in self._each() if (texts := link.captions())]
        return [", ".join(filter(None, texts)) for texts in zip(*told, strict=True)]

    def added(self) -> Added | None:
        """What the last link that adds rows added."""
        told = [added for link in self._each() if (added := link.added()) is not None]
        return told[-1] if told else None


def named(method: Part) -> str:
    """What a sentence calls a method or learner."""
    return method.called or type(method).__name__.lower()


def refusal(method: Part, task: Task, spec: Spec) -> str:
    """Why its ``kinds`` do not include these data; else empty."""
    kinds, name, inputs = method.kinds, named(method), spec.inputs
    if other := [each.kind for each in inputs if each.kind not in kinds]:
        taken = " or ".join(PLURAL[each] for each in sorted(kinds & set(PLURAL)))
        return f"{name} needs {taken}, but the data are {PLURAL[other[0]]}"
    if len(inputs) > 1 and "several" not in kinds:
        return f"{name} needs one input per row, but these have {len(inputs)}"
    columns = [count for each in inputs for count in each.categories]
    if (coded := sum(count > 0 for count in columns)) and "categories" not in kinds:
        return f"{name} needs numbers, but {coded} of {len(columns)} columns are categories"
    if "labels" not in kinds and not exclusive(task):
        return f"{name} needs one label per row, but these have several"
    return ""


PLURAL = {"image": "images", "vector": "vectors", "tokens": "texts"}


def exclusive(task: Task) -> bool:
    """Whether a row has one label of K, so that targets are distributions over the classes."""
    probe = task.labels(torch.zeros(1, 3), 1.0)  # the task defines what is valid
    return bool(torch.isclose(probe.sum(), torch.ones(())))


def overrides(method: Part, hook: Literal["losses", "finish", "begin_epoch"]) -> bool:
    """Whether ``method`` or something along its chain defines ``hook`` itself."""
    defaults = {getattr(cls, hook, None) for cls in (Part, Method, Chain)}
    found = (getattr(type(part), hook, None) for part in method.parts())
    return any(each not in defaults for each in found)
