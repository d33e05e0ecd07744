"""The embedded tiny world: invented medicines, sums, and the questions that are asked about them.

The models that answer them are in `registry/tiny`; in the repository,
`python tools/make_embedded.py` makes them anew.
"""
