"""Stages, embedding and head of a network that is not ours, found by running it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Model
from methods.functional import buffers_kept, mode

NO_HEAD = (
    "its output is not that of an nn.Linear, or it uses the weights of that layer elsewhere too"
)
"""Why a network is not wrapped."""
ROWS = 2
"""Images of the trial run: batch normalisation needs two."""


class Prepared(nn.Module):
    """A network behind what prepares its inputs."""

    def __init__(self, prepare: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.prepare, self.network = prepare, network

    def forward(self, x: Tensor) -> Tensor:
        """What the network returns for prepared inputs (B, *S)."""
        return self.network(self.prepare(x))


class HookedTrunk(Prepared):
    """A network without its head; hooks keep the outputs of its stages.

    ``stages`` are those before the last one, which needs no hook: it ends at the input of the head.
    Outputs have their channels at 1: tokens (B, N, D) become (B, D, N).
    """

    def __init__(self, prepare: nn.Module, network: nn.Module, stages: Sequence[Stage]) -> None:
        super().__init__(prepare, network)
        self.stages = len(stages) + 1
        self._held: dict[int, Tensor] | None = None
        for place, stage in enumerate(stages):
            module = network.get_submodule(stage.name)
            module.register_forward_hook(partial(self._hold, place, stage))

    def _hold(self, place: int, stage: Stage, module: nn.Module, given: Any, output: Any) -> None:
        if self._held is not None:  # a stage may also run alone
            tensor: Tensor = output if stage.part is None else output[stage.part]
            self._held[place] = tensor.movedim(-1, 1) if stage.channels_last else tensor

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Stage outputs, the last of them the input of the head (B, D)."""
        held = self._held = {}
        try:
            last = super().forward(x)
        finally:
            self._held = None
        return [*(held[place] for place in sorted(held)), last]


class HookedModel(Model):
    """A network that is not ours as a ``Model``; its last stage output is the embedding."""

    def __init__(self, trunk: HookedTrunk, head: nn.Linear, pieces: list[nn.Module]) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head
        self._pieces = pieces  # in a list, so that their parameters have one name

    def embed(self, features: list[Tensor]) -> Tensor:
        """(B, D): the input of the head."""
        return features[-1]

    def pieces(self) -> list[nn.Module]:
        """The stages, if chains of modules lead from each to the next; else empty."""
        return self._pieces


class Stage(NamedTuple):
    """The module at the end of a stage."""

    name: str
    part: int | None
    """the place of the tensor in its output, where that is not one tensor"""
    channels_last: bool
    """whether the tensor is (B, *positions, C)"""


class Piece(nn.Module):
    """Modules one after the other, from the output of a stage to that of the next."""

    def __init__(self, modules: Sequence[nn.Module], back: bool, forth: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(*modules)
        self.back, self.forth = back, forth

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *positions) to the same; the modules may have their channels last."""
        x = self.inner(x.movedim(1, -1) if self.back else x)
        return x.movedim(-1, 1) if self.forth else x


class Closing(nn.Module):
    """What a network does to the last output without a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *positions) or (B, N, D) to (B, D)."""
        return self.function(x)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def _pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


def _class_token(x: Tensor) -> Tensor:
    return x[:, 0]


def _mean_token(x: Tensor) -> Tensor:
    return x.mean(dim=1)


CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm1d,
    nn.InstanceNorm2d,
)  # fmt: skip
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
"""Layers that tell where channels are. Subclasses of the latter may have them elsewhere."""
CLOSINGS = {4: (_flat, _pooled, _mean), 3: (_class_token, _mean_token), 2: ()}
"""What may come between the last module and the head, by the dimensions of its output."""


class Call(NamedTuple):
    """One call of a module in the trial run."""

    name: str
    module: nn.Module
    given: Tensor | None
    """its input, if that is one tensor and nothing else"""
    output: Tensor | None
    """its output, if that is one tensor"""
    part: int | None
    value: Tensor | None
    """its output, or the first part of it, that has a row for each image"""
    start: int
    end: int
    given_version: int
    value_version: int
    """how often the tensor had been changed in place when the call began, and when it ended"""


def embedding_alone(network: nn.Module) -> bool:
    """Whether the stages of a network were looked for, and only the last one was found."""
    return any(isinstance(each, HookedTrunk) and each.stages == 1 for each in network.modules())


def staged(
    prepare: nn.Module,
    network: nn.Module,
    shape: Sequence[int],
    classes: int,
    stages: Sequence[tuple[str, int]] | None = None,
) -> HookedModel | None:
    """The network as a Model, or None if its output is not that of an ``nn.Linear``.

    ``shape`` is that of an input, before ``prepare``. ``stages`` are names of modules with their
    channels; where none of them is called, a stage ends at the last module, of those that follow
    one another, before the size of their output changes. The network is changed: its head becomes
    the identity.
    """
    device = next(network.parameters()).device
    x = torch.rand(ROWS, *shape, generator=torch.Generator().manual_seed(0), device="cpu")
    x = x.to(device)
    with torch.no_grad(), _same_draws():
        prepared = prepare(x)
        with buffers_kept(network), mode(network, training=True), _recorded(network) as calls:
            logits = network(prepared)
        head = _head(calls, logits, classes)
        if head is None:
            return None
        found = list(_named(calls, head, stages or ())) or list(_ends(calls, head))
        # What follows a stage must not change its output in place, and the head's input is a stage.
        kept = [each for each in found if each.value._version == each.value_version]  # type: ignore[union-attr]
        order = {call: _channels_last(calls, call, stages) for call in kept}
        ends = [call for call in kept if call.value is not head.given and order[call] is not None]
        last = [bool(order[call]) for call in ends]
        pieces = _pieces(calls, [*ends, head], last)
        before = _outputs(partial(_logits, prepare, network), network, x)
    parent, _, name = head.name.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
    trunk = HookedTrunk(
        prepare,
        network,
        [Stage(each.name, each.part, flag) for each, flag in zip(ends, last, strict=True)],
    )
    linear = head.module
    assert isinstance(linear, nn.Linear)
    model = HookedModel(trunk, linear, pieces)
    with torch.no_grad(), buffers_kept(model), _same_draws():
        try:
            same = _equal(before, _outputs(model, model, x))
        except Exception:  # it ran with its head: something of it needs more than the calls
            same = False
        if not same:
            setattr(network.get_submodule(parent), name, linear)
            return None
        with mode(model, training=False):
            if pieces and not _fits(model, x):
                model._pieces = []
    return model


@contextmanager
def _same_draws() -> Iterator[None]:
    """Leaves the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


def _logits(prepare: nn.Module, network: nn.Module, x: Tensor) -> Tensor:
    return network(prepare(x))


def _outputs(run: Callable[[Tensor], Tensor], network: nn.Module, x: Tensor) -> list[Tensor]:
    """What it returns in train and in eval mode, with the same random draws each time.

    On the meta device in eval mode alone.
    """
    made = []
    for training in (False,) if x.is_meta else (True, False):  # slow there, and without values
        with mode(network, training=training), buffers_kept(network):
            torch.manual_seed(0)
            made.append(run(x))
    return made


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    if any(each.is_meta for each in one):
        return all(a.shape == b.shape for a, b in zip(one, other, strict=True))
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _fits(model: HookedModel, x: Tensor) -> bool:
    """Whether each piece maps the stage output before it to its own."""
    features = model.features(x)
    pieces = model.pieces()
    made = [piece(before) for piece, before in zip(pieces[1:], features[:-1], strict=True)]
    return _equal(made, features[1:])


@contextmanager
def _recorded(network: nn.Module) -> Iterator[list[Call]]:
    """The calls of all modules in the block, in the order in which they end."""
    calls: list[Call] = []
    open_: list[tuple[int, Tensor | None]] = []
    names = {id(module): name for name, module in network.named_modules()}
    clock = iter(range(10**9))

    def enter(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        only = len(given) == 1 and all(each is None for each in named.values())
        x = given[0] if only and isinstance(given[0], Tensor) else None
        open_.append((next(clock), x))
        versions.append(-1 if x is None else x._version)

    def leave(module: nn.Module, given: Any, named: Any, output: Any) -> None:
        start, x = open_.pop()
        part, made = _with_rows(output)
        whole = output if isinstance(output, Tensor) else None
        version = -1 if made is None else made._version
        at = start, next(clock), versions.pop(), version
        calls.append(Call(names[id(module)], module, x, whole, part, made, *at))

    versions: list[int] = []
    handles = []
    for module in network.modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _with_rows(output: object) -> tuple[int | None, Tensor | None]:
    """The first tensor of an output with a row for each image, and its place among several."""
    several = isinstance(output, tuple | list)
    for place, part in enumerate(output if several else [output]):
        if isinstance(part, Tensor) and part.dim() > 1 and len(part) == ROWS:
            return place if several else None, part
    return None, None


def _head(calls: Sequence[Call], logits: object, classes: int) -> Call | None:
    """The call of the linear layer whose output is that of the network."""
    if not isinstance(logits, Tensor) or logits.shape != (ROWS, classes):
        return None
    made = [call for call in calls if call.output is logits and isinstance(call.module, nn.Linear)]
    once = len(made) == 1 and sum(call.module is made[0].module for call in calls) == 1
    given = made[0].given if once else None
    return made[0] if given is not None and given.dim() == 2 and made[0].name else None


def _named(calls: Sequence[Call], head: Call, stages: Sequence[tuple[str, int]]) -> Iterator[Call]:
    """The calls of these modules, as far as each was called once; without the last of them.

    The last stage ends at the input of the head. A part of an output must have the listed channels.
    """
    for name, channels in stages[:-1]:
        own = [call for call in calls if call.name == name]
        if len(own) != 1 or own[0].value is None or own[0].end > head.start:
            continue
        if own[0].part is None or channels in own[0].value.shape[1:]:
            yield own[0]


def _ends(calls: Sequence[Call], head: Call) -> Iterator[Call]:
    """The last call before the size of the output changes, but for the last size."""
    root = next(call for call in calls if not call.name)
    blocks = [call for call in _blocks(calls, root, head) if call.end < head.start]
    sizes = [list(same) for _, same in groupby(blocks, key=partial(_size, calls))]
    learned = [same for same in sizes if any(_has_parameters(call) for call in same)]
    for same in learned[:-1]:
        once = [call for call in same if _once(calls, call)]
        if once:
            yield once[-1]


def _blocks(calls: Sequence[Call], outer: Call, head: Call) -> Iterator[Call]:
    """The calls within ``outer`` in order; those of a Sequential are opened, not itself.

    So are those that return no tensor of the batch's rows, or several, the first of them from a
    module within, and those around the head.
    """
    inside = [c for c in calls if outer.start < c.start and c.end < outer.end]
    ended = outer.start
    for call in sorted(inside, key=lambda call: call.start):
        if call.start < ended:
            continue  # within the one before
        ended = call.end
        around = call.start < head.start and head.end < call.end
        passed = call.part is not None and any(
            call.start < c.start and c.end < call.end and c.value is call.value and _once(calls, c)
            for c in inside
        )
        if around or passed or call.value is None or isinstance(call.module, nn.Sequential):
            yield from _blocks(calls, call, head)
        else:
            yield call


def _once(calls: Sequence[Call], call: Call) -> bool:
    return sum(call.module is other.module for other in calls) == 1


def _size(calls: Sequence[Call], call: Call) -> tuple[int, ...]:
    shape = tuple(call.value.shape) if call.value is not None else ()
    first = len(shape) == 4 or (len(shape) == 3 and _order(calls, call) is False)
    return shape[2:] if first else shape[1:]


def _has_parameters(call: Call) -> bool:
    return any(True for _ in call.module.parameters())


def _channels_last(
    calls: Sequence[Call], call: Call, stages: Sequence[tuple[str, int]] | None
) -> bool | None:
    """Whether an output has its channels at the end, as the number of them or its layers say.

    None if nothing says it of (B, *, *): that may be tokens or channels of a line.
    """
    assert call.value is not None
    shape = call.value.shape
    channels = dict(stages or ()).get(call.name)
    if channels is not None:
        ends = len(shape) == 3 if shape[1] == shape[-1] else shape[1] != channels == shape[-1]
        return ends
    order = _order(calls, call)
    return False if order is None and len(shape) != 3 else order


def _order(calls: Sequence[Call], call: Call) -> bool | None:
    """Whether the last layer that made this shape has its channels at the end; None: there is none.

    Activations, residual sums and dropout keep the shape, so they may follow that layer.
    """
    assert call.value is not None
    for other in reversed(calls):
        if other.end > call.end or other.output is None or other.output.shape != call.value.shape:
            continue
        if isinstance(other.module, CHANNELS_FIRST):
            return False
        if type(other.module) in CHANNELS_LAST:
            return True
    return None


def _pieces(calls: Sequence[Call], ends: Sequence[Call], last: Sequence[bool]) -> list[nn.Module]:
    """The modules from each stage to the next; ``ends`` is closed by the head. Empty if not all."""
    flags = [*last, False]
    made: list[nn.Module] = [nn.Identity()]  # the first stage starts at the image
    for place in range(1, len(ends)):
        here, there = ends[place - 1], ends[place]
        is_head = place == len(ends) - 1
        goal = there.given if is_head else there.value
        until = there.start if is_head else there.end
        chain = _chain(calls, here, goal, until)
        if chain is None:
            return []
        made.append(Piece(chain, flags[place - 1], flags[place]))
    return made


def _chain(
    calls: Sequence[Call], here: Call, goal: Tensor | None, until: int
) -> list[nn.Module] | None:
    """Modules that map an output to ``goal``, each called on just what the one before returned.

    Only the pooling at the end may be without a module; it is found by its result.
    """
    modules: list[nn.Module] = []
    made, version, end = here.value, here.value_version, here.end
    while made is not None:
        after = [
            call
            for call in calls
            if call.start > end
            and call.end <= until
            and call.given is made
            and call.given_version == version
        ]
        if not after:
            break
        step = min(after, key=lambda call: call.start)
        modules.append(step.module)
        made = step.output if step.output is step.value else None
        version, end = step.value_version, step.end
    if made is goal:
        return modules
    if made is None or goal is None or made._version != version:
        return None
    for closing in CLOSINGS.get(made.dim(), ()):
        if _equal([closing(made)], [goal]):
            return [*modules, Closing(closing)]
    return None
