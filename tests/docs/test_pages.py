"""Every command and block of README and docs/ does what it says; every link leads somewhere."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import blocks
import pytest
import yaml
from blocks import PAGES, ROOT

import multicolm
from multicolm import catalog
from multicolm.config import load_ensemble, load_policy
from multicolm.plugins import policies

README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
WITH_BLOCKS = [page for page in PAGES if blocks.blocks_of(page)]


@pytest.mark.slow  # a page costs some seconds: it loads models for each command, as readers do
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run_one_after_another(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = blocks.checkout(tmp_path)
    monkeypatch.chdir(folder)
    runner = blocks.Runner(folder, page)
    try:
        for block in blocks.blocks_of(page):
            runner.run(block)
    finally:
        runner.close()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180


def test_no_sentence_of_the_readme_is_said_on_another_page() -> None:
    # Sentences of prose; a link or a command may well be given twice.
    def sentences(text: str) -> set[str]:
        plain = re.sub(r"```.*?```|^\|.*$|^#.*$", "", text, flags=re.MULTILINE | re.DOTALL)
        found = re.split(r"(?<=[.:;])\s+", " ".join(plain.split()))
        return {sentence for sentence in found if len(sentence.split()) >= 8}

    seen: dict[str, str] = {}
    for name, page in zip(NAMES, PAGES, strict=True):
        for sentence in sentences(page.read_text(encoding="utf-8")):
            assert sentence not in seen, f"{name} and {seen[sentence]}: {sentence}"
            seen[sentence] = name


def _anchors(page: Path) -> set[str]:
    """The anchors of headings, as code hosts and mkdocs make them."""
    plain = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = set(re.findall(r"^::: ([\w.]+)$", plain, flags=re.MULTILINE))
    for heading in re.findall(r"^#+ (.*)$", plain, flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", words).strip()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"(?:\]\(|(?:src|href)=\")(?![a-z]+:)([^)\"\s]+)", text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), link


def test_the_table_of_policies_lists_every_policy_with_its_params() -> None:
    guide = (ROOT / "docs/policies.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|([^|]*)\|", guide, flags=re.MULTILINE)
    listed = {name: set(re.findall(r"`(\w+)`", params)) for name, params in rows}
    wanted = {
        name: {f.name for f in dataclasses.fields(policies.get(load_policy(name, ROOT).kind))}
        for name in catalog.names("policies")
    }
    assert listed == wanted
    assert f"[{len(wanted)} are built in]" in README


def test_the_readme_names_the_command_for_its_figures() -> None:
    assert "sh examples/co-llm/run.sh" in README.partition("## What it reaches")[2]


def test_the_reference_of_files_and_outputs_is_what_the_classes_say() -> None:
    command = [sys.executable, "tools/reference.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0, (
        "run python tools/reference.py"
    )


def test_every_signal_is_described_with_what_it_lets_a_policy_read() -> None:
    from typing import get_args

    from multicolm.types import Signal

    page = (ROOT / "docs/reference/signals.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page.partition("## Signals")[2], flags=re.MULTILINE)
    assert set(get_args(Signal)) <= set(listed)


def test_the_example_of_two_servers_is_the_page_s() -> None:
    page = (ROOT / "docs/how-to/several-machines.md").read_text(encoding="utf-8")
    example = (ROOT / "examples/two-servers/ensemble.yaml").read_text(encoding="utf-8")
    assert load_ensemble(ROOT / "examples/two-servers/ensemble.yaml")
    assert example.partition("base_model:")[2] in page


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == multicolm.__version__
