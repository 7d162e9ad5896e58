"""Causal weights of ACE: how much each dimension of an action moves the reward, by DirectLiNGAM on the host.

The model is linear and not Gaussian: x = B x + e over the columns x = [state | action | reward], e independent. Stage A orders
the columns, causes first; stage B regresses each column on those before it. ACE reads only the reward's row of B, so stage A
matters only for which columns stand before the reward.
"""

import math
import warnings
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Mode = Literal["sink", "full"]
Sign = Literal["signed", "absolute"]

CONSTANT = (
    1e-8  # a column whose standard deviation is below this share of its size (of 1, if it is smaller) is a constant
)
DEPENDENT = 1e-6  # ... with less of it left by the columns before it is a linear combination of them
NAMED = 8  # columns in a warning

# Maximum-entropy approximation of differential entropy; constants of Hyvarinen & Smith (2013)
K1, K2, GAUSSIAN_LOG_COSH = 79.047, 7.4129, 0.37457


def causal_weights(
    states: ArrayLike,
    actions: ArrayLike,
    rewards: ArrayLike,
    mode: Mode = "sink",
    *,
    temperature: float = 1.0,
    sign: Sign = "signed",
    refit: bool = False,
) -> Floats:
    """A weight for each dimension of the action, A * softmax(effects / temperature); Ji et al. (2024, arXiv 2402.14528).

    states [N, S], actions [N, A], rewards [N] of N transitions, in any units -> [A] float64, positive, mean 1.
    sign: signed, as in ACE's code, gives what lowers the reward the smallest weight; absolute reads the effects' sizes.
    temperature: in units of reward per unit of action; the effects have those units, so that the scale of rewards matters.
    mode, refit and the errors: see `causal_effects`.
    """
    return softmax_weights(causal_effects(states, actions, rewards, mode, refit=refit), temperature, sign)


def softmax_weights(effects: ArrayLike, temperature: float = 1.0, sign: Sign = "signed") -> Floats:
    """len(effects) * softmax(effects / temperature), of their sizes where sign is absolute; [A] -> [A] float64, mean 1."""
    _require_one_of("sign", sign, Sign)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    effects = np.asarray(effects, np.float64)
    logits = (np.abs(effects) if sign == "absolute" else effects) / temperature
    shares = np.exp(logits - logits.max())
    weights: Floats = len(effects) * shares / shares.sum()
    return weights


def causal_effects(
    states: ArrayLike, actions: ArrayLike, rewards: ArrayLike, mode: Mode = "sink", *, refit: bool = False
) -> Floats:
    """The row of the reward in DirectLiNGAM's B, its columns of the action: reward per unit of action; [A] float64.

    mode: sink declares that the reward causes no state and no action of its own transition, which is so by construction:
        every column stands before it, and stage A is not needed. full orders the columns by stage A, as ACE's code does, in
        O((S + A)^3 N); what stands behind the reward has no effect.
    refit: least squares on the columns that the adaptive lasso keeps, as lingam 1.12 does; otherwise the lasso's own, slightly
        shrunken coefficients, as in lingam 1.5 (which ACE ships) and causal-learn.

    Constant columns have effect 0, and so does the later of two columns where one is a copy or a linear combination of those
    before it (a warning names it), where ACE's code orders nothing and divides by zero. A constant reward has no causes.
    ValueError in one line for fewer rows than columns + 2, for other shapes and for values that are not finite.
    """
    _require_one_of("mode", mode, Mode)
    data, names = _table(*(np.asarray(values, np.float64) for values in (states, actions, rewards)))
    size = np.maximum(1, np.abs(data).max(axis=0))
    data -= data.mean(axis=0)
    scale = data.std(axis=0)
    constant = scale < CONSTANT * size
    data[:, constant], scale[constant] = 0, 1
    data /= scale
    effects = np.zeros(len(names))
    if not constant[-1]:
        # The same lengths and angles in as few rows as there are columns: all that regression asks for.
        basis = cast(Floats, np.linalg.qr(data, mode="r"))
        left = np.abs(np.diag(basis))[:-1] / math.sqrt(len(data))
        causes = np.flatnonzero(left > DEPENDENT)
        dependent = [names[i] for i in np.flatnonzero((left <= DEPENDENT) & ~constant[:-1])]
        if dependent:
            message = f"left out of a causal fit, being linear combinations of the columns before: {_listed(dependent)}"
            warnings.warn(message, stacklevel=2)
        if mode == "full":
            causes = causes[causal_order(data[:, [*causes.tolist(), -1]], until=len(causes))[:-1]]
        if len(causes):
            coefficients = adaptive_lasso(basis[:, causes], basis[:, -1], len(data), refit)
            effects[causes] = coefficients * scale[-1] / scale[causes]
    return effects[np.shape(states)[1] :]


def _table(states: Floats, actions: Floats, rewards: Floats) -> tuple[Floats, list[str]]:
    """Columns [state | action | reward] and the names of all but the last; ValueError in one line for what cannot be fitted."""
    if states.ndim != 2 or actions.ndim != 2 or rewards.shape != (len(states),) or len(actions) != len(states):
        shapes = ", ".join(str(list(values.shape)) for values in (states, actions, rewards))
        raise ValueError(f"a causal fit needs states [N, S], actions [N, A] and rewards [N], not {shapes}")
    names = [f"{kind} {i}" for kind, values in (("state", states), ("action", actions)) for i in range(values.shape[1])]
    if len(states) < len(names) + 2:
        columns = f"{states.shape[1]} states and {actions.shape[1]} actions"
        raise ValueError(f"a causal fit of {columns} needs {len(names) + 2} rows or more, not {len(states)}")
    data = np.column_stack([states, actions, rewards])
    broken = [name for name, column in zip([*names, "reward"], data.T, strict=True) if not np.isfinite(column).all()]
    if broken:
        raise ValueError(f"a causal fit needs finite numbers; not all are in {_listed(broken)}")
    return data, names


def adaptive_lasso(basis: Floats, target: Floats, rows: int, refit: bool = False) -> Floats:
    """Adaptive lasso (Zou, 2006) with gamma 1, its penalty chosen by BIC; [R, P], [R] -> [P].

    basis, target: independent centred columns of `rows` examples, or any with the same lengths and angles (R >= P).
    The noise's variance in BIC is that of least squares, as in scikit-learn's LassoLarsIC.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lars_path_gram

    columns = basis.shape[1]
    least_squares = np.linalg.lstsq(basis, target)[0]
    weight = np.abs(least_squares)
    weighted = basis * weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # columns of next to no weight that never enter the path
        path = lars_path_gram(
            weighted.T @ target,
            weighted.T @ weighted,
            n_samples=rows,
            max_iter=max(500, 8 * columns),  # 500 is scikit-learn's
            method="lasso",
        )[2]
    residual = np.square(target[:, None] - weighted @ path).sum(axis=0)
    # A reward that is exactly linear leaves no noise, and ACE's code a logarithm of 0.
    floor = np.finfo(np.float64).eps * (target @ target)
    variance = max(np.square(target - basis @ least_squares).sum(), floor) / (rows - columns - 1)
    used = np.abs(path) > np.finfo(np.float64).eps
    chosen = np.argmin(residual / variance + math.log(rows) * used.sum(axis=0))
    coefficients: Floats = path[:, chosen] * weight
    if refit:
        kept = np.flatnonzero(coefficients)
        coefficients[kept] = np.linalg.lstsq(basis[:, kept], target)[0]
    return coefficients


def causal_order(data: ArrayLike, until: int | None = None) -> list[int]:
    """Columns of data [N, D], causes first: stage A of DirectLiNGAM (Shimizu et al., 2011) with pairwise likelihood ratios.

    Again and again the column that looks most like a cause of all the others goes next, and they are freed of it (Hyvarinen &
    Smith, 2013). until: the column at which to stop, itself the last of the list. Takes O(D^3 N) time and O(D N) memory.
    """
    columns = np.array(data, np.float64).T
    columns -= columns.mean(axis=1, keepdims=True)
    left, order = np.arange(len(columns)), []
    while len(left):
        advantage = np.minimum(0, likelihood_ratios(columns))
        first = int(np.argmax(-np.square(advantage).sum(axis=1)))
        order.append(int(left[first]))
        if left[first] == until:
            break
        cause = columns[first]
        left, columns = np.delete(left, first), np.delete(columns, first, axis=0)
        columns -= np.outer(columns @ cause / max(cause @ cause, np.finfo(np.float64).tiny), cause)
    return order


def likelihood_ratios(columns: Floats) -> Floats:
    """How much likelier column i causes column j than the other way round; centred [D, N] -> [D, D], antisymmetric.

    [H(x_j) + H(x_i freed of x_j)] - [H(x_i) + H(x_j freed of x_i)], all standardised; Hyvarinen & Smith (2013).
    """
    tiny = np.finfo(np.float64).tiny
    columns = columns / np.maximum(columns.std(axis=1, keepdims=True), tiny)
    correlation = columns @ columns.T / columns.shape[1]
    spread = np.sqrt(np.maximum(1 - np.square(correlation), np.finfo(np.float64).eps))
    freed = np.empty_like(correlation)
    for j, cause in enumerate(columns):
        freed[:, j] = entropy((columns - np.outer(correlation[:, j], cause)) / spread[:, j, None])
    alone = entropy(columns)
    ratios: Floats = (alone[None] + freed) - (alone[:, None] + freed.T)
    return ratios


def entropy(columns: Floats) -> Floats:
    """Approximate differential entropy of standardised columns [D, N] -> [D], nats; Hyvarinen & Smith (2013)."""
    size = np.abs(columns)
    log_cosh = size + np.log1p(np.exp(-2 * size)) - math.log(2)  # cosh itself overflows
    odd = columns * np.exp(-np.square(columns) / 2)
    gaussian = (1 + math.log(2 * math.pi)) / 2
    result: Floats = (
        gaussian - K1 * np.square(log_cosh.mean(axis=1) - GAUSSIAN_LOG_COSH) - K2 * np.square(odd.mean(axis=1))
    )
    return result


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _require_one_of(what: str, value: str, choices: object) -> None:
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, not {value}")
