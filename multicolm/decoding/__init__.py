"""One decode loop for every policy: drafting, deciding, writing, and keeping every cache right."""
