"""Which layer writes keys and values, and which layers read them.

Models that share KV across layers differ in this map alone (and in what surrounds
it): CLA (arXiv 2405.12981), Layer-Condensed KV (2405.10637), and Llamas in YOCO's
manner (2405.05254).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

_TYPE = re.compile(r"(\d+)(s?)")


@dataclass(frozen=True)
class Span:
    """Layers ``[first, end)`` that run together.

    Attributes:
        repeats: Some of them read a layer of the span that comes later, so a prompt
            needs several passes.
    """

    first: int
    end: int
    repeats: bool = False


@dataclass(frozen=True)
class LayerMap:
    """The map of one model.

    Attributes:
        owners: The layer whose keys and values each layer attends to.
        sliding: Whether each layer attends within the sliding window only.
        masked: Whether each layer leaves out the current token.
    """

    owners: tuple[int, ...]
    sliding: tuple[bool, ...]
    masked: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        owners: Sequence[int],
        sliding: Sequence[bool] = (),
        never_itself: bool = False,
    ) -> "LayerMap":
        """The map of ``owners``; a layer that reads a later one is masked.

        Args:
            owners: See the class.
            sliding: See the class; empty = none.
            never_itself: No layer attends to the current token (``force_nodiag``).

        Raises:
            ValueError: An owner is no layer of the model.
        """
        layers = len(owners)
        for index, owner in enumerate(owners):
            if not 0 <= owner < layers:
                raise ValueError(
                    f"layer {index} reads layer {owner}; this model has the layers "
                    f"0 to {layers - 1}"
                )
        return cls(
            tuple(owners),
            tuple(sliding) or (False,) * layers,
            tuple(never_itself or owner > i for i, owner in enumerate(owners)),
        )

    @classmethod
    def parse(cls, types: Sequence[str], never_itself: bool = False) -> "LayerMap":
        """Read the entries of a ``layer_types`` string of LCKV's authors.

        An entry is the layer whose KV is read, with ``s`` for a sliding window.

        Raises:
            ValueError: An entry is not of that form.
        """
        found = [_TYPE.fullmatch(entry) for entry in types]
        if wrong := [t for t, match in zip(types, found, strict=True) if not match]:
            raise ValueError(
                f"layer_types has {wrong[0]!r}; its entries are layer numbers, with "
                'an "s" behind for a sliding window, such as 0_20_20s'
            )
        pairs = [match.groups() for match in found if match]
        return cls.of(
            [int(number) for number, _ in pairs],
            [bool(slides) for _, slides in pairs],
            never_itself,
        )

    @cached_property
    def writers(self) -> tuple[int, ...]:
        """The layers that compute and store keys and values, from the bottom."""
        return tuple(sorted(set(self.owners)))

    def readers(self, writer: int) -> tuple[int, ...]:
        """The layers that attend to a writer's KV."""
        return tuple(i for i, owner in enumerate(self.owners) if owner == writer)

    def keeps_window(self, writer: int) -> bool:
        """Whether what a writer stores is needed within the sliding window only."""
        return all(self.sliding[reader] for reader in self.readers(writer))

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The order of execution; spans that repeat are as short as can be."""
        spans: list[Span] = []
        start = index = 0
        while index < len(self.owners):
            if self.owners[index] <= index:
                index += 1
                continue
            if start < index:
                spans.append(Span(start, index))
            top, at = self.owners[index], index
            while at <= top:
                top = max(top, self.owners[at])
                at += 1
            spans.append(Span(index, top + 1, repeats=True))
            start = index = top + 1
        if start < index:
            spans.append(Span(start, index))
        return tuple(spans)


def every(num_layers: int, factor: int) -> list[int]:
    """CLA: the first of ``factor`` layers writes, the rest read (section 3.2).

    The last group may be shorter.
    """
    return [layer - layer % factor for layer in range(num_layers)]


def keep_ends(num_layers: int, factor: int) -> list[int]:
    """KeepEnds: as `every`, but the first and the last layer share nothing."""
    inner = [1 + owner for owner in every(num_layers - 2, factor)]
    return [0, *inner, num_layers - 1]


def dense_front(num_layers: int, factor: int = 2) -> list[int]:
    """DenseFront: ordinary layers, a run that reads the last of them, one more."""
    front = num_layers // factor
    run = [front - 1] * (num_layers - front - 1)
    return [*range(front), *run, num_layers - 1]


def dense_back(num_layers: int, factor: int = 2) -> list[int]:
    """DenseBack: two ordinary layers, a run that reads the second, ordinary ones."""
    run = num_layers - num_layers // factor - 1
    return [0, 1, *[1] * run, *range(2 + run, num_layers)]


CLA_MAPS = {
    "every": every,
    "keep_ends": keep_ends,
    "dense_front": dense_front,
    "dense_back": dense_back,
}


def of_roles(roles: Sequence[int], target: int) -> list[int]:
    """The owners of a string of LCKV's first code base.

    Args:
        roles: 0 = ordinary layer, 1 = reads the target, 2 = is the target.
        target: The target layer; negative = counted from the top.

    Raises:
        ValueError: Other roles, or a role 2 that is not at ``target``.
    """
    layers = len(roles)
    target = target + layers if target < 0 else target
    if any(role not in (0, 1, 2) for role in roles):
        raise ValueError("layer_types of an opt-llama model has the roles 0, 1 and 2")
    if any(role == 2 and i != target for i, role in enumerate(roles)):
        raise ValueError(f"layer_types has its role 2 elsewhere than at {target=}")
    return [target if role else i for i, role in enumerate(roles)]


def of_cla_roles(roles: Sequence[int]) -> list[int]:
    """The owners of a CLA string of LCKV's authors.

    Args:
        roles: 1 = reads the nearest layer below that is not 1; others are 0 or 2.

    Raises:
        ValueError: Other roles, or no layer below a first 1.
    """
    if any(role not in (0, 1, 2) for role in roles):
        raise ValueError("layer_types of a cla-llama model has the roles 0, 1 and 2")
    if roles and roles[0] == 1:
        raise ValueError("layer_types begins with 1, but no layer lies below to read")
    owners: list[int] = []
    for index, role in enumerate(roles):
        owners.append(owners[-1] if role == 1 else index)
    return owners
