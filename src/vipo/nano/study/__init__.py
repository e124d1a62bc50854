"""The paper's claims on the embedded world: `python -m vipo.nano.study` trains every arm and writes docs/evidence.md.

arms.py says what is compared, runs.py trains and measures one run, page.py turns the records into tables.
"""
