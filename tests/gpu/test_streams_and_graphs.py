"""Calls run on the current stream, wait for nothing, and can be captured: every operator, forward and backward."""

import pytest
import torch
from calls import Call, assert_equal, kernels, put

from pssl_ext.testing import samples

CASES = [
    (op, s.id, backend) for op, backend in kernels() for s in samples(op, "cpu", torch.float32, "contiguous")
]
every_case = pytest.mark.parametrize("op, sample_id, backend", CASES, ids=["-".join(c) for c in CASES])
pytestmark = pytest.mark.gpu

LATE = 20_000_000  # clock cycles: some 10 ms


def call_of(op, sample_id, backend):
    sample = next(s for s in samples(op, "cuda", torch.float32, "contiguous") if s.id == sample_id)
    return Call(op, sample.args, backend)


@every_case
def test_another_stream(op, sample_id, backend):
    """What a call reads arrives late, on the stream in use: a kernel on any other one would read zeros."""
    call = call_of(op, sample_id, backend)
    expected, given = call.run(), call.given()
    values = [t.detach().clone() for t in given]
    count = len(given) - len(call.seeds)
    put(given, [torch.zeros_like(v) for v in values])
    torch.cuda.synchronize()

    def arrive(part):
        torch.cuda._sleep(LATE)
        put(given[part], values[part])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        arrive(slice(count))
        got = call.run(before_backward=lambda: arrive(slice(count, None)))
    stream.synchronize()
    assert_equal(got, expected, f"{op} {sample_id} on another stream")


@every_case
def test_no_wait(op, sample_id, backend):
    """As far as torch sees: copies to the host and of its pageable memory, values asked for."""
    call = call_of(op, sample_id, backend)
    call.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
def test_capture_and_replay(op, sample_id, backend):
    """A replay reads its inputs anew, and gives the bits of a call."""
    call = call_of(op, sample_id, backend)
    given = call.given()
    values = [t.detach().clone() for t in given]
    # sound values in other places, for every operator
    others = [v.flip(tuple(range(v.ndim))) if v.is_floating_point() else v for v in values]
    expected = []
    for these in (others, values):
        put(given, these)
        expected.append([t.clone() for t in call.run()])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call.run()  # what happens once happens before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run()
    for these, wanted in zip((others, values), expected, strict=True):
        put(given, these)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(captured, wanted, f"{op} {sample_id} replayed")
