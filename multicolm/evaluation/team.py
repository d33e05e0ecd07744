"""Several processes that answer the questions of one comparison together.

Each writes what it has answered into a ledger of its own; the first one takes the records over into
the comparison's. So nothing that was answered is lost when they are stopped, and they can resume in
another number.

    ledger.jsonl                 the comparison's
    processes/1/ledger.jsonl     of the second process, while the work lasts
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from multicolm.evaluation.answering import Answering, Plan
from multicolm.evaluation.ledger import Ledger

__all__ = ["Team"]


class Team:
    """One of several processes at one comparison.

    Args:
        folder: of the results.
        header: of the ledger.
        run: answers questions; its ledger is set by whoever opens :meth:`main_ledger`.
        rank: of this process.
        n_ranks: how many they are.
        wait: returns when all of them have come this far.
    """

    def __init__(
        self,
        folder: Path,
        header: Mapping[str, Any],
        run: Answering,
        rank: int,
        n_ranks: int,
        wait: Callable[[], None],
    ) -> None:
        self._path = folder / "ledger.jsonl"
        self._parts = folder / "processes"
        self._header = header
        self._run = run
        self._rank = rank
        self._n_ranks = n_ranks
        self._wait = wait

    def main_ledger(self) -> Ledger:
        """The comparison's ledger: to write for the first process, to read for the others.

        Raises:
            InputError: if the folder holds another run, or another process is at work in it.
            ArtefactError: if the ledger is damaged.
        """
        if self._rank == 0:
            ledger = Ledger.open(self._path, self._header)
            self._gather(ledger)
            self._wait()
            return ledger
        self._wait()  # until the first process has made it
        return Ledger.open_to_read(self._path, self._header)

    def answer(self, plans: Sequence[Plan]) -> None:
        """Answer what is not yet answered of some rows, each process its part.

        A single process does nothing here: it answers a row when it is asked for it.
        """
        if self._n_ranks == 1:
            return
        known = frozenset(self._run.ledger)
        self._wait()  # until all know what is there, for from now on it grows
        if self._rank == 0:
            self._run.share(plans, known, 0, self._n_ranks)
            self._wait()
            self._gather(self._run.ledger)
            self._wait()
            return
        main = self._run.ledger
        part = self._parts / str(self._rank) / "ledger.jsonl"
        with Ledger.open(part, self._header) as own:
            self._run.ledger = own
            self._run.share(plans, known, self._rank, self._n_ranks)
        self._run.ledger = main
        self._wait()
        self._wait()  # until the first process has taken everything over
        main.read_again()

    def _gather(self, ledger: Ledger) -> None:
        """Take over what other processes have answered, now or before they were stopped."""
        for part in sorted(self._parts.glob("*/ledger.jsonl")):
            with Ledger.open(part, self._header) as other:
                ledger.absorb(other)
        if self._parts.exists():
            shutil.rmtree(self._parts)
