"""Serve one engine over HTTP on this machine, with the endpoints of OpenAI's API."""
