"""Tables and figures of docs/experiments: short runs of one to four passes over 100,000 tokens.

They are made from the CSVs there. What trained them is in the history of this folder, up to version 0.1.0.
"""
