"""What goes to the Hugging Face Hub and comes back: routers, ensembles and score tables.

saved       an ensemble, and a score table, as folders with a card
kinds       which of the three a folder is; push and pull
"""
