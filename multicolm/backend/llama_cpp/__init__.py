"""GGUF models, run in process by llama.cpp through llama-cpp-python."""
