"""A model over HTTP, for OpenAI's clients and SGLang's; or handed to vLLM or SGLang, where one GPU
is not enough.
"""
