"""Next-byte probabilities against genlm-bytes, which follows token paths in another way.

It sums over all token strings where multicolm sums over those that the tokenizer would write, so
they differ by little more than what is left out. It reads the end of a text as its name's bytes.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import multicolm
from multicolm import catalog
from multicolm.exact.byte_session import ByteSession

pytest.importorskip("genlm.bytes", reason="genlm-bytes is not installed: pip install '.[genlm]'")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def with_a_first_token(name: str, folder: Path) -> Path:
    """An embedded model whose texts begin with its end token, since genlm needs a first one."""
    shutil.copytree(catalog.registry() / "tiny" / name, folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "bos_token": "<|end|>"}), encoding="utf-8"
    )
    return folder


async def theirs(folder: Path, text: bytes) -> list[np.ndarray]:
    """Probabilities of the next of 256 bytes before every byte of a text."""
    from genlm.backend import load_model_by_name
    from genlm.bytes import BeamParams, ByteBeamState

    model = load_model_by_name(str(folder), backend="hf", llm_opts={"timeout": 0.0005})
    beam: Any = await ByteBeamState.initial(model, BeamParams(K=8))
    shown = []
    for byte in text:
        probs = np.exp(np.asarray((await beam.logp_next()).ps))[:256]
        shown.append(probs)
        beam = await (beam.prune() << byte)
    return shown


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("math-own", "What is 2 * x + 15 if x = 7?\nResponse: 2 * 7"),
        ("generalist", "What does Zosos treat?\nResponse: Zosos is"),
        ("facts-own", "What does Zosos treat?\nResponse: Zosos"),
    ],
)
def test_next_bytes_are_those_of_genlm_but_for_what_is_left_out(
    name: str, text: str, tmp_path: Path
) -> None:
    models = multicolm.load("tiny-mixed").backends
    model = next(model for model in models if model.name == name.split("-")[0])
    session = ByteSession(model, 1, prune=0.0)
    session.begin(0, [min(model.tokenizer.end_ids)])
    content = text.encode()
    shown = asyncio.run(theirs(with_a_first_token(name, tmp_path / name), content))
    nats = np.zeros(2)
    for i, other in enumerate(shown):
        known = session.next_byte_logprobs([0])[0].exp().numpy()
        probs = known[:256]
        probs[ord("<")] += known[256]  # of "<|end|>"
        assert probs.sum() == pytest.approx(1, abs=1e-6)
        assert np.abs(probs - other).max() <= 1.1 * session.left_out(0) + 2e-3
        nats -= np.log([probs[content[i]], other[content[i]]])
        session.feed([0], [content[i : i + 1]])
    assert nats[0] == pytest.approx(nats[1], rel=0.02)
