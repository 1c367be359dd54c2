"""One file a command: SUMMARY and EXAMPLE for its help, `arguments`, `execute` to one JSON document, `show` for people.

BRIEF stands where a command only looks, and ends before collecting garbage would pay.

`composing`, `studies` and `engines` are what several commands share.
"""
