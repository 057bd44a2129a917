"""The one place that decides between a direct call, an operator of torch.library and the reference."""

from .head_measure import head_measure
from .head_metrics import OPERATOR as _HEAD_METRICS
from .head_metrics import head_metrics
from .head_metrics_backward import OPERATOR as _HEAD_METRICS_BACKWARD
from .operator import register
from .row_norms import OPERATOR as _ROW_NORMS
from .row_norms import row_norms
from .unmasked_cross_entropy import BACKWARD as _UNMASKED_BACKWARD
from .unmasked_cross_entropy import OPERATOR as _UNMASKED
from .unmasked_cross_entropy import unmasked_cross_entropy

__all__ = ["head_measure", "head_metrics", "row_norms", "unmasked_cross_entropy"]

# the operators live as long as this object
_LIBRARY = register(_HEAD_METRICS, _HEAD_METRICS_BACKWARD, _ROW_NORMS, _UNMASKED, _UNMASKED_BACKWARD)
