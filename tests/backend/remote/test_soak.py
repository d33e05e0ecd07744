"""A server that dies, comes back, comes back as another one and breaks off, at random.

Short here; ``MULTICOLM_SOAK=600`` makes it ten minutes.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from fake_vllm import FakeVllm, Manners
from remote_worlds import PROMPTS, ensemble, local, remote

from multicolm.errors import ServerError

Serve = Callable[..., FakeVllm]
SECONDS = float(os.environ.get("MULTICOLM_SOAK", "1.5"))
FACTS = {"kind": "single", "params": {"model": "facts"}}
FAULTS = ["500", "503", "cut", "garbage", "hang up", "429"]


@contextmanager
def chaos(fake: FakeVllm, seed: int, calm: float, *, others: bool = True) -> Iterator[None]:
    """Something happens to a server after ``calm`` seconds at most; in the end it is well again.

    Where ``others``, it comes back with another model at times, at once.
    """
    rng, over = random.Random(seed), threading.Event()

    def rage() -> None:
        while not over.wait(rng.uniform(0.0, calm)):
            match rng.randrange(5):
                case 0:
                    fake.restart(model=local("facts"))
                case 1 if others:
                    fake.restart(model=local("math"))
                    over.wait(rng.uniform(0.0, 0.05))
                    fake.restart(model=local("facts"))
                case _:
                    fake.go_wrong(rng.choice(FAULTS))  # type: ignore[arg-type]

    thread = threading.Thread(target=rage)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        fake.faults.clear()


@pytest.mark.parametrize("keeps_alive", [True, False])
def test_threads_that_ask_at_once_never_see_another_model_or_another_text(
    serve: Serve, keeps_alive: bool
) -> None:
    """One that keeps no connections shows no sign of coming back as another within no time."""
    fake = serve("facts", Manners(keeps_alive=keeps_alive))
    model = remote(fake, retries=1, timeout=5.0)
    ids = local("facts").tokenizer.encode(" ".join(PROMPTS))
    want = local("facts").open(1).feed([0], [ids], [len(ids)]).logits.log_softmax(-1)
    n_right, wrong, end = [0] * 3, [], time.monotonic() + SECONDS

    def ask(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end or not n_right[number]:
            n = rng.randrange(1, len(ids))
            try:
                shown = model.open(1).feed([0], [ids[:n]], [1]).logits[0]
            except ServerError as error:
                if not str(error).startswith(f"server {fake.url} of model 'facts': "):
                    wrong.append(str(error))
                continue
            n_right[number] += 1
            if not torch.allclose(shown, want[n - 1], atol=1e-3):
                wrong.append(f"after {n} tokens")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(n_right))]
    with chaos(fake, seed=1, calm=0.2, others=keeps_alive):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    # When it is well again, so are the answers.
    assert torch.allclose(model.open(1).feed([0], [ids], [1]).logits[0], want[-1], atol=1e-3)


def test_texts_are_those_of_the_model_and_none_that_was_finished_is_lost(serve: Serve) -> None:
    fake = serve()
    together = ensemble(remote(fake, retries=1, timeout=5.0))
    calm = ensemble(local("facts"))
    want = {prompt: calm.generate(prompt, FACTS, max_new_tokens=8)[0].text for prompt in PROMPTS}
    ids = {prompt: local("facts").tokenizer.encode(prompt) for prompt in PROMPTS}
    n_done = 0
    end = time.monotonic() + SECONDS
    with chaos(fake, seed=2, calm=0.3):
        while time.monotonic() < end or not n_done:
            prompts = (PROMPTS * 2)[n_done % 3 :][:3]
            try:
                answers = together.generate(prompts, FACTS, max_new_tokens=8, batch_size=1)
            except ServerError as error:
                answers = error.answers  # type: ignore[assignment]
                assert f"Finished and kept: {len(answers)} of 3 answers" in str(error)
                # Nothing was asked for that comes after the text that was being written.
                for later in prompts[len(answers) + 1 :]:
                    assert fake.requests[-1]["prompt"][: len(ids[later])] != ids[later]
            else:
                assert len(answers) == 3
            for prompt, answer in zip(prompts, answers, strict=False):
                assert answer.text == want[prompt]
            n_done += len(answers)
    [answer] = together.generate(PROMPTS[0], FACTS, max_new_tokens=8)
    assert answer.text == want[PROMPTS[0]]
