"""Models that run in a server with an OpenAI-style API, such as vLLM.

    service     what answers: a server, or an engine in this process
    transport   one server over HTTP: keep-alive, time-outs, retries, errors in one sentence
    completions how a request for next tokens is put, and how its answer is read
    probe       what a server can do, found out by asking it
    session     texts that such a model follows: what it foresaw is remembered
    model       the backends ``vllm``, ``sglang``, ``llama-cpp-server`` and ``openai``

Nothing is trusted from documentation: what a server is used for, it has done when it was probed.
"""
