"""Backends: each runs one model and keeps one cache per row."""

from __future__ import annotations

from multicolm.plugins import backends

backends.declare("transformers", "multicolm.backend.transformers:TransformersModel")
backends.declare("table", "multicolm.backend.table:TableModel")
