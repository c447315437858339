"""The devices' peaks, against the operations of their parts a clock."""

import pytest

from train.step.peaks import PEAKS


@pytest.mark.parametrize(
    ("device_kind", "units", "operations", "gigahertz"),
    [
        # Multiply-adds of all matrix units a clock, two operations each, at the boost clock.
        ("TPU v2", 1, 2 * 128 * 128, 0.7),
        ("TPU v3", 2, 2 * 128 * 128, 0.94),
        ("TPU v4", 8, 2 * 128 * 128, 1.05),
        ("TPU v5 lite", 4, 2 * 128 * 128, 1.5),
        ("TPU v5", 8, 2 * 128 * 128, 1.75),
        ("NVIDIA A100-SXM4-80GB", 108, 2048, 1.41),
        ("NVIDIA H100 80GB HBM3", 132, 4096, 1.83),
        ("NVIDIA H100 PCIe", 114, 4096, 1.62),
        ("NVIDIA H200", 132, 4096, 1.83),
        ("NVIDIA L4", 58, 1024, 2.04),
        ("NVIDIA GeForce RTX 3090", 82, 512, 1.695),
        ("NVIDIA GeForce RTX 4090", 128, 512, 2.52),
        ("NVIDIA GeForce RTX 5090", 170, 512, 2.407),
    ],
)
def test_a_peak_is_what_its_units_do(device_kind, units, operations, gigahertz):
    assert PEAKS[device_kind] == pytest.approx(units * operations * gigahertz * 1e9, rel=0.04)


def test_names_of_one_device_agree():
    for one, other in (("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e")):
        assert PEAKS[one] == PEAKS[other]
    assert "cpu" not in PEAKS and "NVIDIA H100 80GB HBM3 MIG 1g.10gb" not in PEAKS
