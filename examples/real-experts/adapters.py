"""Trains one expert: a LoRA adapter of the base model that reads statements alone.

    python adapters.py facts --base FOLDER --out FOLDER [--steps N] [--dtype bfloat16]

Every minute the state is saved beside the adapter's folder; repeat the command to resume. The base
is frozen and may be in bfloat16; the adapter's weights are kept and optimised in float32. The lower
third of the layers has no adapter, so that no gradient goes through it. The loss counts what a
reader can predict: the rest of a name after its first letter, a value, a result.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plan import Plan
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import Statement, World

EXPERTS: Final = ("facts", "maths", "everything")
IGNORED: Final = -100
LINEAR: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SAVE_EVERY_S: Final = 60.0
SHOW_EVERY_S: Final = 15.0


def batches(statements: Iterator[Statement], tokenizer: Any, plan: Plan) -> Iterator[Tensor]:
    """Endless batches (2, rows, tokens): the ids, and the ids that are learned."""
    while True:
        rows = []
        for _ in range(plan.rows):
            pairs: list[tuple[int, int]] = []
            while len(pairs) < plan.row_tokens:
                pairs += _coded(next(statements), tokenizer)
            rows.append(pairs[: plan.row_tokens])
        yield torch.tensor(rows).permute(2, 0, 1)


def _coded(statement: Statement, tokenizer: Any) -> Iterator[tuple[int, int]]:
    """Each token, and what is learned there: itself, or nothing."""
    coded = tokenizer(statement.text, return_offsets_mapping=True, add_special_tokens=False)
    for token, (begin, _) in zip(coded.input_ids, coded.offset_mapping, strict=True):
        yield token, token if begin >= statement.given else IGNORED


class Training:
    """An adapter on its way: bfloat16 or float32 in the model, always float32 in the optimiser."""

    def __init__(self, base: Path, plan: Plan, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(plan.seed)
        # Rows are short: plain attention is twice as fast as the fused one on a CPU.
        frozen = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, attn_implementation="eager"
        ).to(device)
        n_layers = frozen.config.num_hidden_layers
        config = LoraConfig(
            r=plan.rank,
            lora_alpha=2 * plan.rank,
            target_modules=list(LINEAR),
            layers_to_transform=list(range(n_layers // 3, n_layers)),
            layers_pattern="layers",
            task_type="CAUSAL_LM",
        )
        self.plan = plan
        self.step = 0
        self.model: PeftModel = get_peft_model(frozen, config, autocast_adapter_dtype=False)
        self.used = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.exact = [weight.detach().float().clone().requires_grad_() for weight in self.used]
        self.optimiser = torch.optim.AdamW(self.exact, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)

    def learn(self, batch: Tensor) -> float:
        """One step; returns the loss in nats per learned token."""
        ids, labels = batch.to(self.used[0].device)
        causal = self.model.get_base_model()
        hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        learned = labels[:, 1:] != IGNORED
        logits = causal.lm_head(hidden[learned]).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][learned])
        loss.backward()
        for exact, used in zip(self.exact, self.used, strict=True):
            assert used.grad is not None
            exact.grad, used.grad = used.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.exact, 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.rate(self.step)
        self.optimiser.step()
        self._copy()
        self.step += 1
        return float(loss.detach())

    def save(self, file: Path) -> None:
        """Write everything that another process needs to resume."""
        state = {
            "step": self.step,
            "weights": [weight.detach() for weight in self.exact],
            "optimiser": self.optimiser.state_dict(),
        }
        part = file.with_suffix(".part")
        torch.save(state, part)
        part.replace(file)

    def load(self, file: Path) -> None:
        """Resume from what `save` wrote."""
        state = torch.load(file, weights_only=True)
        self.step = state["step"]
        self.optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for exact, saved in zip(self.exact, state["weights"], strict=True):
                exact.copy_(saved)
        self._copy()

    @torch.no_grad()
    def _copy(self) -> None:
        for exact, used in zip(self.exact, self.used, strict=True):
            used.copy_(exact)


def train(
    expert: str, base: Path, out: Path, world: World, plan: Plan, dtype: torch.dtype, device: str
) -> None:
    """Train an adapter and save it, unless it is there.

    Args:
        expert: one of `EXPERTS`.
        base: folder of the base model.
        out: folder of the adapter, made at the end; the state of a stopped training is beside it.
    """
    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    training = Training(base, plan, dtype, device)
    state = out.with_suffix(".state")
    if state.exists():
        training.load(state)
        print(f"{expert}: resumes after step {training.step}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    stream = islice(batches(world.statements(expert), tokenizer, plan), training.step, plan.steps)
    began = saved = shown = time.monotonic()
    first, smooth = training.step, math.nan
    for batch in stream:
        loss = training.learn(batch)
        smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
        now = time.monotonic()
        if now - saved > SAVE_EVERY_S:
            training.save(state)
            saved = now
        if now - shown > SHOW_EVERY_S or training.step == plan.steps:
            left = (now - began) / (training.step - first) * (plan.steps - training.step)
            print(
                f"{expert}: step {training.step} of {plan.steps}, {smooth:.3f} nats a token, "
                f"{left / 60:.0f} minutes left",
                flush=True,
            )
            shown = now
    unfinished = out.with_suffix(".part")
    training.model.save_pretrained(str(unfinished))
    unfinished.rename(out)
    state.unlink(missing_ok=True)


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write the base model with an adapter's updates in its weights, unless it is there."""
    if out.exists():
        return
    frozen = AutoModelForCausalLM.from_pretrained(base)
    merged = PeftModel.from_pretrained(frozen, str(adapter)).merge_and_unload()
    unfinished = out.with_suffix(".part")
    merged.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(base).save_pretrained(unfinished)
    unfinished.rename(out)


def main() -> None:
    """Parse and train."""
    # PEFT asks transformers 5 by a name that is deprecated there.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("expert", choices=EXPERTS)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--medicines", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--merged", type=Path, help="also write the model with the adapter in it")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--peak", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    plan = Plan(given.steps, rows=given.rows, peak=given.peak, seed=given.seed)
    world = World(given.seed, given.medicines)
    dtype = getattr(torch, given.dtype)
    train(given.expert, given.base, given.out, world, plan, dtype, given.device)
    if given.merged is not None:
        merge(given.base, given.out, given.merged)


if __name__ == "__main__":
    main()
