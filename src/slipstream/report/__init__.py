"""What a comparison says, in words, a table and figures: one HTML page that needs no network, and the same in a terminal.

Everything starts from a list of records (plain dicts, as compare writes them); summary.py is the one source of numbers.
"""
