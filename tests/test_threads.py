"""Limits of threads, what happens around fork, signals and the GIL, and a C program that works the pool hard."""

import asyncio
import contextvars
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import quantization as q
from conftest import SMALL

ROOT = Path(__file__).parents[1]
HAS_PROC = Path("/proc/self/task").is_dir()
# qemu-user cannot start threads in a child of a process that had several.
NO_FORK = SMALL


def run(script, timeout=60, **changes):
    """Run Python code in a process of its own; a variable given as None is taken out of its environment."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(q.__file__).parents[1]), *sys.path])}
    for name in ("QUANTIZATION_NUM_THREADS", "OMP_NUM_THREADS"):
        environment.pop(name, None)
    environment.update(changes)
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, timeout=timeout, check=False, capture_output=True, text=True
    )


def output(script, **changes):
    done = run(script, **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def product(rows=64, features=256, outputs=256, seed=0):
    """Arguments of a product that several threads share: 4 million multiplications."""
    rng = np.random.default_rng(seed)
    weights = q.affine_quantize(rng.standard_normal((outputs, features)).astype(np.float32))
    return rng.standard_normal((rows, features)).astype(np.float32), *weights


# ---- limits ----


@pytest.fixture
def limit():
    """The limit of the process, restored afterwards."""
    yield q.get_num_threads()
    q.set_num_threads(None)


def test_limit_of_the_process(limit):
    assert 1 <= limit <= 1024
    assert q.set_num_threads(3) == limit
    assert q.get_num_threads() == 3
    assert q.set_num_threads(np.int64(1024)) == 3
    assert q.set_num_threads(None) == 1024
    assert q.get_num_threads() == limit


def test_limit_of_a_block_nests(limit):
    with q.threads(3):
        assert q.get_num_threads() == 3
        assert q.set_num_threads(7) == limit
        with q.threads(5), q.isa("generic"):
            assert q.get_num_threads() == 5
        assert q.get_num_threads() == 3
        with pytest.raises(KeyError), q.threads(2):
            raise KeyError
        assert q.get_num_threads() == 3
    assert q.get_num_threads() == 7


def test_limit_of_a_block_is_of_one_thread(limit):
    seen = []
    with q.threads(2):
        thread = threading.Thread(target=lambda: seen.append(q.get_num_threads()))
        thread.start()
        thread.join()
        copied = contextvars.copy_context()
    assert seen == [limit]
    assert copied.run(q.get_num_threads) == 2


def test_limit_of_a_block_is_of_one_task(limit):
    async def task(n):
        with q.threads(n):
            await asyncio.sleep(0)
            mine = q.get_num_threads()
            inner = await asyncio.create_task(inherits())
            return mine, inner, q.AffineQmmT()._plan().threads

    async def inherits():
        await asyncio.sleep(0)
        return q.get_num_threads()

    async def main():
        return await asyncio.gather(*(task(n) for n in range(1, 9)))

    assert asyncio.run(main()) == [(n, n, n) for n in range(1, 9)]
    assert q.get_num_threads() == limit


def test_a_block_in_a_generator_leaves_nothing_behind(limit):
    def generator():
        with q.threads(2):
            yield q.get_num_threads()

    values = generator()
    assert next(values) == 2
    values.close()
    assert q.get_num_threads() == limit


SHOW = "import quantization as q; print(q.get_num_threads(), '|', q.show_config().threads_reason)"


def test_limits_of_the_environment():
    default = output(SHOW).split(" | ")[0]
    value, reason = output(SHOW, QUANTIZATION_NUM_THREADS="3", OMP_NUM_THREADS="5").split(" | ")
    assert value == "3"
    assert "QUANTIZATION_NUM_THREADS" in reason
    value, reason = output(SHOW, OMP_NUM_THREADS="5").split(" | ")
    assert value == "5"
    assert "OMP_NUM_THREADS" in reason
    assert output(SHOW, OMP_NUM_THREADS="5,2").startswith("5 ")  # one limit per level of nesting; the first is ours
    for wrong in ("", "many", "0", "-2", "2.5"):
        assert output(SHOW, QUANTIZATION_NUM_THREADS=wrong).split(" | ")[0] == default


def test_what_a_limit_set_by_hand_says(limit):
    q.set_num_threads(2)
    assert q.show_config().threads_reason == "2: set by set_num_threads"


# ---- threads started and shared ----


@pytest.mark.skipif(not HAS_PROC, reason="needs /proc")
def test_no_thread_starts_before_a_large_call():
    script = """if True:
        import os
        count = lambda: len(os.listdir("/proc/self/task"))
        import numpy as np
        before = count()
        import quantization as q
        print(count() - before)
        q.set_num_threads(3)
        x = np.ones((64, 256), np.float32)
        weights = q.affine_quantize(np.ones((3, 256), np.float32))
        q.affine_qmm_t(x[0], *weights)
        q.show_config()
        print(count() - before)
        with q.threads(1):
            q.quantize(np.ones(1 << 20, np.float32))
        print(count() - before)
        q.quantize(np.ones(1 << 20, np.float32))
        print(count() - before)
        q.quantize(np.ones(1 << 20, np.float32))
        print(count() - before)
        """
    assert output(script).split() == ["0", "0", "0", "2", "2"]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_results_are_the_same_for_every_limit(threads):
    arguments = product()
    with q.threads(1):
        expected = q.affine_qmm_t(*arguments), q.affine_quantize(arguments[0]), q.quantize(arguments[0])
    with q.threads(threads):
        got = q.affine_qmm_t(*arguments), q.affine_quantize(arguments[0]), q.quantize(arguments[0])
    for a, b in zip((got[0], *got[1], got[2]), (expected[0], *expected[1], expected[2]), strict=True):
        assert a.tobytes() == b.tobytes()


def test_python_threads_that_call_at_once():
    cases = [product(rows, seed=rows) for rows in (1, 8, 64, 100)]
    with q.threads(1):
        expected = [q.affine_qmm_t(*case).tobytes() for case in cases]

    def call(i):
        with q.threads(1 + i % 4):
            return q.affine_qmm_t(*cases[i % 4]).tobytes() == expected[i % 4]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(call, range(24 if SMALL else 240)))


def test_python_threads_that_compile_at_once():
    kernel = q.AffineQmmT(64, 4)
    barrier, arguments = threading.Barrier(6), product(1)
    expected = q.affine_qmm_t(*arguments)

    def call(_):
        barrier.wait()
        return np.array_equal(kernel(*arguments), expected), kernel.compile()

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(call, range(6)))
    assert all(equal for equal, _ in results)
    assert kernel.compile() is kernel._kernel


LONG = """
import numpy as np, quantization as q, os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell starts with it ignored
def long_call(seconds):
    # arguments of a product that takes about so long on two threads
    rng = np.random.default_rng(0)
    weights = q.affine_quantize(rng.standard_normal((2048, 2048)).astype(np.float32))
    x = rng.standard_normal((16, 2048)).astype(np.float32)
    q.affine_qmm_t(x, *weights)
    start = time.perf_counter()
    q.affine_qmm_t(x, *weights)
    rows = 16 * max(1, int(seconds / (time.perf_counter() - start)))
    x = np.lib.stride_tricks.as_strided(x, (rows, 2048), (0, 4))  # many rows in little memory
    return x, weights
"""


def test_other_python_threads_run_during_a_call():
    script = f"""{LONG}
q.set_num_threads(1)
x, weights = long_call(0.5)
ticks, stop = [], threading.Event()
def tick():
    while not stop.is_set():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
thread = threading.Thread(target=tick)
thread.start()
start = time.perf_counter()
q.affine_qmm_t(x, *weights)
end = time.perf_counter()
stop.set()
thread.join()
inside = [t for t in ticks if start < t < end]
print(len(inside), end - start)
"""
    ticks, seconds = output(script).split()
    # Were the GIL held, the other thread would tick at most once as the call begins and once as it ends.
    assert int(ticks) > 5, f"{ticks} ticks in {seconds} s"


# ---- signals ----

INTERRUPTED = """
latencies = []
def kill():
    time.sleep(0.15)
    global sent
    sent = time.perf_counter()
    os.kill(os.getpid(), signal.SIGINT)
for _ in range(5):
    sent = None
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        while True:  # until interrupted, however fast the machine
            call()
    except KeyboardInterrupt:
        latencies.append(time.perf_counter() - sent)
    thread.join()
print(*(f"{1e3 * latency:.1f}" for latency in sorted(latencies)))
call_small()
"""


def median_latency(setup, threads):
    """Milliseconds from SIGINT to KeyboardInterrupt: the median of 5, measured inside the process."""
    script = f"{LONG}\nq.set_num_threads({threads})\n{setup}\n{INTERRUPTED}"
    text = output(script)
    print(f"latencies in ms: {text}")
    return float(text.split()[2])


CALLS = {
    "qmm_t": """
x, weights = long_call(3)
def call(): q.affine_qmm_t(x, *weights)
def call_small(): q.affine_qmm_t(x[:1], *weights)
""",
    "one_row_with_nan": """
x, weights = long_call(3)
x = np.where(np.arange(len(x))[:, None] % 3 == 0, np.float32("nan"), x[:1])
def call(): q.affine_qmm_t(x, *weights)
def call_small(): q.affine_qmm_t(x[:1], *weights)
""",
    "many_short_jobs": """
weights = q.affine_quantize(np.ones((32, 4096), np.float32))
x = np.lib.stride_tricks.as_strided(np.ones(4096, np.float32), (1 << 20, 4096), (0, 4))
def call(): q.affine_qmm_t(x, *weights)
def call_small(): q.affine_qmm_t(x[:1], *weights)
""",
    "many_small_matrices": """
batch, weights = 1 << 22, q.affine_quantize(np.ones((8, 64), np.float32))
weights = [np.lib.stride_tricks.as_strided(np.zeros(a.size + batch, a.dtype), (batch, *a.shape), (4, *a.strides))
           for a in weights]  # matrices that overlap
x = np.lib.stride_tricks.as_strided(np.ones(64, np.float32), (batch, 1, 64), (0, 0, 4))
def call(): q.affine_qmm_t(x, *weights)
def call_small(): q.affine_qmm_t(x[:1], *weights)
""",
    "gather": """
x, weights = long_call(3)
experts, chosen = [np.stack([a] * 3) for a in weights], np.arange(len(x)) % 3
def call(): q.affine_gather_qmm_rhs(x, *experts, chosen)
def call_small(): q.affine_gather_qmm_rhs(x[:1], *experts, chosen[:1])
""",
    "indices": """
experts = q.affine_quantize(np.ones((1, 32), np.float32), 32)
experts = [np.lib.stride_tricks.as_strided(a, (1 << 20, *a.shape), (0, *a.strides)) for a in experts]
x, chosen = np.ones((1, 1, 32), np.float32), np.random.default_rng(0).integers(1 << 20, size=1 << 23)
nought = np.zeros(1, np.int64)
def call(): q.affine_gather_qmm(x, *experts, nought, chosen)  # they are sorted for half a second
def call_small(): q.affine_gather_qmm(x, *experts, nought, chosen[:1])
""",
    "quantize": """
w = np.lib.stride_tricks.as_strided(np.ones(1 << 12, np.float32), (1 << 17, 1 << 12), (0, 4))
out = [np.lib.stride_tricks.as_strided(np.zeros((1 << 17) * 512 + 512, t), (1 << 17, n), (4 * n, 4))
       for t, n in ((np.uint32, 512), (np.float32, 64), (np.float32, 64))]
def call(): q.affine_quantize(w, out=tuple(out))
def call_small(): q.affine_quantize(w[:1])
""",
    "quantize_kv": """
x = np.lib.stride_tricks.as_strided(np.ones(1 << 12, np.float32), (1 << 18, 1 << 10), (0, 4))
out = np.zeros((1 << 18, 1 << 9), np.uint8), np.zeros((1 << 18, 1), np.float16)
def call(): q.quantize_kv(x, out=out)
def call_small(): q.quantize_kv(x[:1])
""",
    "kv_attention": """
cache = q.quantize_kv(np.ones((1, 1 << 13, 128), np.float32))
x = np.lib.stride_tricks.as_strided(np.ones(128, np.float32), (1, 1 << 16, 128), (0, 0, 4))
def call(): q.kv_attention(x, cache, cache)
def call_small(): q.kv_attention(x[:, :1], cache, cache)
""",
    "fake_quantize": """
x = np.zeros(1 << 26, np.float32)
def call(): q.quantize(x, out=x)
def call_small(): q.quantize(x[:1])
""",
}


@pytest.mark.skipif(SMALL, reason="an emulator's latency is its own")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_long_calls_answer_ctrl_c(call, threads):
    """The promise is 100 ms.

    Calls look for signals every 20 ms, after a run of pieces of work of up to 40 ms each; the rest is for a
    scheduler that keeps the calling thread off its CPU for a few of its time slices. A machine busy with other work
    can only add to it, so that one measurement of three within the promise shows that it is kept.
    """
    assert any(median_latency(CALLS[call], threads) <= 100 for _ in range(3))


def test_an_interrupted_call_raises_what_the_handler_raises():
    script = f"""{LONG}
class Alarm(Exception): pass
def handler(*_): raise Alarm
signal.signal(signal.SIGALRM, handler)
x, weights = long_call(2)
signal.setitimer(signal.ITIMER_REAL, 0.1)
try:
    q.affine_qmm_t(x, *weights)
except Alarm:
    print("alarm")
def harmless(*_): seen.append(1)
seen = []
signal.signal(signal.SIGALRM, harmless)
signal.setitimer(signal.ITIMER_REAL, 0.05)
expected = q.affine_qmm_t(x[:16], *weights)
y = q.affine_qmm_t(x[: len(x) // 4], *weights)
print(len(seen), np.array_equal(y[-16:], expected))
"""
    assert output(script).split() == ["alarm", "1", "True"]


# ---- fork ----

FORK = f"""{LONG}
signal.alarm(60)  # a hang ends here
q.set_num_threads(4)
rng = np.random.default_rng(1)
w = q.affine_quantize(rng.standard_normal((256, 256)).astype(np.float32))
x = rng.standard_normal((64, 256)).astype(np.float32)
expected = q.affine_qmm_t(x, *w)
"""


@pytest.mark.skipif(NO_FORK or not hasattr(os, "fork"), reason="fork with threads does not work here")
def test_fork_after_a_parallel_call():
    script = f"""{FORK}
def check():
    return np.array_equal(q.affine_qmm_t(x, *w), expected) and q.get_num_threads() == 4
for _ in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        ok = check()
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if check() else 3)
        _, status = os.waitpid(grandchild, 0)
        os._exit(0 if ok and status == 0 else 3)
    assert check()
    _, status = os.waitpid(child, 0)
    assert status == 0, status
print("done")
"""
    assert output(script, PYTHONWARNINGS="ignore") == "done"


@pytest.mark.skipif(NO_FORK or not hasattr(os, "fork"), reason="fork with threads does not work here")
def test_fork_after_attention():
    script = """
import os, signal
import numpy as np, quantization as q
signal.alarm(60)  # a hang ends here
q.set_num_threads(4)
keys = np.random.default_rng(1).standard_normal((4, 2000, 64)).astype(np.float32)
def attend():
    cache = q.quantize_kv(keys)
    return q.kv_attention(keys[:, :8], cache, cache)
expected = attend()
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if np.array_equal(attend(), expected) else 3)
    assert np.array_equal(attend(), expected)
    assert os.waitpid(child, 0)[1] == 0
print("done")
"""
    assert output(script, PYTHONWARNINGS="ignore") == "done"


@pytest.mark.skipif(NO_FORK or not hasattr(os, "fork"), reason="fork with threads does not work here")
def test_fork_while_other_threads_call():
    script = f"""{FORK}
stop = threading.Event()
def busy():
    while not stop.is_set():
        assert np.array_equal(q.affine_qmm_t(x, *w), expected)
threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads: thread.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if np.array_equal(q.affine_qmm_t(x, *w), expected) else 3)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
stop.set()
for thread in threads: thread.join()
print("done")
"""
    assert output(script, PYTHONWARNINGS="ignore") == "done"


@pytest.mark.skipif(NO_FORK or not hasattr(os, "fork"), reason="fork with threads does not work here")
def test_multiprocessing_by_fork():
    script = f"""{FORK}
import multiprocessing
def work(i):
    return np.array_equal(q.affine_qmm_t(x, *w), expected)
with multiprocessing.get_context("fork").Pool(3) as pool:
    assert all(pool.map(work, range(30)))
assert work(0)
print("done")
"""
    assert output(script, PYTHONWARNINGS="ignore") == "done"


def test_the_process_ends_while_workers_wait():
    script = f"{FORK}\nthreading.Thread(target=lambda: q.affine_qmm_t(x, *w), daemon=True).start()\nprint('end')"
    assert output(script) == "end"


# ---- the pool alone ----


@pytest.mark.slow
def test_the_pool_from_plain_c(tmp_path):
    source = ROOT / "tests" / "driver_threads.c"
    compiler = shutil.which(os.environ.get("CC", "cc").split()[0]) or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no C compiler")
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the C sources are not beside the tests")
    pool = [str(ROOT / "csrc" / "cpu" / name) for name in ("threads.c", "cpu_count.c")]
    program = tmp_path / "driver"
    command = [compiler, "-std=c11", "-O1", "-pthread", str(source), *pool, "-o", str(program), "-lm"]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT)
    done = subprocess.run(
        [str(program), *(["no-fork"] if NO_FORK else [])], check=False, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
