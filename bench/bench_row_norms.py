"""row_norms, W5: native against the rivals and the probes of the limit."""

from flatcore._bench.works import WORKS as ALL

WORKS = [work for work in ALL if work.question == "row norms"]


def bench_row_norms(time_case, work, name):
    time_case(work, name)
