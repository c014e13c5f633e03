"""Decoding within a grammar: only tokens that can go on to a program may be chosen (docs/grammar.md)."""

from dsjax.infer.grammar.constraint import Constraint, PythonGrammar

__all__ = ["Constraint", "PythonGrammar"]
