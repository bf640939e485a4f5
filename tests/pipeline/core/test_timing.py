"""Times and sizes have a unit that fits."""

import pytest

from pipeline.core.timing import byte_size, duration

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (39.94, "39.9 s"),
        (12 * _MINUTE + 5, "12 min 5 s"),
        (3 * _HOUR + 20 * _MINUTE, "3 h 20 min"),
        (47 * _HOUR, "47 h 0 min"),
        (2.04 * _DAY, "2 days"),
        (2.6 * _DAY, "2.6 days"),
        (43.3 * _DAY, "43 days"),
        (340 * _DAY, "340 days"),
        (4000 * _DAY, "11 years"),
    ],
)
def test_a_duration_has_two_figures_or_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999_400, "999 kB"),
        (999_600, "1 MB"),
        (21_340_000, "21.3 MB"),
        (6.5e12, "6.5 TB"),
        (1.2e15, "1,200 TB"),
    ],
)
def test_a_size_has_three_figures(count: float, words: str) -> None:
    assert byte_size(count) == words
