"""The same values at other places in memory: any order of axes, any steps, any alignment; and what lies in between."""

import numpy as np

try:
    import hypothesis
    from hypothesis import strategies as st
except ImportError:  # a bare installation: the tests that draw layouts skip
    hypothesis = st = None

FILL = 0xA5
STEPS = (-2, -1, 1, 2)
OFFSETS = (0, 1, 2, 4, 8)


class Layout:
    """How an array lies in memory.

    Parameters
    ----------
    order : sequence of int
        The axes from the outermost in memory to the innermost.
    steps : sequence of int
        For each axis, which n-th element is used; negative: backwards.
    offset : int
        Bytes by which the memory's start is moved, so that elements may be unaligned.
    """

    def __init__(self, order, steps, offset):
        self.order, self.steps, self.offset = tuple(order), tuple(steps), offset

    def __repr__(self):
        return f"Layout({self.order}, {self.steps}, {self.offset})"

    def _view(self, memory, shape, dtype):
        sizes = [shape[axis] * abs(self.steps[axis]) for axis in self.order]
        base = np.ndarray(sizes, dtype, memory, self.offset).transpose(np.argsort(self.order))
        return base[tuple(slice(None, None, step) for step in self.steps)]

    def empty(self, shape, dtype):
        """Memory filled with FILL bytes, and the view of it."""
        elements = int(np.prod([size * abs(step) for size, step in zip(shape, self.steps, strict=True)]))
        memory = np.full(self.offset + elements * np.dtype(dtype).itemsize + 64, FILL, np.uint8)
        return memory, self._view(memory, shape, dtype)

    def place(self, array):
        """A read-only view with the values of `array`."""
        _, view = self.empty(array.shape, array.dtype)
        view[...] = array
        view.flags.writeable = False
        return view

    def check(self, memory, shape, dtype):
        """Assert that no byte outside of the view has changed."""
        inside = np.zeros_like(memory)
        view = self._view(inside, shape, dtype)
        if view.size:
            start = view.__array_interface__["data"][0] - inside.__array_interface__["data"][0]
            as_bytes = np.ndarray((*shape, view.itemsize), np.uint8, inside, start, (*view.strides, 1))
            as_bytes[...] = 1
        assert (memory[inside == 0] == FILL).all(), f"{self}: bytes between the elements changed"


def fixed(ndim):
    """Some layouts of every kind, for tests without hypothesis."""
    straight, one = tuple(range(ndim)), (1,) * ndim
    return [
        Layout(straight, one, 0),
        Layout(straight, one, 1),
        Layout(straight, (-1,) * ndim, 0),
        Layout(straight, (2,) * ndim, 2),
        Layout(straight[::-1], one, 0),
        Layout(straight[::-1], (-2,) * ndim, 1),
    ]


def layouts(ndim):
    """Hypothesis strategy of layouts."""
    steps = st.tuples(*[st.sampled_from(STEPS)] * ndim)
    return st.builds(Layout, st.permutations(range(ndim)), steps, st.sampled_from(OFFSETS))


def settings(examples):
    """The same examples on every run and in any time; they are small, so that none needs to be made smaller."""
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    return {"max_examples": examples, "deadline": None, "derandomize": True, "database": None, "phases": phases}
