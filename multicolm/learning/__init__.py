"""How routers learn from score tables: losses, networks, and the loop that trains them."""
