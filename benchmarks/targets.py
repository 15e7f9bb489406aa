"""What is to be reached on two CPU cores, and what a record says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.record import rows
from benchmarks.summary import candidate, is_red, shown


@dataclass(frozen=True)
class Target:
    """A figure to reach on two CPU cores in float32; `measure` finds (text, met) in a record, or None."""

    wanted: str
    measure: Callable[[dict], tuple[str, bool] | None]


def _row(record, identity) -> dict | None:
    return next((r for r in rows(record) if r["id"] == identity), None)


def _spread(value: dict) -> str:
    return f"{value['median']:.2f}x ({value['p20']:.2f} to {value['p80']:.2f})"


def _speed_up(identity: str, least: float, key: str = "ratio") -> Callable:
    def measure(record):
        row = _row(record, identity)
        entry = shown(row) if row else None
        if entry is None or key not in entry:
            return None
        # A ratio of one is asked for within noise: most of the pairs may lie below only when the upper ones do not.
        reached = entry[key]["p80" if least == 1 else "median"]
        return _spread(entry[key]), reached >= least

    return measure


def _dilation_cost(dilated: str, plain: str, most: float) -> Callable:
    def measure(record):
        rows = [_row(record, identity) for identity in (dilated, plain)]
        entries = [shown(row) if row else None for row in rows]
        if None in entries:
            return None
        cost = entries[0]["seconds"]["median"] / entries[1]["seconds"]["median"]
        return f"{cost:.2f}x", cost <= most

    return measure


def _overhead(record) -> tuple[str, bool] | None:
    found = [r for r in record["overhead"] if r["name"].startswith("fastseg")]
    if not found:
        return None
    worst = max(found, key=lambda r: r["above_native"]["median"])["above_native"]["median"]
    return f"{worst * 1e6:.1f} us", worst <= 10e-6


def _dense_targets() -> tuple[Target, ...]:
    """A branch of DeepLab v3's ASPP given NCHW tensors, and given channels_last ones."""
    found = []
    for name, rates in (("aspp-r101-os16", (6, 12, 18)), ("aspp-tv-os8", (12, 24, 36))):
        for rate, least in zip(rates, (1.15, 1.6, 2.0), strict=True):
            case = f"{name}-d{rate}"
            for layout, wanted in (("NCHW", least), ("channels_last", 0.97)):
                entry = "fastseg" if layout == "channels_last" else f"fastseg {layout}"
                key = f"ratio to native {layout}"
                found.append(
                    Target(
                        f"{case} {layout}: {wanted}x", _entry_speed_up(f"{case}/forward/float32", entry, key, wanted)
                    )
                )
    return tuple(found)


def _entry_speed_up(identity: str, name: str, key: str, least: float) -> Callable:
    """The speed-up of one candidate over one layout of native."""

    def measure(record):
        row = _row(record, identity)
        entry = candidate(row, name) if row else None
        if entry is None or key not in entry:
            return None
        return _spread(entry[key]), entry[key]["median"] >= least

    return measure


def _block_speed_up(identity: str, least: float, name: str = "fastseg", baselines=("channels_last", "compile")):
    """The speed-up of a block over the fastest of some baselines."""

    def measure(record):
        row = _row(record, identity)
        entry = candidate(row, name) if row and not is_red(row) else None
        if entry is None or "seconds" not in entry:
            return None
        keys = [key for key in entry if key.startswith("ratio") and key.endswith(baselines)]
        slowest = min(keys, key=lambda key: entry[key]["median"])
        reached = entry[slowest]["p80" if least == 1 else "median"]
        return f"{_spread(entry[slowest])} of {slowest.removeprefix('ratio to ')}", reached >= least

    return measure


def _block_targets() -> tuple[Target, ...]:
    inference = {"separable-64-128": 1.15, "separable-32-64": 1.15, "separable-728": 1, "aspp-os16": 1.05}
    inference |= {"aspp-os8": 1.05, "separable-aspp": 2}
    training = dict.fromkeys(inference, 1) | {"separable-aspp": 4}
    found = [
        Target(f"{case} {direction}: {least}x", _block_speed_up(f"{case}/{direction}/float32", least))
        for direction, wanted in (("inference", inference), ("training", training))
        for case, least in wanted.items()
    ]
    for case in ("aspp-os16", "aspp-os8"):
        measure = _block_speed_up(f"{case}/inference/float32", 1.4, "fastseg NCHW", ("native NCHW",))
        found.append(Target(f"{case} inference, NCHW: 1.4x", measure))
    return tuple(found)


def _memory_share(identity: str, most: float) -> Callable:
    """Peak memory of fastseg's call over that of native's in the thriftier layout."""

    def measure(record):
        row = _row(record, identity)
        own = candidate(row, "fastseg") if row and not is_red(row) else None
        natives = (
            [c["peak_bytes"] for c in row["candidates"] if c["role"] == "native" and "peak_bytes" in c] if own else []
        )
        if not natives or None in natives or own.get("peak_bytes") is None:
            return None
        share = own["peak_bytes"] / min(natives)
        return f"{share:.3f} of {min(natives) / 1e6:.0f} MB", share <= most

    return measure


def _head_targets() -> tuple[Target, ...]:
    """Against native's better layout; torch.compile is shown beside them."""
    layouts = ("NCHW", "channels_last")
    found = []
    for classes in (21, 19, 150):
        labels, loss = f"head-argmax-{classes}/inference/float32", f"head-loss-{classes}/forward+backward/float32"
        by_name = _block_speed_up(labels, 10, "fastseg NCHW", ("NCHW",))
        found += [
            Target(f"head-argmax-{classes}: 5x", _block_speed_up(labels, 5, baselines=layouts)),
            Target(f"head-argmax-{classes}, NCHW: 10x", by_name),
            Target(f"head-loss-{classes}: 4x", _block_speed_up(loss, 4, baselines=layouts)),
            Target(f"head-loss-{classes}: at most a fifth of the memory", _memory_share(loss, 0.2)),
        ]
    for case in ("bilinear-logits", "bilinear-decoder"):
        for direction in ("forward", "backward"):
            measure = _block_speed_up(f"{case}/{direction}/float32", 1, baselines=layouts)
            found.append(Target(f"{case} {direction}: never below native", measure))
    return tuple(found)


_NETWORK = "deeplabv3-mobilenet-v3/inference/float32"
_RESNET = "deeplabv3-resnet50/inference/float32"
CPU_TARGETS = (
    Target("2048x33x33 d=18 forward: 10x", _speed_up("sep-aspp-d18/forward/float32", 10)),
    Target("728x33x33 d=2 backward: 15x", _speed_up("xception-middle-d2/backward/float32", 15)),
    Target("2048x33x33 d=6 backward: 15x", _speed_up("sep-aspp-d6/backward/float32", 15)),
    Target("728x33x33 forward: never below native", _speed_up("xception-middle/forward/float32", 1)),
    Target("256x129x129 forward: never below native", _speed_up("decoder-256/forward/float32", 1)),
    Target("64x257x257 forward: never below native", _speed_up("xception-entry/forward/float32", 1)),
    *(
        Target(
            f"2048x33x33 d={rate} {direction}: at most 1.3x the time of d=1",
            _dilation_cost(f"sep-aspp-d{rate}/{direction}/float32", f"sep-aspp-d1/{direction}/float32", 1.3),
        )
        for direction in ("forward", "backward")
        for rate in (6, 12, 18)
    ),
    *(
        Target(
            f"728x33x33 d=2 {direction}: at most 1.3x the time of d=1",
            _dilation_cost(f"xception-middle-d2/{direction}/float32", f"xception-middle/{direction}/float32", 1.3),
        )
        for direction in ("forward", "backward")
    ),
    Target("deeplabv3_mobilenet_v3_large: 2x eager NCHW", _speed_up(_NETWORK, 2, "ratio to native NCHW")),
    Target(
        "deeplabv3_mobilenet_v3_large: 1.1x eager channels_last",
        _speed_up(_NETWORK, 1.1, "ratio to native channels_last"),
    ),
    Target(
        "DeepLabV3Plus mobilenet_v2: 1.25x eager channels_last",
        _speed_up("deeplabv3plus-mobilenet-v2/inference/float32", 1.25, "ratio to native channels_last"),
    ),
    Target(
        "DeepLabV3Plus resnet50: 1.12x eager channels_last",
        _speed_up("deeplabv3plus-resnet50/inference/float32", 1.12, "ratio to native channels_last"),
    ),
    *(
        Target(f"deeplabv3_resnet50: {least}x eager {layout}", _speed_up(_RESNET, least, f"ratio to native {layout}"))
        for layout, least in (("NCHW", 3), ("channels_last", 1.08))
    ),
    Target("operator call: at most 10 us above native", _overhead),
    *_head_targets(),
    *_block_targets(),
    *_dense_targets(),
)


def targets(record: dict) -> list[tuple[str, str, bool]]:
    """(what is wanted, what was measured, whether it was met) for the CPU figures this record holds."""
    if record["settings"]["device"] != "cpu":
        return []
    measured = [(target.wanted, target.measure(record)) for target in CPU_TARGETS]
    return [(wanted, *found) for wanted, found in measured if found is not None]
