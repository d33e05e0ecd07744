"""Score tables: what every model says of every token of a corpus, read once and kept."""
