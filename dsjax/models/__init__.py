"""Models: ``decoder.py`` is every language model; a file of its own for each model that is more than a decoder."""
