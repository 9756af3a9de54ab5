"""How is a plan shown to people? One in full, several as a table."""

from collections.abc import Callable, Sequence

from jaxpeft.table import table
from train.plan import Plan

GIB = 2**30


def rows(found: Sequence[Plan]) -> str:
    """Plans to compare, one line each, as a Markdown table."""
    columns: dict[str, Callable[[Plan], str]] = {
        "topology": lambda one: one.topology,
        "model": lambda one: one.model.rpartition("/")[2],
        "method": lambda one: one.method,
        "trained": lambda one: f"{one.trained:,}",
        "batch": lambda one: "{} x {}".format(*one.batch),
        "arguments": lambda one: _gib(one.argument_bytes),
        "temporaries": lambda one: _gib(one.temporary_bytes),
        "peak": lambda one: _gib(one.peak_bytes),
        "of": lambda one: _gib(one.hbm_bytes),
        "fits": lambda one: "yes" if one.fits else "no",
        "TFLOP": lambda one: _number(one.flops, 1e12),
        "links": lambda one: _gib(one.ici_bytes),
        "roofline": lambda one: _seconds(one.roofline_seconds),
        "bound by": lambda one: one.bound,
        "tokens/s": lambda one: _number(one.tokens_per_second, 1, 0),
        "compiled in": lambda one: f"{one.compile_seconds:.0f} s",
    }
    lines = [[*columns], ["---"] * len(columns), *([cell(one) for cell in columns.values()] for one in found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(one: Plan) -> str:
    """One plan for people, in full."""
    verdict = "fits" if one.fits else "does not fit"
    if one.peak_bytes is None:
        verdict += ", by more than any chip of as many devices could tell"
    else:
        left = one.hbm_bytes - one.peak_bytes
        verdict += f": {_gib(abs(left))} {'left' if left >= 0 else 'too much'}"
    mesh = ", ".join(f"{axis} {size}" for axis, size in one.mesh.items() if size > 1) or "one device"
    sent = ", ".join(f"{kind} {_gib(size)}" for kind, size in one.collectives.items()) or "nothing"
    lines = [
        ("model", f"{one.model}, {one.method}, {one.trained:,} trained parameters"),
        ("machine", f"{one.topology}: {mesh}"),
        ("batch", f"{one.batch[0]} sequences of {one.batch[1]}"),
        ("", ""),
        ("per device", ""),
        ("arguments", _gib(one.argument_bytes)),
        ("temporaries", _gib(one.temporary_bytes)),
        ("peak", f"{_gib(one.peak_bytes)} of {_gib(one.hbm_bytes)}; {verdict}"),
        ("products", f"{_number(one.flops, 1e12)} TFLOP"),
        ("over links", f"{_gib(one.ici_bytes)}: {sent}"),
    ]
    if one.terms:
        terms = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in one.terms.items())
        lines.append(("roofline", f"{_seconds(one.roofline_seconds)}, bound by {one.bound} ({terms})"))
        if one.overestimated:
            lines.append(("", "compiled quickly, which takes more to memory than a run does: --effort full tells it"))
        lines.append(("at best", f"{one.tokens_per_second:,.0f} tokens/s a device"))
    lines.append(("compiled in", f"{one.compile_seconds:.0f} s"))
    if one.seen_on:
        lines.append(("figures of", f"{one.seen_on}, whose devices have more memory"))
    if not one.fits:
        lines += [("", ""), ("largest", "")]
        lines += [("", f"{_gib(buffer.bytes)}  {buffer.shape}  {buffer.origin[-70:]}") for buffer in one.buffers]
        lines += [("", ""), ("tried", "" if one.remedies else "nothing")]
        lines += [
            ("", f"{change}: {'fits, ' if fits else 'does not fit, '}peak {_gib(peak)}")
            for change, peak, fits in one.remedies
        ]
    return "\n".join(table(lines))


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / GIB:.2f} GiB"


def _seconds(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:.3g} s"


def _number(value: float | None, unit: float, digits: int = 1) -> str:
    return "?" if value is None else f"{value / unit:,.{digits}f}"
