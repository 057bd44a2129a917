from typing import Final

from ._core import HeadProblem as HeadProblem

ABI: Final[int]
VERSION: Final[str]
CUDA_FUSED_CLASSES: Final[int]
EXPLICIT_ROW: Final[int]
HEAD_BACKWARD_ROW_BIAS: Final[int]
HEAD_BACKWARD_ROW_BYTES: Final[int]
HEAD_BACKWARD_ROW_C: Final[int]
HEAD_BACKWARD_ROW_KIND: Final[int]
HEAD_BACKWARD_ROW_OTHERS: Final[int]
HEAD_EXPLICIT_ALONE: Final[int]
HEAD_PIECE_CLASSES: Final[int]
HEAD_ROW_BYTES: Final[int]
HEAD_TAIL_BYTES: Final[int]
HEAD_TABLE_CLASSES: Final[int]
HEAD_TILE_BYTES: Final[int]
ORDINARY_ROW: Final[int]
POISONED_ROW: Final[int]

_Matrix = tuple[int, int, int, int]

class HeadLoop:
    def __init__(
        self,
        device: int,
        stream: int,
        problem: HeadProblem,
        summary: int,
        center: int,
        centered_squares: int,
        order: int,
        runs: int,
        found: int,
        pieces: int,
        distances: int,
        tails: int,
        all_tails: bool,
        row_state: int,
        mean: int,
        special: int,
    ) -> None: ...
    def start(self, first: int, rows: int) -> None: ...
    def statistics(
        self, first: int, rows: int, first_class: int, classes: int, z: int, z_stride: int, shares: int
    ) -> None: ...
    def values(self, first: int, rows: int) -> None: ...
    def table(self, first: int, rows: int, shares: int, sums: int, bias_sums: int) -> None: ...

class HeadBackwardLoop:
    def __init__(
        self,
        device: int,
        stream: int,
        problem: HeadProblem,
        upstream: int,
        log_coefficient: int,
        summary: int,
        center: int,
        centered_squares: int,
        found: int,
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
        d_logits: int,
        exact: int,
        special: int,
        scratch: int,
        slots: int,
    ) -> None: ...
    def rows(self, first: int, rows: int) -> None: ...
    def tile(self, first: int, rows: int, first_class: int, classes: int, z: int, g: int) -> None: ...
    def unsure_tile(self, first: int, rows: int, first_class: int, classes: int, z: int, g: int) -> None: ...
    def unsure(self, first: int, rows: int) -> None: ...
    def tops(self, first: int, rows: int) -> None: ...
    def explicit_rows(self, first: int, rows: int) -> None: ...

def connect(table: object, tensor: type, parameter: type) -> bool: ...
def cuda_architectures() -> str: ...
def cuda_device(index: int) -> tuple[int, bool, str]: ...
def cuda_head_explicit(
    device: int,
    stream: int,
    problem: HeadProblem,
    first: int,
    rows: int,
    special: int,
    summary: int,
    scratch: int,
    slots: int,
) -> None: ...
def cuda_head_explicit_row(D: int) -> int: ...
def cuda_head_explicit_slot(D: int) -> int: ...
def cuda_head_measure(
    device: int,
    stream: int,
    problem: HeadProblem,
    sample_weights: int,
    class_weight: _Matrix | None,
    reduction: int,
    log: bool,
    count_rows: bool,
    value: int,
    double_value: bool,
    row_logs: int,
    workspace: int,
) -> None: ...
def cuda_head_measure_backward(
    device: int,
    stream: int,
    problem: HeadProblem,
    upstream: _Matrix,
    log_coefficient: int,
    workspace: int,
    d_features: _Matrix | None,
    d_weight: _Matrix | None,
    d_bias: _Matrix | None,
    d_logits: _Matrix | None,
) -> None: ...
def cuda_head_measure_backward_workspace(problem: HeadProblem) -> int: ...
def cuda_head_metrics(
    device: int,
    stream: int,
    problem: HeadProblem,
    packed: int,
    packed_stride: int,
    summary: int,
    distances: int,
    bias_distances: int,
    special: int,
) -> None: ...
def cuda_head_packing(problem: HeadProblem) -> tuple[int, int]: ...
def cuda_head_repeat_keys(
    device: int, stream: int, problem: HeadProblem, tile_classes: int, positions: int, keys: int
) -> None: ...
def cuda_head_repeat_runs(
    device: int,
    stream: int,
    problem: HeadProblem,
    tile_classes: int,
    positions: int,
    keys: int,
    order: int,
    joins: int,
    runs: int,
    found: int,
) -> None: ...
def cuda_head_weights(
    device: int,
    stream: int,
    problem: HeadProblem,
    workspace: int,
    summary: int,
    center: int,
    centered_squares: int,
    packed: int,
    packed_rows: int,
    packed_stride: int,
    distances: int,
    bias_distances: int,
) -> None: ...
def cuda_head_weights_workspace(D: int, C: int) -> int: ...
def cuda_load(device: int) -> bool: ...
def cuda_row_norms(
    device: int, stream: int, x: _Matrix, N: int, K: int, l1: int, l2: int, linf: int, workspace: int
) -> None: ...
def cuda_row_norms_workspace(N: int, K: int) -> int: ...
def cuda_runtime() -> tuple[int, int, int, str]: ...
def cuda_unmasked_cross_entropy(
    device: int,
    stream: int,
    logits: _Matrix,
    target: int,
    N: int,
    C: int,
    ignore_index: int,
    loss: int,
    log_scale: int,
    cotangent: int,
) -> None: ...
def plain_head(head: object) -> tuple[int, int, int, bool] | None: ...
