"""From YAML to frozen settings. Nothing here imports torch or loads a model.

    ensemble.yaml          -> EnsembleConfig     load_ensemble, parse_ensemble
    policies/*.yaml        -> PolicyConfig       load_policy, by way of PolicyFile
    checkpoint/policy.yaml -> PolicyConfig       load_policy
    registry/models/*.yaml -> ModelFile          load_model_file

A complaint names file, line and column, what was allowed and the nearest known name; one file's
complaints come all at once.
"""

from __future__ import annotations

from multicolm.config.ensemble import EnsembleConfig, load_ensemble, parse_ensemble
from multicolm.config.generation import GenerationConfig
from multicolm.config.model import ModelConfig, ModelFile, ResolvedModel, load_model_file
from multicolm.config.policy import (
    PolicyConfig,
    PolicyFile,
    catalog_file,
    check_params,
    file_params,
    is_path,
    load_policy,
    load_policy_file,
    load_task_params,
    parse_policy,
    policy_names,
)
from multicolm.config.validation import Report, validate

__all__ = [
    "EnsembleConfig",
    "GenerationConfig",
    "ModelConfig",
    "ModelFile",
    "PolicyConfig",
    "PolicyFile",
    "Report",
    "ResolvedModel",
    "catalog_file",
    "check_params",
    "file_params",
    "is_path",
    "load_ensemble",
    "load_model_file",
    "load_policy",
    "load_policy_file",
    "load_task_params",
    "parse_ensemble",
    "parse_policy",
    "policy_names",
    "validate",
]
