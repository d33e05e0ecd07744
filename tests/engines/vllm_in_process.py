"""What a program does that has vLLM in its own process; run by the python that has it.

python vllm_in_process.py ENSEMBLE.yaml PAGE.md     prints JSON
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import torch

import multicolm
import multicolm.backend.vllm_engine
from multicolm.backend.transformers import TransformersModel
from multicolm.config import ModelConfig
from multicolm.errors import MulticolmError
from multicolm.testing import check_against, check_model

QUESTIONS = ["What is Dulerex made from?", "Question: What is 3 + 4?\nResponse:"]
POLICIES = ["cosd-rule", "average", "nudging", "max-confidence"]


def main(file: str, page: str) -> None:
    torch.set_num_threads(1)
    ensemble = multicolm.load(file)
    seen = {}
    for model in ensemble.backends[1:]:
        reference = TransformersModel.from_config(
            "reference", ModelConfig(model=f"tiny-{model.name}", dtype="float32")
        )
        check_model(model)
        seen[model.name] = check_against(model, reference, texts=QUESTIONS).greatest
    texts, calls = {}, {}
    for policy in POLICIES:
        answers = ensemble.generate(QUESTIONS, policy, temperature=0.0, max_new_tokens=48)
        texts[policy] = [answer.text for answer in answers]
        calls[policy] = sum(a.usage[n].calls for a in answers for n in ("facts", "math"))
    found = {"differences": seen, "texts": texts, "calls": calls, "refusal": refusal()}
    print(json.dumps({**found, "commands": commands(Path(page).read_text("utf-8"))}))


def refusal() -> str:
    """What is said of an option that vLLM does not know."""
    config = ModelConfig(
        backend="vllm-engine", model="tiny-facts", engine_options={"no_such_option": 1}
    )
    try:
        multicolm.backend.vllm_engine.VllmEngineModel.from_config("facts", config)
    except MulticolmError as error:
        return str(error)
    return ""


def commands(page: str) -> list[list[object]]:
    """How vLLM reads every `vllm serve` of a page: model, node, whether it listens, split by."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser, found = make_arg_parser(FlexibleArgumentParser()), []
    for line in page.replace("\\\n", " ").splitlines():
        if line.startswith("vllm serve "):
            read = parser.parse_args(shlex.split(line)[2:])
            found.append([read.model_tag, read.node_rank, read.headless, read.tensor_parallel_size])
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
