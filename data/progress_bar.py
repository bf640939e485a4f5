"""The one progress bar: tqdm's on a terminal; in a file or a pipe whole lines, at most one every 30 seconds.

teacher: 120 of 500 steps (24 %), 4.2 steps/s, 01:30 left, loss 0.53
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_MIN_S, _MAX_S = 30.0, 300.0  # between two lines
_OF_ELAPSED = 0.1  # between two lines, within these limits: as a log of days needs fewer
_SMOOTHING = 0.05  # of the rate: about the last 20 s; tqdm's 0.3 lets the time left jump
format_interval = tqdm.format_interval  # seconds as `01:30`


class ProgressBar(tqdm):  # tqdm has no types
    """Show how much work is done, on standard error. Iterate over it, or call `update` inside of `with`.

    Without a terminal, the end is a line too, however short the work was.

    Args:
        iterable: what to count; None: `update` counts.
        desc: what works, as `teacher`.
        unit: what is counted, in the singular, as `step`.
        initial: how many were done before.
        delayed: show nothing in the first 5 seconds, and clean the terminal at the end.
        shown: False shows nothing, as in all processes but the first.
        layout: of the bar, as tqdm's `bar_format`; a line is the same with a comma for `|{bar}|`. None: tqdm's own, and the line above.
    """

    def __init__(
        self, iterable: Iterable[Any] | None = None, *, total: float | None = None, desc: str, unit: str,
        initial: int = 0, delayed: bool = False, shown: bool = True, layout: str | None = None,
    ) -> None:  # fmt: skip
        self._log = None if sys.stderr.isatty() else sys.stderr
        self._delayed, self._line_at = delayed, 0.0  # seconds after the start
        options: dict[str, Any] = {"delay": 5 if delayed else 0, "leave": not delayed, "bar_format": layout}
        if self._log is not None:  # tqdm's own output goes nowhere; it asks for the time at each update
            layout = layout and layout.replace("|{bar}|", ",")
            options = {"file": io.StringIO(), "miniters": 0, "bar_format": layout}
        super().__init__(
            iterable, total=total, desc=desc, unit=unit, initial=initial, disable=not shown, mininterval=1,
            smoothing=_SMOOTHING, **options,
        )  # fmt: skip

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar, or write a line if it is time for one; tqdm calls it at times, and at the end, when `disable` is set."""
        if self._log is None:
            return super().display(msg, pos)
        elapsed = self.format_dict["elapsed"]
        if self._ends_with_line() if self.disable else self._is_due(elapsed):
            self._line_at = elapsed
            self._log.write(f"{self._line() if self.bar_format is None else self}\n")
            self._log.flush()
        return True

    def _is_due(self, elapsed: float) -> bool:
        every_s = min(max(_MIN_S, _OF_ELAPSED * elapsed), _MAX_S)
        return elapsed - self._line_at >= every_s and self.n != self.total  # then the end follows

    def _ends_with_line(self) -> bool:
        return self._line_at > 0 or not self._delayed

    def _line(self) -> str:
        figures = self.format_dict
        done, total, elapsed = figures["n"], figures["total"], figures["elapsed"]
        rate = figures["rate"] or (done - figures["initial"]) / max(elapsed, 1e-9)
        count = f"{done:,} {self.unit}s" if total is None else f"{done:,} of {total:,} {self.unit}s"
        percent = f" ({100 * done / total:.0f} %)" if total else ""
        left = f", {format_interval((total - done) / rate)} left" if total and rate and not self.disable else ""
        took = f" in {format_interval(elapsed)}" if self.disable else ""
        postfix = f", {self.postfix}" if self.postfix else ""
        return f"{self.desc}: {count}{percent}{took}, {_speed(rate, self.unit)}{left}{postfix}"


def _speed(rate: float, unit: str) -> str:
    """`4.2 steps/s`, or, below one a second, `3.5 s/step`."""
    if 0 < rate < 1:
        return f"{1 / rate:,.1f} s/{unit}"
    return f"{rate:,.0f} {unit}s/s" if rate >= 10 else f"{rate:.1f} {unit}s/s"
