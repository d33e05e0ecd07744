"""Tasks, metrics, and comparisons of policies with each other and with every model alone."""
