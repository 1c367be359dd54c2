"""Share greedy decoding, prompt lookup and chunked prefill between runtimes."""
