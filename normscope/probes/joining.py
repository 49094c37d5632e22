"""Joining: states of one step of several ranks to those of one process on the joined batch, exact in float64.

Three sums and maxima: what adds up as it is, with the means; then, about the common means, the central sums, so that
nothing cancels; and the maxima. Before that the ranks find out what all of them have: a layer that ran on some alone
keeps what the writing rank has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from normscope.probes import covariance
from normscope.probes.ranks import Ranks

_NOTHING = np.empty(0)


class Item(NamedTuple):
    """A state on the host.

    Attributes:
        key: what it is of, the same on every rank.
        kind: "moments" [3, C], "tails" [9, C], "covariance" as in the module of that name, "areas" [3, n], which come
            side by side, or "sum", of any shape.
        state: the state of this rank.
    """

    key: str
    kind: str
    state: np.ndarray

    @property
    def name(self) -> str:
        """Key, kind and width, which ranks must agree upon."""
        width = {"sum": self.state.shape, "areas": ()}.get(self.kind, self.state.shape[-1:])
        return f"{self.kind} {self.key} {width}"


class _Kind(NamedTuple):
    """How states of one kind are joined.

    Attributes:
        first: what is summed, from a state, the number of ranks and that of this one.
        largest: of what the maximum is taken.
        second: what is summed then, from a state, the first sum and the number of this rank.
        finish: the joint state from both sums and the maximum.
    """

    first: Callable[[np.ndarray, int, int], np.ndarray]
    largest: Callable[[np.ndarray], np.ndarray]
    second: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    finish: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@np.errstate(all="ignore")  # a diverged run holds infinities
def joined(ranks: Ranks, items: Sequence[Item], step: int) -> tuple[list[np.ndarray], list[int]]:
    """Join the states of all ranks; a collective.

    Args:
        ranks: the ranks, together.
        items: states of this rank.
        step: the step that they are of.

    Returns:
        The joint states in the order given, and the places of those that not all ranks have, which are as they were.
        A rank that is lost is a LostError.
    """
    places = {f"{step} {item.name}": place for place, item in enumerate(items)}
    shared = [places[name] for name in ranks.common(places)]
    mine = [items[place] for place in shared]
    kinds = [_KINDS[item.kind] for item in mine]
    first = ranks.summed([kind.first(i.state, ranks.size, ranks.rank) for kind, i in zip(kinds, mine, strict=True)])
    largest = ranks.maximum([kind.largest(item.state) for kind, item in zip(kinds, mine, strict=True)])
    central = [kind.second(i.state, sums, ranks.rank) for kind, i, sums in zip(kinds, mine, first, strict=True)]
    found = zip(shared, kinds, first, ranks.summed(central), largest, strict=True)
    states = [item.state for item in items]
    for place, kind, sums, more, most in found:
        states[place] = kind.finish(sums, more, most)
    return states, sorted(set(range(len(items))) - set(shared))


def _nothing(*_: object) -> np.ndarray:
    return _NOTHING


# ---- moments: [3, C] count, mean, M2 ---------------------------------------------------------------------------------


def _moments_first(state: np.ndarray, *_: int) -> np.ndarray:
    return np.stack((state[0], state[0] * state[1]))


def _moments_second(state: np.ndarray, first: np.ndarray, _: int) -> np.ndarray:
    count, mean, m2 = state
    return np.asarray(m2 + count * (mean - first[1] / first[0]) ** 2)


def _moments_finish(first: np.ndarray, second: np.ndarray, _: np.ndarray) -> np.ndarray:
    return np.stack((first[0], first[1] / first[0], second))


# ---- tails: [9, C] n, max, zeros, saturated, mean, three central sums, bounded ---------------------------------------


def _tails_first(state: np.ndarray, *_: int) -> np.ndarray:
    return np.stack((state[0], state[0] * state[4], state[2], state[3]))


def _tails_second(state: np.ndarray, first: np.ndarray, _: int) -> np.ndarray:
    n, mean, (m2, m3, m4) = state[0], state[4], state[5:8]
    d = mean - first[1] / first[0]
    return np.stack((m2 + n * d**2, m3 + 3 * d * m2 + n * d**3, m4 + 4 * d * m3 + 6 * d**2 * m2 + n * d**4))


def _tails_finish(first: np.ndarray, second: np.ndarray, largest: np.ndarray) -> np.ndarray:
    n, total, zeros, saturated = first
    return np.stack((n, largest[0], zeros, saturated, total / n, *second, largest[1]))


# ---- covariance: samples [m, d], a matrix or a sketch [1, k, d] ------------------------------------------------------
# the first sum ends in the number of samples that each rank holds as they are, 0 where it has reduced them


def _covariance_first(state: np.ndarray, size: int, rank: int) -> np.ndarray:
    held = np.zeros(size)
    held[rank] = len(state) if state.ndim == 2 else 0
    if state.shape[-1] > covariance.WIDEST:
        return held
    if state.ndim == 2:
        return np.concatenate((state.sum(0, dtype=np.float64), [len(state)], held))
    return np.concatenate((state[0, -2] * state[0, -1], state[0, -1, :1], held))


def _covariance_second(state: np.ndarray, first: np.ndarray, rank: int) -> np.ndarray:
    width = state.shape[-1]
    held = _held(first, width)
    if held is not None:
        samples, start = np.zeros((int(held.sum()), width), state.dtype), int(held[:rank].sum())
        samples[start : start + len(state)] = state
        return samples
    wide = torch.from_numpy(np.asarray(state, np.float64))
    matrix = np.asarray(covariance.reduced(wide.T) if state.ndim == 2 else wide)
    if width > covariance.WIDEST:
        return matrix.astype(state.dtype)
    scatter, mean, count = matrix[0, :-2], matrix[0, -2], matrix[0, -1, 0]
    apart = mean - first[:width] / first[width]
    return np.asarray(scatter + count * np.outer(apart, apart), state.dtype)  # as large as on one rank


def _covariance_finish(first: np.ndarray, second: np.ndarray, _: np.ndarray) -> np.ndarray:
    width = second.shape[-1]
    if width > covariance.WIDEST or _held(first, width) is not None:
        return second
    count = first[width]
    return np.concatenate((second, (first[:width] / count)[None], np.full((1, width), count)))[None]


def _held(first: np.ndarray, width: int) -> np.ndarray | None:
    """Return how many samples each rank holds, None where they are reduced: as they would be in one process."""
    held = first if width > covariance.WIDEST else first[width + 1 :]
    return held if held.all() and held.sum() <= covariance.most_samples(width) else None


# ---- areas: [3, n] of each rank, one rank after the other ------------------------------------------------------------


def _areas_first(state: np.ndarray, size: int, rank: int) -> np.ndarray:
    held = np.zeros(size)
    held[rank] = state.shape[1]
    return held


def _areas_second(state: np.ndarray, first: np.ndarray, rank: int) -> np.ndarray:
    areas, start = np.zeros((len(state), int(first.sum()))), int(first[:rank].sum())
    areas[:, start : start + state.shape[1]] = state
    return areas


_KINDS: Mapping[str, _Kind] = {
    "moments": _Kind(_moments_first, _nothing, _moments_second, _moments_finish),
    "tails": _Kind(_tails_first, lambda state: state[[1, 8]], _tails_second, _tails_finish),
    "covariance": _Kind(_covariance_first, _nothing, _covariance_second, _covariance_finish),
    "areas": _Kind(_areas_first, _nothing, _areas_second, lambda _, second, *__: second),
    "sum": _Kind(lambda state, *_: state, _nothing, _nothing, lambda first, *_: first),
}
