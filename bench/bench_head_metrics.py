"""head_metrics and its views, W1 to W4, W6 and W7: native against the rivals and the probes of the limit."""

from flatcore._bench.works import WORKS as ALL

WORKS = [w for w in ALL if w.question not in ("row norms", "cotangent", "training step") and not w.backward]


def bench_head_metrics(time_case, work, name):
    time_case(work, name)
