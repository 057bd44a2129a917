"""A small call of every CUDA kernel in every dtype, for compute-sanitizer: odd sizes, misaligned rows, planted NaN."""

from __future__ import annotations

import argparse
import math

import torch

import flatcore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="of the tensors; cpu shows that the script runs")
    parser.add_argument("--dtypes", default="float16,bfloat16,float32,float64", help="separated by commas")
    arguments = parser.parse_args()
    device = arguments.device
    with flatcore.backend("native"):
        for dtype in (getattr(torch, name) for name in arguments.dtypes.split(",")):
            for N, D, C in ((33, 37, 3), (5, 130, 32), (7, 21, 77), (3, 9, 1500)):
                _head(N, D, C, dtype, device)
            for K in (37, 1025, 20_001):
                x = torch.randn(5, K + 1, device=device).to(dtype)[:, 1:]
                x[1, K - 1] = math.nan
                flatcore.row_norms(x)
    if device == "cuda":
        torch.cuda.synchronize()
    print("ran")


def _head(N: int, D: int, C: int, dtype: torch.dtype, device: str) -> None:
    features = torch.randn(N, D + 1, device=device).to(dtype)[:, 1:]
    weight = torch.randn(C, D, device=device).to(dtype)
    weight[1] = weight[0]  # rows done from explicit differences
    bias, target = torch.randn(C, device=device).to(dtype), torch.arange(N, device=device) % C
    features[2, D - 1] = math.nan
    flatcore.head_metrics(features, weight, target, linear_bias=bias)
    logits = (features.float() @ weight.float().T).to(dtype).requires_grad_()
    flatcore.hessian_trace(features, weight, target, logits=logits.detach())
    flatcore.unmasked_cross_entropy(logits, target).backward()
    leaves = tuple(x.detach().requires_grad_() for x in (features, weight, bias))
    for log in (False, True):
        for value in (
            flatcore.relative_flatness(leaves[0], leaves[1], linear_bias=leaves[2], log=log),
            flatcore.relative_flatness(
                *leaves[:2], linear_bias=leaves[2], include_bias=True, measure="neuronwise", log=log
            ),
            flatcore.feature_gradient_norms(
                *leaves[:2], target, linear_bias=leaves[2], ord=1, reduction="mean", log=log
            ),
        ):
            torch.autograd.grad(value, leaves, allow_unused=True)


if __name__ == "__main__":
    main()
