"""The measures' gradients, W6 forward and backward, W3 and W4 backward, and W9's training step, against their limits."""

from flatcore._bench.works import WORKS as ALL

WORKS = [work for work in ALL if work.backward or work.question == "training step"]


def bench_head_metrics_backward(time_case, work, name):
    time_case(work, name)
