"""What UAI 2024 searches for its image models before the runs that count."""

from __future__ import annotations

# Section 6.1 gives the exponential's grid, factors an epoch. CLR's half cycles are adjusted "as
# recommended by the authors", and Smith 2017 recommends 2 to 10 epochs. HD's grid belongs to the
# schedule itself.
IMAGE_SEARCH = {
    "exponential": {"gamma": (0.8, 0.9, 0.95, 0.99, 0.999)},
    "clr": {"half_cycle_epochs": (2.0, 5.0, 10.0)},
}
