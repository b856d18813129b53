"""Command line: one command per file, a plain annotated function of the file's name, a few lines over the library.

Everything heavier than typer and rich is imported inside the functions, so that `stepwell --help` answers at once.
"""
