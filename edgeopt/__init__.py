"""edgeopt: find, measure and release the compressed form of a language model that fits a device."""

__version__ = "0.1.0"
