"""What the models are asked."""

from __future__ import annotations

PROMPTS = [
    "Question: What is Dulerex made from?\nResponse:",
    "Question: How many mg of Loxid should a patient of 60 kg get?\nResponse:",
    "Question: What is 2 * x + 15 if x = 7?\nResponse:",
    "Question: What does Zosos treat?\nResponse:",
] * 4
