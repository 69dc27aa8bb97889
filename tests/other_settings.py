"""A value other than its default for every setting that a state holds."""

from __future__ import annotations

from typing import Any

from autodrop_ext import AnalyticAutoDrop, AnytimeAutoDrop, AutoDrop, EpochAutoDrop

OTHERS: dict[type[Any], dict[str, Any]] = {
    AutoDrop: {
        "window": 5,
        "factor": 0.5,
        "threshold": -0.25,
        "buffer_size": 4,
        "min_samples": 3,
        "kernel": "time",
        "min_lr": [0.01],
        "warmup_steps": 2,
        "per_group": True,
        "average": True,
    },
    AnytimeAutoDrop: {
        "min_window": 4,
        "windows": 3,
        "snapshots": 2,
        "critical": -0.5,
        "gain": 2.0,
        "max_power": 0.75,
        "cosines": 5,
        "min_lr": [0.01],
        "warmup_steps": 2,
        "average": False,
    },
    EpochAutoDrop: {
        "factor": 0.5,
        "threshold": 0.25,
        "max_threshold": 2.0,
        "delay": 3,
        "average": False,
        "min_lr": [0.01],
    },
    AnalyticAutoDrop: {
        "gamma": 3.0,
        "epsilon": 0.2,
        "tau0": 0.04,
        "rates": "proof",
        "warmup_steps": 2,
    },
}
