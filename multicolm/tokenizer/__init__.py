"""Tokenizer adapters: one model's tokens into bytes and back, and several vocabularies as one."""
