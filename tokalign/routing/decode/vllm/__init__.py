"""A routed pair on stock vLLM: the plug-in, the models that it registers, the servers, the backend."""
