"""A local HTTP service for one engine, with the endpoints of OpenAI's API."""
