"""Run trials: the worker loop, the trial subprocess, heartbeats and the tracking outbox."""
