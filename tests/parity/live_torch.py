"""PyTorch's own files, with torch: run by `make parity` in the peers' environment, which has no jax.

python -m pytest --noconftest tests/parity/live_torch.py
"""

import os
import pickle

import numpy as np
import pytest
import torch

from dalle2_jax.weights.tensors import WeightsError, open_tensors


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, nested):
    trace = tmp_path / "ran"
    content = {"weight": torch.zeros(3), "more": Harmful(trace)}
    torch.save({"state_dict": content} if nested else content, tmp_path / "x.ckpt")
    with pytest.raises(WeightsError, match="holds more than tensors, which could run code, and is not opened"):
        open_tensors(tmp_path / "x.ckpt")
    assert not trace.exists()
    torch.load(tmp_path / "x.ckpt", weights_only=False)  # it would have been
    assert trace.is_dir()


def test_a_bare_pickle_is_not_run(tmp_path):
    trace = tmp_path / "ran"
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Harmful(trace), protocol=2))
    with pytest.raises(WeightsError):
        open_tensors(tmp_path / "x.bin")
    assert not trace.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_read(tmp_path, dtype):
    value = torch.randn(4, 5).to(dtype)
    torch.save({"state_dict": {"a.weight": value}}, tmp_path / "x.ckpt")
    read = open_tensors(tmp_path / "x.ckpt")
    assert read.shapes == {"a.weight": (4, 5)} and read.dtypes == {"a.weight": str(dtype).removeprefix("torch.")}
    np.testing.assert_array_equal(read.read("a.weight").astype(np.float32), value.float().numpy())


def test_a_pair_of_tensors(tmp_path):
    torch.save((torch.zeros(3), torch.ones(3)), tmp_path / "stats.th")
    assert set(open_tensors(tmp_path / "stats.th").shapes) == {"0", "1"}


@pytest.mark.parametrize("kept", [10, 0.5, -10])
def test_a_truncated_file(tmp_path, kept):
    torch.save({"a": torch.randn(1000)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[: int(kept * len(data))] if isinstance(kept, float) else data[:kept])
    with pytest.raises(WeightsError, match="cannot be read by torch|could run code"):
        open_tensors(tmp_path / "x.pt")


def test_what_is_no_dictionary_of_tensors(tmp_path):
    torch.save({"a": 3}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="is not a dictionary of tensors"):
        open_tensors(tmp_path / "x.pt")
