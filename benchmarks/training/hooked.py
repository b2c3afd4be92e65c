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

    ``stages`` are names of modules. The last stage, which needs no hook, ends at the input of the
    head. Outputs have their channels at 1: tokens (B, N, D) become (B, D, N).
    """

    def __init__(self, prepare: nn.Module, network: nn.Module, stages: Sequence[Stage]) -> None:
        super().__init__(prepare, network)
        self._held: dict[int, Tensor] | None = None
        for place, stage in enumerate(stages):
            module = network.get_submodule(stage.name)
            module.register_forward_hook(partial(self._hold, place, stage.channels_last))

    def _hold(
        self, place: int, channels_last: bool, module: nn.Module, given: Any, output: Tensor
    ) -> None:
        if self._held is not None:  # a stage may also run alone
            self._held[place] = output.movedim(-1, 1) if channels_last else output

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
    channels_last: bool
    """whether its output is (B, *positions, C)"""


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
    start: int
    end: int
    given_version: int
    output_version: int
    """how often the tensor had been changed in place when the call began, and when it ended"""


def staged(
    prepare: nn.Module,
    network: nn.Module,
    shape: Sequence[int],
    classes: int,
    stages: Sequence[tuple[str, int]] | None = None,
) -> HookedModel | None:
    """The network as a Model, or None if its output is not that of an ``nn.Linear``.

    ``shape`` is that of an input, before ``prepare``. ``stages`` are names of modules with their
    channels; without them a stage ends at the last module, of those that follow one another, before
    the size of their output changes. The network is changed: its head becomes the identity.
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
        found = list(_ends(calls, head) if stages is None else _named(calls, stages))
        # What follows a stage must not change its output in place, and the head's input is a stage.
        ends = [each for each in found if each.output._version == each.output_version]  # type: ignore[union-attr]
        ends = [each for each in ends if each.output is not head.given]
        last = [_channels_last(each, stages) for each in ends]
        pieces = _pieces(calls, [*ends, head], last)
        before = _outputs(partial(_logits, prepare, network), network, x)
    parent, _, name = head.name.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
    trunk = HookedTrunk(
        prepare,
        network,
        [Stage(each.name, flag) for each, flag in zip(ends, last, strict=True)],
    )
    linear = head.module
    assert isinstance(linear, nn.Linear)
    model = HookedModel(trunk, linear, pieces)
    with torch.no_grad(), buffers_kept(model), _same_draws():
        if not _equal(before, _outputs(model, model, x)):
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
    """What it returns in train and in eval mode, with the same random draws each time."""
    made = []
    for training in (True, False):
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
        made = output if isinstance(output, Tensor) else None
        version = -1 if made is None else made._version
        calls.append(
            Call(names[id(module)], module, x, made, start, next(clock), versions.pop(), version)
        )

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


def _head(calls: Sequence[Call], logits: object, classes: int) -> Call | None:
    """The call of the linear layer whose output is that of the network."""
    if not isinstance(logits, Tensor) or logits.shape != (ROWS, classes):
        return None
    made = [call for call in calls if call.output is logits and isinstance(call.module, nn.Linear)]
    once = len(made) == 1 and sum(call.module is made[0].module for call in calls) == 1
    given = made[0].given if once else None
    return made[0] if given is not None and given.dim() == 2 and made[0].name else None


def _named(calls: Sequence[Call], stages: Sequence[tuple[str, int]]) -> Iterator[Call]:
    """The calls of these modules, as far as each was called once; without the last of them.

    The last stage ends at the input of the head.
    """
    for name, _ in stages[:-1]:
        own = [call for call in calls if call.name == name]
        if len(own) == 1 and own[0].output is not None:
            yield own[0]


def _ends(calls: Sequence[Call], head: Call) -> Iterator[Call]:
    """The last call before the size of the output changes, but for the last size."""
    root = next(call for call in calls if not call.name)
    blocks = [call for call in _blocks(calls, root, head) if call.end < head.start]
    sizes = [list(same) for _, same in groupby(blocks, key=_size)]
    learned = [same for same in sizes if any(_has_parameters(call) for call in same)]
    for same in learned[:-1]:
        once = [c for c in same if sum(c.module is other.module for other in calls) == 1]
        if once:
            yield once[-1]


def _blocks(calls: Sequence[Call], outer: Call, head: Call) -> Iterator[Call]:
    """The calls within ``outer`` in order; those of a Sequential are opened, not itself.

    So are those that return no tensor, and those around the head.
    """
    inside = [c for c in calls if outer.start < c.start and c.end < outer.end]
    direct = [c for c in inside if not any(o.start < c.start and c.end < o.end for o in inside)]
    for call in sorted(direct, key=lambda call: call.start):
        around = call.start < head.start and head.end < call.end
        if around or call.output is None or isinstance(call.module, nn.Sequential):
            yield from _blocks(calls, call, head)
        else:
            yield call


def _size(call: Call) -> tuple[int, ...]:
    shape = tuple(call.output.shape) if call.output is not None else ()
    return shape[2:] if len(shape) == 4 else shape[1:]


def _has_parameters(call: Call) -> bool:
    return any(True for _ in call.module.parameters())


def _channels_last(call: Call, stages: Sequence[tuple[str, int]] | None) -> bool:
    """Whether an output has its channels at the end: tokens, or as the number of them says."""
    assert call.output is not None
    shape = call.output.shape
    channels = dict(stages or ()).get(call.name)
    if channels is None or shape[1] == shape[-1]:
        return len(shape) == 3
    return shape[1] != channels and shape[-1] == channels


def _pieces(calls: Sequence[Call], ends: Sequence[Call], last: Sequence[bool]) -> list[nn.Module]:
    """The modules from each stage to the next; ``ends`` is closed by the head. Empty if not all."""
    flags = [*last, False]
    made: list[nn.Module] = [nn.Identity()]  # the first stage starts at the image
    for place in range(1, len(ends)):
        here, there = ends[place - 1], ends[place]
        is_head = place == len(ends) - 1
        goal = there.given if is_head else there.output
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
    while True:
        after = [
            call
            for call in calls
            if call.start > here.end
            and call.end <= until
            and call.given is here.output
            and call.given_version == here.output_version
        ]
        if not after:
            break
        here = min(after, key=lambda call: call.start)
        modules.append(here.module)
    if here.output is goal:
        return modules
    made, wanted = here.output, goal
    if made is None or wanted is None or made._version != here.output_version:
        return None
    for closing in CLOSINGS.get(made.dim(), ()):
        if _equal([closing(made)], [wanted]):
            return [*modules, Closing(closing)]
    return None
