"""Linear heads by scikit-learn: strength by cross-validation, class balance, calibration.

Rows are feature vectors; everything here is NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, StratifiedKFold

ESTIMATORS = ("logistic", "ridge")
STRENGTHS = {
    "logistic": (1e-4, 1e-3, 1e-2, 1e-1, 1.0),  # C
    "ridge": (1e4, 1e3, 1e2, 1e1, 1.0),  # alpha
}
FIXED = {"logistic": 1e-2, "ridge": 1e2}  # where the data allow no cross-validation
FOLDS = 5
RIDGE_GAIN = 4.0  # of ridge's -1 to 1 into logits before calibration


@dataclass(frozen=True)
class Linear:
    """A fitted linear head: logits = ((x - mean) / std) @ weight.T + bias, over temperature.

    strength: the regularisation used. scores: what cross-validation found; empty without it.
    """

    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray  # (classes, D)
    bias: np.ndarray
    temperature: float
    strength: float
    scores: dict

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Logits (n, classes) of features (n, D)."""
        return (((x - self.mean) / self.std) @ self.weight.T + self.bias) / self.temperature


def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of features (n, D); a nearly constant one is not blown up."""
    mean, std = x.mean(0), x.std(0)
    return mean, np.maximum(std, 0.1 * np.median(std) + 1e-6)


def fit_linear(
    x: np.ndarray,
    y: np.ndarray,
    classes: int,
    estimator: str = "logistic",
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> Linear:
    """A head for features (n, D) and class indices (n,), classes weighted alike.

    The strength is the one with the least cross-validated log loss, the temperature the one that
    makes those held-out predictions likeliest. groups (n,): rows of a group are held out together.
    With a class of one row there are neither, and the defaults stand.
    """
    mean, std = statistics(x)
    x = (x - mean) / std
    folds = _folds(x, y, groups, seed)
    strength, temperature, scores = FIXED[estimator], 1.0, {}
    if folds:
        rows = np.concatenate([test for _, test in folds])  # of a fold left out there are none
        known = y[rows]
        held = {s: _held_out(x, y, classes, estimator, s, folds) for s in STRENGTHS[estimator]}
        tuned = {s: _temperature(logits, known) for s, logits in held.items()}
        losses = {s: log_loss(held[s] / tuned[s], known) for s in held}
        strength = min(losses, key=losses.get)
        temperature = tuned[strength]
        scores = {
            "accuracy": float((held[strength].argmax(1) == known).mean()),
            "log_loss": losses[strength],
            "folds": len(folds),
            "rows": len(rows),
        }
    weight, bias = _solve(x, y, classes, estimator, strength)
    return Linear(mean, std, weight, bias, temperature, strength, scores)


def _folds(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray | None, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Splits into training and held-out rows; none where a class would be missing."""
    if groups is not None:
        count = min(FOLDS, len(np.unique(groups)))
        if count < 2:
            return []
        splits = list(GroupKFold(count).split(x, y, groups))
        return [s for s in splits if len(np.unique(y[s[0]])) == len(np.unique(y))]
    least = int(np.unique(y, return_counts=True)[1].min())
    if least < 2:
        return []
    return list(StratifiedKFold(min(FOLDS, least), shuffle=True, random_state=seed).split(x, y))


def _held_out(x, y, classes, estimator, strength, folds) -> np.ndarray:
    """Logits (m, classes) of the folds' held-out rows, by heads fitted without them."""
    out = []
    for train, test in folds:
        weight, bias = _solve(x[train], y[train], classes, estimator, strength)
        out.append(x[test] @ weight.T + bias)
    return np.concatenate(out)


def _solve(
    x: np.ndarray, y: np.ndarray, classes: int, estimator: str, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (classes, D) and bias (classes,) on normalised features, classes weighted alike."""
    present = np.unique(y)
    weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, -10.0)
    if estimator == "ridge":
        counts = np.bincount(y, minlength=classes)
        target = RIDGE_GAIN * (2.0 * (y[:, None] == np.arange(classes)) - 1)
        model = Ridge(alpha=strength).fit(x, target, len(y) / (len(present) * counts[y]))
        return model.coef_, model.intercept_
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=500).fit(x, y)
    coef, intercept = model.coef_, model.intercept_
    if len(present) == 2:  # scikit-learn gives the second class's row only
        coef = np.concatenate([-coef, coef]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    weight[present], bias[present] = coef, intercept
    return weight, bias


def _temperature(logits: np.ndarray, y: np.ndarray) -> float:
    """The divisor of the logits that makes the held-out labels likeliest (Guo et al. 2017)."""
    found = minimize_scalar(
        lambda log_t: log_loss(logits / np.exp(log_t), y), bounds=(-1.5, 3), method="bounded"
    )
    return float(np.exp(found.x))


def log_loss(logits: np.ndarray, y: np.ndarray) -> float:
    """Mean negative log probability of the labels (n,) under logits (n, classes)."""
    return float(-log_softmax(logits, 1)[np.arange(len(y)), y].mean())


def mean_iou(predicted: np.ndarray, y: np.ndarray, classes: Sequence[int]) -> float:
    """Mean over classes that occur of intersection over union of pixels (n,)."""
    scores = []
    for c in classes:
        union = ((predicted == c) | (y == c)).sum()
        if (y == c).any():
            scores.append(((predicted == c) & (y == c)).sum() / union)
    return float(np.mean(scores))
