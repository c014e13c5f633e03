"""Recursion over nested lists, and dynamic programming. See `dsjax.data.tasks.operation` for the form of the tables."""

from __future__ import annotations

from dsjax.data.tasks.operation import operations

NESTED = operations(r"""
reverse_levels: nested -> nested
  - reverse the list and every list in it, at all levels
  =
      def reversed_levels(node):
          return [reversed_levels(x) if isinstance(x, list) else x for x in reversed(node)]

      $y = reversed_levels($x)

add_leaves: nested -> nested with k in 1, 2, 5, -3
  - add $k to every number at all levels
  =
      def increased(node):
          return [increased(x) if isinstance(x, list) else x + $k for x in node]

      $y = increased($x)

multiply_leaves: nested -> nested with k in 2, 3, -1
  - multiply every number at all levels by $k
  =
      def scaled(node):
          return [scaled(x) if isinstance(x, list) else x * $k for x in node]

      $y = scaled($x)

add_depth: nested -> nested
  - add to every number its depth, which is 1 for numbers in the outermost list
  =
      def deepened(node, depth):
          return [deepened(x, depth + 1) if isinstance(x, list) else x + depth for x in node]

      $y = deepened($x, 1)

even_leaves: nested -> nested
  - keep only the even numbers at all levels, and all lists
  =
      def even_only(node):
          return [even_only(x) if isinstance(x, list) else x for x in node if isinstance(x, list) or x % 2 == 0]

      $y = even_only($x)

positive_leaves: nested -> nested
  - keep only the positive numbers at all levels, and all lists
  =
      def positive_only(node):
          return [positive_only(x) if isinstance(x, list) else x for x in node if isinstance(x, list) or x > 0]

      $y = positive_only($x)

prune: nested -> nested
  - remove the lists at all levels that hold no number, not even deeper down; the outermost list stays
  =
      def pruned(node):
          parts = [pruned(x) if isinstance(x, list) else x for x in node]
          return [x for x in parts if x != []]

      $y = pruned($x)

sum_lists: nested -> nested
  - replace every list in the outermost list by the sum of all numbers in it at all levels
  =
      def total(node):
          return sum(total(x) if isinstance(x, list) else x for x in node)

      $y = [total(x) if isinstance(x, list) else x for x in $x]
""")

NESTED_RESULTS = operations(r"""
flatten: nested -> ints
  - list all numbers at all levels from left to right
  =
      def leaves(node):
          found = []
          for x in node:
              if isinstance(x, list):
                  found.extend(leaves(x))
              else:
                  found.append(x)
          return found

      $y = leaves($x)
  =
      $y = []
      waiting = $x[::-1]
      while waiting:
          item = waiting.pop()
          if isinstance(item, list):
              waiting.extend(item[::-1])
          else:
              $y.append(item)

depths: nested -> ints
  - list the depths of all numbers from left to right, where those in the outermost list have depth 1
  =
      def depths(node, depth):
          found = []
          for x in node:
              found += depths(x, depth + 1) if isinstance(x, list) else [depth]
          return found

      $y = depths($x, 1)

level_sums: nested -> ints
  - list for each depth, the outermost first, the sum of the numbers at that depth
  =
      $y = []
      level = $x
      while level:
          $y.append(sum(x for x in level if not isinstance(x, list)))
          level = [inner for x in level if isinstance(x, list) for inner in x]

tree_sum: nested -> int
  - add up the numbers at all levels
  =
      def total(node):
          return sum(total(x) if isinstance(x, list) else x for x in node)

      $y = total($x)

depth: nested -> int
  - find how deeply the lists are nested, 1 if no list is in the outermost one
  =
      def depth(node):
          return 1 + max((depth(x) for x in node if isinstance(x, list)), default=0)

      $y = depth($x)

weighted_sum: nested -> int
  - add up the numbers, each times its depth, which is 1 in the outermost list
  =
      def weighted(node, depth):
          return sum(weighted(x, depth + 1) if isinstance(x, list) else x * depth for x in node)

      $y = weighted($x, 1)

count_lists: nested -> int
  - count the lists at all levels, the outermost one included
  =
      def lists(node):
          return 1 + sum(lists(x) for x in node if isinstance(x, list))

      $y = lists($x)
""")

PROGRAMMES = operations(r"""
best_without_neighbours: ints -> int
  - find the largest sum of numbers of which no two are neighbours in the list (0 if it is best to take none)
  =
      $y = taken = 0
      for value in $x:
          $y, taken = max($y, taken), $y + value
      $y = max($y, taken)

best_with_gaps: ints -> int with n in 2, 3
  - find the largest sum of numbers of which any two have at least $n others between them (0 if it is best to
    take none)
  =
      best = [0] * ($n + 1)
      for value in $x:
          best.append(max(best[-1], best[-1 - $n] + value))
      $y = best[-1]

longest_increasing: ints -> int
  - find the length of the longest strictly increasing subsequence
  =
      lengths = []
      for i, value in enumerate($x):
          lengths.append(1 + max((lengths[j] for j in range(i) if $x[j] < value), default=0))
      $y = max(lengths, default=0)
  =
      import bisect
      tails = []
      for value in $x:
          at = bisect.bisect_left(tails, value)
          tails[at : at + 1] = [value]
      $y = len(tails)

longest_falling: ints -> int
  - find the length of the longest subsequence in which no number is larger than the one before it
  =
      lengths = []
      for i, value in enumerate($x):
          lengths.append(1 + max((lengths[j] for j in range(i) if $x[j] >= value), default=0))
      $y = max(lengths, default=0)

longest_chain: ints -> int with k in 1, 2, 3
  - find the length of the longest subsequence in which each number is $k more than the one before it
  =
      lengths = {}
      for value in $x:
          lengths[value] = max(lengths.get(value, 0), lengths.get(value - $k, 0) + 1)
      $y = max(lengths.values(), default=0)

longest_zigzag: ints -> int
  - find the length of the longest subsequence that goes up and down in turn
  =
      up = down = min(len($x), 1)
      for before, value in zip($x, $x[1:]):
          if value > before:
              up = down + 1
          elif value < before:
              down = up + 1
      $y = max(up, down)

best_slice: ints -> int
  - find the largest sum of neighbouring numbers (0 if it is best to take none)
  =
      $y = running = 0
      for value in $x:
          running = max(running + value, 0)
          $y = max($y, running)

ways_to_sum: ints -> int with t in 5, 6, 10
  - count the ways to choose numbers, by their places, so that they add up to $t
  =
      ways = {0: 1}
      for value in $x:
          more = dict(ways)
          for total, count in ways.items():
              more[total + value] = more.get(total + value, 0) + count
          ways = more
      $y = ways.get($t, 0)

fullest: ints -> int with c in 11, 17, 25
  - find the largest sum of at most $c that some of the positive numbers have, each used once at most
  =
      sums = {0}
      for value in $x:
          if value > 0:
              sums |= {total + value for total in sums if total + value <= $c}
      $y = max(sums)

cheapest_climb: ints -> int
  - find the smallest sum of the numbers stepped on, beginning before the first number and ending behind the
    last, with steps that go on by one place or by two
  =
      before = here = 0
      for value in $x:
          before, here = here, min(before, here) + value
      $y = min(before, here)

longest_palindrome: ints -> int
  - find the length of the longest subsequence that is the same from both ends
  =
      lengths = [0] * (len($x) + 1)
      for a in $x:
          row = lengths[:]
          for j, b in enumerate($x[::-1]):
              lengths[j + 1] = row[j] + 1 if a == b else max(row[j + 1], lengths[j])
      $y = lengths[-1]
""")
