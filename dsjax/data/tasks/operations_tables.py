"""Operations on dictionaries, on matrices and on pairs of lists.

See `dsjax.data.tasks.operation` for the form of the tables.
"""

from __future__ import annotations

from dsjax.data.tasks.operation import operations

COUNTS = operations(r"""
entries_above: counts -> counts with k in 0, 1, 2, 4
  - keep only the entries whose value is greater than $k
  = {n: v for n, v in $x.items() if v > $k}
  =
      $y = {}
      for name, value in $x.items():
          if value > $k:
              $y[name] = value

entries_below: counts -> counts with k in 2, 5, 9
  - keep only the entries whose value is less than $k
  = {n: v for n, v in $x.items() if v < $k}

even_entries: counts -> counts
  - keep only the entries whose value is even
  = {n: v for n, v in $x.items() if v % 2 == 0}

add_to_entries: counts -> counts with k in 1, 2, 5
  - add $k to every value
  = {n: v + $k for n, v in $x.items()}
  =
      $y = dict($x)
      for name in $y:
          $y[name] += $k

multiply_entries: counts -> counts with k in 2, 3, 10
  - multiply every value by $k
  = {n: v * $k for n, v in $x.items()}

square_entries: counts -> counts
  - square every value
  = {n: v * v for n, v in $x.items()}

halve_entries: counts -> counts
  - halve every value, rounding down
  = {n: v // 2 for n, v in $x.items()}

name_length: counts -> counts
  - add to every value the length of its key
  = {n: v + len(n) for n, v in $x.items()}

long_names: counts -> counts with n in 1, 2, 3
  - keep only the entries whose key has more than $n characters
  = {n: v for n, v in $x.items() if len(n) > $n}

names_without: counts -> counts with c in 'a', 'e', 'o'
  - remove the entries whose key holds $c
  = {n: v for n, v in $x.items() if $c not in n}

upper_names: counts -> counts
  - write every key in capital letters, adding up the values of keys that become equal
  =
      $y = {}
      for name, value in $x.items():
          $y[name.upper()] = $y.get(name.upper(), 0) + value

by_initial: counts -> counts
  - replace every key by its first character, adding up the values of keys that become equal (an empty key stays
    empty)
  =
      $y = {}
      for name, value in $x.items():
          $y[name[:1]] = $y.get(name[:1], 0) + value

top_entries: counts -> counts with n in 1, 2, 3
  - keep only the $n entries of the largest values, of equal values those whose keys come first in alphabetical
    order
  =
      order = sorted($x, key=lambda name: (-$x[name], name))
      $y = {name: $x[name] for name in order[:$n]}

without_smallest: counts -> counts
  - remove the entries that have the smallest of all values
  = {n: v for n, v in $x.items() if v > min($x.values())}
""")

COUNT_RESULTS = operations(r"""
total_value: counts -> int
  - add up the values
  = sum($x.values())

number_of_entries: counts -> int
  - count the entries
  = len($x)

largest_value: counts -> int
  - take the largest value (0 if there are no entries)
  = max($x.values(), default=0)

sorted_values: counts -> ints
  - list the values in ascending order
  = sorted($x.values())

values_by_name: counts -> ints
  - list the values in the alphabetical order of their keys
  = [$x[n] for n in sorted($x)]

names: counts -> words
  - list the keys in alphabetical order
  = sorted($x)

names_by_value: counts -> words
  - list the keys by their values, largest first, those of equal values in alphabetical order
  = sorted($x, key=lambda n: (-$x[n], n))

best_name: counts -> str
  - take the key of the largest value, the first in alphabetical order if there are several (an empty text if
    there are no entries)
  = min($x, key=lambda n: (-$x[n], n), default="")
""")

MATRICES = operations(r"""
transpose: matrix -> matrix
  - swap rows and columns
  - transpose the matrix
  = [list(column) for column in zip(*$x)]

reverse_rows: matrix -> matrix
  - put the rows in reverse order
  - turn the matrix upside down
  = $x[::-1]

mirror_rows: matrix -> matrix
  - reverse every row
  - mirror the matrix from left to right
  = [row[::-1] for row in $x]

turn: matrix -> matrix
  - turn the matrix clockwise by a quarter
  = [list(column) for column in zip(*$x[::-1])]

add_cells: matrix -> matrix with k in 1, 2, 5
  - add $k to every cell
  = [[v + $k for v in row] for row in $x]

multiply_cells: matrix -> matrix with k in 2, 3, -1
  - multiply every cell by $k
  = [[v * $k for v in row] for row in $x]

cut_negative: matrix -> matrix
  - replace negative cells by 0
  = [[max(v, 0) for v in row] for row in $x]

skip_row: matrix -> matrix
  - drop the first row
  = $x[1:]

skip_column: matrix -> matrix
  - drop the first column
  = [row[1:] for row in $x]

heavy_rows: matrix -> matrix with k in 0, 3, 6
  - keep only the rows whose sum is greater than $k
  = [row for row in $x if sum(row) > $k]

sort_rows: matrix -> matrix
  - sort every row in ascending order
  = [sorted(row) for row in $x]

order_rows: matrix -> matrix
  - put the rows in ascending order of their sums, rows of equal sums as they were
  = sorted($x, key=sum)

running_rows: matrix -> matrix
  - replace every cell by the sum of its row up to and including it
  = [[sum(row[: i + 1]) for i in range(len(row))] for row in $x]
""")

MATRIX_RESULTS = operations(r"""
row_sums: matrix -> ints
  - list the sums of the rows
  = [sum(row) for row in $x]
  = list(map(sum, $x))

column_sums: matrix -> ints
  - list the sums of the columns
  = [sum(column) for column in zip(*$x)]

row_maxima: matrix -> ints
  - list the largest cell of every row (0 for an empty row)
  = [max(row, default=0) for row in $x]

flatten_rows: matrix -> ints
  - list all cells, row by row
  = [v for row in $x for v in row]
  =
      $y = []
      for row in $x:
          $y.extend(row)

diagonal: matrix -> ints
  - list the cells of the diagonal that begins at the top left
  = [row[i] for i, row in enumerate($x) if i < len(row)]
""")

PAIRS = operations(r"""
sums: pair -> ints
  - add the lists number by number, up to the end of the shorter one
  = [a + b for a, b in zip($x, $z)]
  =
      $y = []
      for i in range(min(len($x), len($z))):
          $y.append($x[i] + $z[i])

products: pair -> ints
  - multiply the lists number by number, up to the end of the shorter one
  = [a * b for a, b in zip($x, $z)]

gaps: pair -> ints
  - subtract the second list from the first number by number, up to the end of the shorter one
  = [a - b for a, b in zip($x, $z)]

larger_ones: pair -> ints
  - take of each two numbers at the same place the larger one, up to the end of the shorter list
  = [max(a, b) for a, b in zip($x, $z)]

one_after_the_other: pair -> ints
  - append the second list to the first
  = $x + $z

interleave: pair -> ints
  - take numbers from both lists in turn, the first list first; when one ends, the rest of the other follows
  =
      $y = []
      for i in range(max(len($x), len($z))):
          $y += $x[i : i + 1] + $z[i : i + 1]

in_both: pair -> ints
  - keep the numbers of the first list that are in the second list, too
  = [v for v in $x if v in $z]
  = list(filter(lambda v: v in $z, $x))

only_in_first: pair -> ints
  - keep the numbers of the first list that are not in the second list
  = [v for v in $x if v not in $z]

merged: pair -> ints
  - put the numbers of both lists into one sorted list
  = sorted($x + $z)

matches: pair -> ints
  - list the places, counting from 0, at which both lists have the same number
  = [i for i, (a, b) in enumerate(zip($x, $z)) if a == b]
""")

PAIR_RESULTS = operations(r"""
dot: pair -> int
  - multiply the lists number by number, up to the end of the shorter one, and add up the products
  = sum(a * b for a, b in zip($x, $z))

common_front: pair -> int
  - count how many numbers at the front of both lists are the same
  =
      $y = 0
      while $y < min(len($x), len($z)) and $x[$y] == $z[$y]:
          $y += 1

longest_common_subsequence: pair -> int
  - find the length of the longest list that both lists contain in this order, not necessarily without gaps
  =
      lengths = [0] * (len($z) + 1)
      for a in $x:
          before = lengths[:]
          for j, b in enumerate($z):
              lengths[j + 1] = before[j] + 1 if a == b else max(before[j + 1], lengths[j])
      $y = lengths[-1]
""")
