"""One file a command: SUMMARY and EXAMPLE for its help, `arguments`, `execute` to one JSON document, `show` for people.

`composing`, `studies` and `engines` are what several commands share.
"""
