"""Learning to route, from score tables."""
