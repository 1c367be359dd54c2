"""Locate models on a hub, in a folder or in a registry, one file per source."""
