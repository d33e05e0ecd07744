"""The embedded tiny world: three small models that can only answer questions together.

A generalist knows how questions are asked and answered, a facts expert knows two hundred invented
medicines, and a maths expert can multiply, add and square. `world` makes up the facts and the
questions, `corpora` writes what each model reads, `training` trains, `measure` checks.
`python -m multicolm.tiny` rebuilds all of it; the trained weights are in `registry/tiny`.
"""
