"""An ensemble behind an OpenAI-style HTTP interface; needs the extra ``serve``.

engine    one thread that owns the models and writes all texts, batched with each other
catalog   which policies clients may choose, and by which names
protocol  what clients may ask for; what is not supported is refused by name
replies   what they get, in the shapes that the clients of OpenAI know
metrics   counts for Prometheus
texts     the texts of a request on their way to the client, and the places for them
prompts   made into tokens, outside of the engine's thread
limits    what a request may be at the most; who may ask
connection  deadlines of a socket
app       the routes
server    uvicorn: sockets, signals, and an end that loses nothing
"""

from __future__ import annotations
