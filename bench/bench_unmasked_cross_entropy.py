"""unmasked_cross_entropy, W8: native against the rivals and a copy of the logits."""

from flatcore._bench.works import WORKS as ALL

WORKS = [work for work in ALL if work.question == "cotangent"]


def bench_unmasked_cross_entropy(time_case, work, name):
    time_case(work, name)
