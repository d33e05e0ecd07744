"""Makes the embedded models: three small ones that can only answer questions together.

A generalist knows how questions are asked and answered, a facts expert knows two hundred invented
medicines, and a maths expert can multiply, add and square. `multicolm.tiny.world` makes up the
facts and the questions, `corpora` writes what each model reads, `training` trains, `build` trains
all of them, `measure` checks. `python tools/make_embedded.py` does all of it; the trained weights
are in `registry/tiny`.
"""
