"""The structure of code as its tokens come: a scanner, what it says of a corpus, errors that are put into code."""
