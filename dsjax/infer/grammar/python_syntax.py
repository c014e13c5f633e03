"""The syntax of Python 3.11, without a tree: which sequences of tokens ``ast.parse`` takes.

It follows the language reference's grammar (https://docs.python.org/3.11/reference/grammar.html). What binds how
tightly does not matter here, so that operators of several levels are one; but targets, the order of arguments and
parameters, stars and patterns are told apart, as the parser of Python does.

Names in capitals are tokens that have many spellings, or none (see :mod:`dsjax.infer.grammar.lexer`); ``CONST`` is
True, False or None, ``SPEC`` the colon in front of a format, ``DEBUG`` the ``=`` and ``CONV`` the ``!r`` of a field.
``FLUFL`` is the name ``barry_as_FLUFL``: who imports it from ``__future__`` gets another language.
"""

from __future__ import annotations

import keyword

STATEMENTS = """
file: statements END | END
statements: statement | statements statement
statement: line | compound
line: simples ';'? NEWLINE
simples: simple | simples ';' simple
block: line | NEWLINE INDENT statements DEDENT
simple: expressions | assignment | yields | pass | break | continue | return expressions?
  | raise | raise expression | raise expression from expression | global names | nonlocal names
  | del deleted ','? | assert expression | assert expression ',' expression
  | import modules | from origin import imported
names: name | names ',' name
name: capture | _
capture: NAME | match | case | FLUFL

modules: module | modules ',' module
module: dotted | dotted as name
dotted: name | dotted '.' name
origin: dotted | dots | dots dotted
dots: '.' | '...' | dots '.' | dots '...'
imported: '*' | members | '(' members ','? ')'
members: member | members ',' member
member: importable | importable as name
importable: NAME | match | case | _

assignment: chain value | single AUGMENTED value | annotated ':' expression | annotated ':' expression '=' value
annotated: name | reference_of_name | '(' single ')'
chain: targets '=' | chain targets '='
value: expressions | yields
single: name | reference | '(' single ')'
targets: target_list ','?
target_list: star_target | target_list ',' star_target
star_target: target | '*' target
target: name | reference | '(' target ')' | '(' ')' | '[' ']' | '[' targets ']'
  | '(' star_target ',' ')' | '(' target_list ',' star_target ','? ')'
deleted: delete | deleted ',' delete
delete: name | reference | '(' ')' | '[' ']' | '(' deleted ','? ')' | '[' deleted ','? ']'

compound: branches | branches else ':' block | while named ':' block other? | for_loop | async for_loop
  | tried | with_block | async with_block | decorators? function | decorators? class_block | match_block
branches: if named ':' block | branches elif named ':' block
other: else ':' block
for_loop: for targets in expressions ':' block other?
tried: try ':' block finally ':' block | try ':' block handlers other? | try ':' block star_handlers other?
  | try ':' block handlers other? finally ':' block | try ':' block star_handlers other? finally ':' block
handlers: handler | handlers handler
handler: except ':' block | except caught ':' block
star_handlers: star_handler | star_handlers star_handler
star_handler: except '*' caught ':' block
caught: expression | expression as name
with_block: with managers ':' block | with '(' named_managers ','? ')' ':' block
managers: manager | managers ',' manager
manager: expression | expression as target
named_managers: expression as target | plain ',' expression as target | named_managers ',' manager
plain: expression | plain ',' expression
decorators: '@' named NEWLINE | decorators '@' named NEWLINE
function: async? signature ':' block | async? signature '->' expression ':' block
signature: def name '(' def_parameters? ')'
class_block: class name ':' block | class name '(' arguments? ')' ':' block

match_block: match subject ':' NEWLINE INDENT cases DEDENT
subject: named | star_named ',' | elements ',' star_named ','?
cases: case_block | cases case_block
case_block: case patterns ':' block | case patterns if named ':' block
patterns: pattern | sequence
sequence: maybe_star ',' | maybe_stars ',' maybe_star ','?
maybe_stars: maybe_star | maybe_stars ',' maybe_star
maybe_star: pattern | '*' name
pattern: closed_or | closed_or as capture
closed_or: closed | closed_or '|' closed
closed: literal | name | path | '(' pattern ')' | '(' ')' | '(' sequence ')' | '[' ']' | '[' maybe_stars ','? ']'
  | '{' '}' | '{' entries ','? '}' | '{' rest ','? '}' | '{' entries ',' rest ','? '}'
  | type_name '(' ')' | type_name '(' positions ','? ')' | type_name '(' attributes ','? ')'
  | type_name '(' positions ',' attributes ','? ')'
literal: -? number | -? REAL + IMAG | -? REAL - IMAG | text | bytes | CONST
path: capture '.' name | path '.' name
type_name: capture | path
entries: entry | entries ',' entry
entry: literal ':' pattern | path ':' pattern
rest: '**' capture
positions: pattern | positions ',' pattern
attributes: attribute | attributes ',' attribute
attribute: name '=' pattern
"""

EXPRESSIONS = """
expressions: star_list ','?
star_list: star_expression | star_list ',' star_expression
star_expression: expression | '*' operation
named: expression | name ':=' expression
star_named: named | '*' operation
elements: star_named | elements ',' star_named
yields: yield expressions? | yield from expression
expression: disjunction | disjunction if disjunction else expression | lambda lambda_parameters? ':' expression
disjunction: inversion | disjunction and inversion | disjunction or inversion
inversion: comparison | not inversion
comparison: operation | comparison COMPARE operation | comparison in operation | comparison not in operation
  | comparison is operation | comparison is not operation
operation: operand | operation BINARY operand | operation / operand | operation + operand | operation - operand
  | operation '*' operand
  | operation '**' operand | operation '@' operand | operation '|' operand
operand: awaited | + operand | - operand | ~ operand
awaited: primary | await primary
primary: of_name | of_group
of_name: atom | reference_of_name | of_name '(' arguments? ')' | of_name '(' named loops ')'
of_group: group | reference_of_group | of_group '(' arguments? ')' | of_group '(' named loops ')'
reference: reference_of_name | reference_of_group
reference_of_name: of_name '.' name | of_name '[' slices ']'
reference_of_group: of_group '.' name | of_group '[' slices ']'
slices: slice_list ','?
slice_list: slice | slice_list ',' slice
slice: named | '*' expression | expression? ':' expression? | expression? ':' expression? ':' expression?
atom: name | CONST | number | strings | bytes | '...' | '[' ']' | '[' elements ','? ']' | '[' named loops ']'
  | '{' '}' | '{' elements ','? '}' | '{' named loops '}' | '{' pairs ','? '}' | '{' pair loops '}'
group: '(' ')' | '(' yields ')' | '(' named ')' | '(' named loops ')' | '(' star_named ',' ')'
  | '(' elements ',' star_named ','? ')'
number: REAL | IMAG
pairs: pair | '**' operation | pairs ',' pair | pairs ',' '**' operation
pair: expression ':' expression
loops: loop | loops loop
loop: async? for targets in disjunction | async? for targets in disjunction conditions
conditions: if disjunction | conditions if disjunction

arguments: positional ','? | keyed ','? | positional ',' keyed ','?
positional: argument | positional ',' argument
argument: named | '*' expression
keyed: keys | mappings
keys: key | keys ',' key | keys ',' '*' expression
key: name '=' expression
mappings: '**' expression | keys ',' '**' expression | mappings ',' key | mappings ',' '**' expression

strings: text | mixed
text: TEXT | text TEXT
bytes: BYTES | bytes BYTES
mixed: fstring | text fstring | mixed TEXT | mixed fstring
fstring: FSTRING fields? FSTRING_END
fields: field | fields field
field: FIELD shown DEBUG? CONV? FIELD_END | FIELD shown DEBUG? CONV? SPEC fields? FIELD_END
shown: shown_one | shown_list ',' | shown_list ',' shown_star | yield | yield from shown_one | yield shown_list ','?
shown_list: shown_star | shown_list ',' shown_star
shown_star: shown_one | '*' operation
shown_one: disjunction | disjunction if disjunction else shown_one
"""

# Python's parser takes ``(a)`` in front of a colon for all that is annotated: so ``(a).b: int`` is no annotation.
# A field has no lambda of its own: its colon would begin the format.

PARAMETERS = """
K_parameters: K_all ','?
K_all: K_positional | K_starred | K_keyword | K_mapping
K_positional: K_plain | K_optional | K_later | K_later_optional
K_plain: K_one | K_plain ',' K_one
K_optional: K_default | K_plain ',' K_default | K_optional ',' K_default
K_later: K_plain ',' / | K_later ',' K_one
K_later_optional: K_optional ',' / | K_later ',' K_default | K_later_optional ',' K_default
K_starred: '*' K_rest | K_positional ',' '*' K_rest | K_starred ',' K_one | K_starred ',' K_default
K_bare: '*' | K_positional ',' '*'
K_keyword: K_bare ',' K_one | K_bare ',' K_default | K_keyword ',' K_one | K_keyword ',' K_default
K_mapping: '**' K_one | K_positional ',' '**' K_one | K_starred ',' '**' K_one | K_keyword ',' '**' K_one
K_default: K_one '=' expression
"""

ONE_PARAMETER = """
def_one: name | name ':' expression
def_rest: name | name ':' star_expression
lambda_one: name
lambda_rest: name
"""

GRAMMAR = "".join(
    [STATEMENTS, EXPRESSIONS, *(PARAMETERS.replace("K_", f"{kind}_") for kind in ("def", "lambda")), ONE_PARAMETER]
)

CONSTANTS = ("False", "None", "True")
# A word -> its token. Others are NAME; ``match``, ``case`` and ``_`` are names, too, as the grammar says.
WORDS = {word: word for word in (*keyword.kwlist, "match", "case", "_") if word not in CONSTANTS}
WORDS |= dict.fromkeys(CONSTANTS, "CONST") | {"barry_as_FLUFL": "FLUFL"}

OPERATORS = {op: op for op in ("...", "->", ":=", "**", *"()[]{},;:.=+-*@|~/")}
OPERATORS |= dict.fromkeys(("^", "&", "<<", ">>", "//", "%"), "BINARY")
OPERATORS |= dict.fromkeys(("==", "!=", "<", ">", "<=", ">="), "COMPARE")
OPERATORS |= {f"{op}=": "AUGMENTED" for op in ("+", "-", "*", "/", "//", "%", "@", "&", "|", "^", ">>", "<<", "**")}

# The shortest spelling of tokens that are not spelt as they are called.
SPELLINGS = {"NAME": "x", "REAL": "0", "IMAG": "0j", "TEXT": "''", "BYTES": "b''", "CONST": "None", "BINARY": "%"}
SPELLINGS |= {"COMPARE": "<", "AUGMENTED": "+=", "FLUFL": "barry_as_FLUFL", "NEWLINE": "\n", "INDENT": "", "DEDENT": ""}
SPELLINGS |= {"FIELD": "{", "FIELD_END": "}", "DEBUG": "=", "CONV": "!r", "SPEC": ":", "END": ""}

# What may be left out anywhere, and would let a text nest without limit: Python's parser has one.
NESTING = ("(", "[", "{", "FIELD", "FSTRING", "not", "+", "-", "~", "lambda", "if", "await", "yield")
