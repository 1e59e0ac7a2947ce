"""A run as a server that OpenAI's clients talk to: llama.cpp on the CPU with a chat page, or vLLM on GPUs."""
