"""head_metrics and its views, W1 to W4 and W6: native against the rivals and the probes of the limit."""

from works import WORKS as ALL

WORKS = [work for work in ALL if work.question not in ("row norms", "cotangent")]


def bench_head_metrics(time_case, work, name):
    time_case(work, name)
