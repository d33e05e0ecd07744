"""An ensemble behind an OpenAI-style HTTP interface; needs the extra ``serve``.

engine    one thread that owns the models and writes all texts, batched with each other
menu      which policies clients may choose, and by which names
asked     what clients may ask for; what is not supported is refused by name
replies   what they get, in the shapes that the clients of OpenAI know
metrics   counts for Prometheus
app       the routes
server    uvicorn: sockets, signals, and an end that loses nothing
"""

from __future__ import annotations
