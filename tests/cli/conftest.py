"""Small tables on disk, and the command as a user types it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hakari import cli

HAKARI = Path(sys.executable).with_name("hakari")


def hakari(*words, cwd, timeout=300):
    """The finished process of `hakari WORDS`."""
    command = [str(HAKARI), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def type_in(capfd, monkeypatch, tmp_path):
    """`hakari WORDS` in this process, in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def typed(*words):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(word) for word in words])
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return typed


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """A folder with strong.csv, strong.parquet (the same rows), gaps.csv and weak.csv."""
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(5)
    n = 600
    z, other, e = rng.standard_normal((3, n))
    x = 0.5 * z + 0.3 * other + 0.7 * e + rng.standard_normal(n)
    y = 1 + 2 * x - other + e * (1 + 0.5 * np.abs(z))
    frame = pd.DataFrame({"y": y, "x": x, "other": other, "z": z})
    frame.to_csv(folder / "strong.csv", index=False)
    frame.to_parquet(folder / "strong.parquet")
    frame.mask(rng.random(frame.shape) < 0.02).to_csv(folder / "gaps.csv", index=False)
    useless = np.random.default_rng(1).standard_normal(n)
    frame.assign(z=useless).to_csv(folder / "weak.csv", index=False)
    return folder
