"""What a policy remembers of every text: asked for here, and kept on the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from multicolm.decoding.choosing import grouped
from multicolm.decoding.decider import Decider
from multicolm.decoding.decision import Decision
from multicolm.decoding.draft import Draft, Positions
from multicolm.decoding.row import Row
from multicolm.errors import PolicyError
from multicolm.policy.base import NewTokens, Policy, SegmentPolicy, Segments

__all__ = ["Memory"]


class Memory:
    """Asks a policy what it remembers of texts, and checks what it answers.

    Args:
        decider: shows the policy what there is to see.

    Attributes:
        updates: whether what it remembers changes with the tokens.
    """

    def __init__(self, decider: Decider) -> None:
        self._decider = decider
        self._policy = decider.policy
        kind = type(decider.policy)
        self._narrows = decider.policy.narrows
        self._kept: tuple[int, torch.dtype] | None = None  # width and dtype, the same for all texts
        self.updates = decider.policy.keeps_state and kind.update is not Policy.update

    def begin(self, positions: Positions) -> None:
        """Ask about new texts, one position each; their prompts have been read where needed.

        Raises:
            PolicyError: if the policy breaks its contract.
        """
        if self._policy.keeps_state:
            state = self._policy.initial_state(self._decider.text_views(positions))
            self._keep(positions, state, "initial_state")
        if self._narrows:
            flags = self._policy.text_uses(self._decider.text_views(positions))
            self._narrow(positions, flags)

    def update(self, draft: Draft, decision: Decision) -> None:
        """Ask about the tokens that were decided: at most one of each row.

        Raises:
            PolicyError: if the policy breaks its contract.
        """
        if not self.updates:
            return
        # What is seen at a place must not depend on what is seen at others.
        decided = sorted(decision.tokens)
        ran = [tuple(k for k, m in draft.shown.items() if m.knows([i])) for i in decided]
        for which in grouped(decided, ran):
            views = self._decider.views(draft.positions, which, draft.shown)
            device = views.costs.device
            written = NewTokens(
                torch.tensor([decision.tokens[i] for i in which], device=device),
                torch.tensor([decision.writers[i] for i in which], device=device),
                torch.tensor([decision.logprobs[i] for i in which], device=device),
            )
            self._keep(draft.positions.at(which), self._policy.update(views, written), "update")

    def feedback(self, positions: Positions, segments: Segments, chosen: Tensor) -> None:
        """Ask about segments that were rated, one per row.

        Raises:
            PolicyError: if the policy breaks its contract.
        """
        if self._policy.keeps_state and isinstance(self._policy, SegmentPolicy):
            self._keep(positions, self._policy.feedback(segments, chosen), "feedback")

    def state(self, rows: Sequence[Row]) -> Tensor | None:
        """What the policy remembers of some texts, if it keeps state: [rows, width]."""
        states = [row.state for row in rows if row.state is not None]
        return torch.stack(states) if states else None

    def _keep(self, positions: Positions, state: Tensor, method: str) -> None:
        rows = positions.rows
        fits = isinstance(state, Tensor) and state.ndim == 2 and len(state) == len(rows)
        if fits and self._kept is not None:
            fits = (state.shape[1], state.dtype) == self._kept
        if not fits:
            width, dtype = self._kept or ("width", "any dtype")
            got = f"{state.dtype} {list(state.shape)}" if isinstance(state, Tensor) else type(state)
            raise PolicyError(
                f"policy '{self._policy.name}': {method}() must return a tensor of shape "
                f"[{len(rows)}, {width}] and {dtype}, a row per position, and returned {got}."
            )
        self._kept = state.shape[1], state.dtype
        # A copy: what the policy holds may be written into by its next call.
        for row, line in zip(rows, state.clone(), strict=True):
            row.state = line

    def _narrow(self, positions: Positions, flags: Tensor) -> None:
        plan = self._decider.plan
        models, always, uses = plan.names, plan.needs.always, {*plan.used}
        shape = (len(positions), len(models))
        if not isinstance(flags, Tensor) or flags.dtype != torch.bool or flags.shape != shape:
            got = f"{flags.dtype} {list(flags.shape)}" if isinstance(flags, Tensor) else type(flags)
            raise PolicyError(
                f"policy '{self._policy.name}': text_uses() must return a torch.bool tensor of "
                f"shape {list(shape)}, one entry per position and model, and returned {got}."
            )
        for row, line in zip(positions.rows, flags.tolist(), strict=True):
            row.models = tuple(k for k, flag in enumerate(line) if flag)
            if not row.models or not uses.issuperset(row.models):
                used = ", ".join(f"{k} {models[k]}" for k in sorted(uses))
                raise PolicyError(
                    f"policy '{self._policy.name}': text_uses() gave a text the models "
                    f"{list(row.models)}; allowed are one or more of those that it uses ({used})."
                )
            if 0 in always and 0 not in row.models:
                raise PolicyError(
                    f"policy '{self._policy.name}': text_uses() leaves out the base model, which "
                    "drafts every text as needs() looks at it always; name it under `deferred`."
                )
