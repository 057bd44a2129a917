from typing import Final

ABI: Final[int]
VERSION: Final[str]
COMPILER: Final[str]
HEAD_BACKWARD_ROW_BIAS: Final[int]
HEAD_BACKWARD_ROW_BYTES: Final[int]
HEAD_BACKWARD_ROW_C: Final[int]
HEAD_BACKWARD_ROW_KIND: Final[int]
HEAD_ROW_BYTES: Final[int]
POISONED_ROW: Final[int]

_Matrix = tuple[int, int, int, int]

class HeadProblem:
    def __init__(
        self,
        head: object,
        features: _Matrix,
        weight: _Matrix,
        logits: _Matrix | None,
        bias: int,
        labels: int,
        N: int,
        D: int,
        C: int,
        fields: int,
        double_compute: bool,
        threads: int,
    ) -> None: ...
    def write_to(self, values: int, double_values: bool, prediction: int) -> None: ...

def cpu_target(name: str) -> str: ...
def cpu_targets() -> tuple[str, ...]: ...
def head_chunk_cotangent(
    target: str,
    problem: HeadProblem,
    first: int,
    rows: int,
    upstream: int,
    log_coefficient: int,
    q: int,
    g: int,
    g_stride: int,
    summary: int,
    center: int,
    centered_squares: int,
    row_state: int,
    numbers: int,
    d_features: int,
    d_weight: int,
    d_bias: int,
    scratch: int,
) -> None: ...
def head_chunk_directions(
    target: str,
    problem: HeadProblem,
    first: int,
    rows: int,
    upstream: int,
    log_coefficient: int,
    summary: int,
    center: int,
    row_state: int,
    numbers: int,
    mean: int,
    direction: int,
    q: int,
    top_row: int,
    top_bias: int,
    top: int,
    equal_rows: bool,
) -> None: ...
def head_chunk_scratch(C: int, D: int) -> int: ...
def head_chunk_statistics(
    target: str,
    problem: HeadProblem,
    first: int,
    rows: int,
    z: int,
    z_stride: int,
    q: int,
    q_stride: int,
    summary: int,
    center: int,
    centered_squares: int,
    row_state: int,
    members: int,
    starts: int,
    groups: int,
    near: int,
    near_of: int,
    near_count: int,
    merged: int,
    near_q: int,
) -> int: ...
def head_chunk_weights(
    target: str,
    problem: HeadProblem,
    first: int,
    rows: int,
    q: int,
    q_stride: int,
    summary: int,
    center: int,
    row_state: int,
    mean: int,
    mean_stride: int,
    distance: int,
    distance_stride: int,
    scratch: int,
    equal_rows: bool,
) -> None: ...
def head_distances(target: str, problem: HeadProblem, weight: _Matrix, exponent: int, distances: int) -> None: ...
def head_measure(
    target: str,
    problem: HeadProblem,
    weight: int,
    reduction: int,
    log: bool,
    count_rows: bool,
    value: int,
    double_value: bool,
    log_coefficient: int,
) -> int: ...
def head_metrics(target: str, problem: HeadProblem) -> int: ...
def head_metrics_backward(
    target: str,
    problem: HeadProblem,
    upstream: int,
    upstream_stride: int,
    log_coefficient: int,
    d_features: int,
    d_weight: int,
    d_bias: int,
    d_logits: int,
) -> None: ...
def head_reduction(
    target: str,
    logs: int,
    weight: int,
    labels: int,
    N: int,
    ignore_index: int,
    reduction: int,
    log: bool,
    count_rows: bool,
    value: int,
    double_value: bool,
    log_coefficient: int,
) -> None: ...
def head_repeats(
    target: str,
    problem: HeadProblem,
    exponent: int,
    centered_squares: int,
    keys: int,
    members: int,
    starts: int,
    near: int,
    near_of: int,
) -> tuple[int, int]: ...
def head_summary(
    target: str, problem: HeadProblem, row_workspace: int, summary: int, center: int, centered_squares: int
) -> None: ...
def row_norms(
    target: str, x: _Matrix, N: int, K: int, threads: int, l1: int, l2: int, linf: int, workspace: int
) -> None: ...
def row_norms_workspace(N: int, K: int) -> int: ...
def unmasked_cross_entropy(
    target: str,
    logits: _Matrix,
    labels: int,
    N: int,
    C: int,
    ignore_index: int,
    threads: int,
    loss: int,
    log_scale: int,
    cotangent: int,
) -> int: ...
