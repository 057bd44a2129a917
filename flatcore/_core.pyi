from typing import Final

ABI: Final[int]
VERSION: Final[str]
COMPILER: Final[str]
EXPLICIT_ROW: Final[int]
HEAD_BACKWARD_ROW_BIAS: Final[int]
HEAD_BACKWARD_ROW_BYTES: Final[int]
HEAD_BACKWARD_ROW_C: Final[int]
HEAD_BACKWARD_ROW_KIND: Final[int]
HEAD_BACKWARD_ROW_OTHERS: Final[int]
HEAD_ROW_BYTES: Final[int]
HEAD_TAIL_BYTES: Final[int]
ORDINARY_ROW: Final[int]
POISONED_ROW: Final[int]

_Matrix = tuple[int, int, int, int]

class HeadProblem:
    def __init__(
        self,
        head: object,
        features: _Matrix,
        weight: _Matrix,
        logits: _Matrix | None,
        bias: _Matrix | None,
        target: int,
        N: int,
        D: int,
        C: int,
        fields: int,
        double_compute: bool,
        threads: int,
    ) -> None: ...
    @staticmethod
    def of(head: object, fields: int, threads: int, recorded: bool, takes_float32_bias: bool) -> HeadProblem | None: ...
    @property
    def size(self) -> tuple[int, int, int, bool]: ...
    def write_to(self, values: int, double_values: bool, prediction: int) -> None: ...

class HeadLoop:
    def __init__(
        self,
        cpu_target: str,
        problem: HeadProblem,
        summary: int,
        center: int,
        centered_squares: int,
        classes: int,
        positions: int,
        bias_by_position: int,
        tails: int,
        all_tails: bool,
        row_state: int,
        mean: int,
        scratch: int,
        equal_rows: bool,
    ) -> None: ...
    def statistics(
        self,
        first: int,
        rows: int,
        first_class: int,
        classes: int,
        z: int,
        z_stride: int,
        starts: int,
        pieces: int,
        end: int,
        near: int,
        near_of: int,
        near_count: int,
        near_shares: int,
    ) -> int: ...
    def own_logits(
        self,
        rows: int,
        first_class: int,
        classes: int,
        in_order: bool,
        x: int,
        x_stride: int,
        z: int,
        z_stride: int,
    ) -> None: ...
    def own_tile(self, first: int, rows: int, first_class: int, classes: int, x: int, x_stride: int, z: int) -> int: ...
    def own_sums(self, rows: int, first_class: int, classes: int, z: int, z_stride: int) -> None: ...
    def values(self, first: int, rows: int) -> None: ...

class HeadBackwardLoop:
    def __init__(
        self,
        cpu_target: str,
        problem: HeadProblem,
        upstream: int,
        log_coefficient: int,
        summary: int,
        center: int,
        centered_squares: int,
        tails: int,
        all_tails: bool,
        row_state: int,
        numbers: int,
        mean: int,
        direction: int,
        top_row: int,
        top_bias: int,
        top: int,
        d_features: int,
        d_weight: int,
        d_bias: int,
        scratch: int,
        equal_rows: bool,
    ) -> None: ...
    def rows(self, first: int, rows: int) -> None: ...
    def tile(self, first: int, rows: int, first_class: int, classes: int, z: int, g: int, stride: int) -> None: ...
    def explicit_rows(self, first: int, rows: int, count: int, g: int) -> None: ...

def connect(table: object, tensor: type, parameter: type) -> bool: ...
def cpu_target(name: str) -> str: ...
def cpu_targets() -> tuple[str, ...]: ...
def head_chunk_scratch(C: int, D: int) -> int: ...
def head_measure(
    cpu_target: str,
    problem: HeadProblem,
    sample_weights: int,
    reduction: int,
    log: bool,
    count_rows: bool,
    value: int,
    double_value: bool,
    log_coefficient: int,
) -> int: ...
def head_metrics(cpu_target: str, problem: HeadProblem) -> int: ...
def head_metrics_backward(
    cpu_target: str,
    problem: HeadProblem,
    upstream: int,
    upstream_stride: int,
    double_upstream: bool,
    log_coefficient: int,
    d_features: int,
    d_weight: int,
    d_bias: int,
    double_bias: bool,
    d_logits: int,
) -> None: ...
def head_reduction(
    cpu_target: str,
    logs: int,
    sample_weights: int,
    target: int,
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
    cpu_target: str,
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
    cpu_target: str,
    problem: HeadProblem,
    row_workspace: int,
    summary: int,
    center: int,
    centered_squares: int,
    keys: int,
) -> None: ...
def plain_head(head: object) -> tuple[int, int, int, bool] | None: ...
def row_norms(
    cpu_target: str, x: _Matrix, N: int, K: int, threads: int, l1: int, l2: int, linf: int, workspace: int
) -> None: ...
def row_norms_workspace(N: int, K: int) -> int: ...
def unmasked_cross_entropy(
    cpu_target: str,
    logits: _Matrix,
    target: int,
    N: int,
    C: int,
    ignore_index: int,
    threads: int,
    loss: int,
    log_scale: int,
    cotangent: int,
) -> int: ...
