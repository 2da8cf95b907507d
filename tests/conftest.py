"""What all tests share: the instruction sets to run on, sizes, and arrays with guarded memory around them."""

import ctypes
import mmap
import os

import numpy as np
import pytest

import quantization as q

try:
    import hypothesis
except ImportError:  # its tests skip
    pass
else:  # machines are shared and emulated: how long an example takes says nothing
    hypothesis.settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("untimed")

SMALL = bool(os.environ.get("QUANTIZATION_TEST_SMALL"))  # set where a CPU is emulated: fewer cases of each kind

AVAILABLE = [entry["name"] for entry in q._C.isas() if entry["available"]]
FORCED = os.environ.get("QUANTIZATION_ISA")
ISAS = [FORCED] if FORCED else AVAILABLE[:1] if SMALL else AVAILABLE

FORMATS = [  # of the affine family; tests/test_quantize_fp.py has the others
    pytest.param(row["mode"], row["bits"], size, id=f"{row['name']}_g{size}")
    for row in q._C.formats()
    for size in row["group_sizes"]
    if row["family"] == "affine"
]


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that is here (or the one forced), with proof that it is the one that runs."""
    with q.isa(request.param):
        assert q.AffineQmmT()._plan().isa == request.param
        yield request.param


@pytest.fixture
def rng(request):
    """Random numbers that depend on the test's name alone."""
    return np.random.default_rng(list(request.node.name.encode()))


def assert_same_bytes(ours, expected):
    """Assert equality of shapes, dtypes and all bits, of NaN too."""
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    unsigned = f"u{expected.itemsize}"
    a, b = (np.ascontiguousarray(array).view(unsigned) for array in (ours, expected))
    different = np.argwhere(a != b)
    if len(different):
        index = tuple(different[0])
        pytest.fail(f"{len(different)} of {a.size} differ, first at {index}: {a[index]:#x}, expected {b[index]:#x}")


def assert_threads_change_nothing(results):
    """Assert that each result of `results()` is the same on any number of threads, and return it."""
    with q.threads(1):
        alone = results()[0]
    for threads in (3,) if SMALL else (2, 3, 8):
        with q.threads(threads):
            for y in results():
                assert_same_bytes(y, alone)
    return alone


class Guarded:
    """Arrays between guard bytes, which `check` finds changed if a kernel wrote outside."""

    MARGIN = 256

    def __init__(self):
        self._blocks = []

    def empty(self, shape, dtype, offset=0):
        """Return an array whose memory starts `offset` bytes after a 64-byte border."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        block = np.full(size + 2 * self.MARGIN + 128, 0xA5, np.uint8)
        start = self.MARGIN + (-(block.ctypes.data + self.MARGIN)) % 64 + offset
        self._blocks.append((block, start, start + size))
        return block[start : start + size].view(dtype).reshape(shape) if size else np.empty(shape, dtype)

    def check(self):
        for block, start, end in self._blocks:
            assert (block[:start] == 0xA5).all(), "bytes before the array changed"
            assert (block[end:] == 0xA5).all(), "bytes after the array changed"


@pytest.fixture
def guarded():
    """A `Guarded`, checked when the test has passed."""
    guard = Guarded()
    yield guard
    guard.check()


class Page:
    """Memory between two pages that may not be touched."""

    def __init__(self, size):
        pages = -(-size // mmap.PAGESIZE)
        self.memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
        everything = np.frombuffer(self.memory, np.uint8)
        self.bytes = everything[mmap.PAGESIZE : -mmap.PAGESIZE]
        libc = ctypes.CDLL(None, use_errno=True)
        for address in (everything.ctypes.data, self.bytes.ctypes.data + self.bytes.size):
            assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0

    def put(self, array, at_end):
        """Copy an array there: its last byte is the last before the border, or its first at an odd address after."""
        first = self.bytes.size - array.nbytes if at_end else 1
        place = self.bytes[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
        place[...] = array
        return place
