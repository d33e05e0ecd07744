"""A server that answers as llama.cpp's own, the one in C++, was seen to."""

from __future__ import annotations

import codecs
from typing import Any

import torch
from fake_vllm import FakeVllm, Refused

__all__ = ["FakeLlama"]

_LOWEST = float(torch.finfo(torch.float32).min)  # what it writes for -inf


class FakeLlama(FakeVllm):
    """It returns ids beside the text, and nothing of a token that ends within a character.

    ``manners.max_model_len`` is the room that all texts of a request share. Of a parameter that
    it does not know it says nothing.
    """

    def card(self) -> dict[str, Any]:
        """The model as it is listed."""
        return {"id": self.name, "meta": {"n_ctx": self.capabilities.max_model_len, "n_vocab": 768}}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request for completions."""
        prompts = body["prompt"]
        several = isinstance(prompts[0], list | str)
        sizes = [len(self._ids(prompt)) for prompt in (prompts if several else [prompts])]
        if max(sizes) >= self.capabilities.max_model_len:
            raise Refused(400, f"request ({max(sizes)} tokens) exceeds the available context size")
        used = sum(sizes) + len(sizes) * max(1, body["max_tokens"])
        if len(sizes) > 1 and used > self.capabilities.max_model_len:
            raise Refused(500, "Context size has been exceeded.")
        return super().complete({**body, "model": self.name})

    def _choice(self, number: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        room = self.capabilities.max_model_len - len(ids)
        written, rows, ended = self._write(ids, min(max(1, body["max_tokens"]), room), body)
        tokenizer = self.model.tokenizer
        entries, pending = [], b""
        for token, row in zip(written, rows, strict=True):
            pending += tokenizer.token_bytes(token)
            if _ends_within_a_character(pending):
                continue
            top = row.topk(min(max(0, body.get("logprobs") or 0), len(row))).indices.tolist()
            others = [self._entry(i, tokenizer.token_bytes(i), row) for i in top]
            entries.append({**self._entry(token, pending, row), "top_logprobs": others})
            pending = b""
        listed = bool(entries) and (body.get("logprobs") or 0) > 0
        return {
            "index": number,
            "text": self._text(written),
            "finish_reason": "stop" if ended else "length",
            "logprobs": {"content": entries} if listed else None,
        }

    def _entry(self, token: int, content: bytes, row: torch.Tensor) -> dict[str, Any]:
        text = content.decode("utf-8", "ignore")
        logprob = max(float(row[token]), _LOWEST)
        return {"id": token, "token": text, "bytes": list(content), "logprob": logprob}

    def _write(
        self, ids: list[int], n_tokens: int, body: dict[str, Any]
    ) -> tuple[list[int], list[torch.Tensor], bool]:
        """Greedy tokens but for `logit_bias`, what each could have been, and whether it ended."""
        bias = {int(i): -1e9 if b is False else b for i, b in body.get("logit_bias", {}).items()}
        session, new = self.model.open(1), ids
        written: list[int] = []
        rows: list[torch.Tensor] = []
        for _ in range(n_tokens):
            rows.append(session.feed([0], [new], [1]).logits[0].float().log_softmax(-1))
            at, by = torch.tensor(list(bias)).long(), torch.tensor(list(bias.values())).float()
            token = int(rows[-1].index_add(0, at, by).argmax())
            written.append(token)
            new = [token]
            if token in self.model.tokenizer.end_ids:
                return written, rows, True
        return written, rows, False


def _ends_within_a_character(content: bytes) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(content)
    return bool(decoder.getstate()[0])
