"""scikit-learn's linear models and networks: their coefficients as heads, their probabilities as the oracle.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import textbook
import torch

import flatcore


@pytest.fixture(scope="module")
def digits(sklearn: ModuleType) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x[:400] / 16, y[:400]


def fitted(kind: str, x: np.ndarray, y: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # far from converged, and that is no matter
        if kind == "logistic":
            return LogisticRegression(max_iter=30).fit(x, y)
        return MLPClassifier((12,), max_iter=20, random_state=0).fit(x, y)


def test_logistic_regression(digits: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = digits
    model = fitted("logistic", x, y)
    p = model.predict_proba(x)
    head = {"linear_weight": model.coef_, "linear_bias": model.intercept_}
    metrics = flatcore.head_metrics(x, target=y, **head)
    assert isinstance(metrics.loss, np.ndarray) and metrics.loss.dtype == np.float64
    assert (metrics.prediction == model.predict(x)).all()
    np.testing.assert_allclose(metrics.loss, -np.log(p[np.arange(len(y)), y]), rtol=1e-6)
    trace = (x**2).sum(1) * (p * (1 - p)).sum(1)
    np.testing.assert_allclose(metrics.hessian_trace, trace, rtol=1e-9)
    np.testing.assert_allclose(metrics.layerwise, trace * (model.coef_**2).sum(), rtol=1e-9)
    centred = ((model.coef_[None] - (p @ model.coef_)[:, None]) ** 2).sum(2)
    np.testing.assert_allclose(metrics.neuronwise, (x**2).sum(1) * (p * centred).sum(1), rtol=1e-9)


def test_a_hidden_layer_as_features(digits: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = digits
    model = fitted("network", x, y)
    hidden = np.maximum(x @ model.coefs_[0] + model.intercepts_[0], 0)
    metrics = flatcore.head_metrics(hidden, model.coefs_[-1].T, y, linear_bias=model.intercepts_[-1])
    p = model.predict_proba(x)
    np.testing.assert_allclose(metrics.hessian_trace, (hidden**2).sum(1) * (p * (1 - p)).sum(1), rtol=1e-8)
    with pytest.raises(ValueError, match=r"(?s)linear_weight.*\(C, D\).*\(12, 10\).*transpose"):
        flatcore.head_metrics(hidden, model.coefs_[-1], y)


def test_binary_coefficients_are_no_softmax_head(digits: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = digits
    model = fitted("logistic", x[y < 2], y[y < 2])
    x, y, weight, bias = x[y < 2], y[y < 2], model.coef_, model.intercept_
    assert weight.shape == (1, x.shape[1])
    for call in (
        lambda: flatcore.hessian_trace(x, weight),
        lambda: flatcore.relative_flatness(x, weight, linear_bias=bias),
        lambda: flatcore.feature_gradient_norms(x, weight, np.zeros_like(y)),
        lambda: flatcore.head_metrics(x, weight),
    ):
        with pytest.warns(UserWarning, match=r"one output"):
            call()
    # the way out that the text names: a row of zeros, whose softmax is the sigmoid
    two, two_bias = np.vstack([np.zeros_like(weight), weight]), np.concatenate([[0.0], bias])
    metrics = flatcore.head_metrics(x, two, y, linear_bias=two_bias)
    p = model.predict_proba(x)
    np.testing.assert_allclose(metrics.hessian_trace, (x**2).sum(1) * 2 * p[:, 0] * p[:, 1], rtol=1e-6)
    np.testing.assert_allclose(metrics.neuronwise, (x**2).sum(1) * (weight**2).sum() * p[:, 0] * p[:, 1], rtol=1e-6)


def test_labels_and_features_as_scikit_learn_has_them(digits: tuple[np.ndarray, np.ndarray]) -> None:
    from scipy import sparse
    from sklearn.preprocessing import label_binarize

    x, y = digits
    model = fitted("logistic", x, y)
    want = float(textbook.mean("feature_gradient_norm", *map(torch.from_numpy, (x, model.coef_, model.intercept_, y))))
    options = {"linear_bias": model.intercept_, "reduction": "mean"}
    for labels in (y.astype(np.int32), y.astype(np.uint8), y.astype(">i4"), y[::-1][::-1], y.tolist()):
        if isinstance(labels, list):
            with pytest.raises(TypeError, match=r"target must be"):
                flatcore.feature_gradient_norms(x, model.coef_, labels, **options)
        else:
            assert flatcore.feature_gradient_norms(x, model.coef_, labels, **options) == pytest.approx(want, rel=1e-9)
    for order in (np.asfortranarray(x), x.astype(">f8"), np.ascontiguousarray(x[::-1])[::-1]):
        assert flatcore.feature_gradient_norms(order, model.coef_, y, **options) == pytest.approx(want, rel=1e-9)
    with pytest.raises((TypeError, ValueError), match=r"target must have the features' leading shape"):
        flatcore.feature_gradient_norms(x, model.coef_, label_binarize(y, classes=range(10)), **options)
    with pytest.raises(TypeError, match=r"target"):
        flatcore.feature_gradient_norms(x, model.coef_, y.astype(str), **options)
    with pytest.raises(TypeError, match=r"target"):
        flatcore.feature_gradient_norms(x, model.coef_, y.astype(float), **options)
    with pytest.raises(TypeError, match=r"features.*csr"):
        flatcore.hessian_trace(sparse.csr_matrix(x), model.coef_)
