"""The exact byte bridge: a model's probabilities of texts, summed over all ways to spell them.

paths            whether a tokenizer is covered, and which strings of its tokens are valid
lattice          all valid paths that cover a text, and what they weigh
byte_session     a model that reads and predicts bytes
probabilities    what a model expects after a text; how likely it finds a span
"""
