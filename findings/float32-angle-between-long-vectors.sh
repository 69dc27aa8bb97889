#!/usr/bin/env bash
# The angle between two long float32 vectors, such as two states of a model, by SciPy and torch.
#
# Expected (guesses, 60 % and 65 % sure): scipy.spatial.distance.cosine computes in float64, so that
#   an angle of 1e-4 radians comes out within 1 %; torch's cosine_similarity of a vector of a
#   million elements with itself is within 2e-7 of 1.
# Seen: SciPy keeps float32 and returns exactly 0 for vectors that are 1e-4, or 5e-4, radians apart;
#   in float64 the angle is right to 1e-5. torch's cosine of a vector with itself is 1.00002 at 10^6
#   elements and 1.0007 at 10^7, so that its arc cosine is NaN: linalg.vector_norm on the CPU loses
#   digits in proportion to the length, while the sum of the same squares is right to 1e-7.
# Versions: torch 2.13.0, scipy 1.17.1, numpy 2.4.6, CPU. Date: 2026-12-01.
# Where: neither page mentions the precision; torch's part is known, pytorch/pytorch issue 78064.
#   https://docs.scipy.org/doc/scipy/reference/generated/scipy.spatial.distance.cosine.html
#   https://docs.pytorch.org/docs/2.13/generated/torch.nn.functional.cosine_similarity.html
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.13.0 numpy==2.4.6 scipy==1.17.1
"$folder/venv/bin/python" - <<'PYTHON'
import math

import torch
from scipy.spatial.distance import cosine
from torch.nn.functional import cosine_similarity

torch.manual_seed(0)
x, noise = torch.randn(2, 10**6)
for angle in (1e-4, 5e-4):
    y = x + angle * noise
    a, b = x.double(), y.double()
    true = 2 * math.asin(float((a / a.norm() - b / b.norm()).norm()) / 2)
    single = float(cosine(x.numpy(), y.numpy()))
    double = math.acos(1 - cosine(a.numpy(), b.numpy()))
    print(f"true {true:.6e}: SciPy float32 {single}, float64 {double:.6e} radians")
    assert abs(true / angle - 1) < 0.01, true
    assert single == 0, single
    assert abs(double / true - 1) < 1e-5, double

for n, least in ((10**6, 1e-6), (10**7, 1e-4)):
    x = torch.randn(n)
    squares = x.double().square().sum()
    above = cosine_similarity(x, x, dim=0).item() - 1
    norm = float(torch.linalg.vector_norm(x).double() / squares.sqrt()) - 1
    total = float(x.square().sum().double() / squares) - 1
    print(f"{n}: cosine with itself 1 + {above:.1e}; norm off by {norm:.1e}, sum by {total:.1e}")
    assert above > least, above
    assert torch.acos(cosine_similarity(x, x, dim=0)).isnan()
    assert norm < -least / 4, norm
    assert abs(total) < 1e-6, total
PYTHON
