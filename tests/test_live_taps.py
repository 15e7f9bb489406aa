"""The planner of live taps: rectangles tile the targets, and list every live tap once and no other."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastseg.ops.geometry import output_size
from fastseg.ops.live_taps import live_share, rectangles


def live_pairs(size, outputs, kernel, stride, pad, dilation):
    """(output, input, tap) along one axis, by trying all."""
    return {
        (p, p * stride - pad + t * dilation, t)
        for p in range(outputs)
        for t in range(kernel)
        if 0 <= p * stride - pad + t * dilation < size
    }


def listed(span):
    """(target, source, tap) along one axis, as a span lists them."""
    return [
        (span.index + span.period * j, tap.source + span.step * j, tap.weight)
        for j in range(span.count)
        for tap in span.taps
    ]


axes = st.tuples(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 40), st.integers(0, 40), st.integers(1, 40)
).filter(lambda a: a[0] + a[3] + a[4] >= a[5] * (a[1] - 1) + 1)


@given(rows=axes, columns=axes, targets=st.sampled_from(["outputs", "inputs"]))
def test_every_target_and_every_live_tap_once(rows, columns, targets):
    (H, R, stride_h, top, bottom, d_h), (W, S, stride_w, left, right, d_w) = rows, columns
    geometry = ((stride_h, stride_w), (top, bottom, left, right), (d_h, d_w))
    P, Q = output_size((H, W), (R, S), *geometry)
    found = rectangles(targets, (H, W), (R, S), *geometry)

    sizes = (P, Q) if targets == "outputs" else (H, W)
    covered = Counter(
        (r.rows.index + r.rows.period * i, r.columns.index + r.columns.period * j)
        for r in found
        for i in range(r.rows.count)
        for j in range(r.columns.count)
    )
    assert covered == Counter((h, w) for h in range(sizes[0]) for w in range(sizes[1]))

    for axis, (size, outputs, kernel, stride, pad, dilation) in (
        ("rows", (H, P, R, stride_h, top, d_h)),
        ("columns", (W, Q, S, stride_w, left, d_w)),
    ):
        pairs = [pair for span in {getattr(r, axis) for r in found} for pair in listed(span)]
        wanted = live_pairs(size, outputs, kernel, stride, pad, dilation)
        if targets == "inputs":
            wanted = {(source, target, tap) for target, source, tap in wanted}
        assert len(pairs) == len(set(pairs))
        assert set(pairs) == wanted


@pytest.mark.parametrize(
    ("size", "rate", "live"),
    [(33, 6, 6.95), (33, 12, 5.17), (33, 18, 3.64), (33, 36, 1), (65, 12, 6.92), (65, 24, 5.11), (65, 36, 3.58)],
)
def test_live_taps_of_aspp(size, rate, live):
    found = rectangles("outputs", (size, size), (3, 3), (1, 1), (rate,) * 4, (rate, rate))
    assert len(found) <= 9
    assert 9 * live_share(found, (3, 3)) == pytest.approx(live, abs=0.005)


def test_a_rate_beyond_the_image_is_one_rectangle_with_one_tap():
    (only,) = rectangles("outputs", (33, 33), (3, 3), (1, 1), (36,) * 4, (36, 36))
    assert only.taps == 1
    assert (only.rows.taps[0].weight, only.columns.taps[0].weight) == (1, 1)


@pytest.mark.parametrize("mistake", [{"targets": "y"}, {"input": (0, 3)}, {"stride": (0, 1)}, {"dilation": (1, -1)}])
def test_mistakes(mistake):
    arguments = {"targets": "outputs", "input": (9, 9), "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1)}
    with pytest.raises(ValueError, match="expected"):
        rectangles(**arguments | mistake)
