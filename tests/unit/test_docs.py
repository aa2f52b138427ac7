"""Every code block of the documentation runs, and prints what its page says it prints.

A page is one test. Its ```python blocks run in order in one namespace, its ```console blocks
as a user types them, all in one temporary directory. A ```text block right after a python
block is that block's output, the lines of a console block without `$ ` are among that
command's: words equal, numbers within `CLOSE`. `<!-- not run: why -->` before a block skips it.

After a change of behaviour, `python -m tests.unit.test_docs` writes the text blocks anew.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import hakari.inference as hi
from hakari.inference import transition
from hakari.inference.density import log_density_batch
from hakari.inference.kernels.metropolis import metropolis
from tests.numerics.test_kernels import CASES, imbalance

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CLOSE = 0.2  # of a number's size: draws and effective sizes differ between machines
_BLOCK = re.compile(
    r"(?P<skip><!-- not run: .*? -->\n)?```(?P<kind>python|console)\n(?P<code>.*?)```\n"
    r"(?:\n```text\n(?P<said>.*?)```\n)?",
    re.DOTALL,
)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*\.?\d*(?:e[-+]?\d+)?")


class Block(NamedTuple):
    """A block of a page: its code, and the output that the page shows after it (or None)."""

    kind: str
    code: str
    said: str | None
    span: tuple[int, int]  # of `said` in the page


def blocks(page: str) -> list[Block]:
    return [
        Block(m["kind"], m["code"], m["said"], m.span("said"))
        for m in _BLOCK.finditer(page)
        if not m["skip"]
    ]


def run_python(block: Block, space: dict[str, object]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.code, "<page>", "exec"), space)
    return printed.getvalue()


def run_console(block: Block, folder: Path) -> list[tuple[str, str]]:
    """(output, what the page shows) of each command."""
    found = []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        command = re.match(r"(?:.*\\\n)*.*\n", part)[0]
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode in (0, 2), f"{command}: {done.stderr}"
        found.append((done.stdout + done.stderr, part[len(command) :]))
    return found


def bring(page: Path, folder: Path) -> None:
    """Lay out what a page starts from and does not make itself."""
    if page.stem == "checkpoints":
        fixture = ROOT / "tests" / "fixtures" / "zero_llama"
        shutil.copytree(fixture / "checkpoint", folder / "zero")
        shutil.copytree(fixture / "model", folder / "model")


def same(said: str, printed: str) -> bool:
    """Words equal, numbers close; a shown 0.0 may be anything small."""
    words = [_NUMBER.sub("#", text).split() for text in (said, printed)]
    if words[0] != words[1]:
        return False
    ours, theirs = (
        [float(n.replace(",", "")) for n in _NUMBER.findall(t)] for t in (said, printed)
    )
    return bool(np.all(np.abs(np.subtract(ours, theirs)) <= CLOSE * np.abs(ours) + 0.02))


def shows(output: str, said: str) -> bool:
    """Whether the lines of `said` are among the output's, in order."""
    lines = iter(output.splitlines())
    wanted = [line for line in said.splitlines() if line.strip() and line.strip() != "..."]
    return all(any(_shows_line(line, want) for line in lines) for want in wanted)


def _shows_line(line: str, want: str) -> bool:
    if want.endswith(" ..."):
        words = want.split()[:-1]
        return same(" ".join(words), " ".join(line.split()[: len(words)]))
    return same(want, line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_on_the_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bring(page, tmp_path)
    space: dict[str, object] = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.kind == "console":
            for output, said in run_console(block, tmp_path):
                assert shows(output, said), f"the page shows\n{said}\nthe command prints\n{output}"
            continue
        printed = run_python(block, space)
        if block.said is not None:
            assert same(block.said, printed), (
                f"the page shows\n{block.said}\nthe code prints\n{printed}"
            )


def test_pages_are_found_and_show_output():
    assert len(PAGES) >= 12
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert sum(block.said is not None for block in blocks(text)) >= 12
    assert same("ess 7012\nr_hat 1.00", "ess 6700\nr_hat 1.01")
    assert not same("ess 7012", "ess 70")
    assert not same("sd 1.0", "se 1.0")
    assert shows("a 1\nb 2\nc 3\n", "a 1\n...\nc 3\n")
    assert not shows("a 1\nb 2\n", "b 2\na 1\n")


def test_every_page_and_decision_is_in_the_navigation():
    listed = set(re.findall(r"^ .*?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M))
    docs = ROOT / "docs"
    assert listed == {str(page.relative_to(docs)) for page in docs.rglob("*.md")}


# --- the skeleton of a kernel -------------------------------------------------------------


def skeleton():
    spec = importlib.util.spec_from_file_location("skeleton", ROOT / "docs" / "skeleton_kernel.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["skeleton"] = module  # numba's cache asks where the functions live
    spec.loader.exec_module(module)
    return module.skeleton


@pytest.mark.parametrize("case", CASES, ids=str)
def test_skeleton_kernel_leaves_the_target_invariant(case):
    """Interpreted, which is the same source: compiling `step` for one more kernel is dear."""
    assert imbalance(transition.step.py_func, skeleton(), *case) < 1e-11


def test_skeleton_kernel_runs_in_the_machinery_and_finds_the_target():
    kernel, rng, size = skeleton(), np.random.default_rng(1), 20_000
    X = rng.standard_normal((300, 2))
    y = X.sum(axis=1) + np.abs(X[:, 0]) * rng.standard_normal(300)
    posterior = hi.QuasiPosterior(hi.LinearMoments.from_arrays(y, X))
    target, scale = posterior.whitened.target, np.eye(2)
    walk = (metropolis.place, metropolis.log_screen)
    noise, coins = rng.standard_normal((size, 2)), rng.random((size, 3))
    u, density, outcome = transition.run(
        target, kernel.place, kernel.log_screen, *walk, 0.0, np.zeros(2), scale, scale, noise, coins
    )
    np.testing.assert_allclose(density, log_density_batch(target, u), atol=1e-9)
    assert (outcome == transition.ACCEPTED).mean() > 0.5
    known = posterior.whitened.u(
        hi.sample(posterior, draws=10_000, chains=2, seed=1)["posterior"]["theta"].values
    ).reshape(-1, 2)
    np.testing.assert_allclose(u.mean(axis=0), known.mean(axis=0), atol=0.06)
    np.testing.assert_allclose(np.cov(u.T), np.cov(known.T), atol=0.1)


# --- writing the outputs anew -------------------------------------------------------------


def rewrite(page: Path) -> None:
    """Put what the python blocks print into the text blocks that follow them."""
    text = page.read_text(encoding="utf-8")
    space: dict[str, object] = {"__name__": "page"}
    new, at, home = "", 0, Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in blocks(text):
                if block.kind == "console":
                    run_console(block, Path(folder))
                    continue
                printed = run_python(block, space)
                if block.said is not None:
                    new, at = new + text[at : block.span[0]] + printed, block.span[1]
        finally:
            os.chdir(home)
    page.write_text(new + text[at:], encoding="utf-8")


if __name__ == "__main__":
    for chosen in PAGES:
        if not sys.argv[1:] or chosen.stem in sys.argv[1:]:
            rewrite(chosen)
