"""flatcore in its process: fork, threads, runtimes, memory, huge strides. Each in a process of its own, with a time limit.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import flatcore
from flatcore._check.tolerance import assert_same, assert_within, tolerance
from flatcore._engine import paths


def run(script: str, *options: str, **variables: str) -> str:
    """Run a script in a fresh interpreter; return what it printed. A hang or a crash is a failure.

    A script takes seconds; the limit only tells a hang from a busy machine.
    """
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(script)],
        env=os.environ | {"OMP_NUM_THREADS": "2"} | variables,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stderr == "", done.stderr
    return done.stdout


def test_importing_prints_and_warns_nothing() -> None:
    assert run("import flatcore", "-W", "error") == ""


def test_the_command_line_is_not_imported() -> None:
    heavy = "matplotlib", "sklearn", "rich", "flatcore._cli.demo"
    assert run(f"import sys, flatcore; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_one_openmp_runtime() -> None:
    """Two cost a factor of five in alternating calls."""
    script = """
        import torch, flatcore
        torch.set_num_threads(2)
        torch.randn(500, 500) @ torch.randn(500, 500)
        with flatcore.backend("native"):
            flatcore.head_metrics(torch.randn(4000, 64), torch.randn(10, 64))
            flatcore.row_norms(torch.randn(4000, 64))
        files = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
        names = ("libgomp", "libomp", "libiomp")
        print(sum(any(n in f.rsplit("/", 1)[-1] for n in names) for f in files))
    """
    assert run(script).strip() == "1"


FORK = """
    import os, sys, torch, flatcore
    from flatcore._engine import paths
    torch.set_num_threads(2)
    g = torch.Generator().manual_seed(0)
    x, w, y = torch.randn(5000, 64, generator=g), torch.randn(30, 64, generator=g), torch.randint(30, (5000,), generator=g)
    def work():
        with flatcore.backend({engine!r}), paths.forced(path={path!r}):
            a, b = x.detach().requires_grad_(), w.detach().requires_grad_()  # a clone is torch's own parallel region
            gradients = torch.autograd.grad(flatcore.relative_flatness(a, b, measure="neuronwise"), (a, b))
            return [*flatcore.head_metrics(x, w, y), flatcore.row_norms(x), *gradients]
    if {when!r} == "used":
        before = work()
        torch.randn(2000, 2000) @ torch.randn(2000, 2000)
    child = os.fork()
    if child == 0:
        try:
            after = work()
            torch.save(after, {file!r})
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    again = work()
    there = torch.load({file!r})
    for a, b in zip(there, again):
        if {path!r} == "fused":
            assert torch.equal(a, b)
        else:  # the library's products of one thread and of two round differently
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    print("equal")
"""


@pytest.mark.parametrize("path", ("fused", "chunked", "reference"))
@pytest.mark.parametrize("when", ("used", "unused"))
def test_a_forked_child_does_not_hang(when: str, path: str, tmp_path: Path) -> None:
    """The parent's OpenMP team does not exist in the child: a parallel region there would wait for it for ever."""
    engine, forced = ("reference", None) if path == "reference" else ("native", path)
    script = textwrap.dedent(FORK).format(when=when, engine=engine, path=forced, file=str(tmp_path / "child.pt"))
    assert run(script).strip() == "equal"


def test_a_forked_loader_may_call_flatcore() -> None:
    script = """
        import torch, flatcore
        torch.set_num_threads(2)
        w = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
        class Rows(torch.utils.data.Dataset):
            def __len__(self): return 4
            def __getitem__(self, i):
                x = torch.full((3000, 64), float(i + 1))
                return flatcore.hessian_trace(x, w, log=True)
        here = torch.stack([Rows()[i] for i in range(4)])
        loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2, multiprocessing_context="fork")
        there = torch.stack(list(loader))
        assert torch.equal(here, there)
        print("equal")
    """
    assert run(script).strip() == "equal"


@pytest.fixture(params=("fused", "chunked"))
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Native kernels on the path that is forced; the setting is the process's, so every thread has it."""
    with flatcore.backend("native"), paths.forced(path=request.param):
        yield request.param


def test_concurrent_calls_do_not_disturb_each_other(kernels: str) -> None:
    def problem(seed: int) -> tuple[torch.Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        n, d, c = 200 + 37 * seed, 20 + seed, 5 + seed
        return (
            torch.randn(n, d, generator=g), torch.randn(c, d, generator=g), torch.randint(c, (n,), generator=g),
        )  # fmt: skip

    def call(seed: int) -> list[torch.Tensor]:
        x, w, y = problem(seed)
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        gradients = torch.autograd.grad(flatcore.feature_gradient_norms(a, b, y, reduction="mean"), (a, b))
        return [*flatcore.head_metrics(x, w, y), flatcore.row_norms(x), *gradients]

    alone = [call(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(10):
            for seed, values in enumerate(pool.map(call, range(6))):
                for i, (a, b) in enumerate(zip(values, alone[seed], strict=True)):
                    assert_same(f"problem {seed}, output {i}", a, b)


def test_a_bad_label_in_one_thread_is_that_threads_error(kernels: str) -> None:
    x, w = torch.randn(300, 16), torch.randn(5, 16)

    def call(i: int) -> str:
        y = torch.full((300,), 5 if i % 2 else 1)
        y[i] = 1
        try:
            return f"{flatcore.head_metrics(x, w, y).loss.isfinite().all()}"
        except ValueError as error:
            return str(error).rpartition("got ")[2]

    with ThreadPoolExecutor(4) as pool:
        for i, text in enumerate(pool.map(call, range(40))):
            assert text == (f"5 in row {0}" if i % 2 else "True")


@pytest.mark.parametrize("call", ("flatcore.head_metrics(x, w)", "flatcore.row_norms(wide)"))
def test_a_call_lets_other_threads_run(call: str) -> None:
    """A counter runs on during a long native call: impossible if the call kept the interpreter's lock.

    A busy machine may leave the counter no time during one call, so the call is repeated until it has had some.
    """
    script = f"""
        import threading, time, torch, flatcore
        torch.set_num_threads(1)
        x, w, wide = torch.ones(200_000, 128), torch.ones(60, 128), torch.ones(1, 1 << 16).expand(8000, 1 << 16)
        ticks, stop = [], threading.Event()
        def tick():
            while not stop.wait(0.002):
                ticks.append(time.perf_counter())
        thread = threading.Thread(target=tick)
        thread.start()
        for _ in range(100):
            with flatcore.backend("native"):
                start = time.perf_counter(); {call}; end = time.perf_counter()
            third = (end - start) / 3
            # in the middle third of the call nothing but the kernel runs
            during = sum(start + third < t < end - third for t in ticks)
            if during >= 2:
                break
        stop.set()
        thread.join()
        print(during)
    """
    assert int(run(script)) >= 2


def test_memory_does_not_grow() -> None:
    """300 calls of each path; a call's workspace is some 100 KB, so that a leak of one in ten would be seen."""
    script = """
        import torch, flatcore
        from flatcore._engine import paths
        torch.set_num_threads(1)
        x, w, y = torch.randn(256, 64), torch.randn(32, 64), torch.randint(32, (256,))
        def rss():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        def work(calls):
            for _ in range(calls):
                for path in ("fused", "chunked"):
                    with flatcore.backend("native"), paths.forced(path=path):
                        flatcore.head_metrics(x, w, y)
                        flatcore.relative_flatness(x, w, y, measure="neuronwise")
                flatcore.row_norms(x)
                flatcore.hessian_trace(x.numpy(), w.numpy(), y.numpy())
                try:
                    flatcore.head_metrics(x, w, y + 32)
                except ValueError:
                    pass
        work(30)
        before = rss()
        work(300)
        print((rss() - before) / 300)
    """
    assert float(run(script)) < 10_000  # bytes a call


# ---------------------------------------------------------------------------------------------------- beyond 32 bits
FAR = (1 << 31) + 24  # elements from row to row: beyond 2^31, and with 4 rows beyond 2^32


def _eighths(*shape: int) -> torch.Tensor:
    """Multiples of 1/8 up to 2: products and their sums are exact in every order, so logits are."""
    return torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(sum(shape))) / 8


def assert_same_metrics(got: flatcore.HeadMetrics, want: flatcore.HeadMetrics) -> None:
    """Two computations from exact logits, each within its own bound."""
    assert torch.equal(got.prediction, want.prediction)
    for name, values in want._asdict().items():
        if name != "prediction":
            truth = values.double().numpy()
            bound = tolerance(name, truth, truth, values.dtype)
            assert_within(name, getattr(got, name), truth, bound + bound, values.dtype)


@pytest.fixture
def far_rows() -> Iterator[torch.Tensor]:
    """(4, 8) float32 rows that lie 2^31 elements apart in a sparse file of 24 GiB, which holds four pages."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        elements = 3 * FAR + 8
        with path.open("wb") as file:
            file.truncate(4 * elements)
        flat = torch.from_file(str(path), shared=True, size=elements, dtype=torch.float32)
        rows = flat.as_strided((4, 8), (FAR, 1))
        rows.copy_(_eighths(4, 8))
        yield rows
        assert path.stat().st_blocks * 512 < 1 << 20, "the file was not sparse"


def test_offsets_beyond_32_bits(path: str, far_rows: torch.Tensor) -> None:
    near = far_rows.contiguous()
    w, y = _eighths(3, 8), torch.tensor([0, 1, 2, 1])
    assert_same_metrics(flatcore.head_metrics(far_rows, w, y), flatcore.head_metrics(near, w, y))
    assert_same_metrics(flatcore.head_metrics(w, far_rows, y[:3]), flatcore.head_metrics(w, near, y[:3]))
    z = far_rows[:, :3]
    assert_same_metrics(
        flatcore.head_metrics(near, w, y, logits=z), flatcore.head_metrics(near, w, y, logits=z.contiguous())
    )


def test_columns_beyond_32_bits(path: str, far_rows: torch.Tensor) -> None:
    columns = far_rows.T  # (8, 4): elements of a row lie 2^31 apart
    near, w, y = columns.contiguous(), _eighths(3, 4), torch.arange(8) % 3
    assert_same_metrics(flatcore.head_metrics(columns, w, y), flatcore.head_metrics(near, w, y))
    assert_same_metrics(flatcore.head_metrics(w, columns, y[:3]), flatcore.head_metrics(w, near, y[:3]))


def test_row_norms_beyond_32_bits(target: str, far_rows: torch.Tensor) -> None:
    assert_same("rows", flatcore.row_norms(far_rows), flatcore.row_norms(far_rows.contiguous()))
    want = flatcore.row_norms(far_rows.T.contiguous()).double().numpy()
    bound = tolerance("row_norm", want, 0.0, torch.float32, terms=4)
    assert_within("row_norm", flatcore.row_norms(far_rows.T), want, bound + bound, torch.float32)


def test_more_rows_than_31_bits_in_a_call_of_little_memory() -> None:
    """A vector of one-element rows read through stride 0; the answer would need 8 GiB, so it is refused, not wrapped."""
    script = """
        import resource, torch, flatcore
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        x = torch.ones(1, 1).expand(1 << 40, 1)
        for call in (lambda: flatcore.row_norms(x), lambda: flatcore.hessian_trace(x, torch.ones(2, 1)),
                     lambda: flatcore.hessian_trace(torch.ones(1, 1), x)):
            try:
                call()
            except (RuntimeError, MemoryError) as error:
                print("memory" in str(error))
            else:
                print("a number came out")
    """
    assert run(script).split() == ["True"] * 3


def test_many_threads_give_the_same_numbers(kernels: str) -> None:
    before = torch.get_num_threads()
    x, w, y = _eighths(2000, 33), _eighths(17, 33), torch.arange(2000) % 17
    try:
        torch.set_num_threads(1)
        one, norms = flatcore.head_metrics(x, w, y), flatcore.row_norms(x)
        for threads in (2, 3, 64):
            torch.set_num_threads(threads)
            several = flatcore.head_metrics(x, w, y)
            assert_same_metrics(several, one)
            if kernels == "fused":  # the chunked path's products are the library's, which may add in another order
                for name, values in one._asdict().items():
                    assert_same(name, getattr(several, name), values)
            assert_same("norms", flatcore.row_norms(x), norms)
    finally:
        torch.set_num_threads(before)


def test_the_backend_is_one_setting_for_all_threads() -> None:
    seen = []
    with flatcore.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(flatcore.show_config()["cpu_backend"]))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_the_setting_returns_after_an_exception() -> None:
    before = flatcore.show_config()["backend"]
    with pytest.raises(KeyError), flatcore.backend("reference"):
        raise KeyError
    assert flatcore.show_config()["backend"] == before
